"""Optimizers from a config, and setting what a schedule says."""

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from cifarlab.config import TrainConfig
from cifarlab.optim.muon import Muon


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """PyTorch's SGD, Adam, AdamW or RMSprop, or Muon, over the model's trainable parameters, with the config's settings.

    One group, or as many as their settings differ in: tensors of one axis (norms, biases) have a learning rate of their own with
    `bias_lr` and no decay where `decay_norms` is False; the last linear layer's weights have one with `head_lr`. A group's
    "lr_factor" is what the schedule's rate is multiplied by. Muon makes the updates of all matrices orthogonal but the last
    linear layer's; a convolution's kernel is one, outputs × the rest.
    Build it when the model is already on its device and in its memory order (channels_last): kernels are chosen by device, and
    state is laid out like the weights.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    head = next((m.weight for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    by_settings: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for param in params:
        is_vector = param.ndim <= 1
        decay = config.weight_decay if config.decay_norms or not is_vector else 0.0
        factor = config.bias_lr if is_vector else config.head_lr if param is head else 1.0
        is_matrix = config.optimizer == "muon" and not is_vector and param is not head
        by_settings.setdefault((decay, factor, is_matrix), []).append(param)
    groups = [{"params": those, "weight_decay": decay, "lr": config.lr * factor}
              | ({"lr_factor": factor} if factor != 1 else {}) | ({"is_matrix": True} if is_matrix else {})
              for (decay, factor, is_matrix), those in by_settings.items()]  # fmt: skip
    # One fused kernel per step. For ResNet-18's 62 tensors on 2 CPU cores (torch 2.13): SGD, Adam, AdamW 5, 8, 7 ms;
    # foreach 15, 54, 37 ms; a loop over tensors 35, 42, 37 ms. There is none for RMSprop (foreach 34 ms, loop 26 ms on a
    # CPU): PyTorch then chooses, foreach on CUDA and the loop elsewhere. Fused results repeat bit for bit.
    fused = True if all(p.device.type in ("cpu", "cuda") for p in params) else None
    betas = (config.beta1, config.beta2)
    optimizer: Optimizer
    match config.optimizer:
        case "sgd":
            optimizer = SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)
            if config.precision == "fp16" and config.momentum:
                # Where a scaler skips the first step, fused SGD keeps a momentum that was never written (torch 2.13). From
                # zeros, the first step that is made is bitwise what it would have been.
                for param in params:
                    optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
        case "adam":
            optimizer = Adam(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
        case "adamw":
            optimizer = AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)
        case "rmsprop":
            optimizer = RMSprop(groups, lr=config.lr, alpha=config.alpha, eps=config.eps, momentum=config.momentum)
        case "muon":
            optimizer = Muon(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, steps=config.muon_steps,
                             renormalize=config.renormalize,
                             dtype=torch.bfloat16 if config.precision == "bf16" else None)  # fmt: skip
    optimizer.register_load_state_dict_post_hook(_lay_out_like_weights)
    return optimizer


def set_lr(optimizer: Optimizer, lr: float, momentum: float | None = None) -> None:
    """Sets the learning rate (times the group's factor), and momentum (Adam: beta1) unless None, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)
        if momentum is not None and "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif momentum is not None:
            group["momentum"] = momentum


def was_skipped(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> torch.Tensor | float:
    """1 where the fp16 scaler is about to skip this update, because a gradient is not finite, else 0; on the device.

    Call it between the scaler's `unscale_` and `step`. Its public word for it, the scale before and after, would make the loop
    wait for a GPU at every step.
    """
    if not scaler.is_enabled():
        return 0.0
    found = scaler._found_inf_per_device(optimizer)  # so in torch 2.6 to 2.13
    return torch.stack(list(found.values())).max() if found else 0.0


def _lay_out_like_weights(optimizer: Optimizer) -> None:
    """Gives loaded state the memory order of its weights.

    The fused CPU kernels walk weight, gradient and state side by side in memory without looking at strides (torch 2.13). State
    that lost its channels_last order on disk (safetensors keeps no strides) would be applied to the wrong weights, silently;
    and state of another size would be read and written beyond its end. Raises ValueError for that.
    """
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != param.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} does not belong to a weight of {tuple(param.shape)}")
            if isinstance(value, torch.Tensor) and value.shape == param.shape and value.stride() != param.stride():
                state[name] = torch.empty_like(param, dtype=value.dtype).copy_(value)
