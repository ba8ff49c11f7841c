"""The probes at work in one training: told of each step's moments, read once per flush.

    panel.before_clip()          gradients are complete and true (only where something clips them)
    panel.before_update(step)    gradients are what the optimizer gets; the weights have not moved
    panel.after_update(step)     the weights have moved; the gradients are still there
    panel.read()                 all measured since the last call, by one copy from the device

`train` calls these itself; `watch` ties them to the hooks of anybody's optimizer. A probe that fails is switched off, and said
once: no measurement ends a training.
"""

import fnmatch
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from cifarlab.config import InputError
from cifarlab.distributed import autocast_to
from cifarlab.probes import activations, batch_norm, curvature, distributions, gradient_flow, noise, update_flow, weight_flow
from cifarlab.probes.curvature import measure_curvature
from cifarlab.probes.fixed_batch import FixedBatch, measuring, unwrap
from cifarlab.probes.gpu_passes import is_capturing
from cifarlab.probes.incident import WeightsBeforeBad
from cifarlab.probes.listener import Listener
from cifarlab.probes.moments import Moments
from cifarlab.probes.moments_torch import ABS_MAX, ABS_SUM, NON_FINITE, SQUARE_SUM, SUM, dense
from cifarlab.probes.noise import GradientMemory, measure_noise
from cifarlab.records import Measured, Reading, round_as_stored

COLUMNS = {
    module.__name__.rpartition(".")[2]: module.COLUMNS
    for module in (gradient_flow, weight_flow, update_flow, activations, batch_norm, distributions, curvature, noise)
}
LISTENERS: dict[str, type[Listener]] = {"activations": activations.Activations, "batch_norm": batch_norm.NormStatistics}

_VERSION = attrgetter("_version")
LOOKS_AT_ALL, LOOK_AT = 8, 61  # steps in which all weights are looked at for writers that torch does not count; then one in 61
OFTEN = 3  # times that weights were written by others, after which they are copied before each step


@dataclass
class _Step:
    """One step's moments on the device, (parameters, 6) each."""

    step: int
    numels: NDArray[np.int64]
    is_due: bool
    gradients: Tensor | None = None
    clipped: Tensor | None = None
    is_bad: Tensor | None = None  # 0-d, where it is not known at once: whether a gradient is not finite
    weights: Tensor | None = None
    updates: Tensor | None = None
    scale: Tensor | None = None  # that the gradients still carry
    gradient_bins: Tensor | None = None  # (parameters, 512), of a due step


