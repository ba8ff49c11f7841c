"""Which input pixels a layer's output sees: in theory, from the operations alone, and in effect, from gradients.

The theory follows the tensors of one forward pass on the meta device, where nothing is computed, so it needs no knowledge of
module classes: functional calls, residual branches and hand-written arithmetic count like layers. What an output sees through
one branch is a rectangle with gaps, rows × columns, and each of the two is followed by itself; where branches meet, their
rectangles are kept apart, since a cross is not a square. For each image axis a tensor knows where its positions lie (`_Place`)
and what they see (`_Axis`); an operation is described by the input positions that each output position reads (`_Step`).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cifarlab.config import InputError, did_you_mean
from cifarlab.profile.counting import _tensors, bring_to, copy_to, dtype_of, home_of, random_states_kept


@dataclass(frozen=True)
class ReceptiveField:
    """What the outputs of one layer see of the image; every pair is (height, width), in input pixels.

    size: pixels from the first to the last that an output can depend on, on an image without borders: it may exceed the image.
    stride: distance between the fields of neighbouring outputs; a fraction after upsampling, 0 where all see the same.
    offset: first pixel of output 0's field; negative where the field begins in the padding. So output i sees the pixels from
    offset + i · stride, `size` of them. After upsampling outputs differ in phase: then `size` is the largest of the phases, and
    those pixels begin at offset + i · stride rounded down or up.
    Where branches of different strides meet, fields drift apart from output to output, and no one stride describes them: then
    stride is None, and size is that of the largest field on this map. `pixels` is exact there too.
    is_global: whether every output sees every pixel of this image.
    branches: bool pairs (outputs' rows × image rows, outputs' columns × image columns), a single row where all outputs see the
    same. Output (i, j) sees a pixel (y, x) if in some pair [i, y] and [j, x] are both true: borders and gaps are exact.
    unknown: operations that could not be followed. When there are any, size, stride and offset are None, branches empty.
    """

    size: tuple[int, int] | None
    stride: tuple[float, float] | None
    offset: tuple[int, int] | None
    is_global: bool
    unknown: tuple[str, ...] = ()
    branches: tuple[tuple[NDArray[np.bool_], NDArray[np.bool_]], ...] = field(default=(), repr=False, compare=False)

    def pixels(self, i: int, j: int) -> NDArray[np.bool_]:
        """bool, H×W: the pixels of this image that output (i, j) sees; none where its window lies on padding alone.

        Raises InputError for a field that is unknown.
        """
        if self.unknown:
            raise InputError(f"which pixels are seen is not known behind {', '.join(self.unknown)}")
        seen = [np.outer(rows[min(i, len(rows) - 1)], columns[min(j, len(columns) - 1)]) for rows, columns in self.branches]
        return np.logical_or.reduce(seen)  # type: ignore[no-any-return]

    @property
    def rows(self) -> NDArray[np.bool_]:
        """bool, outputs × image: the rows of this image that some output of each row of outputs sees; (0, 0) where unknown."""
        return self._lines(0)

    @property
    def columns(self) -> NDArray[np.bool_]:
        return self._lines(1)

    def _lines(self, axis: int) -> NDArray[np.bool_]:
        if not self.branches:
            return np.zeros((0, 0), bool)
        # A branch that is blind along the other axis sees nothing along this one either.
        return np.logical_or.reduce([pair[axis] & pair[1 - axis].any() for pair in self.branches])  # type: ignore[no-any-return]


def receptive_fields(module: nn.Module, input_shape: tuple[int, ...], *, inputs: Any = None) -> dict[str, ReceptiveField]:
    """The receptive field of each layer whose output has three or more axes, by dotted name, in order of execution.

    input_shape: (C, H, W). inputs: what to call the module with instead of one image of that shape, as for `profile`: a tuple
    holds all positional arguments, a dict those by keyword, a tensor or list is the only one; every tensor in it of shape
    (N, C, H, W) is an image. A layer is a leaf module, or a container that computes its output itself, as a residual block does
    with its addition. One called twice appears once, with its last call, at that place; one that has two names under the first.

    Measured in eval mode on a copy on the meta device, or on the module's own where it cannot run on meta; the module and all
    random states stay as they are. In eval mode batch norm looks at no neighbours; group, layer and instance norm measure the
    map itself, so whatever they normalise over becomes visible to every output, as it does through squeeze-and-excitation and
    attention.

    Exact for each position as the union over its channels and branches, for convolutions (strided, dilated, transposed),
    pooling, padding (circular too), interpolation, slices, reshapes, matrix products and everything element by element. A
    window that lies on padding alone, along either axis, sees nothing. `size` is of the bounding rectangle: of a cross, its
    square. Operations that are not followed are named in `unknown` from there on. More than 64 branches that see different
    pixels are merged into the rectangle that holds all; no usual net has a tenth of that.

    Raises InputError when the module does not run on this input.
    Source: Araujo, Norris and Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019. Ours differs in
    that operations, not layers, are followed, phases after upsampling are kept apart, and borders are exact too.
    """
    shape = _check_shape(input_shape)
    if inputs is None:
        inputs = torch.empty(1, *shape, dtype=dtype_of(module.parameters()), device="meta")
    home = home_of(module)
    with random_states_kept(home):
        try:
            return _walk(module, shape, inputs, torch.device("meta"))
        except _NotRunError as error:
            if home.type == "meta":
                raise
            try:  # a constant on another device, a look at values
                return _walk(module, shape, inputs, home)
            except _NotRunError as again:
                raise (again if isinstance(error.__cause__, NotImplementedError) else error) from again


def _walk(module: nn.Module, shape: tuple[int, int, int], inputs: Any, place: torch.device) -> dict[str, ReceptiveField]:
    given = bring_to(place, inputs if isinstance(inputs, tuple | dict) else (inputs,))
    images = _images(given, shape)
    tracer = _Tracer()
    for image in images:
        tracer.note(image, (_Place(2, 1, _Axis.of_image(shape[1])), _Place(3, 1, _Axis.of_image(shape[2]))))
    fields: dict[str, ReceptiveField] = {}

    def record(name: str, tensor: Tensor) -> None:
        if id(tensor) in tracer.tags:
            fields.pop(name, None)
            fields[name] = _describe(tracer.tags[id(tensor)])

    shadow = _watched_copy(module, record, place)
    with (_plain_words(shape), torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"),
          _CircularPads(tracer), tracer):  # fmt: skip
        shadow(**given) if isinstance(given, dict) else shadow(*given)
    return fields


def _images(given: Any, shape: tuple[int, int, int]) -> list[Tensor]:
    images = [a for a in tree_leaves(given) if isinstance(a, Tensor) and a.ndim == 4 and tuple(a.shape[1:]) == shape]
    if not images:
        raise InputError(f"no tensor of the inputs is a batch of images of shape {shape}: give one, or the shape that they have")
    return images


def _check_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    shape = tuple(shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"input_shape={shape} is not the shape of an image: give (channels, height, width), such as (3, 32, 32)")
    return shape[0], shape[1], shape[2]


def _first_map(output: Any) -> Tensor | None:
    return next((o for o in _tensors(output) if o.ndim >= 3), None)


def _watched_copy(module: nn.Module, record: Callable[[str, Tensor], None], place: torch.device) -> nn.Module:
    """A copy in eval mode that reports the first map of each leaf, and of each container that computed it itself."""
    shadow = copy_to(module, place).eval().requires_grad_(False)
    reported: dict[int, tuple[Tensor, int]] = {}  # the tensors are kept, so that no id is used twice

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            tensor = _first_map(output)
            if tensor is None:
                return
            _, version = reported.get(id(tensor), (tensor, -1))
            if version != tensor._version or next(module.children(), None) is None:  # in place, it is another value
                reported[id(tensor)] = tensor, tensor._version
                record(name, tensor)

        return hook

    for name, child in shadow.named_modules():
        child.register_forward_hook(watch(name))
    shadow.register_forward_pre_hook(lambda *_: reported.clear())
    return shadow


class _NotRunError(InputError):
    """The module fails on the input."""


@contextmanager
def _plain_words(shape: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _NotRunError(
            f"the module does not run on images of shape {shape}, give one that it was made for: {reason}"
        ) from error


# ---- what a tensor knows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """What the positions along an axis without ends see of one image axis, from the first pixel to the last.

    Position i sees pixels first(i) … last(i), and position i + period the same, `shift` pixels on. A phase that sees nothing
    (a transposed convolution can leave holes) has first ∞ and last −∞.
    """

    period: int
    shift: int
    firsts: tuple[float, ...]
    lasts: tuple[float, ...]

    @property
    def stride(self) -> Fraction:
        return Fraction(self.shift, self.period)

    def first(self, i: int) -> float:
        return self.firsts[i % self.period] + i // self.period * self.shift

    def last(self, i: int) -> float:
        return self.lasts[i % self.period] + i // self.period * self.shift

    def joined(self, other: "_Line") -> "_Line":
        """The union with a line of the same stride."""
        period = math.lcm(self.period, other.period)
        firsts = tuple(min(self.first(i), other.first(i)) for i in range(period))
        lasts = tuple(max(self.last(i), other.last(i)) for i in range(period))
        return _Line(period, int(self.stride * period), firsts, lasts)


@dataclass(frozen=True)
class _Axis:
    """What the positions along an axis see of one image axis.

    lines: without ends and in one stretch; one for each stride, of which all count. reach: branches × n × image, bool: exactly
    which pixels each of the n real positions sees through each branch; the other image axis has the same branches.
    """

    lines: tuple[_Line, ...]
    reach: NDArray[np.bool_]

    @staticmethod
    def of_image(n: int) -> "_Axis":
        return _Axis((_Line(1, 1, (0,), (0,)),), np.eye(n, dtype=bool)[None])

    @property
    def n(self) -> int:
        return int(self.reach.shape[1])

    def first(self, i: int) -> float:
        return min(line.first(i) for line in self.lines)

    def last(self, i: int) -> float:
        return max(line.last(i) for line in self.lines)

    def all_together(self, positions: Iterable[int] | None = None) -> "_Axis":
        """The one position that sees what all of these see (default: the real ones)."""
        chosen = list(range(self.n) if positions is None else positions)
        line = _Line(1, 0, (min(map(self.first, chosen)),), (max(map(self.last, chosen)),))
        return _Axis((line,), np.any(self.reach[:, chosen], axis=1, keepdims=True))


@dataclass(frozen=True)
class _Place:
    """Where an image axis lies in a tensor: position = index along `dim` // inner % n.

    inner is 1 unless axes were flattened into one. dim None: nowhere, all elements see the same.
    """

    dim: int | None
    inner: int
    axis: _Axis

    def moved(self, dim: int | None) -> "_Place":
        return replace(self, dim=dim)

    def together(self) -> "_Place":
        return _Place(None, 1, self.axis.all_together())


_Places = tuple[_Place, _Place]  # rows, columns
_Tag = _Places | frozenset[str]  # or the operations that were not understood on the way


class _Unclear(Exception):
    """An operation whose effect on the places cannot be said."""


@dataclass(frozen=True)
class _Step:
    """The positions that output j reads along an axis; taps(j + every) = taps(j) + jump.

    border: what a position beyond the ends stands for: nothing (zeros), or a real one.
    """

    taps: Callable[[int], Iterable[int]]
    every: int = 1
    jump: int = 1
    border: str = "zeros"

    def fold(self, i: int, n: int) -> int | None:
        if 0 <= i < n:
            return i
        if self.border == "clamp":
            return min(max(i, 0), n - 1)
        if self.border == "reflect":
            i = abs(i) % (2 * n - 2 or 1)
            return min(i, 2 * n - 2 - i)
        return i % n if self.border == "circular" else None

    def apply(self, axis: _Axis, n: int) -> _Axis:
        """What n outputs see."""
        reach = np.zeros((len(axis.reach), n, axis.reach.shape[2]), bool)
        for j in range(n):
            real = [i for i in (self.fold(tap, axis.n) for tap in self.taps(j)) if i is not None]
            reach[:, j] = axis.reach[:, real].any(1)
        return _Axis(_by_stride(map(self._carry, axis.lines)), reach)

    def _carry(self, line: _Line) -> _Line:
        turns = line.period // math.gcd(line.period, self.jump)
        phases = [list(self.taps(j)) for j in range(self.every * turns)]
        firsts = tuple(min(map(line.first, taps), default=math.inf) for taps in phases)
        lasts = tuple(max(map(line.last, taps), default=-math.inf) for taps in phases)
        return _Line(len(phases), line.shift * (self.jump * turns // line.period), firsts, lasts)


def _by_stride(lines: Iterable[_Line]) -> tuple[_Line, ...]:
    """The union of all, those of one stride in one."""
    united: dict[Fraction, _Line] = {}
    for line in lines:
        united[line.stride] = united[line.stride].joined(line) if line.stride in united else line
    return tuple(united.values())


def _describe(tag: _Tag) -> ReceptiveField:
    if isinstance(tag, frozenset):
        return ReceptiveField(None, None, None, False, tuple(sorted(tag)))
    (row_size, row_stride, row_offset), (column_size, column_stride, column_offset) = (_summarize(place.axis) for place in tag)
    branches = tuple(zip(*(place.axis.reach for place in tag), strict=True))
    stride = None if row_stride is None or column_stride is None else (row_stride, column_stride)
    return ReceptiveField((row_size, column_size), stride, (row_offset, column_offset), _is_global(tag), (), branches)


def _summarize(axis: _Axis) -> tuple[int, float | None, int]:
    """(size, stride, offset); stride None where none fits all positions."""
    stride: float | None
    if len(axis.lines) > 1:  # on this map they may be one line all the same
        seeing = [(axis.first(i), axis.last(i)) for i in range(axis.n) if axis.first(i) <= axis.last(i)]
        distances = {after[k] - before[k] for before, after in itertools.pairwise(seeing) for k in range(2)} or {0}
        stride = int(distances.pop()) if len(distances) == 1 and len(seeing) == axis.n else None
    else:
        (line,) = axis.lines
        seeing = [(first, last) for first, last in zip(line.firsts, line.lasts, strict=True) if first <= last]
        stride = line.stride.numerator if line.stride.denominator == 1 else float(line.stride)
    if not seeing:
        return 0, 0, 0
    return int(max(last - first + 1 for first, last in seeing)), stride, int(seeing[0][0])


def _is_global(tag: _Places) -> bool:
    """Whether every position sees every pixel of the image."""
    rows, columns = (place.axis.reach for place in tag)
    if (rows.all((1, 2)) & columns.all((1, 2))).any():  # by one branch alone
        return True
    if not (rows.any(0).all() and columns.any(0).all()):
        return False
    rows, columns = (np.unique(reach, axis=1) for reach in (rows, columns))  # most positions are alike by then
    return all((rows[:, i, :, None] & columns[:, j, None, :]).any(0).all()
               for i in range(rows.shape[1]) for j in range(columns.shape[1]))  # fmt: skip


# ---- following the tensors -----------------------------------------------------------------------------------------------------


class _Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives each tensor that depends on the image its places."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tags: dict[int, _Tag] = {}  # by id; the tensors are kept, so that no id is used twice
        self.memory: dict[int, list[Tensor]] = {}  # tensors that share a storage

    def note(self, tensor: Tensor, tag: _Tag | None) -> None:
        sharing = self.memory.setdefault(tensor.untyped_storage()._cdata, [])
        if not any(other is tensor for other in sharing):
            sharing.append(tensor)
        if tag is not None:
            self.tags[id(tensor)] = tag

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [o for o in tree_leaves(result) if isinstance(o, Tensor)]
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        tagged = {id(a): self.tags[id(a)] for a in tensors if id(a) in self.tags}
        before = [self.tags.get(id(o)) for o in outputs]
        tags = _follow(func, args, kwargs, tensors, tagged, outputs) if tagged else [None] * len(outputs)
        for output, tag, old in zip(outputs, tags, before, strict=True):
            self.note(output, tag)
            if tag is not old and any(output is a for a in tensors):  # written in place: those who share its memory see it
                for other in self.memory[output.untyped_storage()._cdata]:
                    if other is not output:
                        self.tags[id(other)] = frozenset({f"{_name(func)} into shared memory"})
        return result


class _CircularPads(TorchFunctionMode):
    """Circular padding is one step; torch builds it from copies into parts of an empty tensor, which cannot be followed."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ("pad", "_pad_circular"):
            given = dict(zip(("input", "pad", "mode"), args, strict=False)) | (kwargs or {})
            tag = self.tracer.tags.get(id(given["input"]))
            if given.get("mode") == "circular" and tag is not None and not isinstance(tag, frozenset):
                try:
                    tag = _pad("circular", given, tag, given["input"], [result])
                except _Unclear as error:
                    tag = frozenset({f"circular padding ({error})"})
                self.tracer.note(result, tag)
        return result


