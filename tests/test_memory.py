"""Freed memory that is kept: no page is fetched twice meanwhile, and all is given back afterwards."""

import platform
import subprocess
import sys

import pytest

import cifarlab.memory
from cifarlab.memory import freed_memory_kept

PROGRAM = """
import resource
import torch
from cifarlab.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 18)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

pages = (64 << 20) // resource.getpagesize()
faults()
assert faults() > pages / 2, "glibc has changed: it keeps such blocks by itself"
before = resident()
with freed_memory_kept():
    for _ in range(30):
        faults()  # small objects come to lie between the large ones: it takes some rounds until a hole fits
    assert sum(faults() for _ in range(5)) < pages / 100
    assert resident() > before + pages / 2
assert resident() < before + pages / 4
assert faults() > pages / 2
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these switches")
def test_pages_are_kept_inside_and_given_back_outside() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.delattr(cifarlab.memory.ctypes, "CDLL")
    with freed_memory_kept():
        pass