class Panel:
    """Chosen probes over chosen parameters; `names` are those at work, `lost` those that failed, with the reason.

    Parameters that are moved, cast or replaced under their names (`model.to`, pruning) are followed as they are then.

    parameters: by name, in the order of the network, frozen ones too (of which only weights are measured).
    names: of PROBES. every: steps between two measurements of those that do not measure each step; the first step and
    `last_step` (when it is known) are always measured.
    images: what the probes of a fixed batch run the network on, and dtype: the autocast that the training does it in (None: in
    none); batch: the same with labels, for those that need a loss, which is computed without autocast. All are functions, for
    they may be known late, and None where there is nothing. optimizer: whose edge curvature is held against.
    left_out: further weights of the optimizer, of which nothing is measured. Only their gradients are looked at for NaN and Inf,
    which would break the measured ones a step later.
    weights_are_ours: nobody but the optimizer writes weights between two steps, so that it need not be looked for.
    on_non_finite: called with a step whose gradients are not finite: before its update where that is known without waiting (on a
    CPU), else by `read` with `is_late=True`, while the model holds the weights of before that update once more.
    rests: the optimizer is one of several, and need not step each time: what was due meanwhile is measured when it steps again.
    say: called with a line for people.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        names: Iterable[str],
        *,
        every: int,
        last_step: int = 0,
        images: Callable[[], Tensor | None] = lambda: None,
        dtype: Callable[[], torch.dtype | None] = lambda: None,
        batch: Callable[[], FixedBatch | None] = lambda: None,
        optimizer: Optimizer | None = None,
        left_out: Sequence[Tensor] = (),
        weights_are_ours: bool = False,
        on_non_finite: Callable[..., None] | None = None,
        rests: bool = False,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    ) -> None:
        self.names = frozenset(names) if parameters else frozenset()
        self.lost: dict[str, str] = {}
        self._say, self._rests, self._last = say, rests, 0  # the last step of this optimizer
        self._model, self._every, self._last_step = unwrap(model), every, last_step
        self._images, self._dtype, self._batch, self._optimizer = images, dtype, batch, optimizer
        self.items = tuple(parameters)
        self._weights = list(parameters.values())
        self._moments = Moments(self._weights)
        self._left_out = list(left_out) if on_non_finite is not None else []
        self._moments_left_out = Moments(self._left_out)
        self._ours = weights_are_ours
        self._old: list[Tensor] | None = None
        self._left: tuple[list[int], list[int]] | None = None  # the marks of the weights, when `_old` was made the same
        self._looks = self._times_written = 0  # by somebody else than the optimizer, as far as seen
        self._on_non_finite = on_non_finite
        self._before_bad: WeightsBeforeBad | None = None
        self._current: _Step | None = None
        self._pending: list[_Step] = []
        self._dear: dict[str, tuple[tuple[str, ...], tuple[str, ...], list[int], list[Tensor]]] = {}
        self._items_of: dict[str, tuple[str, ...]] = {}  # of the dear ones: of a table they must stay the same
        self._memory = GradientMemory()
        self._cosine: Tensor | None = None
        self._unclipped: Tensor | None = None
        self._has_told_of_graph = False
        self.seconds = 0.0
        self._events: list[tuple[Any, Any]] = []  # of a GPU, whose time is known later

    @property
    def _device(self) -> torch.device:
        return (self._moments if self.items else self._moments_left_out).device

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"

    @property
    def _needs_gradients(self) -> bool:
        return bool(self.items) and ("gradient_flow" in self.names or self._on_non_finite is not None)

    @property
    def _knows_at_once(self) -> bool:
        """What was just measured: elsewhere than on a CPU, to look at it is to wait for the device."""
        return self._device.type == "cpu"

    # ---- the moments of a step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_clip(self) -> None:
        if "gradient_flow" in self.names and not is_capturing(self._device):
            with self._clock(), self._guard("gradient_flow"):
                self._follow()
                self._unclipped = self._moments.of([w.grad for w in self._weights])

    @torch.no_grad()
    def before_update(self, step: int, scale: Tensor | None = None) -> None:
        """scale: what the gradients must be divided by to be true, where the optimizer itself undoes a loss scaling."""
        if not self.names and not self._left_out:
            return
        if is_capturing(self._device):  # without a current step nothing is measured behind the update either
            if not self._has_told_of_graph:
                self._say("cifarlab: a step that is captured in a CUDA graph is not measured, nor are its replays")
                self._has_told_of_graph = True
            return
        with self._clock():
            self._see_gradients(step, scale)

    def _see_gradients(self, step: int, scale: Tensor | None) -> None:
        self._follow()
        is_due, self._last = self._is_due(step), step
        current = self._current = _Step(step, self._moments.numels, is_due, scale=scale)
        copying = None
        if "update_flow" in self.names or ("distributions" in self.names and is_due):
            with self._guard("update_flow", "distributions"):
                copying = self._weights_to_copy(exactly=is_due)
        if self._needs_gradients:
            with self._guard("gradient_flow"):
                current.clipped = self._moments.of([w.grad for w in self._weights], copying)
                copying = None
                current.gradients = current.clipped if self._unclipped is None else self._unclipped
            self._unclipped = None
        if copying is not None:
            with self._guard("update_flow", "distributions"):
                self._moments.copy(*copying)
        if "distributions" in self.names and is_due:  # now, as a fused optimizer divides the gradients by the scale
            with self._guard("distributions"):
                gradients = [w.grad if scale is None or w.grad is None else w.grad / scale for w in self._weights]
                current.gradient_bins = self._moments.exponents(gradients)
        if "noise" in self.names:
            with self._guard("noise"):
                self._compare_gradients(step, is_due)
        if self._on_non_finite is not None:
            with self._guard("incidents"):
                self._look_for_bad(current, self._on_non_finite)

    def _look_for_bad(self, current: _Step, on_non_finite: Callable[..., None]) -> None:
        measured = [] if current.clipped is None else [(self._moments, current.clipped)]
        if self._left_out:
            measured.append((self._moments_left_out, self._moments_left_out.of([w.grad for w in self._left_out])))
        if self._knows_at_once:
            if not all(moments.is_finite(of_gradients) for moments, of_gradients in measured):
                on_non_finite(current.step)
        elif current.scale is None and measured:  # else a scaler sees to it
            is_bad = [(of_gradients[:, NON_FINITE] > 0).any() for _, of_gradients in measured]
            current.is_bad = is_bad[0] if len(is_bad) == 1 else torch.stack(is_bad).any()
            self._before_bad = self._before_bad or WeightsBeforeBad(self._model)
            self._before_bad.see(current.is_bad)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        current = self._current
        if current is None:
            return
        self._current = None
        with self._clock():
            if self._follow():  # within the step: who knows how they moved
                current.weights = current.updates = torch.full((len(self.items), 6), torch.nan, device=self._moments.device)
                current.gradient_bins = None
            if current.gradient_bins is not None and "distributions" in self.names:
                with self._guard("distributions"):
                    self._measure_distributions(step, current.gradient_bins)
            if "update_flow" in self.names and self._old is not None:
                with self._guard("update_flow"):
                    current.weights, current.updates = self._moments.of_weights(self._weights, self._old, keeps=self._keeps)
                    self._left = self._marks() if self._keeps and not self._ours else None
            if "weight_flow" in self.names and current.weights is None:
                with self._guard("weight_flow"):
                    current.weights = self._moments.of(self._weights)
            self._pending.append(current)
            if current.is_due:
                self._measure_dear(step)

    def _follow(self) -> bool:
        """Whether weights were moved, cast or replaced since the last look; if so, all that was laid out for them is anew."""
        if not self._moments_left_out.fits(self._left_out):
            self._moments_left_out = Moments(self._left_out)
        if self._moments.fits(self._weights):
            return False
        was, self._moments = self._moments.numels, Moments(self._weights)
        self._old = self._unclipped = None
        self._memory.forget()
        other = np.flatnonzero(was != self._moments.numels)
        if other.size:
            named = ", ".join(self.items[k] for k in other[:3]) + (" …" if other.size > 3 else "")
            self._say(f"cifarlab: the size of {named} has changed: it is measured as it is now")
        return True

    def _weights_to_copy(self, *, exactly: bool) -> tuple[list[Tensor], list[Tensor]] | None:
        """(weights, room for them as they were), where that does not hold them already, from behind the last step.

        exactly: each in its weight's own memory order, which the fast copies do not care for.
        """
        if self._old is None or (exactly and any(o.stride() != dense(w).stride()
                                                 for o, w in zip(self._old, self._weights, strict=True))):  # fmt: skip
            self._old = self._moments.copies(self._weights)
            return None
        if self._keeps and "update_flow" in self.names and (self._ours or not self._was_written(exactly)):
            return None
        return self._weights, self._old

    @property
    def _keeps(self) -> bool:
        """Whether the pass behind a step leaves the weights in `_old` for the next, which moves less than a copy before it.

        In somebody else's loop as long as weights were found as a step left them.
        """
        return self._ours or (self._moments.is_compiled and self._times_written < OFTEN)

    def _marks(self) -> tuple[list[int], list[int]]:
        """How often torch has written each weight (of one of inference mode it does not count: 0 times), and where it lies."""
        try:
            versions = list(map(_VERSION, self._weights))
        except RuntimeError:
            versions = [0 if w.is_inference() else w._version for w in self._weights]
        return versions, list(map(Tensor.data_ptr, self._weights))

    def _was_written(self, exactly: bool) -> bool:
        """Whether anybody has written weights since the last step, so that `_old` is not what they are.

        torch counts what most of its operations write, but not fused optimizers, nor what goes through `.data`, numpy's or
        another library's view. So all weights are looked at in the first steps and where it is to be `exactly` known; else
        the small tensors, and one strip of 256 entries in LOOK_AT of the others, in no order that a layer or a loop could have.
        Who is found out so is not trusted again.
        """
        assert self._old is not None
        self._looks += 1
        if self._left != self._marks():
            self._times_written += 1
            return True
        every = 1 if exactly or self._looks <= LOOKS_AT_ALL else LOOK_AT
        if self._moments.differ(self._weights, self._old, (self._looks * 0x9E3779B1 >> 7) % every, every):
            self._times_written = OFTEN
            return True
        return False

    # ---- a probe that fails ----------------------------------------------------------------------------------------------

    def _guard(self, *names: str) -> "_Guard":
        """Whatever a probe's own measuring raises switches off those probes: it must not end somebody's training."""
        return _Guard(self, names)

    def _lose(self, names: Iterable[str], error: Exception) -> None:
        lost = [name for name in names if name in self.names or (name == "incidents" and self._on_non_finite)]
        if "gradient_flow" in names or "incidents" in names:
            self._on_non_finite = None
        self.names -= frozenset(names)
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.lost |= dict.fromkeys(lost, why)
        if lost:
            self._say(f"cifarlab: {' and '.join(lost)} could not be measured, and will not be any more ({why}); "
                      "the training goes on")  # fmt: skip

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def read(self) -> Reading:
        """Everything since the last call; the only place where the device is waited for."""
        reading, begun = Reading(), time.perf_counter()
        pending, self._pending = self._pending, []
        if pending:
            with self._guard("gradient_flow", "weight_flow", "update_flow"):
                self._read_flows(reading, pending)
        if self._before_bad is not None and self._on_non_finite is not None:
            with self._guard("incidents"):
                self._tell_late(self._before_bad, pending)
        dear, self._dear = self._dear, {}
        for name, (items, columns, due_steps, tensors) in dear.items():
            with self._guard(name):
                values = torch.stack(_together(tensors)).cpu().double().numpy()
                reading.tables.append(Measured(name, items, columns, np.array(due_steps, np.int64), values))
        events, self._events = self._events, []
        if events:
            events[-1][1].synchronize()
            self.seconds += sum(start.elapsed_time(end) for start, end in events) / 1000
        elif self.names and not self._is_cuda:
            self.seconds += time.perf_counter() - begun  # on a GPU that would be the training's own time, which is waited for
        reading.seconds, self.seconds = self.seconds, 0.0
        return reading

    def _tell_late(self, before: "WeightsBeforeBad", pending: list[_Step]) -> None:
        seen = _to_host([p.is_bad for p in pending], ())
        bad = [] if seen is None else np.flatnonzero(seen > 0).tolist()
        if not bad or self._on_non_finite is None:
            return
        since = sum(p.is_bad is not None for p in pending[bad[0] :])  # updates, the bad one among them
        if since > before.num_seen or not before.are_of_model():  # these are of other parameters, or of later
            self._before_bad = None
            self._say(f"cifarlab: the weights before step {pending[bad[0]].step:,}, whose gradients are not finite, are lost: "
                      "the model's parameters were replaced, moved or laid out anew since")  # fmt: skip
            return
        with before.restored():
            self._on_non_finite(pending[bad[0]].step, is_late=True)

    def _read_flows(self, reading: Reading, pending: list[_Step]) -> None:
        steps, numels = np.array([p.step for p in pending], np.int64), np.stack([p.numels for p in pending])
        shape = (len(self.items), 6)
        gradients, clipped, weights, updates = (
            _to_host([getattr(p, name) for p in pending], shape) for name in ("gradients", "clipped", "weights", "updates")
        )
        if any(p.scale is not None for p in pending):
            scales = _to_host([None if p.scale is None else p.scale.reshape(()) for p in pending], ())
            for moments in (gradients, clipped):
                if moments is not None and scales is not None:
                    scales[np.isnan(scales)] = 1
                    moments[..., [SUM, ABS_SUM, ABS_MAX]] /= scales[:, None, None]
                    moments[..., SQUARE_SUM] /= scales[:, None] ** 2
        tables: dict[str, NDArray[np.float64]] = {}
        rows = reading.rows = {int(step): {} for step in steps}
        if "gradient_flow" in self.names and gradients is not None and clipped is not None:
            tables["gradient_flow"] = gradient_flow.gradient_flow(gradients, clipped, numels)
            norms, after = _whole_norm(gradients), _whole_norm(clipped)
            for step, norm, clipped_norm in zip(steps.tolist(), norms.tolist(), after.tolist(), strict=True):
                rows[step] |= {"gradient_flow/norm": norm}
                if clipped_norm != norm and np.isfinite(norm):
                    rows[step] |= {"gradient_flow/clipped_norm": clipped_norm}
        if weights is not None:
            if "weight_flow" in self.names:
                tables["weight_flow"] = weight_flow.weight_flow(weights, numels)
            norms = np.sqrt(weights[..., SQUARE_SUM].sum(1))
            for step, norm in zip(steps.tolist(), norms.tolist(), strict=True):
                rows[step] |= {"weight_flow/norm": norm}
            if updates is not None and "update_flow" in self.names:
                tables["update_flow"] = update_flow.update_flow(updates, weights, numels)
                moved = np.sqrt(updates[..., SQUARE_SUM].sum(1))
                for step, norm, change in zip(steps.tolist(), norms.tolist(), moved.tolist(), strict=True):
                    rows[step] |= {"update_flow/ratio": change / norm if norm else 0.0}
        for name, values in tables.items():
            reading.tables.append(Measured(name, self.items, COLUMNS[name], steps, round_as_stored(values)))

    # ---- the dear ones ---------------------------------------------------------------------------------------------------

    def _measure_dear(self, step: int) -> None:
        if wanted := sorted(self.names & LISTENERS.keys()):
            with self._guard(*wanted):
                self._listen(step, wanted)
        if "curvature" in self.names and self._optimizer is not None:
            with self._guard("curvature"):
                if (batch := self._batch()) is not None:
                    found = measure_curvature(self._model, batch, self._optimizer, max_iterations=20, tolerance=0.03)
                    self._keep("curvature", ["loss"], COLUMNS["curvature"], step, found)
        if "noise" in self.names:
            with self._guard("noise"):
                if (batch := self._batch()) is not None:
                    found = measure_noise(self._model, batch, min(4, len(batch)), cosine=self._cosine)
                    self._keep("noise", ["loss"], COLUMNS["noise"], step, found)

    def _listen(self, step: int, names: list[str]) -> None:
        listeners, images = {name: LISTENERS[name]() for name in names}, self._images()
        if images is None:
            return
        as_trained = autocast_to(images.device, self._dtype(), keeps_weights=False)  # the loop's own may be open around it
        with measuring(self._model) as net, as_trained, ExitStack() as stack:
            for listener in listeners.values():
                stack.enter_context(listener.listening(net))
            net(images)
        for name, listener in listeners.items():
            if listener.items:
                self._keep(name, listener.items, COLUMNS[name], step, listener.result())

    def _keep(self, name: str, items: Sequence[str], columns: tuple[str, ...], step: int, values: Tensor) -> None:
        if self._items_of.setdefault(name, tuple(items)) != tuple(items):
            return  # a network whose forward pass is another one each time: its first form is the one that is followed
        known = self._dear.setdefault(name, (tuple(items), columns, [], []))
        known[2].append(step)
        known[3].append(values)

    def _measure_distributions(self, step: int, gradient_bins: Tensor) -> None:
        if self._old is None:
            return
        changes = [dense(w.detach()) - old for w, old in zip(self._weights, self._old, strict=True)]
        bins = {"weight": self._moments.exponents(self._weights), "gradient": gradient_bins,
                "update": self._moments.exponents(changes)}  # fmt: skip
        items = [f"{kind}/{item}" for kind in distributions.KINDS for item in self.items]
        shares = distributions.fold_bins(torch.cat([bins[kind] for kind in distributions.KINDS]))
        self._keep("distributions", items, distributions.COLUMNS, step, shares)

    def _compare_gradients(self, step: int, is_due: bool) -> None:
        """Keeps the gradient of the step before a due one, and compares the due one's with it; a cosine knows no scale."""
        gradients = [w.grad if w.grad is None or w.grad.layout is torch.strided else w.grad.to_dense() for w in self._weights]
        if is_due:
            self._cosine = self._memory.cosine_with(gradients)
        self._memory.forget()
        if self._is_due(step + 1):
            self._memory.remember(gradients)

    def _is_due(self, step: int) -> bool:
        if self._rests and (not self._last or step // self._every > self._last // self._every):
            return True
        return step in (1, self._last_step) or step % self._every == 0

    # ---- state and time --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs to measure the same: the gradient kept for the cosine with the next."""
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)

    def _clock(self) -> "_Clock":
        return _Clock(self, self._is_cuda)