def _name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")


def _follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], tagged: Mapping[int, _Tag],
            outputs: list[Tensor]) -> list[_Tag | None]:  # fmt: skip
    unknown = frozenset[str]().union(*(tag for tag in tagged.values() if isinstance(tag, frozenset)))
    if unknown:
        return [unknown] * len(outputs)
    places = {key: tag for key, tag in tagged.items() if not isinstance(tag, frozenset)}
    name, rule = _name(func), _RULES.get(_name(func))
    declared = enumerate(func._schema.arguments)
    arguments = {a.name: args[k] if k < len(args) else kwargs.get(a.name, a.default_value) for k, a in declared}
    reason = name
    try:
        if torch.Tag.pointwise in func.tags or name in _ELEMENTWISE:
            aligned = [_broadcast(places[id(a)], a.shape, outputs[0].shape) for a in tensors if id(a) in places]
            return [_union(aligned)] * len(outputs)
        if rule is not None:
            return rule(name, arguments, places, outputs)
    except _Unclear as error:
        reason = f"{name} ({error})"
    except Exception as error:  # a use of the operation that its rule does not know must not end the walk
        reason = f"{name} ({type(error).__name__})"
    if all(map(_is_global, places.values())):  # seeing all, they stay so whatever is done
        return [_union([_together(tag) for tag in places.values()])] * len(outputs)
    return [frozenset({reason})] * len(outputs)


