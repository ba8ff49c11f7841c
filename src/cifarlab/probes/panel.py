"""The probes at work in one training: told of each step's moments, read once per flush.

    panel.before_clip()          gradients are complete and true (only where something clips them)
    panel.before_update(step)    gradients are what the optimizer gets; the weights have not moved
    panel.after_update(step)     the weights have moved; the gradients are still there
    panel.read()                 all measured since the last call, by one copy from the device

`train` calls these itself; `watch` ties them to the hooks of anybody's optimizer.
"""

import fnmatch
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from cifarlab.config import InputError
from cifarlab.probes import activations, batch_norm, curvature, distributions, gradient_flow, noise, update_flow, weight_flow
from cifarlab.probes.curvature import measure_curvature
from cifarlab.probes.fixed_batch import FixedBatch, measuring, unwrap
from cifarlab.probes.moments import ABS_MAX, ABS_SUM, NON_FINITE, SQUARE_SUM, SUM, Moments, dense
from cifarlab.probes.noise import GradientMemory, measure_noise
from cifarlab.records import Measured, Reading, round_as_stored

COLUMNS = {
    module.__name__.rpartition(".")[2]: module.COLUMNS
    for module in (gradient_flow, weight_flow, update_flow, activations, batch_norm, distributions, curvature, noise)
}
LISTENERS: dict[str, type[activations.Activations] | type[batch_norm.NormStatistics]] = {
    "activations": activations.Activations,
    "batch_norm": batch_norm.NormStatistics,
}


@dataclass
class _Step:
    """One step's moments on the device, (parameters, 6) each."""

    step: int
    gradients: Tensor | None = None
    clipped: Tensor | None = None
    weights: Tensor | None = None
    updates: Tensor | None = None
    scale: Tensor | None = None  # that the gradients still carry
    gradient_bins: Tensor | None = None  # (parameters, 512), of a due step


