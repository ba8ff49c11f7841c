"""How far batch norm's running statistics, which evaluation uses, are from those of a batch, which training uses."""

from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cifarlab.probes.listener import Listener

COLUMNS = ("mean_shift", "variance_ratio")


class NormStatistics(Listener):
    """rms over channels of (running mean − batch mean)/batch std, and the median of running variance/batch variance

    One row for each batch norm that keeps running statistics, on a fixed batch; of one that is called twice also a row `name#2`.
    Cost: two reductions of each norm's input.

    How to read: a shift below 0.3 and a ratio within 0.5 … 2 are usual; the first ten steps, in which the averages still
    remember their start, are not. Values that stay beyond 1, or 0.25 … 4, mean that the network is evaluated as another one than
    was trained: weights move faster than the averages follow (lower learning rate, higher momentum of the norm), batches
    too small, or training images unlike the ones measured.

    Source: running against batch statistics, Ioffe 2017 (batch renormalisation), arXiv:1702.03275.
    """

    columns = COLUMNS

    def _attach(self, model: nn.Module, stack: ExitStack) -> None:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                stack.callback(module.register_forward_pre_hook(lambda m, given, name=name: self._note(name, m, given[0])).remove)

    def _note(self, name: str, norm: nn.Module, inputs: Tensor) -> None:
        assert isinstance(norm, _BatchNorm)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        values, others = inputs.detach().float(), [axis for axis in range(inputs.ndim) if axis != 1]
        mean = values.mean(others, keepdim=True)
        # By hand and in place, as torch's var_mean takes six times as long on a CPU.
        variance = (values - mean).square_().sum(others) / (values.numel() / values.shape[1] - 1)
        mean = mean.flatten()
        scale = (variance + norm.eps).sqrt()
        shift = ((norm.running_mean - mean) / scale).square().mean().sqrt()
        ratio = ((norm.running_var + norm.eps) / (variance + norm.eps)).median()
        calls = sum(item.rpartition("#")[0] == name or item == name for item in self.items)
        self._add(f"{name}#{calls + 1}" if calls else name, torch.stack([shift, ratio]))
