"""A step whose gradients are not finite: where it went wrong, in which samples, and all that is needed to do it again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from cifarlab.checkpoint import load_weights, save_weights
from cifarlab.config import InputError
from cifarlab.probes.fixed_batch import measuring, unwrap
from cifarlab.runs import write_atomically

Criterion = Callable[[Tensor, Tensor], Tensor]
MOST = 3  # incidents kept of a run: the first are the ones that matter


@dataclass(frozen=True)
class Located:
    """Where numbers first stopped being finite in a step.

    place: "input", "forward", "loss" or "backward"; layer: the first bad module, in backward the parameter where it began;
    samples: places in the batch whose numbers are bad there (of "backward": none can be told from a mean over the batch).
    """

    place: str
    layer: str
    samples: tuple[int, ...]

    def __str__(self) -> str:
        which = f", samples {', '.join(map(str, self.samples[:8]))}{' …' if len(self.samples) > 8 else ''} of the batch"
        return f"first in the {self.place}{f' at {self.layer}' if self.layer else ''}{which if self.samples else ''}"


def locate(model: nn.Module, images: Tensor, labels: Tensor | None = None, criterion: Criterion | None = None) -> Located:
    """Finds the first number that is not finite, by a forward pass of the batch with every module's output looked at.

    The pass is as in training, but for dropout, which is off. Where inputs, outputs and loss are all finite, the trouble began in
    the backward pass: then the answer is the last parameter, in the network's order, whose gradient is bad.
    """
    if samples := _bad_samples(images):
        return Located("input", "", samples)
    found: list[Located] = []

    def look(name: str, inputs: Any, output: Any) -> None:
        samples = sorted({k for t in _floats(output) for k in _bad_samples(t)})
        if samples and not found and not any(_bad_samples(t) for t in _floats(inputs)):
            found.append(Located("forward", name, tuple(samples)))

    with torch.no_grad(), measuring(model) as net:
        handles = [module.register_forward_hook(lambda _, inputs, output, name=name: look(name, inputs, output))
                   for name, module in net.named_modules()]  # fmt: skip
        try:
            logits = net(images)
        finally:
            for handle in handles:
                handle.remove()
    if found:
        return found[0]
    if labels is not None and criterion is not None:
        each = [k for k in range(len(images)) if not torch.isfinite(criterion(logits[k : k + 1], labels[k : k + 1]))]
        if each:
            return Located("loss", "", tuple(each))
    bad = [name for name, p in unwrap(model).named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return Located("backward", bad[-1] if bad else "", ())


def save_incident(run: Path, step: int, model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor | None = None, *,
                  criterion: Criterion | None = None, indices: Tensor | None = None) -> Path | None:  # fmt: skip
    """Writes `incidents/step-…`: weights and optimizer state before the update, the batch, and what `locate` found.

    incident.json names the first bad layer and the samples: their place in the batch, and by `indices` in the training set.
    None, and nothing written, when the run has MOST incidents already, or when the weights are broken already: then it was an
    earlier step.
    """
    folder = run / "incidents" / f"step-{step:08d}"
    if len(list(folder.parent.glob("step-*"))) >= MOST or not all(torch.isfinite(p).all() for p in model.parameters()):
        return None
    found = locate(model, images, labels, criterion)
    folder.mkdir(parents=True, exist_ok=True)
    net = unwrap(model)
    # Copies: a safetensors file cannot hold weights that share memory.
    save_weights({name: t.clone() for name, t in net.state_dict().items() if isinstance(t, Tensor)}, folder / "model.safetensors")
    batch = {"images": images, "labels": labels, "indices": indices}
    save_weights({name: tensor for name, tensor in batch.items() if tensor is not None}, folder / "batch.safetensors")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    told = {
        "step": step, "place": found.place, "layer": found.layer, "samples": list(found.samples),
        "images": [] if indices is None else [int(indices[k]) for k in found.samples],
        "parameters": [name for name, p in net.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()],
        "found": str(found),
    }  # fmt: skip
    write_atomically(folder / "incident.json", (json.dumps(told, indent=2) + "\n").encode())
    return folder


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
    told = json.loads((folder / "incident.json").read_bytes())
    return load_weights(folder / "model.safetensors"), load_weights(folder / "batch.safetensors"), told
