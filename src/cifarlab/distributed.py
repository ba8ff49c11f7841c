"""Several processes that train as one: who am I, which slice is mine, and the few sums that all must agree on.

Started by `torchrun --nproc-per-node N -m cifarlab train …`, or by anything else that sets RANK, WORLD_SIZE, MASTER_ADDR
and MASTER_PORT. gloo on CPUs, NCCL on GPUs. Without those variables there is one process, and every method is the identity.
"""

import gc
import inspect
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cifarlab.config import Failure, InputError

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "Timed out waiting")
"""What gloo says of a rank that is gone, or does not answer for half an hour: torch has no type of error for it."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size` processes, and its device."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def check_sync_batch_norm(self, is_wanted: bool) -> None:
        """Raises InputError where batch norm cannot be synchronised; alone there is nothing to synchronise."""
        if is_wanted and self.world_size > 1 and self.device.type != "cuda":
            raise InputError("sync_batch_norm=True needs GPUs, where alone torch synchronises batch norm: turn it off here")

    def wrap(self, model: nn.Module, *, sync_batch_norm: bool) -> nn.Module:
        """The module to call in training: the same object when alone, DistributedDataParallel round it otherwise."""
        if self.world_size == 1:
            return model
        if sync_batch_norm:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        # Batch-norm buffers are not broadcast: each rank's own are kept, and rank 0's are the ones saved and evaluated.
        devices = [self.device] if self.device.type == "cuda" else None
        ddp = nn.parallel.DistributedDataParallel
        is_new = "forward_sync_buffers" in inspect.signature(ddp).parameters  # its name since torch 2.13
        keep_own: dict[str, Any] = {"forward_sync_buffers" if is_new else "broadcast_buffers": False}
        return ddp(model, device_ids=devices, **keep_own)

    def hold_gradients(self, module: nn.Module, hold: bool) -> AbstractContextManager[Any]:
        """Leaves the exchange of gradients to a later backward pass, for all but the last piece of an accumulated batch."""
        return module.no_sync() if hold and isinstance(module, nn.parallel.DistributedDataParallel) else nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def max(self, value: int) -> int:
        """The largest value on any rank; by gloo, so that no GPU is waited for."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def average_buffers(self, *models: nn.Module) -> None:
        """Gives every rank the mean of all ranks' floating-point buffers (batch-norm statistics), once for each model.

        Each rank has seen its own slices only; the mean is what evaluation and checkpoints use.
        """
        if self.world_size == 1:
            return
        for buffer in dict.fromkeys(buffer for model in models for buffer in model.buffers()):
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world_size


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile's wrapper, in any order.

    A model's own child that happens to be called `module` is not taken for one. FSDP's wrapper is left: its weights are shards.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _whole_number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.strip().isdecimal():
        raise InputError(f"{variable}={text!r} in the environment is no whole number: start with torchrun, or unset it")
    return int(text)


@contextmanager
def open_ranks(device: str) -> Iterator[Ranks]:
    """Joins the group of processes if there is one, and leaves it in order."""
    world_size, rank = _whole_number("WORLD_SIZE", 1), _whole_number("RANK", 0)
    if not 0 <= rank < world_size:
        raise InputError(f"RANK={rank} is not one of WORLD_SIZE={world_size} processes: start them with torchrun, or unset both")
    if world_size == 1:
        yield Ranks(pick_device(device))
        return
    ours = not dist.is_initialized()
    picked = pick_device(device)
    if picked.type == "cuda" and ":" not in device:
        picked = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if ours:
        dist.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo", rank=rank, world_size=world_size)
    try:
        yield Ranks(picked, rank, world_size)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(said in str(error) for said in LOST):
            raise
        why = " ".join(str(error).split())[:160]
        raise Failure(f"rank {rank} has lost another of the {world_size} ranks, whose own last words say more ({why}): the last "
                      "checkpoint is whole, so start all ranks again with --resume") from error  # fmt: skip
    finally:
        if ours:
            # Without this order, 7 of 62 launches aborted at interpreter exit after all work was done.
            gc.collect()
            dist.destroy_process_group()


def pick_precision(name: str, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """The precision of that name; `auto` is the fastest that the device computes in natively, bf16 before fp16.

    fp16 needs loss scaling and skips updates, so it is for GPUs without bf16 alone (a T4). A CPU without bf16 instructions
    (AVX512-BF16, AMX) emulates it, three times slower than fp32.
    """
    if name != "auto":
        return cast(Literal["fp32", "bf16", "fp16"], name)
    if has_native_bf16(device):
        return "bf16"
    return "fp16" if device.type == "cuda" else "fp32"


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 (Ampere GPUs and later; CPUs with AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Private names, of torch 2.6 and later alike; a torch without them is taken for a processor without the instructions.
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return device.type == "cpu" and any(ask() for ask in asked if ask)


def autocast_dtype(precision: str) -> torch.dtype | None:
    """In which autocast computes for that precision (fp32, bf16, fp16); None: fp32 is torch's plain way, without it."""
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which that precision (fp32, bf16, fp16) is computed on the device."""
    return autocast_to(device, autocast_dtype(precision))


def autocast_to(device: torch.device, dtype: torch.dtype | None, *, keeps_weights: bool = True) -> torch.autocast:
    """Autocast to that type (None: none). keeps_weights: a cast weight serves all passes within, as torch's default is; not where
    one pass is without gradients and another is not, which such a weight would take them from."""
    keeps = None if keeps_weights else False
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=keeps)


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device={name!r} is no device: use auto, cpu, cuda, cuda:0 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={name!r}: this torch ({torch.__version__}) sees no CUDA GPU; use --device cpu, "
                         "or install the CUDA build")  # fmt: skip
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device={name!r}: this machine has {torch.cuda.device_count()} GPU(s), numbered from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device={name!r}: torch finds no Apple GPU here; use --device cpu")
    if device.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device={name!r} is not supported: use auto, cpu, cuda, cuda:0 or mps")
    return device