class Panel:
    """Chosen probes over chosen parameters.

    parameters: by name, in the order of the network, frozen ones too (of which only weights are measured).
    names: of PROBES. every: steps between two measurements of those that do not measure each step; the first step and
    `last_step` (when it is known) are always measured.
    images: what the probes of a fixed batch run the network on; batch: the same with labels, for those that need a loss; both
    functions, for they may be made late, and None where there is nothing. optimizer: whose edge curvature is held against.
    weights_are_ours: nobody but the optimizer writes weights between two steps, which saves a pass over them.
    on_non_finite: called before an update whose gradients are not finite, where that is known without waiting (on a CPU).
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
        batch: Callable[[], FixedBatch | None] = lambda: None,
        optimizer: Optimizer | None = None,
        weights_are_ours: bool = False,
        on_non_finite: Callable[[int], None] | None = None,
    ) -> None:
        self.names = frozenset(names) if parameters else frozenset()
        self._model, self._every, self._last_step = unwrap(model), every, last_step
        self._images, self._batch, self._optimizer = images, batch, optimizer
        self.items = tuple(parameters)
        self._weights = list(parameters.values())
        self._moments = Moments(self._weights)
        self._numels = self._moments.numels
        self._ours = weights_are_ours
        self._old: list[Tensor] | None = None
        self._on_non_finite = on_non_finite if self._moments.device.type == "cpu" else None
        self._needs_gradients = "gradient_flow" in self.names or self._on_non_finite is not None
        self._current: _Step | None = None
        self._pending: list[_Step] = []
        self._dear: dict[str, tuple[tuple[str, ...], tuple[str, ...], list[int], list[Tensor]]] = {}
        self._memory = GradientMemory()
        self._cosine: Tensor | None = None
        self._unclipped: Tensor | None = None
        self.seconds = 0.0
        self._events: list[tuple[Any, Any]] = []  # of a GPU, whose time is known later
        self._is_cuda = self._moments.device.type == "cuda"

    # ---- the moments of a step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_clip(self) -> None:
        if "gradient_flow" in self.names:
            with self._clock():
                self._unclipped = self._moments.of([w.grad for w in self._weights])

    @torch.no_grad()
    def before_update(self, step: int, scale: Tensor | None = None) -> None:
        """scale: what the gradients must be divided by to be true, where the optimizer itself undoes a loss scaling."""
        if not self.names:
            return
        current = self._current = _Step(step, scale=scale)
        is_due = self._is_due(step)
        with self._clock():
            if self._needs_gradients:
                current.clipped = self._moments.of([w.grad for w in self._weights])
                current.gradients = current.clipped if self._unclipped is None else self._unclipped
                self._unclipped = None
            if "distributions" in self.names and is_due:  # now, as a fused optimizer divides the gradients by the scale
                gradients = [w.grad if scale is None or w.grad is None else w.grad / scale for w in self._weights]
                current.gradient_bins = self._moments.exponents(gradients)
            if "update_flow" in self.names or current.gradient_bins is not None:
                if self._old is None:
                    self._old = self._moments.copies(self._weights)
                elif not (self._ours and "update_flow" in self.names):  # else it holds them since the last update
                    self._moments.copy(self._weights, self._old)
            if "noise" in self.names:
                self._compare_gradients(step)
        if self._on_non_finite and current.clipped is not None and (current.clipped[:, NON_FINITE] > 0).any():
            self._on_non_finite(step)

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        current = self._current
        if current is None:
            return
        self._current = None
        is_due = self._is_due(step)
        with self._clock():
            if current.gradient_bins is not None:
                self._measure_distributions(step, current.gradient_bins)
            if "update_flow" in self.names and self._old is not None:
                current.weights, current.updates = self._moments.of_weights(self._weights, self._old)
            elif "weight_flow" in self.names:
                current.weights = self._moments.of(self._weights)
            self._pending.append(current)
            if is_due:
                self._measure_dear(step)

    # ---- reading ---------------------------------------------------------------------------------------------------------

    def read(self) -> Reading:
        """Everything since the last call; the only place where the device is waited for."""
        reading, begun = Reading(), time.perf_counter()
        if self._pending:
            steps = np.array([p.step for p in self._pending], np.int64)
            raw = {name: _to_host([getattr(p, name) for p in self._pending])
                   for name in ("gradients", "clipped", "weights", "updates")}  # fmt: skip
            if any(p.scale is not None for p in self._pending):
                one = torch.ones((), device=self._moments.device)
                scales = _to_host([one if p.scale is None else p.scale.to(one).reshape(()) for p in self._pending])
                for name in ("gradients", "clipped"):
                    if scales is not None and (moments := raw[name]) is not None:
                        moments[..., [SUM, ABS_SUM, ABS_MAX]] /= scales[:, None, None]
                        moments[..., SQUARE_SUM] /= scales[:, None] ** 2
            self._read_flows(reading, steps, raw)
            self._pending = []
        for name, (items, columns, due_steps, tensors) in self._dear.items():
            values = torch.stack(tensors).cpu().double().numpy()
            reading.tables.append(Measured(name, items, columns, np.array(due_steps, np.int64), values))
        self._dear = {}
        if self._events:
            self._events[-1][1].synchronize()
            self.seconds += sum(start.elapsed_time(end) for start, end in self._events) / 1000
            self._events = []
        elif self.names and not self._is_cuda:
            self.seconds += time.perf_counter() - begun  # on a GPU that would be the training's own time, which is waited for
        reading.seconds, self.seconds = self.seconds, 0.0
        return reading

    def _read_flows(self, reading: Reading, steps: NDArray[np.int64], raw: dict[str, NDArray[np.float64] | None]) -> None:
        gradients, clipped, weights, updates = raw["gradients"], raw["clipped"], raw["weights"], raw["updates"]
        tables: dict[str, NDArray[np.float64]] = {}
        rows = reading.rows = {int(step): {} for step in steps}
        if "gradient_flow" in self.names and gradients is not None and clipped is not None:
            tables["gradient_flow"] = gradient_flow.gradient_flow(gradients, clipped, self._numels)
            norms, after = _whole_norm(gradients), _whole_norm(clipped)
            for step, norm, clipped_norm in zip(steps.tolist(), norms.tolist(), after.tolist(), strict=True):
                rows[step] |= {"gradient_flow/norm": norm}
                if clipped_norm != norm and np.isfinite(norm):
                    rows[step] |= {"gradient_flow/clipped_norm": clipped_norm}
        if weights is not None:
            if "weight_flow" in self.names:
                tables["weight_flow"] = weight_flow.weight_flow(weights, self._numels)
            norms = np.sqrt(weights[..., SQUARE_SUM].sum(1))
            for step, norm in zip(steps.tolist(), norms.tolist(), strict=True):
                rows[step] |= {"weight_flow/norm": norm}
            if updates is not None and "update_flow" in self.names:
                tables["update_flow"] = update_flow.update_flow(updates, weights, self._numels)
                moved = np.sqrt(updates[..., SQUARE_SUM].sum(1))
                for step, norm, change in zip(steps.tolist(), norms.tolist(), moved.tolist(), strict=True):
                    rows[step] |= {"update_flow/ratio": change / norm if norm else 0.0}
        for name, values in tables.items():
            reading.tables.append(Measured(name, self.items, COLUMNS[name], steps, round_as_stored(values)))

    # ---- the dear ones ---------------------------------------------------------------------------------------------------

    def _measure_dear(self, step: int) -> None:
        listeners = {name: probe() for name, probe in LISTENERS.items() if name in self.names}
        images = self._images() if listeners else None
        if images is not None:
            with measuring(self._model) as net, ExitStack() as stack:
                for listener in listeners.values():
                    stack.enter_context(listener.listening(net))
                net(images)
            for name, listener in listeners.items():
                if listener.items:
                    self._keep(name, listener.items, COLUMNS[name], step, listener.result())
        batch = self._batch() if self.names & {"curvature", "noise"} else None
        if batch is not None and "curvature" in self.names and self._optimizer is not None:
            found = measure_curvature(self._model, batch, self._optimizer, max_iterations=20, tolerance=0.03)
            self._keep("curvature", ["loss"], COLUMNS["curvature"], step, found)
        if batch is not None and "noise" in self.names:
            found = measure_noise(self._model, batch, min(4, len(batch)), cosine=self._cosine)
            self._keep("noise", ["loss"], COLUMNS["noise"], step, found)

    def _keep(self, name: str, items: Sequence[str], columns: tuple[str, ...], step: int, values: Tensor) -> None:
        known = self._dear.setdefault(name, (tuple(items), columns, [], []))
        if known[0] != tuple(items):
            return  # a network whose forward pass is another one each time: its first form is the one that is followed
        known[2].append(step)
        known[3].append(values)

    def _measure_distributions(self, step: int, gradient_bins: Tensor) -> None:
        assert self._old is not None
        changes = [dense(w.detach()) - old for w, old in zip(self._weights, self._old, strict=True)]
        bins = {"weight": self._moments.exponents(self._weights), "gradient": gradient_bins,
                "update": self._moments.exponents(changes)}  # fmt: skip
        items = [f"{kind}/{item}" for kind in distributions.KINDS for item in self.items]
        shares = distributions.fold_bins(torch.cat([bins[kind] for kind in distributions.KINDS]))
        self._keep("distributions", items, distributions.COLUMNS, step, shares)

    def _compare_gradients(self, step: int) -> None:
        """Keeps the gradient of the step before a due one, and compares the due one's with it; a cosine knows no scale."""
        gradients = [w.grad for w in self._weights]
        if self._is_due(step):
            self._cosine = self._memory.cosine_with(gradients)
        self._memory.forget()
        if self._is_due(step + 1):
            self._memory.remember(gradients)

    def _is_due(self, step: int) -> bool:
        return step in (1, self._last_step) or step % self._every == 0

    # ---- state and time --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs to measure the same: the gradient kept for the cosine with the next."""
        return self._memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._memory.load_state_dict(state)

    def _clock(self) -> "_Clock":
        return _Clock(self, self._is_cuda)


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

    Left out as well are those that are empty or complex: there is nothing to measure, or no one number to an entry.
    Raises InputError when that leaves none.
    """
    wanted, unwanted = ([glob.strip() for glob in globs.split(",") if glob.strip()] for globs in (include, exclude))
    named = [(name, parameter) for name, parameter in named if parameter.is_floating_point() and parameter.numel()]
    chosen = {
        name: parameter
        for name, parameter in named
        if (not wanted or any(fnmatch.fnmatchcase(name, glob) for glob in wanted))
        and not any(fnmatch.fnmatchcase(name, glob) for glob in unwanted)
    }
    if named and not chosen:
        raise InputError(f"no parameter is left to probe: include {include or '*'!r} without {exclude!r} matches none of "
                         f"{', '.join(name for name, _ in named[:4])}, …")  # fmt: skip
    return chosen


def _whole_norm(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """(steps, parameters, 6) -> (steps,). Where there is no gradient every moment is NaN; a NaN within one must be seen."""
    is_missing = np.isnan(moments[..., NON_FINITE])
    norm: NDArray[np.float64] = np.sqrt(np.where(is_missing, 0, moments[..., SQUARE_SUM]).sum(1))
    return norm


def _to_host(tensors: list[Tensor | None]) -> NDArray[np.float64] | None:
    there = [t for t in tensors if t is not None]
    if not there:
        return None
    host: NDArray[np.float64] = torch.stack(there).cpu().double().numpy()
    return host
