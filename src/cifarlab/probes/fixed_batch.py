"""A batch that stays the same through a training run, and measuring on it without a trace."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from cifarlab.config import InputError
from cifarlab.distributed import unwrap as unwrap
from cifarlab.profile.counting import random_states_kept


@dataclass(frozen=True, eq=False)
class FixedBatch:
    """Images with their labels, and the loss of the training that is looked at: criterion(logits, labels) -> mean loss, 0-d.

    images: N×C×H×W, or any tensor the model takes whose first axis is the samples; labels: what the criterion takes, of as many
    samples. Both on the model's device and in its memory order. The criterion must be a mean over samples; one with weights per
    class is not quite, since each piece of a batch then has its own divisor.

    Raises InputError when there are no images, or another number of labels.
    """

    images: Tensor
    labels: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def __post_init__(self) -> None:
        if len(self.images) == 0 or len(self.images) != len(self.labels):
            raise InputError(f"a fixed batch of {len(self.images)} images and {len(self.labels)} labels cannot be measured on: "
                             "give as many labels as images, at least one")  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def loss(self, net: nn.Module) -> Tensor:
        """The mean loss, 0-d, of a net within `measuring`."""
        return self.criterion(net(self.images), self.labels)

    def split(self, num_pieces: int) -> list["FixedBatch"]:
        """That many consecutive pieces, whose sizes differ by one at most.

        Raises InputError when there are fewer images than pieces.
        """
        if not 1 <= num_pieces <= len(self):
            raise InputError(f"num_pieces={num_pieces} cannot be used with {len(self)} images: it must be from 1 to {len(self)}")
        pieces = zip(self.images.tensor_split(num_pieces), self.labels.tensor_split(num_pieces), strict=True)
        return [dataclasses.replace(self, images=images, labels=labels) for images, labels in pieces]


class _Buffer(NamedTuple):
    """A module's buffer, a copy of what is in it, and torch's count of the writes to it."""

    module: nn.Module
    name: str
    buffer: Tensor
    values: Tensor
    version: int

    @torch.no_grad()
    def restore(self) -> None:
        current = self.module._buffers.get(self.name)
        if current is not self.buffer and current is not None and current.shape == self.buffer.shape:
            self.module._buffers[self.name] = self.buffer
        if self.buffer._version != self.version:
            self.buffer.copy_(self.values)


@contextmanager
def measuring(model: nn.Module) -> Iterator[nn.Module]:
    """The bare net to call, as it is in training but without chance and without a trace: `with measuring(model) as net`.

    Batch norm (and instance norm) works with the batch's own statistics and leaves its running ones alone; all else, dropout
    above all, is in eval mode. Two exceptions stay in eval mode too: SyncBatchNorm, as one rank measures alone, and a norm layer
    that is in eval mode in a model in training mode, as that one is frozen in training. Autocast is off, and what was compiled
    runs eagerly (compiled graphs cannot be differentiated twice).

    Afterwards, also after an error: training flags, buffers, the random states of Python, numpy and torch (CPU and the model's
    GPU) and of torch.Generators that are attributes of its modules are as before. Not so what a forward pass keeps in other
    places: a generator of its own elsewhere, plain attributes, and a buffer that it makes anew in another shape, which such
    attributes usually describe. Flags are set on the modules themselves, not by `train()`, which models may have overridden.
    Whether gradients are recorded is the caller's to say. Forward hooks on the model are called, as in any forward pass.

    Raises, from the call of the net, ValueError where batch norm is left with one value per channel.
    """
    net = unwrap(model)
    flags = [(module, module.training) for module in net.modules()]
    norms = [module for module, is_training in flags
             if isinstance(module, _BatchNorm | _InstanceNorm) and not isinstance(module, nn.SyncBatchNorm)
             and (is_training or not net.training)]  # fmt: skip
    tracking = [(norm, norm.track_running_stats) for norm in norms]
    buffers = [(norm, norm._buffers.copy()) for norm in norms if isinstance(norm, _InstanceNorm)]
    all_buffers = [_Buffer(module, name, buffer, buffer.clone(), buffer._version) for module, _ in flags
                   for name, buffer in module._buffers.items()
                   if buffer is not None and not (is_lazy(buffer) or buffer.is_inference())]  # fmt: skip
    generators = [(it, it.get_state()) for module, _ in flags for it in vars(module).values() if isinstance(it, torch.Generator)]
    device = next((weight.device for weight in net.parameters()), torch.device("cpu"))
    with ExitStack() as stack:
        stack.enter_context(random_states_kept(device))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; importing it takes seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module, _ in flags:
                module.training = False
            for norm in norms:
                norm.training = True
                norm.track_running_stats = False
            for norm, _ in buffers:  # instance norm hands its buffers over even so, to be written
                norm._buffers.update(dict.fromkeys(norm._buffers))
            yield net
        finally:
            for norm, kept in buffers:
                norm._buffers.update(kept)
            for kept_buffer in all_buffers:
                kept_buffer.restore()
            for generator, state in generators:
                generator.set_state(state)
            for norm, is_tracking in tracking:
                norm.track_running_stats = is_tracking
            for module, is_training in flags:
                module.training = is_training


def wide(tensor: Tensor) -> torch.dtype:
    """What a sum over many values is gathered in: float64, or float32 where a device has no wider one."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def dot(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """Σ aᵢbᵢ over pairs of tensors, 0-d: products in float32 at least, their sum in float64."""
    least = [torch.promote_types(one.dtype, torch.float32) for one in ones]
    sums = [(one.to(dtype) * other.to(dtype)).sum(dtype=wide(one)) for one, other, dtype in zip(ones, others, least, strict=True)]
    return torch.stack(sums).sum()
