"""The probes around anybody's own training loop.

    with cl.watch(model, optimizer, run="my-run"):
        for images, labels in loader:
            ...                        # as it was

Everything hangs on the optimizer's own step hooks, so nothing else in the loop changes.
"""

import atexit
import dataclasses
import os
import shutil
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import clip_grad
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from cifarlab.config import InputError, is_plain_name
from cifarlab.diagnosis import Alarm, Diagnosis, Facts
from cifarlab.environment import describe_environment
from cifarlab.gallery import draw_recorded_figures
from cifarlab.probes import PROBES, choose_probes, distributions
from cifarlab.probes.fixed_batch import FixedBatch, unwrap
from cifarlab.probes.incident import save_incident
from cifarlab.probes.open import FIXED_IMAGES
from cifarlab.probes.panel import LISTENERS, Panel, choose_parameters, describe_parameters
from cifarlab.records import Measured
from cifarlab.report.page import leave_report
from cifarlab.runs import Row, Run, RunFolder

Criterion = Callable[[Tensor, Tensor], Tensor]
MOST_SEEN = 2**28  # bytes of micro-batches that are kept for an incident
OpenRow = dict[str, float | Tensor]  # a tensor: on a GPU, waited for when it is written


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    run: str = "",
    *,
    runs_dir: str | Path = "runs",
    probes: str = "default",
    every: int = 200,
    include: str = "",
    exclude: str = "",
    batch: tuple[Tensor, Tensor] | None = None,
    criterion: Criterion = F.cross_entropy,
    flush_every: int = 20,
    figures: bool = True,
    say: Callable[[str], None] | None = print,
) -> "Watch":
    """Measures gradients, weights and updates at every optimizer step of somebody's own loop, and says what is wrong with them.

    Use it as a context manager, or keep what it returns and call its `close`. It writes the run folder `runs_dir/run`, which
    `cl.load_run` and `cifarlab diagnose` read. For the rules on losses, tell it the loss: `watched.log(loss=loss)`.

    A row is an optimizer step, so micro-batches that are accumulated make one. Gradients are those that the optimizer gets: an
    fp16 GradScaler's scaling undone, ranks averaged (of several ranks the first alone measures), clipped; and as they were
    before `torch.nn.utils.clip_grad_…`. An optimizer that is given a closure (LBFGS) gets them from it: those of its first call
    are measured, at the weights that the step begins with. A step that a GradScaler skips makes no row; of a fused optimizer,
    which skips by itself, one with the gradients that are not finite and an update of 0. Of several optimizers each is
    followed; a row ends when one of them steps again. Wrapped models (DDP, torch.compile) are measured inside.

    model: its parameters' names are used. optimizer: one or several. probes, include, exclude: as in `cifarlab train`.
    every: steps between measurements of the probes that need passes of their own. batch: (images, labels) for these; without it
    activations are measured on the first batch that the model sees in training, which takes a model of one tensor that
    torch.compile has not swallowed with its hooks (watch the compiled model, not the one inside); curvature and noise cannot be.
    Activations are measured under the autocast of the training's last forward pass, curvature and noise without.
    criterion: criterion(logits, labels), the mean loss, for these two. figures: draw them into the run folder when it is closed.
    say: called with lines for people (None: silent).

    Nothing else of the training changes, not a bit of a weight; after `close` model and optimizers carry no hook. Until then
    both can be copied and pickled, as anybody's can (to read a whole pickled model, cifarlab must be there). Nor does anything
    that fails here end the training: a probe that fails is switched off (`probes_lost` in result.json), and what a full disk does
    not take is kept and tried again. Models may be moved, cast or pruned meanwhile.

    An optimizer has one watch: a new one closes the one before, and a `run` that this process has written already goes on as
    `run-2`, so that a notebook's cell can be run again. A watch that nobody closes ends with its model, or with the program.
    Raises InputError for what can be mended: unknown probes, a run that exists, an optimizer without parameters of this model.
    """
    tell = say or (lambda _: None)
    names = choose_probes(probes)
    needing = [name for name in sorted(names) if PROBES[name].needs_loss]
    if needing and batch is None:
        raise InputError(f"the probe {needing[0]!r} needs images and labels to measure on: give watch batch=(images, labels)")
    for name, value in (("every", every), ("flush_every", flush_every)):
        if value < 1:
            raise InputError(f"{name}={value} cannot be used in watch: it must be at least 1")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    named = _name_parameters(model, optimizers)
    parameters = choose_parameters(named.items(), include, exclude)
    if not parameters:
        raise InputError(f"no parameter of this {type(unwrap(model)).__name__} can be measured, as each is complex, empty or not "
                         "made yet: run a batch through a lazy model before it is watched")  # fmt: skip
    if not is_plain_name(run):
        raise InputError(f"run={run[:80]!r} cannot be used in watch: it must be a plain folder name; runs_dir says where it is")
    device = next(iter(parameters.values())).device
    fixed = FixedBatch(batch[0].to(device), batch[1].to(device), criterion) if batch else None
    path = asked = Path(runs_dir) / (run or _new_name(Path(runs_dir)))
    is_main = not (dist.is_available() and dist.is_initialized() and dist.get_rank())
    if is_main:
        path = _free(path)
    for other in list(_OPEN):
        if not set(map(id, optimizers)).isdisjoint(map(id, other._optimizers)) or other.run.path.resolve() == asked.resolve():
            tell(f"cifarlab: the watch of {other.run.path} was still open, and is closed now")
            other._close("stopped")
    if path != asked:
        tell(f"cifarlab: {asked} has been written already; this run is {path}")
    settings: dict[str, Any] = {"every": every, "flush_every": flush_every, "batch": fixed, "figures": figures, "say": tell}
    if not is_main:
        return Watch(model, optimizers, parameters, path, None, names, **settings)
    is_new = not path.exists()
    folder = RunFolder(path, name="run", runs_dir="runs_dir")  # the last that can be refused
    try:
        watched = Watch(model, optimizers, parameters, path, folder, names, **settings)
    except BaseException:  # of which nothing may be left, so that the next try finds the name free
        folder.close()
        shutil.rmtree(path, ignore_errors=True)
        if not is_new:
            path.mkdir(exist_ok=True)
        raise
    _WRITTEN.add(path.resolve())
    if lazy := [name for name, p in named.items() if isinstance(p, UninitializedParameter)]:
        tell(f"cifarlab: {', '.join(lazy[:3])}{' …' if len(lazy) > 3 else ''} cannot be measured, as a lazy model makes them "
             "later: watch it after its first batch")  # fmt: skip
    return watched


