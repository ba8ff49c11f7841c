"""What several tests share: a tiny network, and the real data where it is at hand."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is: the passes for GPUs, on a CPU


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded data goes to a folder of this test session, also in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFARLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.delenv("CIFARLAB_DATA", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The suite works in an empty folder: a path that a test forgets to name leads to no folder of the user's."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


@pytest.fixture(autouse=True)
def nothing_is_left(own_place: Path) -> Iterator[None]:
    """Tests write below tmp_path: what one leaves where it was started fails it."""
    yield
    left = [path.name for path in own_place.iterdir()]
    for name in left:  # the next test is not to be blamed for it
        path = own_place / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert not left, f"left in the folder where the tests were started: {left}"


@pytest.fixture
def tiny() -> Iterator[str]:
    """Name of a network that trains in milliseconds: strided convolution, batch norm, dropout, linear."""
    sys.path.insert(0, str(PROJECT / "tests"))
    import tiny_models

    yield from tiny_models.registered()
    sys.path.remove(str(PROJECT / "tests"))


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Probes measure a CPU's tensors by the passes for GPUs, in triton's interpreter."""
    import numpy as np

    pytest.importorskip("triton")
    from cifarlab.probes import incident, moments
    from cifarlab.probes.moments_triton import Passes

    monkeypatch.setattr(moments, "_library", lambda: None)
    monkeypatch.setattr(Passes, "rows", 2)  # else it would take a million entries to need more than one round
    for module in (moments, incident):
        monkeypatch.setattr(module, "gpu_passes", lambda device: Passes)
    with np.errstate(over="ignore", invalid="ignore"):  # the interpreter computes with numpy
        yield


@pytest.fixture(params=["known at once", "known at the flush", "known at the flush, by Triton"])
def is_late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether probes learn only at a flush what they have measured, as on a GPU, with its passes too."""
    from cifarlab.probes.panel import Panel

    if "Triton" in request.param:
        request.getfixturevalue("by_triton")
    late = "flush" in request.param
    monkeypatch.setattr(Panel, "_knows_at_once", not late)
    return late


@pytest.fixture
def host_waits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context that finds what makes Python wait for a GPU, while its `is_on`: operations whose results Python needs, and
    numbers that Python hands over."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class HostWaits(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.is_on, self.found = False, set[str]()

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
            name, kinds = str(function), ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")
            if self.is_on and any(kind in name for kind in kinds):
                self.found.add(name)
            return function(*arguments, **(settings or {}))

    make = torch.tensor

    def made(*arguments: Any, **settings: Any) -> Any:
        if waits.is_on:
            waits.found.add("torch.tensor")
        return make(*arguments, **settings)

    waits = HostWaits()
    monkeypatch.setattr(torch, "tensor", made)
    with waits:
        waits.is_on = True
        bool(torch.tensor([1.0]).sum())
        assert waits.found == {"aten._local_scalar_dense.default", "torch.tensor"}
        waits.is_on = False
    waits.found.clear()
    return waits


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real CIFAR images, or a skip."""
    folder = Path(os.environ.get("CIFARLAB_TEST_DATA") or PROJECT.parent / "shared" / "data")
    if not (folder / "cifar10-jpeg").is_dir():
        pytest.skip(f"no real CIFAR data at {folder}: set CIFARLAB_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, or a skip that says what is missing."""
    sys.path.insert(0, str(PROJECT / "tests"))
    from browser import open_browser

    sys.path.remove(str(PROJECT / "tests"))
    yield from open_browser()