def _together(tag: _Places) -> _Places:
    return tag[0].together(), tag[1].together()


MOST_BRANCHES = 64


def _union(tags: list[_Places]) -> _Places:
    """What all of these see together: every branch of each, but for those that another one covers."""
    if len(tags) == 1:
        return tags[0]  # the very same object: an in-place ReLU changes nothing
    places = [_where([tag[k] for tag in tags]) for k in range(2)]
    lines = [_by_stride(line for tag in tags for line in tag[k].axis.lines) for k in range(2)]
    reaches: list[NDArray[np.bool_]] = []
    for k in range(2):  # a place nowhere has one row, for all
        spread = [tag[k].axis.reach for tag in tags]
        reaches.append(np.concatenate([np.broadcast_to(r, (len(r), places[k].axis.n, r.shape[2])) for r in spread]))
    kept = _uncovered(*reaches)
    reaches = [reach[kept] for reach in reaches]
    if len(kept) > MOST_BRANCHES:
        reaches = [np.any(reach, axis=0, keepdims=True) for reach in reaches]
    axes = [_Axis(lines[k], reaches[k]) for k in range(2)]
    for k, other in ((0, 1), (1, 0)):
        # Every output sees all of it: then all see the same, whichever branch brings what.
        if len(lines[k]) > 1 and np.any(reaches[k].all((1, 2)) & np.all(reaches[other].any(2), axis=1)):
            axes[k] = _Axis(axes[k].all_together().lines, axes[k].reach)
    return replace(places[0], axis=axes[0]), replace(places[1], axis=axes[1])