class _Guard:
    """A class, as a generator costs 40 µs where the caches are cold."""

    def __init__(self, panel: Panel, names: tuple[str, ...]) -> None:
        self._panel, self._names = panel, names

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self._panel._lose(self._names, error)
        return True


class _Clock:
    """Adds the time of its block to the panel's: on a GPU by events, since the CPU only gives orders there."""

    def __init__(self, panel: Panel, on_gpu: bool) -> None:
        self._panel, self._on_gpu = panel, on_gpu

    def __enter__(self) -> None:
        if self._on_gpu:
            self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._start.record()
        else:
            self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._on_gpu:
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end.record()
            self._panel._events.append((self._start, end))
        else:
            self._panel.seconds += time.perf_counter() - self._begun


def choose_parameters(named: Iterable[tuple[str, Tensor]], include: str = "", exclude: str = "") -> dict[str, Tensor]:
    """The parameters whose names match one of the include globs (none: all) and none of the exclude globs (comma-separated).

    Left out as well are those that are empty, complex or not made yet (lazy): there is nothing to measure, or no one number to
    an entry.
    Raises InputError when that leaves none.
    """
    wanted, unwanted = ([glob.strip() for glob in globs.split(",") if glob.strip()] for globs in (include, exclude))
    named = [(name, parameter) for name, parameter in named if not isinstance(parameter, UninitializedParameter)
             and parameter.is_floating_point() and parameter.numel()]  # fmt: skip
    chosen = {
        name: parameter
        for name, parameter in named
        if (not wanted or any(fnmatch.fnmatchcase(name, glob) for glob in wanted))
        and not any(fnmatch.fnmatchcase(name, glob) for glob in unwanted)
    }
    if named and not chosen:
        raise InputError(f"no parameter is left to probe: probe_include={include or '*'!r} without probe_exclude={exclude!r} "
                         f"matches none, so choose of {', '.join(name for name, _ in named[:4])}, …")  # fmt: skip
    return chosen


