"""Parameters and multiply-adds of a network, counted without doing the arithmetic."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one forward pass on one input of that shape (C, H, W): convolutions, linear layers and matrix products.

    One multiply-add is two FLOP. Counted on a copy on the meta device, which neither allocates nor computes; the model is
    not touched. Batch norm, activations, pooling and additions are not in it.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, *input_shape, device="meta"))
    return counter.get_total_flops() // 2