def _where(places: list[_Place]) -> _Place:
    """The place that all of these have, or that is nowhere."""
    there = [place for place in places if place.dim is not None] or places
    if len({(place.dim, place.inner, place.axis.n) for place in there}) > 1:
        raise _Unclear("one image axis on two axes")
    return there[0]


def _uncovered(rows: NDArray[np.bool_], columns: NDArray[np.bool_]) -> list[int]:
    """The branches of which no other sees as much at every position; one is left, though it may see nothing."""
    kept: list[int] = []
    largest_first = np.argsort(-(rows.sum((1, 2)) * columns.sum((1, 2))), kind="stable").tolist()
    for k in largest_first:
        is_covered = any((rows[k] <= rows[o]).all() and (columns[k] <= columns[o]).all() for o in kept)
        if not kept or not (is_covered or rows[k].sum() * columns[k].sum() == 0):
            kept.append(k)
    return sorted(kept)


def _broadcast(tag: _Places, shape: Iterable[int], new_shape: Iterable[int]) -> _Places:
    """The places in a tensor expanded to the new shape."""
    old, new = list(shape), list(new_shape)
    ahead = len(new) - len(old)
    if old == new:
        return tag

    def move(place: _Place) -> _Place:
        if place.dim is None:
            return place
        return place.moved(place.dim + ahead) if old[place.dim] == new[place.dim + ahead] else place.together()

    return move(tag[0]), move(tag[1])


