"""A training step that does not fit into memory: which part of it would, tried out before the run is given up."""

import copy
import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from cifarlab.config import Failure, TrainConfig
from cifarlab.data.batches import Batches
from cifarlab.distributed import autocast
from cifarlab.optim.optimizers import build_optimizer

SAYINGS = ("out of memory", "DefaultCPUAllocator: can't allocate", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""Of errors that are no torch.OutOfMemoryError: of the CPU's allocator, of Apple GPUs, and of libraries beneath torch."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory, or the machine's, was not enough."""
    said = isinstance(error, RuntimeError) and any(saying in str(error) for saying in SAYINGS)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def memory_explained(config: TrainConfig, model: nn.Module, batches: Batches) -> Iterator[None]:
    """Where the block runs out of memory, tries smaller steps and raises Failure, which says how many images would fit.

    Found out by trying, and not by counting: what a step needs depends on kernels, their workspaces and how memory is cut up.
    A step is tried on a copy of the network with a new optimizer, of half as many images each time; it takes some seconds.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations of the step that did not fit
        where = str(batches.device) if batches.device.type != "cpu" else "this machine"
    whole = config.micro_batch_size or -(-batches.images_at(1) // batches.world_size)
    size = whole
    while size and not _fits(size, config, model, batches):
        size = size // 2 if size > 2 else 0  # batch norm cannot train on a single image
    told = f"{where} ran out of memory in a step of {whole:,} images at once"
    if not size:
        raise Failure(f"{told}, and not even 2 would fit: choose a smaller --model, another --device, or end what else holds its "
                      "memory")  # fmt: skip
    if size == whole:
        raise Failure(f"{told}, which does fit when nothing else is there: end what else holds its memory, and continue the run "
                      "with --resume")  # fmt: skip
    raise Failure(f"{told}, but {size:,} would fit (tried just now): start anew with --micro-batch-size {size}, which takes the "
                  f"same steps in pieces, or with --batch-size {size * batches.world_size}")  # fmt: skip


def _fits(size: int, config: TrainConfig, model: nn.Module, batches: Batches) -> bool:
    gc.collect()
    if batches.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        net = copy.deepcopy(model).train()
        optimizer = build_optimizer(net, config)
        optimizer.zero_grad(set_to_none=True)
        images = torch.zeros(size, 3, batches.height, batches.width, device=batches.device)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(batches.device, config.precision):
            loss = F.cross_entropy(net(images).float(), torch.zeros(size, dtype=torch.int64, device=batches.device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if batches.device.type == "cuda":
            torch.cuda.synchronize(batches.device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        return False
    return True
