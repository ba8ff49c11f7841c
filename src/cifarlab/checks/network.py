"""Mistakes that show in a network itself, found by what it does with an image: any nn.Module, whatever its layers are called."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, SequentialLR

from cifarlab.checks.remark import Remark
from cifarlab.config import InputError
from cifarlab.distributed import unwrap
from cifarlab.profile.counting import random_states_kept

SMALL = 64  # pixels: sides of images for which ImageNet's stems were not made
SHRUNK = 4  # times smaller before the second convolution


def check_network(model: nn.Module, shape: tuple[int, ...], fields: tuple[str, ...] = ()) -> list[Remark]:
    """What one forward pass of two images of that shape (C×H×W) shows: the stem, and whether the outputs are logits.

    The model comes back as it was. Cost: a forward pass. Raises InputError where it cannot take such images.
    """
    net = unwrap(model)
    convolutions: list[tuple[str, nn.Conv2d, int]] = []
    names = {module: name for name, module in net.named_modules()}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        assert isinstance(module, nn.Conv2d)
        convolutions.append((names[module], module, int(inputs[0].shape[-1])))

    weight = next(iter(net.parameters()), torch.zeros(()))
    handles = [module.register_forward_hook(note) for module in names if isinstance(module, nn.Conv2d)]
    flags = [(module, module.training) for module in names]
    try:
        with random_states_kept(weight.device), torch.no_grad():
            for module, _ in flags:
                module.training = False
            images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
            outputs = net(images)
    except (RuntimeError, ValueError, TypeError) as error:
        told, images_are = " ".join(str(error).split())[:160], "×".join(map(str, shape))
        raise InputError(f"the model takes no images of shape {images_are} ({told}): give shape=(C, H, W)") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags:
            module.training = flag
    return [remark for remark in (_stem(convolutions, shape[-1], fields), _outputs(outputs, names, fields)) if remark]


def _stem(convolutions: list[tuple[str, nn.Conv2d, int]], side: int, fields: tuple[str, ...]) -> Remark | None:
    """Small images are shrunk four times before the second convolution sees them, but not by a patch embedding."""
    if len(convolutions) < 2 or side > SMALL:
        return None
    name, first, _ = convolutions[0]
    second = convolutions[1][2]
    is_patches = first.kernel_size[0] <= int(first.stride[0]) > 1
    if side < SHRUNK * second or is_patches:
        return None
    kernel, stride = first.kernel_size[0], int(first.stride[0])
    return Remark(kind="mistake", rule="imagenet_stem", place=name or "the first convolution", fields=fields,
                  told=f"a stem for large images (here {kernel}×{kernel}, stride {stride}) leaves {second}×{second} of "
                       f"{side}×{side} pixels to the second convolution, which costs about 20 points",
                  remedy="use a 3×3 convolution of stride 1 and no pooling, such as --model resnet18")  # fmt: skip


def _outputs(outputs: Any, names: dict[nn.Module, str], fields: tuple[str, ...]) -> Remark | None:
    """The outputs are probabilities, or their logarithms, and cross-entropy takes logits."""
    if isinstance(outputs, dict):
        outputs = outputs.get("logits")
    elif isinstance(outputs, tuple | list) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2 or not torch.isfinite(outputs).all():
        return None
    outputs = outputs.cpu().double()
    soft = (nn.Softmax, nn.LogSoftmax)
    place = next((name for module, name in reversed(names.items()) if isinstance(module, soft)), "") or "the network's end"
    if outputs.min() >= 0 and (outputs.sum(1) - 1).abs().max() < 1e-4:
        least = math.log(1 + (outputs.shape[1] - 1) / math.e)
        return Remark(kind="mistake", rule="softmax_twice", place=place, fields=fields,
                      told=f"it ends in softmax, and cross-entropy takes another: the loss cannot fall below {least:.2f}",
                      remedy="give the logits")  # fmt: skip
    if outputs.max() <= 0 and outputs.logsumexp(1).abs().max() < 1e-4:
        return Remark(kind="note", rule="softmax_twice", place=place, fields=fields,
                      told="it ends in log-softmax, and cross-entropy takes another: the same loss, the work done twice",
                      remedy="give the logits, or use the NLL loss")  # fmt: skip
    return None


def check_training(model: nn.Module, optimizer: Optimizer | None = None, scheduler: LRScheduler | None = None, *,
                   num_steps: int = 0, steps_per_epoch: int = 0) -> list[Remark]:  # fmt: skip
    """What somebody's own optimizer and scheduler show, beside `check_network`: decayed norms, a one-cycle of another length.

    num_steps: how often optimizer.step() will be called in the whole training; steps_per_epoch: in an epoch (0: not known).
    """
    remarks = []
    if optimizer is not None:
        norms = {id(p): name for name, module in unwrap(model).named_modules() if isinstance(module, _BatchNorm)
                 for p in module.parameters(recurse=False)}  # fmt: skip
        decayed = [norms[id(p)] for group in optimizer.param_groups if group.get("weight_decay")
                   for p in group["params"] if id(p) in norms]  # fmt: skip
        if number := len(set(decayed)):
            told = f"weight decay is on the parameters of {number} batch norm{'s' * (number > 1)}"
            remarks.append(Remark(kind="note", rule="norms_decay", place=decayed[0], remedy="put them in a group without it",
                                  told=told))  # fmt: skip
    for cycle, before in _cycles(scheduler) if num_steps else ():
        total, length = int(cycle.total_steps), num_steps - before
        if steps_per_epoch > 1 and abs(total + before - num_steps / steps_per_epoch) < 1:
            remarks.append(Remark(kind="mistake", rule="schedule_does_not_fit", place="OneCycleLR",
                                  told=f"its {total:,} steps are the epochs of this training, whose updates are {num_steps:,}",
                                  remedy=f"give total_steps={length} and call its step() after every update"))  # fmt: skip
        elif total != length:
            late = total > length
            what = "longer than the training, so the rate never comes down" if late else "over before the training ends"
            remarks.append(Remark(kind="mistake", rule="schedule_does_not_fit", place="OneCycleLR",
                                  told=f"{total:,} steps are {what}", remedy=f"give total_steps={length}"))  # fmt: skip
    return remarks


def _cycles(scheduler: LRScheduler | None) -> list[tuple[OneCycleLR, int]]:
    """(one-cycle, steps before it) of a scheduler, which may be the last of a sequence, after a warm-up."""
    if isinstance(scheduler, SequentialLR):  # torch has no public word for what one is made of
        return [(cycle, before + scheduler._milestones[-1]) for cycle, before in _cycles(scheduler._schedulers[-1])]
    return [(scheduler, 0)] if isinstance(scheduler, OneCycleLR) else []
