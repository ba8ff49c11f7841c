"""What several tests share: a tiny network, and the real data where it is at hand."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded data goes to a folder of this test session, also in the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFARLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patch.delenv("CIFARLAB_DATA", raising=False)
        yield


@pytest.fixture
def tiny() -> Iterator[str]:
    """Name of a network that trains in milliseconds: strided convolution, batch norm, dropout, linear."""
    sys.path.insert(0, str(PROJECT / "tests"))
    import tiny_models

    yield from tiny_models.registered()
    sys.path.remove(str(PROJECT / "tests"))


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
