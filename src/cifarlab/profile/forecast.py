"""How long a training will take on this machine, from a few measured steps."""

import copy
import time

import torch
import torch.nn.functional as F
from torch import nn

from cifarlab.config import TrainConfig


def measure_step(model: nn.Module, config: TrainConfig, shape: tuple[int, ...], num_classes: int, images: int,
                 device: torch.device, *, budget: float = 3.0) -> float:  # fmt: skip
    """Seconds of forward + backward for `images` images of that shape (C, H, W), the median of up to five passes.

    Done on a copy with random images, one micro-batch at a time; stops after `budget` seconds, with at least one pass
    behind a warm-up pass. torch.compile, augmentation and the optimizer are not in it.
    """
    piece = min(images, config.micro_batch_size or images)
    model = copy.deepcopy(model).train()
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    inputs = torch.randn(piece, *shape, device=device).contiguous(memory_format=memory_format)
    labels = torch.randint(num_classes, (piece,), device=device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]

    def one_pass() -> float:
        begun = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=config.precision != "fp32"):
            loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        loss.item()  # waits for a GPU
        return time.perf_counter() - begun

    end = time.perf_counter() + budget
    one_pass()
    measured = [one_pass()]
    while len(measured) < 5 and time.perf_counter() < end:
        measured.append(one_pass())
    return sorted(measured)[len(measured) // 2] * images / piece