def _renumber(tag: _Places, numbers: Callable[[int], int]) -> _Places:
    rows, columns = (place if place.dim is None else place.moved(numbers(place.dim)) for place in tag)
    return rows, columns


def _mix(tag: _Places, dims: Iterable[int]) -> _Places:
    """Every element sees what all along these dims see."""
    chosen = set(dims)
    rows, columns = (place.together() if place.dim in chosen else place for place in tag)
    return rows, columns


def _slide(tag: _Places, shape: Iterable[int], new_shape: Iterable[int], steps: Mapping[int, _Step]) -> _Places:
    """Steps along some dims, which keep their numbers."""
    old, new = list(shape), list(new_shape)

    def apply(place: _Place) -> _Place:
        if place.dim is None or place.dim not in steps:
            return place
        if place.inner != 1 or place.axis.n != old[place.dim]:
            raise _Unclear("along flattened axes")
        return _Place(place.dim, 1, steps[place.dim].apply(place.axis, new[place.dim]))

    return apply(tag[0]), apply(tag[1])


# ---- the operations ------------------------------------------------------------------------------------------------------------
# Each rule: (name, its arguments by name, places by id of a tensor, outputs) -> the tag of each output. `_Unclear` and a name
# without a rule end in `unknown`.

_Rule = Callable[[str, dict[str, Any], dict[int, _Places], list[Tensor]], list[_Tag | None]]

# Element by element, but without torch's tag that says so.
_ELEMENTWISE = {"clone", "_to_copy", "detach", "alias", "lift_fresh", "copy_", "native_dropout", "expand", "channel_shuffle",
                "native_channel_shuffle", "contiguous", "_unsafe_expand", "conj", "_conj"}  # fmt: skip


def _of_one(rule: Callable[[str, dict[str, Any], _Places, Tensor, list[Tensor]], _Places]) -> _Rule:
    """A rule for one tensor, `self` or `input`; all that depends on the image among the rest (a kernel, say) is seen by all."""

    def follow(name: str, arguments: dict[str, Any], places: dict[int, _Places], outputs: list[Tensor]) -> list[_Tag | None]:
        x = arguments["self"] if "self" in arguments else arguments["input"]
        tags = [_together(tag) for key, tag in places.items() if key != id(x)]
        if id(x) in places:
            tags.insert(0, rule(name, arguments, places[id(x)], x, outputs))
        return [_union(tags)] * len(outputs)

    return follow


