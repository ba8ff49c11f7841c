"""Freed memory that is kept for the next step, where a CPU trains and the C library is glibc."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # numbers of malloc.h
MOST = 2**31 - 1  # bytes on top of the heap before any are given back: the largest that mallopt takes


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Has glibc keep what is freed, instead of giving it back to the system and fetching it again; elsewhere nothing.

    By itself glibc takes every block above 32 MB from the system anew and gives the top of its heap back, so that the
    activations of each step come as new pages: 74,000 page faults a step of SimpleCNN at batch 128, 46,000 of ResNet-18 at 64.
    Kept, there are none or a few thousand, and a step takes 4 to 14 % fewer processor seconds (docs/performance.md). What the
    process has held at most it holds until the end of the block.

    Afterwards the memory goes back to the system. The thresholds are then those that glibc's own adjustment comes to in a program
    with large blocks, 32 and 64 MB: its adjustment itself cannot be switched on again.
    """
    libc = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if libc is None or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, MOST)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, 65_536)
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)
