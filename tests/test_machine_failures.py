"""The machine fails a training: memory, disk, folder, another rank. One sentence, exit code 1, and the last checkpoint whole."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cifarlab as cl
from cifarlab.checkpoint import find_checkpoints, load_checkpoint
from cifarlab.cli import main
from cifarlab.config import Failure
from cifarlab.listing import read_listed
from cifarlab.models import MODELS
from cifarlab.runs import Run, write_atomically

TESTS = Path(__file__).parent
TRAIN = ["train", "quick", "--model", "tiny", "--train-images", "96", "--batch-size", "16", "--epochs", "2", "--no-forecast",
         "--progress", "none", "--log-every", "1", "--name", "run", "--no-figures"]  # fmt: skip


def failure(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What is said about a failure of the machine: the last line on stderr, no traceback, exit code 1."""
    assert main([str(argument) for argument in arguments]) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    last = told.splitlines()[-1]
    assert last.startswith("cifarlab: ")
    assert "--debug" not in last, "nobody has foreseen this"
    return last


# ---- memory --------------------------------------------------------------------------------------------------------------


def hungry(limit: int, error: Callable[[], Exception]) -> Callable[[int], nn.Module]:
    """A builder of the tiny net, which raises the error where it gets more images than that in training."""
    import tiny_models

    def refuse(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if module.training and len(inputs[0]) > limit:
            raise error()

    def build(num_classes: int) -> nn.Module:
        model = tiny_models.tiny(num_classes)
        model.register_forward_pre_hook(refuse)
        return model

    return build


ERRORS = {
    "torch's own": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "of the CPU": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    "of Python": MemoryError,
}


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_out_of_memory_says_which_batch_would_fit(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Callable[[], Exception]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", hungry(5, error))
    told = failure(capsys, *TRAIN, "--runs-dir", tmp_path)
    assert "ran out of memory in a step of 16 images at once, but 4 would fit (tried just now)" in told
    assert "--micro-batch-size 4" in told
    assert main([*TRAIN, "--runs-dir", str(tmp_path / "again"), "--micro-batch-size", "4"]) == 0  # what it says is true


@pytest.mark.parametrize(("limit", "told"), [(0, "not even 2 would fit"), (16, "does fit when nothing else is there")])
def test_out_of_memory_whatever_the_batch(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], limit: int, told: str
) -> None:
    monkeypatch.setitem(MODELS, "tiny", hungry(limit, ERRORS["torch's own"]))
    if limit:  # another program took the memory for a moment
        def refuse(*_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(import_module("cifarlab.train"), "read_rows", refuse)
    assert told in failure(capsys, *TRAIN, "--runs-dir", tmp_path)


def test_out_of_memory_outside_the_steps_is_said(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the set of images itself does not fit, no step can be tried."""

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")

    monkeypatch.setattr(import_module("cifarlab.train"), "Batches", refuse)
    told = failure(capsys, *TRAIN, "--runs-dir", tmp_path)
    assert told.startswith("cifarlab: there is not enough memory (CUDA out of memory): end what else holds it, or take a smaller")
    assert not list(tmp_path.iterdir())  # nor is a folder left behind


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", hungry(0, lambda: RuntimeError("shapes do not match")))
    assert main([*TRAIN, "--runs-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "cifarlab: RuntimeError: shapes do not match (--debug shows where)"


# ---- a full disk ---------------------------------------------------------------------------------------------------------


@contextmanager
def full(size: int) -> Iterator[None]:
    """No file may grow beyond that many bytes: to write(), what a full disk is, with a reason of its own (EFBIG)."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def when(monkeypatch: pytest.MonkeyPatch, place: str, name: str, size: int) -> list[Any]:
    """Wraps cifarlab.PLACE.NAME so that the disk is full while it runs; the list tells how often it ran."""
    module, calls = import_module(f"cifarlab.{place}"), []
    original = getattr(module, name)

    def limited(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        with full(size):
            return original(*arguments, **keywords)

    monkeypatch.setattr(module, name, limited)
    return calls


@pytest.mark.parametrize("name", ["save_evaluation", "save_samples", "save_weights"])
def test_a_disk_that_is_full_at_the_end_costs_nothing_but_a_resume(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with monkeypatch.context() as patch:
        assert not when(patch, "train", name, 100)
        told = failure(capsys, *TRAIN, "--runs-dir", tmp_path)
    written = {"save_evaluation": "predictions.npz", "save_samples": "samples.npz", "save_weights": "model.safetensors"}[name]
    assert f"{tmp_path / 'run' / written} could not be written" in told
    assert "(File too large): raise ulimit -f, then run the same again" in told
    run = Run(tmp_path / "run")
    assert not run.is_finished
    assert load_checkpoint(find_checkpoints(run.path / "checkpoints")[0])[1]["step"] == 12
    assert main(["train", "--resume", str(run.path), "--progress", "none", "--no-figures"]) == 0
    assert run.result["state"] == "finished"
    assert not list(run.path.rglob("*.tmp"))


def test_figures_and_trajectory_that_find_the_disk_full_do_not_end_a_run(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = when(monkeypatch, "train", "draw_recorded_figures", 100)
    monkeypatch.setattr(import_module("cifarlab.train"), "draw_run_figures", lambda *_: None)  # real ones take seconds
    monkeypatch.setattr("cifarlab.gallery.draw_training_figures", lambda run: write_atomically(run.path / "a.png", bytes(1000)))
    saved = when(monkeypatch, "train", "save_trajectory", 100)
    words = [word for word in TRAIN if word != "--no-figures"]
    assert main([*words, "--runs-dir", str(tmp_path), "--figures-every", "1", "--trajectory-every", "1"]) == 0
    assert (len(drawn), len(saved)) == (1, 3)
    told = capsys.readouterr().err
    assert told.count("the landscape of this run will lack that step") == 3
    assert "not all figures could be drawn (OSError: [Errno 27] File too large" in told
    assert Run(tmp_path / "run").result["state"] == "finished"


@pytest.mark.parametrize("size", [0, 100, 4000])
def test_a_disk_that_is_full_from_the_start_is_said(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    """At 0 bytes not even the config can be written; nothing is left that would be in the way of the next try."""
    cl.load_dataset("digits")  # so that it is in the cache
    with full(size):
        assert "(File too large)" in failure(capsys, *TRAIN, "--runs-dir", tmp_path)
    words = ["train", "--resume", str(tmp_path / "run")] if size > 100 else [*TRAIN, "--runs-dir", str(tmp_path)]
    assert main([*words, "--progress", "none", "--no-figures"]) == 0


@contextmanager
def without_rights() -> Iterator[None]:
    """Root may write everywhere: what it does here, it does as nobody."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_may_only_be_read_is_said(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module("cifarlab.train")
    original = module.open_run

    def limited(*arguments: Any) -> Any:  # only here: Python's own modules may be root's
        with without_rights():
            return original(*arguments)

    monkeypatch.setattr(module, "open_run", limited)
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary) / "kept"
        kept.mkdir()
        (kept / "config.json").write_text(json.dumps(cl.TrainConfig(data="digits", model="tiny").to_dict()))
        for path in (kept, kept.parent):
            path.chmod(0o555)
        try:
            for words in ([*TRAIN, "--runs-dir", temporary], ["train", "--resume", str(kept), "--no-forecast"]):
                assert main(words) == 2
                told = capsys.readouterr().err
                assert told.startswith(f"cifarlab: run folder {temporary}")
                assert told.endswith(" cannot be written (Permission denied): choose another --runs-dir\n")
            with without_rights():
                assert read_listed(kept).state == "interrupted"  # but it may be looked at
        finally:
            for path in (kept.parent, kept):
                path.chmod(0o755)
        assert [path.name for path in kept.parent.rglob("*")] == ["kept", "config.json"]


def test_a_cache_that_finds_the_disk_full_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CIFARLAB_CACHE", str(tmp_path / "cache"))
    with full(10_000):
        assert len(cl.load_dataset("digits").train) == 1437
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "decoded images are not kept, because" in told
    assert not list((tmp_path / "cache").rglob("*.building-*"))


def test_a_download_that_finds_the_disk_full_keeps_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, there = tmp_path / "archive.tar.gz", tmp_path / "there"
    archive.write_bytes(bytes(range(256)) * 400)
    with full(10_000):
        told = failure(capsys, "data", "cifar10", "--data-dir", there, "--data-url", archive.as_uri())
    assert f"CIFAR-10 does not fit into {there / 'from-url'} (File too large): make room there" in told
    parts = [path for path in (there / "from-url").iterdir() if path.stat().st_size]
    assert [path.suffix for path in parts] == [".part"]
    assert archive.read_bytes().startswith(parts[0].read_bytes())


# ---- a folder that goes away ---------------------------------------------------------------------------------------------


def test_a_run_whose_folder_is_moved_ends_and_goes_on_from_there(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    calls = 0

    def move(module: nn.Module, _: tuple[Tensor, ...]) -> None:
        nonlocal calls
        calls += module.training
        if calls == 8 and module.training:
            path.rename(elsewhere)

    def build(num_classes: int) -> nn.Module:
        import tiny_models

        model = tiny_models.tiny(num_classes)
        model.register_forward_pre_hook(move)
        return model

    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "tiny", build)
        told = failure(capsys, *TRAIN, "--runs-dir", tmp_path, "--save-every", "0.5")
    assert f"run folder {path} was moved or removed while its run was running" in told
    assert calls == 8  # and did not train on for nobody
    assert main(["train", "--resume", str(elsewhere), "--progress", "none", "--no-figures"]) == 0
    assert Run(elsewhere).metrics["train/loss"].size == 12


# ---- another rank --------------------------------------------------------------------------------------------------------


def test_a_rank_that_dies_ends_the_others_with_a_sentence(tiny: str, tmp_path: Path) -> None:
    """By SIGKILL in its 8th update, as the system's lack of memory does it; the other does not wait for gloo's half hour."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = cl.TrainConfig(data="digits", model="tiny", train_images=96, batch_size=16, epochs=2, lr=0.05)
    watch: dict[str, Any] = dict(runs_dir=str(tmp_path), name="run", progress="none", forecast=False, figures=False,
                                 save_every=0.5)  # fmt: skip
    group = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(TESTS / "tiny_models.py"), json.dumps(config.to_dict()), json.dumps(watch)]
    survivor = subprocess.Popen(command, env=group | {"RANK": "0"}, stderr=subprocess.PIPE, text=True)
    dying = subprocess.Popen([*command, "8"], env=group | {"RANK": "1"}, stderr=subprocess.DEVNULL)
    assert dying.wait(timeout=100) == -signal.SIGKILL
    gone = time.monotonic()
    _, told = survivor.communicate(timeout=100)
    assert time.monotonic() - gone < 60
    assert survivor.returncode == 1
    assert "cifarlab.config.Failure: rank 0 has lost another of the 2 ranks" in told
    newest = find_checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert load_checkpoint(newest)[1]["step"] == 6
    resumed = cl.train(config, cl.WatchConfig(**(watch | {"name": "", "resume": "auto"})))
    assert resumed.result["step"] == 12


def test_a_failure_is_no_bad_input() -> None:
    assert not issubclass(Failure, ValueError)