def describe_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """What a run's probes.json says of each.

    A module that means some of its weights not to be trained has an attribute `frozen_by_design`, a tuple of their names; for
    these no alarm is raised.
    """
    modules = [(name, getattr(module, "frozen_by_design", None)) for name, module in unwrap(model).named_modules()]
    by_design = {f"{module}.{name}".lstrip(".") for module, names in modules if isinstance(names, tuple) for name in names}
    return [{"name": name, "shape": list(p.shape), "trainable": p.requires_grad, "frozen_by_design": name in by_design}
            for name, p in parameters.items()]  # fmt: skip


def _whole_norm(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """(steps, parameters, 6) -> (steps,). Where there is no gradient every moment is NaN; a NaN within one must be seen."""
    is_missing = np.isnan(moments[..., NON_FINITE])
    norm: NDArray[np.float64] = np.sqrt(np.where(is_missing, 0, moments[..., SQUARE_SUM]).sum(1))
    return norm


def _to_host(tensors: list[Tensor | None], shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """All in one array, NaN for None; None where there is nothing."""
    there = _together([t for t in tensors if t is not None])
    if not there:
        return None
    values: NDArray[np.float64] = torch.stack(there).cpu().double().numpy()
    if len(there) == len(tensors):
        return values
    host = np.full((len(tensors), *shape), np.nan)
    host[[t is not None for t in tensors]] = values
    return host


def _together(tensors: list[Tensor]) -> list[Tensor]:
    """On one device: a model may have been moved between two steps."""
    return tensors if len({t.device for t in tensors}) < 2 else [t.cpu() for t in tensors]