def _pairwise(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _convolution(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    kernel = a["weight"].shape[2:]
    strides, paddings, dilations = (_pairwise(a[key], len(kernel)) for key in ("stride", "padding", "dilation"))
    window = _spread_window if a["transposed"] else _window
    steps = {2 + k: window(kernel[k], strides[k], paddings[k], dilations[k]) for k in range(len(kernel))}
    return _slide(_mix(tag, [1]), x.shape, outputs[0].shape, steps)


def _window(size: int, stride: int, padding: int, dilation: int = 1) -> _Step:
    return _Step(lambda j: range(j * stride - padding, j * stride - padding + (size - 1) * dilation + 1, dilation), 1, stride)


def _spread_window(size: int, stride: int, padding: int, dilation: int) -> _Step:
    """Transposed convolution: input i is written to outputs i · stride − padding + k · dilation."""

    def taps(j: int) -> Iterable[int]:
        ahead = (j + padding - k * dilation for k in range(size))
        return [distance // stride for distance in ahead if distance % stride == 0]

    return _Step(taps, stride, 1)


def _pool(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    count = int(name.partition("_pool")[2][0])
    sizes, paddings = (_pairwise(a[key], count) for key in ("kernel_size", "padding"))
    strides = _pairwise(a["stride"], count) if a["stride"] else sizes
    dilations = _pairwise(a.get("dilation", 1), count)
    begin = x.ndim - count
    steps = {begin + k: _window(sizes[k], strides[k], paddings[k], dilations[k]) for k in range(count)}
    return _slide(tag, x.shape, outputs[0].shape, steps)


def _adaptive_pool(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    def step(n: int, m: int) -> _Step:
        common = math.gcd(n, m)
        return _Step(lambda j: range(j * n // m, -(-(j + 1) * n // m)), m // common, n // common)

    new = outputs[0].shape
    return _slide(tag, x.shape, new, {d: step(x.shape[d], new[d]) for d in range(2, x.ndim)})


def _interpolate(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    new = outputs[0].shape
    begin = 2
    scales = a["scale_factors"] if "scale_factors" in a else [a[k] for k in ("scales_h", "scales_w", "scales") if k in a]
    reach = 2 if "cubic" in name else 1

    def step(d: int) -> _Step:
        n, m = x.shape[d], new[d]
        scale = scales[d - begin] if scales else None
        # A factor such as 1.7 is used as it is, though it does not divide the sizes.
        ratio = Fraction(n, m) if not scale or scale * n == m else 1 / Fraction(scale).limit_denominator(1000)
        shift = Fraction(0)
        if a.get("align_corners"):
            ratio = Fraction(n - 1, m - 1) if m > 1 else Fraction(0)
        elif "nearest" not in name or "exact" in name:
            shift = Fraction(1, 2)

        def taps(j: int) -> Iterable[int]:
            if "nearest" in name:
                return [math.floor((j + shift) * ratio)]
            at = (j + shift) * ratio - shift
            low = math.floor(at)
            return [low] if at == low else range(low - reach + 1, low + reach + 1)  # a weight of 0 sees nothing

        if ratio == 0:
            return _Step(lambda j: [0], 1, 0, "clamp")
        return _Step(taps, ratio.denominator, ratio.numerator, "clamp")

    return _slide(tag, x.shape, new, {d: step(d) for d in range(begin, x.ndim)})


def _pad(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    border = {"reflection": "reflect", "replication": "clamp", "circular": "circular"}.get(name.partition("_")[0], "zeros")
    amounts = a["pad"] if "pad" in a else a["padding"]
    steps = {x.ndim - 1 - k: _shift(amounts[2 * k], border) for k in range(len(amounts) // 2)}
    return _slide(tag, x.shape, outputs[0].shape, steps)


def _shift(amount: int, border: str = "zeros") -> _Step:
    return _Step(lambda j: [j - amount], border=border)


def _roll(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    if not a["dims"]:
        raise _Unclear("of the flattened tensor")
    dims, shifts = (_pairwise(a[key], 1) for key in ("dims", "shifts"))
    steps = {d % x.ndim: _shift(shift, "circular") for d, shift in zip(dims, shifts, strict=True)}
    return _slide(tag, x.shape, x.shape, steps)


def _flip(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    return _slide(tag, x.shape, x.shape, {d % x.ndim: _mirror(x.shape[d]) for d in a["dims"]})


def _mirror(n: int) -> _Step:
    return _Step(lambda j: [n - 1 - j], 1, -1)


def _pixel_shuffle(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    if name == "pixel_unshuffle":
        step = _window(a["downscale_factor"], a["downscale_factor"], 0)
    else:
        factor = a["upscale_factor"]
        step = _Step(lambda j: [j // factor], factor, 1)
    return _slide(_mix(tag, [x.ndim - 3]), x.shape, outputs[0].shape, {x.ndim - 2: step, x.ndim - 1: step})


def _normalize(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    if "batch_norm" in name:
        return _mix(tag, [d for d in range(x.ndim) if d != 1]) if a.get("training") else tag
    if "group_norm" in name:
        return _mix(tag, range(1, x.ndim))
    if "normalized_shape" in a:
        return _mix(tag, range(x.ndim - len(a["normalized_shape"]), x.ndim))
    return _mix(tag, [a["dim"] % x.ndim])  # softmax


def _reduce(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    dims = a.get("dim")
    gone = {d % x.ndim for d in ([dims] if isinstance(dims, int) else dims or range(x.ndim))}
    tag = _mix(tag, gone)
    return tag if a.get("keepdim") else _renumber(tag, lambda d: d - sum(g < d for g in gone))


def _view(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    """Axes merged or split: an image axis is a digit of the running index, and is looked for in the new shape."""
    old, new = list(x.shape), list(outputs[0].shape)

    def find(place: _Place) -> _Place:
        if place.dim is None or old == new:
            return place
        if place.axis.n == 1:
            return place.together()
        unit = place.inner * math.prod(old[place.dim + 1 :])
        for d in range(len(new)):
            below = math.prod(new[d + 1 :])
            if unit % below == 0 and (below * new[d]) % (unit * place.axis.n) == 0:
                return _Place(d, unit // below, place.axis)
        raise _Unclear("splits an image axis")

    return find(tag[0]), find(tag[1])


def _permute(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    order = list(range(x.ndim))
    if name == "permute":
        order = [d % x.ndim for d in a["dims"]]
    elif x.ndim > 1:
        i, j = (a["dim0"], a["dim1"]) if name == "transpose" else (0, 1)
        order[i], order[j] = order[j], order[i]
    return _renumber(tag, order.index)


def _repeat(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    tag = _renumber(tag, lambda d: d + len(a["repeats"]) - x.ndim)
    if any(place.dim is not None and a["repeats"][place.dim] > 1 for place in tag):
        raise _Unclear("along an image axis")
    return tag


def _slice(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    dim = a["dim"] % x.ndim
    if outputs[0].shape[dim] == x.shape[dim]:
        return tag
    start, _, step = slice(a["start"], a["end"], a["step"]).indices(x.shape[dim])
    return _slide(tag, x.shape, outputs[0].shape, {dim: _Step(lambda j: [start + j * step], 1, step)})


def _pick(tag: _Places, x: Tensor, dim: int, index: int) -> _Places:
    """One position along dim, which goes."""

    def pick(place: _Place) -> _Place:
        if place.dim != dim:
            return place
        if place.inner != 1 or place.axis.n != x.shape[dim]:
            raise _Unclear("along flattened axes")
        return _Place(None, 1, place.axis.all_together([index % place.axis.n]))

    return _renumber((pick(tag[0]), pick(tag[1])), lambda d: d - (d > dim))


def _select(name: str, a: dict[str, Any], tag: _Places, x: Tensor, outputs: list[Tensor]) -> _Places:
    return _pick(tag, x, a["dim"] % x.ndim, a["index"])


def _split(name: str, a: dict[str, Any], places: dict[int, _Places], outputs: list[Tensor]) -> list[_Tag | None]:
    x = a["self"]
    tag, dim = places[id(x)], a["dim"] % x.ndim
    if name == "unbind":
        return [_pick(tag, x, dim, k) for k in range(len(outputs))]
    starts = np.cumsum([0] + [o.shape[dim] for o in outputs]).tolist()
    return [_slide(tag, x.shape, o.shape, {dim: _shift(-start)}) for o, start in zip(outputs, starts, strict=False)]


def _concatenate(name: str, a: dict[str, Any], places: dict[int, _Places], outputs: list[Tensor]) -> list[_Tag | None]:
    dim = a["dim"] % outputs[0].ndim
    tags = [places[id(t)] for t in a["tensors"] if id(t) in places]
    if name == "stack":
        tags = [_renumber(tag, lambda d: d + (d >= dim)) for tag in tags]
    elif len(a["tensors"]) > 1 and any(place.dim == dim for tag in tags for place in tag):
        raise _Unclear("along an image axis")
    return [_union(tags)]


def _matmul(name: str, a: dict[str, Any], places: dict[int, _Places], outputs: list[Tensor]) -> list[_Tag | None]:
    left, right = next((a[i], a[j]) for i, j in (("mat1", "mat2"), ("batch1", "batch2"), ("self", "mat2")) if i in a)
    tags = []
    for factor, summed in ((left, left.ndim - 1), (right, right.ndim - 2)):
        if id(factor) in places:
            tags.append(_mix(places[id(factor)], [summed]))
    bias = a.get("self")
    if bias is not left and id(bias) in places and isinstance(bias, Tensor):
        tags.append(_broadcast(places[id(bias)], bias.shape, outputs[0].shape))
    for k in range(2):
        if len({tag[k].dim for tag in tags} - {None}) > 1:  # attention's scores: query position × key position
            tags = [(tag[0].together(), tag[1]) if k == 0 else (tag[0], tag[1].together()) for tag in tags]
    return [_union(tags)]


def _attention(name: str, a: dict[str, Any], places: dict[int, _Places], outputs: list[Tensor]) -> list[_Tag | None]:
    summed = {"query": a["query"].ndim - 1, "key": a["key"].ndim - 2, "value": a["value"].ndim - 2}
    tags = [_mix(places[id(a[key])], [dim]) for key, dim in summed.items() if id(a[key]) in places]
    return [_union(tags)] * len(outputs)


def _nothing(name: str, a: dict[str, Any], places: dict[int, _Places], outputs: list[Tensor]) -> list[_Tag | None]:
    return [None] * len(outputs)


_RULES: dict[str, _Rule] = {
    "convolution": _of_one(_convolution),
    **dict.fromkeys((f"{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)), _of_one(_pool)),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), _of_one(_pool)),
    **dict.fromkeys(("_adaptive_avg_pool2d", "adaptive_max_pool2d"), _of_one(_adaptive_pool)),
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
                     "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d"), _of_one(_interpolate)),
    **dict.fromkeys(("constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d"),
                    _of_one(_pad)),
    "roll": _of_one(_roll),
    "flip": _of_one(_flip),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _of_one(_pixel_shuffle)),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
                     "cudnn_batch_norm", "native_group_norm", "native_layer_norm", "_fused_rms_norm", "_softmax",
                     "_log_softmax"), _of_one(_normalize)),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "logsumexp",
                     "linalg_vector_norm", "argmax", "argmin"), _of_one(_reduce)),
    **dict.fromkeys(("view", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze"), _of_one(_view)),
    **dict.fromkeys(("permute", "transpose", "t"), _of_one(_permute)),
    "repeat": _of_one(_repeat),
    "slice": _of_one(_slice),
    "select": _of_one(_select),
    **dict.fromkeys(("split", "split_with_sizes", "unbind"), _split),
    **dict.fromkeys(("cat", "stack"), _concatenate),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _matmul),
    **dict.fromkeys((f"_scaled_dot_product_{kind}" for kind in (
        "flash_attention", "flash_attention_for_cpu", "efficient_attention", "fused_attention_overrideable",
        "attention_math")), _attention),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "new_zeros",
                     "new_ones", "new_empty", "new_empty_strided", "new_full"), _nothing),
}  # fmt: skip


# ---- in effect -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ERF:
    """The effective receptive field of a layer's centre output, and its size in pixels.

    array: float64, H×W: share of the gradient that falls on each pixel; sums to 1.
    mass_side: side of the smallest square, anywhere in the image, that holds 95 % of it (cut off at the borders of the image).
    core_side: √(number of pixels above 4.55 % of the largest), the size that Luo et al. use.
    """

    layer: str
    array: NDArray[np.float64]
    mass_side: int
    core_side: float


def effective_receptive_field(module: nn.Module, images: Tensor | tuple[int, ...], layer: str | None = None, *,
                              inputs: Any = None, num_images: int = 16, seed: int = 0) -> ERF:  # fmt: skip
    """|∂ Σ_c y[c, centre] / ∂ image|, averaged over images and image channels, for the output y of one layer.

    images: N×C×H×W, normalised as for the module; or a shape (C, H, W), for `num_images` images of standard normal noise drawn
    from `seed`. inputs: what to call the module with instead, as for `receptive_fields`; then `images` is a shape. layer: dotted
    name of a module with an output N×C×h×w (default: the last that is larger than 1×1). The centre is row h // 2, column
    w // 2. Costs a forward and a backward pass of each image, on a copy in eval mode on the module's device; module and random
    generators are not touched.

    Raises InputError for a layer that is not there or has no map, and when no gradient arrives.
    Source: Luo et al. 2016, arXiv:1701.04128. Ours differs in that output channels are summed before the gradient is
    taken, and that the size is also given as the square of 95 % of the mass.
    """
    home = home_of(module)
    if home.type == "meta":
        raise InputError("an effective receptive field needs weights, and this module has none on the meta device: move it first")
    centres: dict[str, Tensor] = {}

    def record(name: str, tensor: Tensor) -> None:
        if tensor.ndim == 4 and (name == layer or (layer is None and max(tensor.shape[2:]) > 1)):
            centres.pop(name, None)
            # Read at once: an in-place ReLU behind the layer would change it.
            centres[name] = tensor[:, :, tensor.shape[2] // 2, tensor.shape[3] // 2].sum()

    shadow = _watched_copy(module, record, home)
    names = [name for name, _ in shadow.named_modules()]
    if layer is not None and layer not in names:
        remedy = did_you_mean(layer, names) or ": give the dotted name of one"
        raise InputError(f"layer {layer!r} is not a module of this model{remedy}")
    with (random_states_kept(home), torch.inference_mode(False), torch.enable_grad(),
          torch.compiler.set_stance("force_eager")):  # fmt: skip
        if inputs is not None:
            torch.manual_seed(seed)
            shape = _check_shape(tuple(images.shape[1:]) if isinstance(images, Tensor) else images)
            batches = [bring_to(home, inputs if isinstance(inputs, tuple | dict) else (inputs,))]
        else:
            if not isinstance(images, Tensor):
                images = torch.randn(num_images, *_check_shape(images), generator=torch.Generator().manual_seed(seed))
            if images.ndim != 4 or not len(images):
                told = f"images of shape {tuple(images.shape)} cannot be used"
                raise InputError(f"{told}: give a batch N×C×H×W, or a shape (C, H, W)")
            shape = _check_shape(tuple(images.shape[1:]))
            batches = [(part.detach().to(home, dtype_of(module.parameters()), copy=True),) for part in torch.split(images, 16)]
        total = torch.zeros(shape[1:], dtype=torch.float64, device=home)
        for given in batches:
            centres.clear()
            pixels = [image.requires_grad_() for image in _images(given, shape)]
            given = tree_map_only(Tensor, lambda tensor: tensor.clone(), given)  # copies, since the module may begin in place
            with _plain_words(shape):
                shadow(**given) if isinstance(given, dict) else shadow(*given)
            if not centres:
                told = f"layer {layer!r} was not called or gives no map N×C×h×w: name another"
                raise InputError(told if layer else "no layer gives a map N×C×h×w larger than 1×1, so none has a centre")
            name, centre = next(reversed(centres.items()))
            gradients = torch.autograd.grad(centre, pixels, allow_unused=True) if centre.requires_grad else ()
            for gradient in gradients:
                total += 0 if gradient is None else gradient.double().abs().sum((0, 1))
    array = total.cpu().numpy()
    if not (np.isfinite(array).all() and array.any()):
        raise InputError(f"no finite gradient of layer {name!r} reaches the image: name another layer, or give other images")
    array = array / array.sum()
    return ERF(name, array, _mass_side(array, 0.95), math.sqrt((array > 0.0455 * array.max()).sum()))


def _mass_side(array: NDArray[np.float64], share: float) -> int:
    height, width = map(int, array.shape)
    sums: NDArray[np.float64] = np.pad(array, ((1, 0), (1, 0))).cumsum(0).cumsum(1)  # summed-area table
    for side in range(1, max(height, width)):
        h, w = min(side, height), min(side, width)
        inside = sums[h:, w:] - sums[:-h, w:] - sums[h:, :-w] + sums[:-h, :-w]
        if float(inside.max()) >= share:
            return side
    return max(height, width)