class Watch:
    """Probes tied to optimizers: made by `watch`. `run` reads what has been written so far, `alarms` what was found."""

    _handles: Sequence[Any] = ()  # of the hooks, while it is open

    def __init__(self, model: nn.Module, optimizers: list[Optimizer], parameters: Mapping[str, Tensor], path: Path,
                 folder: RunFolder | None, names: frozenset[str], *, every: int, flush_every: int, batch: FixedBatch | None,
                 figures: bool, say: Callable[[str], None]) -> None:  # fmt: skip
        self._path = path
        self.step = 0  # rows begun
        self.alarms: list[Alarm] = []
        self._model, self._optimizers, self._folder, self._say = model, optimizers, folder, say
        self._flush_every, self._figures = flush_every, figures
        self._lost: dict[str, str] = {}  # what failed, and why; of the probes see `Panel.lost`
        self._is_broken = self._is_failing = False  # nothing is measured any more; the disk takes nothing at present
        self._process = os.getpid()
        self._logged: OpenRow = {}  # by `log`, for the step to come
        self._stepped: list[int] = []  # optimizers that have stepped in the open row, in their order
        self._order = list(range(len(optimizers)))  # in which they step
        self._open_row: OpenRow = {}
        self._rows: list[OpenRow] = []  # whole ones, not yet written
        self._seen = _Seen()
        self._seen_at: dict[int, _Seen] = {}  # by step, where it is not known at once whether one is bad
        self._first_images: Tensor | None = None
        self._incident_of = 0  # the step of the last one kept: by the first of the optimizers, before any of them moved
        self._told: set[str] = set()
        self._no_images = "nobody calls the watched model itself (of a compiled one, watch what torch.compile gave)"
        self._begun, self._probe_seconds = time.perf_counter(), 0.0
        if folder is None:
            return
        self._items, self._batch, self._names = tuple(parameters), batch, names
        self._some_weight = next(iter(parameters.values()))
        self._dtype = self._some_weight.dtype
        self._known = {id(p) for p in unwrap(model).parameters()}
        self._num_held = [_count_held(optimizer) for optimizer in optimizers]
        # A panel for each optimizer, as each has its own moments before and after; one of them also has what none holds, and
        # the probes that look at the whole network.
        of_each: list[dict[str, Tensor]] = [{} for _ in optimizers]
        holder = {id(p): k for k, optimizer in enumerate(optimizers) for group in optimizer.param_groups for p in group["params"]}
        main = next((holder[id(p)] for p in parameters.values() if id(p) in holder), 0)
        for name, p in parameters.items():
            of_each[holder.get(id(p), main)][name] = p
        chosen = {id(p) for p in parameters.values()}
        others = {id(p): p for p in choose_parameters(unwrap(model).named_parameters()).values() if names and id(p) not in chosen}
        left_out = [[others[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in others]
                    for optimizer in optimizers]  # fmt: skip
        of_parameters = names & {"gradient_flow", "weight_flow", "update_flow", "distributions"}
        self._panels = [
            Panel(model, of_each[k], names if k == main else of_parameters, every=every, images=self._fixed_images,
                  dtype=lambda: self._seen.dtype, batch=self._fixed_batch, optimizer=optimizer, left_out=left_out[k],
                  on_non_finite=partial(self._keep_incident, optimizer), rests=len(optimizers) > 1, say=self._tell_line)
            for k, optimizer in enumerate(optimizers)
        ]  # fmt: skip
        self._weight_norms = [np.nan for panel in self._panels if panel.items]
        self._steps_taken_in: list[FrameType | None] = [None] * len(optimizers)
        self._steps_within = [0] * len(optimizers)
        self._unclipped: list[weakref.ref[Tensor] | None] = [None] * len(optimizers)  # see `see_clipping`
        folder.write_json("probes.json", {"probes": sorted(names), "every": every, "num_classes": 0,
                                          "parameters": describe_parameters(model, parameters)})  # fmt: skip
        folder.write_json("watch.json", {"model": type(unwrap(model)).__name__, "optimizers": [_describe(o) for o in optimizers]})
        folder.write_json("environment.json", describe_environment(str(self._some_weight.device)))
        self._diagnosis = Diagnosis(Facts.from_dict(self.run.probed), incident=self.run.incident)
        self._attach()

    # ---- what the user calls ---------------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """The run folder as it is now; what was read of it before does not change."""
        return Run(self._path)

    def log(self, *, loss: float | Tensor | None = None, **values: float | Tensor | None) -> None:
        """Adds numbers to the row of the optimizer step to come. loss: the training loss. A GPU's tensor is not waited for.

        None is passed over. Raises InputError for what is no number, for `step` and `epoch`, by which rows are told apart, and
        for `lr`, which is the first optimizer's.
        """
        for name in ("step", "epoch", "lr"):
            if name in values:
                raise InputError(f"log({name}=…) cannot be used: a row has its own {name}; choose another name")
        values["train/loss"] = loss
        for name, value in values.items():
            if value is None:
                continue
            try:
                self._logged[name] = _number(value)
            except (TypeError, ValueError, RuntimeError):
                told = "loss" if name == "train/loss" else name
                raise InputError(f"log({told}=…) cannot be used with a {type(value).__name__} that is not one number") from None

    def close(self) -> None:
        """Takes everything off model and optimizers, and writes what is left."""
        self._close("finished")

    def _close(self, state: str, *, figures: bool = True) -> None:
        """Raises nothing: it may be at work while an error of the user's own is on its way."""
        if not self._handles:
            return
        self._detach()
        assert self._folder
        _FOLDERS.discard(self._folder)
        with suppress(Exception), self._folder:
            begun = time.perf_counter()
            self._try(self._end_row)
            self._try(self._flush)
            self._try(lambda: self._tell(self._diagnosis.finish()))
            self._probe_seconds += time.perf_counter() - begun if self._is_on_cpu else 0.0
            seconds = time.perf_counter() - self._begun
            share = self._probe_seconds / seconds
            lost = {name: why for panel in reversed(self._panels) for name, why in panel.lost.items()} | self._lost
            result = {"state": state, "step": self.step, "train_seconds": seconds, "probe_share": share}
            self._try(lambda: self._write_result(result | ({"probes_lost": lost} if lost else {})))
            if self._figures and figures:
                self._tell_line(f"cifarlab: drawing figures of {self._path} …")
                self._try(lambda: draw_recorded_figures(self.run))
                self._try(lambda: leave_report(self.run))
            self._tell_line(f"cifarlab: {self.step:,} optimizer steps watched; the probes took {100 * share:.2f} % of the time; "
                            f"{len(self.alarms)} alarm(s); {self._folder.path}")  # fmt: skip

    def _write_result(self, result: dict[str, Any]) -> None:
        """It says that all else is there."""
        assert self._folder
        folder = self._folder
        if self._is_failing:
            try:
                folder.sync()
            except OSError as error:
                self._tell_line(f"cifarlab: {self._path} has no result.json, as not all rows could be written ({error.strerror})")
                return
        self._write(lambda: folder.write_json("result.json", result))

    def __del__(self) -> None:
        """Model and optimizers are gone, and nobody has closed it."""
        if self._handles and self._process == os.getpid():
            with suppress(Exception):
                self._close("stopped", figures=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close("stopped" if kind else "finished")

    # ---- hooks -----------------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._handles = handles = []
        try:
            for k, optimizer in enumerate(self._optimizers):
                before, after = (_uncompiled(partial(self._safely, partial(f, k))) for f in (self._before, self._after))
                handles.append(optimizer.register_step_pre_hook(_Hook(before)))
                handles.append(optimizer.register_step_post_hook(_Hook(after)))
            if isinstance(self._model, torch.jit.ScriptModule):
                self._no_images = "a model of torch.jit.script takes no hooks"
            else:
                handles.append(self._model.register_forward_pre_hook(_Hook(self._look), with_kwargs=True))
        except BaseException:
            self._detach()
            raise
        assert self._folder
        _FOLDERS.add(self._folder)
        _OPEN.add(self)
        _see_clipping(True)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._seen = _Seen()
        self._steps_taken_in = [None] * len(self._optimizers)
        _OPEN.discard(self)
        _see_clipping(bool(_OPEN))

    def _safely(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a hook does, as long as nothing has gone wrong in one; its whole time is the probes'."""
        begun = time.perf_counter()
        try:
            return None if self._is_broken else self._try(call, *arguments)
        finally:
            if self._is_on_cpu:
                self._probe_seconds += time.perf_counter() - begun

    @property
    def _is_on_cpu(self) -> bool:
        """There a hook's time is what it takes; a GPU works on meanwhile, and its own time at the probes counts."""
        return self._some_weight.device.type == "cpu"

    def _try(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:  # ours, or of what of theirs we called: it must not end somebody's training
            if "watch" not in self._lost:
                self._lost["watch"] = why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._tell_line(f"cifarlab: the watch of {self._path} has failed, and nothing more is measured ({why}); the "
                                "training goes on")  # fmt: skip
            self._is_broken = True
            return None

    def _before(self, k: int, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        frame = _step_frame()
        if self._is_within_a_step(k, frame):
            self._steps_within[k] += 1
            return None
        self._steps_taken_in[k], self._steps_within[k] = frame, 0
        if k in self._stepped or not self._stepped:
            self._end_row()
            self.step += 1
            group = self._optimizers[0].param_groups[0]
            self._open_row = {"step": self.step} | ({"lr": _number(group["lr"])} if "lr" in group else {}) | self._logged
            self._logged = {}
        self._stepped.append(k)
        self._unclipped[k] = None
        if (held := _count_held(optimizer)) != self._num_held[k]:
            self._num_held[k] = held
            if any(id(p) not in self._known for group in optimizer.param_groups for p in group["params"]):
                self._tell_once(f"the {type(optimizer).__name__} has got parameters that were not there when the watch began: "
                                "they are not measured; begin a new watch to have them")  # fmt: skip
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if callable(closure):
            seen = _FirstCallSeen(closure, partial(self._safely, self._panels[k].before_update, self.step))
            return ((args[0], seen, *args[2:]), kwargs) if "closure" not in kwargs else (args, kwargs | {"closure": seen})
        # Set where a fused optimizer undoes the loss scaling itself: its gradients still carry the scale.
        self._panels[k].before_update(self.step, getattr(optimizer, "grad_scale", None))
        return None

    def _is_within_a_step(self, k: int, frame: FrameType | None) -> bool:
        """Whether a step is part of another of the same optimizer, as that of a class which calls the one it is derived from."""
        while frame := frame and frame.f_back:
            if frame is self._steps_taken_in[k]:
                return True
        return False

    def _after(self, k: int, *_: Any) -> None:
        if self._steps_taken_in[k] is None:
            return
        if self._steps_within[k]:
            self._steps_within[k] -= 1
            return
        self._steps_taken_in[k] = None
        self._panels[k].after_update(self.step)
        self._seen.is_used = True
        if not self._panels[k]._knows_at_once:
            self._remember_seen()
        if len(self._stepped) == len(self._optimizers):
            self._order = self._stepped
            self._end_row()

    def _remember_seen(self) -> None:
        """Until the flush, by which a bad step is known: as many of the last steps' batches as MOST_SEEN allows."""
        self._seen_at[self.step] = dataclasses.replace(self._seen, pieces=list(self._seen.pieces))
        size = sum(seen.num_bytes for seen in self._seen_at.values())
        while size > MOST_SEEN and len(self._seen_at) > 1:
            size -= self._seen_at.pop(next(iter(self._seen_at))).num_bytes

    def _end_row(self) -> None:
        if self._stepped:
            if self._first_images is None and self._batch is None and (asked := sorted(self._names & LISTENERS.keys())):
                self._tell_once(f"there is no batch to measure {' and '.join(asked)} on yet, as {self._no_images}: give watch "
                                "batch=(images, labels)")  # fmt: skip
            self._rows.append(self._open_row)
            self._stepped = []
            if len(self._rows) >= self._flush_every:
                self._flush()

    def _look(self, *arguments: Any) -> None:
        if not torch.compiler.is_compiling():
            self._safely(self._see_images, *arguments)

    def _see_images(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Notes the batch: the first is what a fixed batch is made of, all since the last step are kept with an incident."""
        if not module.training:
            self._no_images = "the model is in eval mode while it trains"
            return
        self._unclipped = [None] * len(self._optimizers)
        kind = self._some_weight.device.type
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].ndim > 1 and not kwargs:  # so it can be called again
            images, was = args[0].detach(), self._first_images
            self._seen.add(images, kind)
            if was is None or (was.dtype, was.device) != (images.dtype, images.device):  # the model was cast or moved
                self._first_images = images[:FIXED_IMAGES].clone()
        else:
            self._seen.add(None, kind)
            self._no_images = "the model's input is not one tensor of several axes"

    def see_clipping(self, gradients: Sequence[Tensor]) -> None:
        """Gradients are about to be clipped; of ours, this is the last chance to see them whole.

        Only the first time since the backward pass: torch comes here twice when it clips by norm, and a loop may clip part by
        part, or by norm and then by value. A new backward pass shows in a forward pass before it, or in new gradient tensors.
        """
        clipped = {id(g) for g in gradients}
        for k, optimizer in enumerate(self._optimizers):
            ours = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            seen = self._unclipped[k]
            if not clipped.isdisjoint(map(id, ours)) and (seen is None or seen() is not ours[0]):
                self._unclipped[k] = weakref.ref(ours[0])
                self._panels[k].before_clip()

    def _fixed_images(self) -> Tensor | None:
        batch = self._fixed_batch()
        return self._first_images if batch is None else batch.images

    def _fixed_batch(self) -> FixedBatch | None:
        """Where the model is now, and of the type it has now."""
        batch, weight = self._batch, self._some_weight
        if batch is not None and batch.images.device != weight.device:
            batch = dataclasses.replace(batch, images=batch.images.to(weight.device), labels=batch.labels.to(weight.device))
        if batch is not None and batch.images.is_floating_point() and weight.dtype != self._dtype:
            batch = dataclasses.replace(batch, images=batch.images.to(weight.dtype))
        self._batch, self._dtype = batch, weight.dtype
        return batch

    def _keep_incident(self, optimizer: Optimizer, step: int, is_late: bool = False) -> None:
        is_skipped = getattr(optimizer, "found_inf", None) is not None  # a GradScaler sees to it
        seen = self._seen_at.get(step) if is_late else self._seen
        if seen is None or not seen.pieces or self._folder is None or is_skipped or step == self._incident_of:
            return
        try:
            kept = save_incident(self._folder.path, step, self._model, None if is_late else optimizer, seen.pieces,
                                 dtype=seen.dtype, num_missing=seen.num_missing)  # fmt: skip
            self._incident_of = step if kept else self._incident_of
        except Exception as error:  # somebody's model may refuse to be run again; that must not end somebody's training
            self._tell_line(f"cifarlab: the gradients of step {step} are not finite; the step could not be kept ({error})")

    # ---- writing ---------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        assert self._folder
        folder = self._folder
        tensors = [value for row in self._rows for value in row.values() if isinstance(value, Tensor)]
        numbers = iter(torch.stack([t.to(tensors[-1].device) for t in tensors]).tolist() if tensors else [])
        rows: list[Row] = [{key: next(numbers) if isinstance(value, Tensor) else value for key, value in row.items()}
                           for row in self._rows]  # fmt: skip
        self._rows = []
        tables = []
        # In the order of their steps: of a step whose gradients are not finite the first one knows the weights before any moved.
        by_optimizer = {k: self._panels[k].read() for k in self._order}
        readings = [by_optimizer[k] for k in range(len(self._panels))]
        self._seen_at = {}
        with_rows = [reading for panel, reading in zip(self._panels, readings, strict=True) if panel.items]
        for name in dict.fromkeys(table.name for reading in readings for table in reading.tables):
            parts = [table for reading in readings for table in reading.tables if table.name == name]
            tables.append(_join(parts, self._items) if len(self._panels) > 1 else parts[0])
        for row in rows:
            row |= _whole([reading.rows.get(int(row["step"]), {}) for reading in with_rows], self._weight_norms)
        begun = time.perf_counter()
        for table in tables:
            self._write(partial(folder.table, table))
        if rows:
            self._write(partial(folder.rows, rows))
        self._tell(self._diagnosis.see(rows, tables))
        if not self._is_on_cpu:
            self._probe_seconds += sum(reading.seconds for reading in readings) + time.perf_counter() - begun

    def _write(self, write: Callable[[], None]) -> None:
        """A disk that is full or fails for a while ends nothing: the folder keeps what it does not take, until the next flush."""
        try:
            write()
        except OSError as error:
            if not self._is_failing:
                self._tell_line(f"cifarlab: {self._path} cannot be written ({error.strerror}): what is new is kept in memory, "
                                "and tried again; make room on that disk")  # fmt: skip
            self._is_failing = True

    def _tell(self, alarms: list[Alarm]) -> None:
        assert self._folder
        self.alarms += alarms
        for alarm in alarms:
            self._write(partial(self._folder.alarm, alarm.to_dict()))
            for line in alarm.format():
                self._tell_line(line)

    def _tell_line(self, line: str) -> None:
        with suppress(Exception):  # a closed pipe, say
            self._say(line)

    def _tell_once(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            self._tell_line(f"cifarlab: {what}")


_OPEN: weakref.WeakSet[Watch] = weakref.WeakSet()  # their own models and optimizers hold them, and nothing else does
_FOLDERS: set[RunFolder] = set()  # of these: files of a watch that dies unclosed would be closed before it could write to them
_WRITTEN: set[Path] = set()  # run folders of this process


@atexit.register
def _close_open() -> None:
    for watch in list(_OPEN):
        if watch._process == os.getpid():
            watch._close("stopped")


def _uncompiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """So that torch.compile leaves it out when somebody compiles an optimizer step. To have an optimizer is to have its parts."""

    def hook(*arguments: Any) -> Any:
        return call(*arguments)

    disabled: Callable[..., Any] = torch.compiler.disable(hook, reason="cifarlab's watch")  # type: ignore[no-untyped-call]
    return disabled


def _step_frame() -> FrameType | None:
    """Torch's, in which the step that calls us is taken."""
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_code.co_filename != torch_optimizer.__file__:
        frame = frame.f_back
    return frame


class _Hook:
    """A hook that does nothing in copies: a model can be pickled and copied while it is watched."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments) if self._call else None

    def __reduce__(self) -> Any:
        return _Hook, ()

    def __getattr__(self, name: str) -> Any:
        told = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name == "__name__":  # by which torch.jit.script compiles a model's hooks with the model: there is no way around it
            told = ("torch.jit.script cannot compile a model while cl.watch has a hook on it: script it before it is watched, "
                    "or when the watch is closed")  # fmt: skip
        raise AttributeError(told)


@dataclasses.dataclass
class _Seen:
    """What went through the model since the last step: references to the last ones, of at most MOST_SEEN bytes."""

    pieces: list[Tensor] = dataclasses.field(default_factory=list)
    num_missing: int = 0
    num_bytes: int = 0
    dtype: torch.dtype | None = None  # of autocast
    is_used: bool = False  # a step was made of them

    def add(self, images: Tensor | None, kind: str) -> None:
        """images: of a forward pass; None where it cannot be done again. kind: of the device that the model is on."""
        if self.is_used:
            self.pieces, self.num_missing, self.num_bytes, self.is_used = [], 0, 0, False
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if images is None:
            self.num_missing += 1
            return
        self.pieces.append(images)
        self.num_bytes += images.nbytes
        while len(self.pieces) > 1 and (self.num_bytes > MOST_SEEN or len(self.pieces) > 1000):
            self.num_bytes -= self.pieces.pop(0).nbytes
            self.num_missing += 1


class _FirstCallSeen:
    """An optimizer's closure, and what is to be done when it has run for the first time."""

    def __init__(self, closure: Callable[[], Any], then: Callable[[], None]) -> None:
        self._closure, self._then = closure, then

    def __call__(self) -> Any:
        loss = self._closure()
        self._then()
        self._then = lambda: None
        return loss


def _see_clipping(wanted: bool) -> None:
    """Lets open watches see gradients before torch clips them.

    torch.nn.utils.clip_grad_norm_ and clip_grad_value_ begin by sorting the gradients by device, whoever imported them from
    where; it is that function of their module which is stood in for while a watch is open. A torch without it (there is none
    from 2.6 to 2.13) just leaves "before clipping" equal to "after".
    """
    name = "_group_tensors_by_device_and_dtype"
    current = getattr(clip_grad, name, None)
    if isinstance(current, _SortingSeen) and not wanted:
        setattr(clip_grad, name, current.sort)
    elif current is not None and wanted and not isinstance(current, _SortingSeen):
        setattr(clip_grad, name, _SortingSeen(current))


class _SortingSeen:
    def __init__(self, sort: Callable[..., Any]) -> None:
        self.sort = sort

    def __call__(self, tensors: list[list[Tensor]], *arguments: Any, **keywords: Any) -> Any:
        for watch in [] if torch.compiler.is_compiling() else list(_OPEN):
            watch._safely(watch.see_clipping, tensors[0])
        return self.sort(tensors, *arguments, **keywords)


def _name_parameters(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The model's parameters by name; raises InputError where an optimizer holds none of them."""
    named: dict[str, Tensor] = dict(unwrap(model).named_parameters())
    ours = {id(p) for p in named.values()}
    for k, optimizer in enumerate(optimizers):
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            which = f"optimizer {k} ({type(optimizer).__name__})" if len(optimizers) > 1 else f"the {type(optimizer).__name__}"
            raise InputError(f"{which} holds no parameter of this {type(unwrap(model)).__name__}: watch the model that it trains")
    if not optimizers:
        raise InputError("there is no optimizer to watch: give watch the one that trains the model")
    return named


def _count_held(optimizer: Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _free(path: Path) -> Path:
    """That path, or with a number behind it where this process has written it already; raises InputError where others have."""
    try:
        if not path.is_dir() and path.exists():
            raise InputError(f"run={path.name!r} cannot be used in watch: {path} is a file; choose another run name")
        if path.is_dir() and any(path.iterdir()):
            if path.resolve() not in _WRITTEN:
                raise InputError(f"run folder {path} exists already: choose another run name")
            number = 2
            while (numbered := path.with_name(f"{path.name}-{number}")).exists():
                number += 1
            return numbered
    except OSError as error:
        raise InputError(f"run folder {path} cannot be used ({error.strerror}): choose another runs_dir") from None
    return path


def _new_name(runs_dir: Path) -> str:
    """By the time, and another one each time."""
    name = f"watch-{datetime.now():%Y%m%d-%H%M%S}"
    taken = sum(path.name == name or path.name.startswith(f"{name}-") for path in runs_dir.glob(f"{name}*"))
    return f"{name}-{taken + 1}" if taken else name


def _number(value: float | Tensor) -> float | Tensor:
    """As a float where that costs no waiting, else as a tensor of its own."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.detach().float().reshape(()).clone()
    return float(value.detach() if isinstance(value, Tensor) else value)


def _describe(optimizer: Optimizer) -> dict[str, Any]:
    plain = {key: value for key, value in optimizer.defaults.items() if isinstance(value, int | float | str | bool)}
    return {"name": type(optimizer).__name__, "parameters": _count_held(optimizer)} | plain


def _join(parts: list[Measured], order: Sequence[str]) -> Measured:
    """One table of the parts of several optimizers, of all items in the model's order; NaN where one of them did not step.

    All, though one may not have stepped for long: the items of a table are the same in every part of a run.
    """
    first = parts[0]
    steps = np.unique(np.concatenate([part.steps for part in parts]))
    if first.name == "distributions":
        items = tuple(f"{kind}/{item}" for kind in distributions.KINDS for item in order)
    elif set(first.items) <= set(order):
        items = tuple(order)
    else:
        return first  # of the whole network, which one of the panels looks at
    place = {item: k for k, item in enumerate(items)}
    values = np.full((len(steps), len(items), len(first.columns)), np.nan)
    for part in parts:
        there = np.array([place[item] for item in part.items], np.intp)
        values[np.ix_(np.searchsorted(steps, part.steps), there)] = part.values
    return Measured(first.name, items, first.columns, steps, values)


def _whole(parts: list[Mapping[str, float]], weight_norms: list[float]) -> Row:
    """The whole model's numbers from those of its optimizers' parts, of which some may not have stepped.

    weight_norms: of each part when it last stepped (NaN: not yet), brought up to date; it has not moved since then. Gradients
    that no step has used are nobody's: without one of the parts there is no norm of the whole.
    """
    if len(parts) == 1:
        return dict(parts[0])
    row: Row = {}
    if all("gradient_flow/norm" in part for part in parts):
        row["gradient_flow/norm"] = _norm(part["gradient_flow/norm"] for part in parts)
        if any("gradient_flow/clipped_norm" in part for part in parts):
            row["gradient_flow/clipped_norm"] = _norm(part.get("gradient_flow/clipped_norm", part["gradient_flow/norm"])
                                                      for part in parts)  # fmt: skip
    for k, part in enumerate(parts):
        weight_norms[k] = part.get("weight_flow/norm", weight_norms[k])
    if any("weight_flow/norm" in part for part in parts) and not np.isnan(weight_norms).any():
        row["weight_flow/norm"] = whole = _norm(weight_norms)
        if whole and any("update_flow/ratio" in part for part in parts):
            row["update_flow/ratio"] = _norm(part.get("update_flow/ratio", 0.0) * part.get("weight_flow/norm", 0.0)
                                             for part in parts) / whole  # fmt: skip
    return row


def _norm(norms: Iterable[float]) -> float:
    return float(np.sqrt(sum(norm**2 for norm in norms)))
