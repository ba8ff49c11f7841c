"""Averaged weights: an exponential moving average of a model, and batch-norm statistics that fit it."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifarlab.config import InputError


class WeightAverage:
    """w̄ ← d·w̄ + (1 − d)·w after each optimizer step, with d = min(decay, (1 + n)/(10 + n)) at update n = 1, 2, …

    `module` is the average: a copy of the model in eval mode, without gradients. Batch-norm's running mean and variance are
    averaged alike (they are float buffers); whole-number buffers (the count of batches) are copied. Averaged statistics belong
    to the averaged weights only roughly: `recompute_batch_norm(average.module, batches)` measures them, at the cost of forward
    passes.

    Give it the bare model, not its DDP or compiled wrapper, on its device and in its memory order. An update costs one pass
    over the weights and no device sync.

    Source: Polyak & Juditsky 1992 in the form usual for deep nets; the smaller decay at the start (so that the initial weights
    are soon forgotten) is that of TensorFlow's ExponentialMovingAverage with `num_updates`. Ours differs in averaging buffers
    too.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"decay={decay!r} cannot be used for WeightAverage: it must be a number from 0 to below 1")
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.num_updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model as it is now; the model is only read."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if never stopped."""
        return {"num_updates": self.num_updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        self.module.load_state_dict(state["module"])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def recompute_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Measures the batch-norm statistics anew: mean over all images of each batch's mean and (unbiased) variance.

    batches: normalised images, N×3×H×W, on the model's device. Two batches or more leave out the variance between batch means, as
    training does, so use the training batch size. Everything but batch norm stays in eval mode (no dropout); training flags and
    momenta are as before at the end, even after an error.

    Raises InputError when there are no images.

    Source: Izmailov et al. 2018 (SWA), arXiv:1803.05407. Ours differs from torch.optim.swa_utils.update_bn in weighting a smaller
    last batch by its images, and in keeping dropout off.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    training = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    num_images = 0
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
        for images in batches:
            num_images += len(images)
            for norm in norms:
                norm.momentum = len(images) / num_images  # 1, then such that every image so far weighs the same
            model(images)
    finally:
        for module, was_training in training:
            module.training = was_training
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if num_images == 0:
        raise InputError("recompute_batch_norm got no images to measure on: give it at least one batch of training images")
