"""A step whose gradients are not finite: where it went wrong, in which samples, and all that is needed to do it again."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter, is_
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from cifarlab.checkpoint import load_weights, save_state, save_weights
from cifarlab.config import InputError
from cifarlab.distributed import autocast_to
from cifarlab.probes.fixed_batch import measuring, unwrap
from cifarlab.probes.gpu_passes import are_plain, gpu_passes
from cifarlab.probes.moments_torch import dense
from cifarlab.runs import Run, write_atomically

Criterion = Callable[[Tensor, Tensor], Tensor]
MOST = 3  # incidents kept of a run: the first are the ones that matter
_FORM = attrgetter("shape", "dtype", "device", "__class__")
LOOK_AGAIN = 50  # steps after which it is looked whether a model has other parameters than it had


@dataclass(frozen=True)
class Located:
    """Where numbers first stopped being finite in a step.

    place: "input", "forward", "loss", "backward", or "unknown" where all was finite when it was done again; layer: the first bad
    module, in backward the parameter where it began; samples: places in the batch whose numbers are bad there (of "backward":
    none can be told from a mean over the batch).
    """

    place: str
    layer: str = ""
    samples: tuple[int, ...] = ()
    untried: str = ""  # of "unknown": what could not be done again

    def __str__(self) -> str:
        if self.place == "unknown":
            return "not reproduced: all is finite when the step is done again" + (f" ({self.untried})" if self.untried else "")
        which = f", samples {', '.join(map(str, self.samples[:8]))}{' …' if len(self.samples) > 8 else ''} of the batch"
        return f"first in the {self.place}{f' at {self.layer}' if self.layer else ''}{which if self.samples else ''}"


def locate(model: nn.Module, images: Tensor, labels: Tensor | None = None, criterion: Criterion | None = None, *,
           sizes: Sequence[int] = (), dtype: torch.dtype | None = None) -> Located:  # fmt: skip
    """Finds the first number that is not finite, by doing the step's passes again with every module's output looked at.

    sizes: of the micro-batches, in which the images went through the network (none: at once); dtype: what autocast computed
    in (None: there was none). The passes are as in training, but for dropout, which is off. Where inputs, outputs and losses are
    all finite, the backward pass is done again too, which takes labels and criterion; the model's own gradients are left
    alone. Of a bad one the answer is the last parameter, in the network's order, whose gradient is bad: there it began.
    """
    sizes = list(sizes) or [len(images)]
    of_pieces = [None] * len(sizes) if labels is None else torch.split(labels, sizes)
    pieces = list(zip(torch.split(images, sizes), of_pieces, strict=True))
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    if samples := _bad_samples(images):
        return Located("input", "", samples)
    found: list[Located] = []

    def look(name: str, inputs: Any, output: Any) -> None:
        samples = sorted({k for t in _floats(output) for k in _bad_samples(t)})
        if samples and not found and not any(_bad_samples(t) for t in _floats(inputs)):
            found.append(Located("forward", name, tuple(samples)))

    parameters = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
    with measuring(model) as net:
        autocast = autocast_to(images.device, dtype, keeps_weights=False)
        for start, (piece, targets) in zip(starts, pieces, strict=True):
            handles = [module.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs, output))
                       for name, module in net.named_modules()]  # fmt: skip
            try:
                with torch.no_grad(), autocast:
                    logits = net(piece)
            finally:
                for handle in handles:
                    handle.remove()
            if found:
                return Located("forward", found[0].layer, tuple(start + k for k in found[0].samples))
            if targets is not None and criterion is not None:
                with torch.no_grad():
                    each = [start + k for k in range(len(piece))
                            if not torch.isfinite(criterion(logits[k : k + 1].float(), targets[k : k + 1]))]  # fmt: skip
                if each:
                    return Located("loss", "", tuple(each))
        if labels is None or criterion is None:
            return Located("unknown", untried="but for the loss and the backward pass, of which nothing is known")
        for piece, targets in pieces:
            assert targets is not None
            with torch.enable_grad():
                with autocast:
                    logits = net(piece)
                gradients = torch.autograd.grad(criterion(logits.float(), targets), list(parameters.values()), allow_unused=True)
            bad = [name for name, g in zip(parameters, gradients, strict=True) if g is not None and not torch.isfinite(g).all()]
            if bad:
                return Located("backward", bad[-1])
    return Located("unknown", untried="without dropout")


class WeightsBeforeBad:
    """A model's weights before the first update whose gradients were not finite, kept without waiting for the device.

    Which step that was is known only when the host reads what the device has measured, and until then it computes on. So at
    each step the weights are copied unless there was a bad step already: a choice that the device itself makes.
    Cost: the memory of the weights and two passes over it a step; where `gpu_passes` has none for them, twice that memory and
    five passes. Of the optimizer nothing is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._lay_out()

    def _lay_out(self) -> None:
        self.num_seen = 0  # updates since
        self._weights = self._parameters()
        self._forms = self._forms_now
        sizes, device = [p.numel() for p in self._weights], self._weights[0].device
        is_plain = are_plain(self._weights, device) and all(dense(p) is p for p in self._weights)
        kernels = gpu_passes(device) if is_plain else None
        self._passes = kernels(np.array(sizes, np.int64), device) if kernels else None
        self._is_over = torch.zeros((), dtype=torch.bool, device=device)
        if self._passes:
            self._kept = [torch.empty_like(p, requires_grad=False) for p in self._weights]
        else:
            dtype = torch.float64 if any(p.dtype == torch.float64 for p in self._weights) else torch.float32
            self._buffers = torch.zeros(2, sum(sizes), dtype=dtype, device=device)
            self._kept, self._now = (
                [part.view(p.shape) for part, p in zip(torch.split(buffer, sizes), self._weights, strict=True)]
                for buffer in self._buffers
            )

    @property
    def _forms_now(self) -> tuple[list[tuple[object, ...]], list[tuple[int, ...]]]:
        return list(map(_FORM, self._weights)), list(map(Tensor.stride, self._weights))

    def _parameters(self) -> list[Tensor]:
        return [p for p in self._model.parameters() if not isinstance(p, UninitializedParameter)]

    @torch.no_grad()
    def see(self, is_bad: Tensor) -> None:
        """Before each update. is_bad: 0-d, whether its gradients are not finite."""
        is_due = (self.num_seen + 1) % LOOK_AGAIN == 0  # a look at each module takes long
        if self._forms != self._forms_now or (is_due and not self.are_of_model()):
            self._lay_out()
        self.num_seen += 1
        if self._passes:
            self._passes.copy_unless(self._is_over, self._weights, self._kept)
        else:
            torch._foreach_copy_(self._now, self._weights)
            torch.where(self._is_over, *self._buffers, out=self._buffers[0])
        self._is_over |= is_bad

    def are_of_model(self) -> bool:
        """Whether the model has the parameters that it had, and not others in their places."""
        now = self._parameters()
        return len(now) == len(self._weights) and all(map(is_, now, self._weights))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The model with those weights; afterwards with its own again, and the next bad update is waited for."""
        with torch.no_grad():
            own = [p.detach().clone() for p in self._weights]
            torch._foreach_copy_(self._weights, self._kept)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, own)
            self._is_over.zero_()


def save_incident(run: Path, step: int, model: nn.Module, optimizer: Optimizer | None, images: Tensor | Sequence[Tensor],
                  labels: Tensor | None = None, *, criterion: Criterion | None = None, indices: Tensor | None = None,
                  size: int = 0, dtype: torch.dtype | None = None, num_missing: int = 0) -> Path | None:  # fmt: skip
    """Writes `incidents/step-…`: weights and optimizer state before the update, the batch, and what `locate` found.

    images: the batch, which went through the network in pieces of `size` (0: at once), or the micro-batches themselves.
    optimizer: None where its state before the update is not known. num_missing: how many micro-batches, the first ones,
    were not kept. Micro-batches of different shapes are no one tensor: then the last of one shape are taken. incident.json names
    the first bad layer and the samples: their place in the batch, and by `indices` in the training set. Batch-norm statistics
    that the bad forward pass has broken are written as they are at a network's start, and named there (`buffers_reset`): a
    replay in training mode does not use them.
    None, and nothing written, when the run has MOST incidents already, or when the weights are broken already: then it was an
    earlier step.
    """
    folder = run / "incidents" / f"step-{step:08d}"
    others = {path.parent for path in folder.parent.glob("step-*/incident.json")} - {folder}  # whole ones: it is written last
    if len(others) >= MOST or not all(torch.isfinite(p).all() for p in model.parameters()):
        return None
    if isinstance(images, Tensor):
        pieces = list(torch.split(images, size or len(images)))
    else:
        pieces = [piece for piece in images if (piece.shape[1:], piece.dtype) == (images[-1].shape[1:], images[-1].dtype)]
        num_missing += len(images) - len(pieces)
        images = torch.cat(pieces)
    sizes = [len(piece) for piece in pieces]
    found = locate(model, images, labels, criterion, sizes=sizes, dtype=dtype)
    if num_missing and found.place == "unknown":
        missing = f"{num_missing} of {num_missing + len(sizes)} micro-batches were not kept"
        found = replace(found, untried=f"{found.untried}; {missing}")
    folder.mkdir(parents=True, exist_ok=True)
    net = unwrap(model)
    # Copies: a safetensors file cannot hold weights that share memory.
    weights = {name: t.clone() for name, t in net.state_dict().items() if isinstance(t, Tensor)}
    reset = _reset_broken_statistics(net, weights)
    save_weights(weights, folder / "model.safetensors")
    batch = {"images": images, "labels": labels, "indices": indices}
    save_weights({name: tensor for name, tensor in batch.items() if tensor is not None}, folder / "batch.safetensors")
    if optimizer is not None:
        save_state(optimizer.state_dict(), folder / "optimizer.safetensors")
    told = {
        "step": step, "place": found.place, "layer": found.layer, "samples": list(found.samples),
        "images": [] if indices is None else [int(indices[k]) for k in found.samples],
        "parameters": [] if optimizer is None else  # as the gradients are a later step's
                      [name for name, p in net.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()],
        "found": str(found), "micro_batches": sizes, "micro_batches_missing": num_missing,
        "autocast": str(dtype).removeprefix("torch.") if dtype else "", "buffers_reset": reset,
    }  # fmt: skip
    write_atomically(folder / "incident.json", (json.dumps(told, indent=2) + "\n").encode())
    return folder


def _reset_broken_statistics(net: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Norm layers' running statistics that are not finite, as at the start; other buffers may hold Inf for good, as masks do."""
    reset = []
    for place, module in net.named_modules():
        if isinstance(module, _NormBase):
            for statistic, value in (("running_mean", 0.0), ("running_var", 1.0)):
                name = f"{place}.{statistic}".strip(".")
                if name in weights and not torch.isfinite(weights[name]).all():
                    weights[name].fill_(value)
                    reset.append(name)
    return reset


def _floats(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _bad_samples(tensor: Tensor) -> tuple[int, ...]:
    """Places along the first axis that hold a number that is not finite."""
    if not tensor.is_floating_point() or tensor.ndim == 0:
        return ()
    good = torch.isfinite(tensor.detach()).reshape(len(tensor), -1).all(1)
    return () if bool(good.all()) else tuple(torch.nonzero(~good).flatten().tolist())


def load_incident(run: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(weights, batch, incident.json) of an incident; raises InputError where there is none."""
    folder = run / "incidents" / f"step-{step:08d}"
    if not folder.is_dir():
        known = sorted(path.name for path in (run / "incidents").glob("step-*"))
        raise InputError(f"{run} has no incident of step {step}; it has {', '.join(known) or 'none'}")
    told = Run(run).incident(step)
    if told is None:
        raise InputError(f"{folder} is not whole: it has no incident.json, so name another step")
    return load_weights(folder / "model.safetensors"), load_weights(folder / "batch.safetensors"), told
