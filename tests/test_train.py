"""The loop: a resume is invisible, ranks are invisible, divergence is a result, and the test set chooses nothing."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cifarlab as cl
from cifarlab.checkpoint import find_checkpoints, load_checkpoint, load_weights
from cifarlab.cli import main
from cifarlab.config import InputError
from cifarlab.distributed import pick_precision
from cifarlab.models import MODELS
from cifarlab.runs import Run
from cifarlab.train import Interrupted

TESTS = Path(__file__).parent


def small(**changes: Any) -> cl.TrainConfig:
    """Twelve updates of the tiny net: two epochs of six."""
    settings: dict[str, Any] = dict(
        data="digits", model="tiny", train_images=96, batch_size=16, epochs=2, lr=0.05, weight_decay=1e-3
    )
    return cl.TrainConfig(**(settings | changes))


def quiet(folder: Path, **changes: Any) -> cl.WatchConfig:
    settings: dict[str, Any] = dict(runs_dir=folder, name="run", progress="none", forecast=False, figures=False, save_minutes=0)
    return cl.WatchConfig(**(settings | changes))


def timeless(run: Run) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in run.metrics.rows]


def assert_same(run: Run, other: Run) -> None:
    """Rows, weights and trainer state are the same, bit by bit."""
    assert timeless(run) == timeless(other)
    newest = [find_checkpoints(each.path / "checkpoints")[0] for each in (run, other)]
    (weights, trainer), (other_weights, other_trainer) = (load_checkpoint(path) for path in newest)
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights | other_weights)
    for each in (trainer, other_trainer):
        del each["state"]["seconds"], each["state"]["probe_seconds"]
    _assert_equal(trainer, other_trainer)


def _assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            _assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


RESUMED = {
    "sgd": {},
    "adam one-cycle, momentum cycled, averaged": dict(
        optimizer="adam", lr=1e-3, schedule="one-cycle", cycle_momentum=True, ema_decay=0.9
    ),
    "averaged, batch norm averaged too": {"ema_decay": 0.9, "ema_batch_norm": "average"},
    "mixup and cutmix": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0},
    "accumulated": {"micro_batch_size": 5},
    "fp16": {"precision": "fp16"},
    "validation": {"val_fraction": 0.2, "train_images": 0, "epochs": 0.2, "eval_every": 0.05},
    "muon, small images first": dict(
        optimizer="muon", nesterov=True, renormalize=True, bias_lr=8, micro_batch_size=5,
        small_sides="30:0.3,31:0.6", tta_share=0.1,
    ),
    "rmsprop, clipped, jitter": dict(optimizer="rmsprop", lr=1e-3, clip_value=0.1, clip_norm=1.0, hue=0.1, brightness=0.2),
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED.keys())
def test_a_resume_in_mid_epoch_is_invisible(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    from tiny_models import dies_at

    config = small(**changes)
    whole = cl.train(config, quiet(tmp_path / "whole"))
    save_every = 4 / whole.environment["steps_per_epoch"]
    pieces = -(-16 // (config.micro_batch_size or 16))
    monkeypatch.setitem(MODELS, "tiny", dies_at(7 * pieces, []))
    with pytest.raises(RuntimeError, match="power cut"):
        cl.train(config, quiet(tmp_path / "cut", save_every=save_every, log_every=3))
    cut = Run(tmp_path / "cut" / "run")
    assert not cut.is_finished
    assert find_checkpoints(cut.path / "checkpoints")[0].name == "step-00000004"
    monkeypatch.undo()
    resumed = cl.train(config, quiet(tmp_path / "cut", name="", resume=str(cut.path), save_every=save_every))
    assert resumed.path == cut.path
    assert_same(whole, resumed)


def test_a_resume_after_sigkill_is_invisible(tiny: str, tmp_path: Path) -> None:
    config = small()
    whole = cl.train(config, quiet(tmp_path / "whole"))
    watch = quiet(tmp_path / "killed", save_every=0.5, log_every=2)
    arguments = [json.dumps(config.to_dict()), json.dumps(vars(watch) | {"runs_dir": str(watch.runs_dir)})]
    died = subprocess.run([sys.executable, TESTS / "tiny_models.py", *arguments, "8"], timeout=120)
    assert died.returncode == -signal.SIGKILL
    killed = Run(tmp_path / "killed" / "run")
    assert not killed.is_finished
    with (killed.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lr": 0.0')  # a row that the kill tore
    resumed = cl.train(config, replace(watch, name="", resume="auto"))
    assert resumed.path == killed.path
    assert_same(whole, resumed)


def test_a_run_that_dies_before_its_first_checkpoint_starts_over_in_its_folder(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    whole = cl.train(config, quiet(tmp_path / "whole"))
    from tiny_models import dies_at

    watch = quiet(tmp_path / "killed", log_every=1)
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "tiny", dies_at(3, []))
        with pytest.raises(RuntimeError, match="power cut"):
            cl.train(config, watch)
    assert len(Run(tmp_path / "killed" / "run").metrics.rows) == 2
    assert_same(whole, cl.train(config, replace(watch, name="", resume="auto")))


def start_ranks(*trainings: tuple[cl.TrainConfig, cl.WatchConfig]) -> list[subprocess.Popen[str]]:
    """Two gloo processes that train the configs together, one after the other."""
    with ExitStack() as held:
        free = [held.enter_context(socket.socket()) for _ in trainings]
        for each in free:
            each.bind(("127.0.0.1", 0))
        ports = ",".join(str(each.getsockname()[1]) for each in free)
    arguments = [json.dumps([config.to_dict() for config, _ in trainings]),
                 json.dumps([vars(watch) | {"runs_dir": str(watch.runs_dir)} for _, watch in trainings])]  # fmt: skip
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORTS": ports}
    command = [sys.executable, str(TESTS / "tiny_models.py"), *arguments]
    return [subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}, text=True) for rank in range(2)]


NO_NORM: dict[str, Any] = dict(model="tiny-without-norm", train_images=91, clip_norm=1.0, mixup_alpha=0.3, ema_decay=0.5,
                               val_fraction=0.1)  # fmt: skip
BY_TWO = {
    "sgd": NO_NORM,
    "muon, small images first": NO_NORM | dict(optimizer="muon", nesterov=True, renormalize=True, bias_lr=4.0,
                                               small_sides="30:0.3", tta_share=0.2),
    "averaged": dict(ema_decay=0.5, ema_batch_norm="average"),
}  # fmt: skip


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> dict[str, Run]:
    """Those of two processes, which train them one after the other: most of their time goes into their start."""
    folder = tmp_path_factory.mktemp("by two")
    ranks = start_ranks(*((small(**changes), quiet(folder, name=f"run-{k}")) for k, changes in enumerate(BY_TWO.values())))
    assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    return {name: Run(folder / f"run-{k}") for k, name in enumerate(BY_TWO)}


def test_ranks_report_the_model_that_they_save(tiny: str, by_two: dict[str, Run]) -> None:
    """Each rank has batch-norm statistics of its own slices: the number reported must be that of the weights in the folder."""
    run = by_two["averaged"]
    evaluation, _ = cl.evaluate_run(run)
    assert run.result["test/loss"] == pytest.approx(evaluation.loss, rel=1e-5)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As in a terminal; a shell has what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_ends_at_once_and_hurts_nothing(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in the forward pass of update 8: the first would end the run after it, the second does not wait for that."""
    from tiny_models import tiny as build_tiny

    passed = 0

    def interrupt(module: torch.nn.Module, _: Any) -> None:
        nonlocal passed
        passed += module.training
        if passed == 8 and module.training:
            signal.raise_signal(signal.SIGINT)  # of this thread: two that come to the process at once may become one
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("went on after the second")

    def build(num_classes: int) -> torch.nn.Module:
        model = build_tiny(num_classes)
        model.register_forward_pre_hook(interrupt)
        return model

    config, watch = small(), quiet(tmp_path / "cut", save_every=0.5, log_every=1)
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "tiny", build)
        with pytest.raises(KeyboardInterrupt) as ended:
            cl.train(config, watch)
    assert not isinstance(ended.value, Interrupted)  # which would say that its state was saved
    run = Run(tmp_path / "cut" / "run")
    assert run.last_step == 7
    assert find_checkpoints(run.path / "checkpoints")[0].name == "step-00000006"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_same(cl.train(config, quiet(tmp_path / "whole")), cl.train(config, replace(watch, name="", resume="auto")))


def test_a_signal_to_ranks_saves_at_their_next_step(tiny: str, tmp_path: Path) -> None:
    config = small(epochs=100_000, eval_every=0)
    ranks = start_ranks((config, quiet(tmp_path, save_every=0, log_every=100, forecast=False)))
    checkpoints, rows = tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline:  # until well into the steps
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=120) for process in ranks]
    assert 0 not in codes
    assert len(find_checkpoints(checkpoints)) == 1


@pytest.mark.parametrize("name", ["sgd", "muon, small images first"])
def test_ranks_are_invisible(tiny: str, tmp_path: Path, by_two: dict[str, Run], name: str) -> None:
    """Two gloo processes and one compute the same on a net without batch norm and dropout, also when pieces are uneven."""
    alone, two = cl.train(small(**BY_TWO[name]), quiet(tmp_path)), by_two[name]
    assert two.result["state"] == "finished"
    for row, other in zip(timeless(alone), timeless(two), strict=True):
        assert row == pytest.approx(other, rel=2e-5, abs=1e-6)
    weights, other_weights = (load_weights(run.path / "model.safetensors") for run in (alone, two))
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], rtol=1e-4, atol=1e-6)


def test_equal_configs_give_equal_runs_and_the_callers_random_state_stays(tiny: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = cl.train(small(), quiet(tmp_path / "a"))
    torch.manual_seed(4)
    second = cl.train(small(), quiet(tmp_path / "b", log_every=1))
    assert_same(first, second)
    torch.manual_seed(3)
    cl.train(small(epochs=0.2), quiet(tmp_path / "c"))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = cl.train(small(seed=1), quiet(tmp_path / "d"))
    assert other.metrics["train/loss"][0] != first.metrics["train/loss"][0]


def test_the_process_is_left_as_it_was(tiny: str, tmp_path: Path) -> None:
    threads, smallest = torch.get_num_threads(), sys.float_info.min
    cl.train(small(epochs=0.2, deterministic=True), quiet(tmp_path, threads=2))
    assert smallest / 2 > 0  # flushing denormals would change other libraries' floats
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_divergence_is_a_result(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(lr=1e30, epochs=4), quiet(tmp_path, log_every=1))
    assert run.result["state"] == "diverged"
    step = run.result["step"]
    losses = run.metrics["train/loss"]
    assert len(losses) == step < 24
    assert not np.isfinite(losses[-1])
    assert np.isfinite(losses[:-1]).all()


def test_divergence_in_the_last_update_is_one_too(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(lr=1e30, train_images=16, epochs=1, schedule="constant"), quiet(tmp_path))
    assert run.result == {"state": "diverged", "step": 1, "train_seconds": run.result["train_seconds"]}
    assert np.isfinite(run.metrics["train/loss"]).all()  # that was before the update


def test_the_best_on_validation_is_reported_and_the_test_set_chooses_nothing(tiny: str, tmp_path: Path) -> None:
    config = small(val_fraction=0.25, train_images=0, epochs=1, eval_every=0.1, lr=0.3)
    run = cl.train(config, quiet(tmp_path))
    accuracies, steps = run.metrics["val/accuracy"], run.metrics.steps("val/accuracy")
    assert len(set(accuracies)) > 1
    best = int(steps[accuracies.argmax()])
    assert run.result["reported_step"] == best
    at_best = run.metrics["test/accuracy"][list(run.metrics.steps("test/accuracy")).index(best)]
    assert run.result["test/accuracy"] == pytest.approx(at_best)
    kept = {path.name for path in (run.path / "checkpoints").iterdir()}
    assert kept == {f"step-{best:08d}", f"step-{run.result['step']:08d}"}


def test_without_validation_the_last_step_is_reported(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(), quiet(tmp_path))
    assert run.result["reported_step"] == run.result["step"] == 12
    assert run.result["test/accuracy"] == pytest.approx(run.metrics["test/accuracy"][-1])


def test_mixing_claims_no_training_accuracy_but_measures_it_on_clean_images(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cl.train(small(cutmix_alpha=1.0), quiet(tmp_path, progress="lines"))
    assert "train/accuracy" not in run.metrics
    assert len(run.metrics["clean/accuracy"]) == 2
    assert "measured on clean training images" in capsys.readouterr().out


def test_accumulating_pieces_equals_the_whole_batch_on_a_net_without_norm(tiny: str, tmp_path: Path) -> None:
    config = small(model="tiny-without-norm")
    whole = cl.train(config, quiet(tmp_path / "whole"))
    pieces = cl.train(replace(config, micro_batch_size=5), quiet(tmp_path / "pieces"))
    np.testing.assert_allclose(whole.metrics["train/loss"], pieces.metrics["train/loss"], rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch that are deprecated
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_trains_alike_and_is_saved_plain(tiny: str, tmp_path: Path) -> None:
    config = small(model="tiny-without-norm", epochs=0.5)
    plain = cl.train(config, quiet(tmp_path / "plain"))
    compiled = cl.train(replace(config, compile=True), quiet(tmp_path / "compiled"))
    np.testing.assert_allclose(plain.metrics["train/loss"], compiled.metrics["train/loss"], rtol=1e-4)
    assert load_weights(compiled.path / "model.safetensors").keys() == load_weights(plain.path / "model.safetensors").keys()


def test_training_learns(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(train_images=0, epochs=6, crop_padding=0, flip="none"), quiet(tmp_path, figures=True))
    assert run.result["test/accuracy"] > 0.8
    assert {path.name for path in (run.path / "figures").iterdir()} >= {
        "learning_curves.png", "learning_rate.png", "confusion.png", "class_accuracy.png",
        "mistakes.png", "doubtful.png", "samples.png", "gradient_flow.png", "update_ratio.png",
    }  # fmt: skip
    lines = (run.path / "results.csv").read_text().splitlines()
    assert len(lines) == 7
    assert "train/loss" in lines[0]
    assert "lr" in lines[0]


def has_bf16(monkeypatch: pytest.MonkeyPatch, *, cpu: bool, gpu: bool = False) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: cpu, raising=False)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: gpu)


def test_auto_precision_is_the_fastest_that_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    has_bf16(monkeypatch, cpu=False, gpu=False)
    assert [pick_precision("auto", device) for device in (cpu, gpu)] == ["fp32", "fp16"]
    has_bf16(monkeypatch, cpu=True, gpu=True)
    assert [pick_precision("auto", device) for device in (cpu, gpu)] == ["bf16", "bf16"]
    assert pick_precision("auto", torch.device("mps")) == "fp32"
    assert [pick_precision(name, gpu) for name in ("fp32", "fp16", "bf16")] == ["fp32", "fp16", "bf16"]
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported")
    assert pick_precision("auto", cpu) == "fp32"


def test_a_run_names_the_precision_it_took_and_a_resume_elsewhere_keeps_it(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import dies_at

    has_bf16(monkeypatch, cpu=True)
    config = small(precision="auto")
    whole = cl.train(config, quiet(tmp_path / "whole"))
    assert whole.config == small(precision="bf16")
    assert_same(cl.train(small(precision="bf16"), quiet(tmp_path / "named")), whole)
    with monkeypatch.context() as patch:
        patch.setitem(MODELS, "tiny", dies_at(8, []))
        with pytest.raises(RuntimeError, match="power cut"):
            cl.train(config, quiet(tmp_path / "cut", save_every=0.5))
    has_bf16(monkeypatch, cpu=False)  # the job goes on on another machine
    resumed = cl.train(config, quiet(tmp_path / "cut", name="", resume="auto", save_every=0.5))
    assert resumed.path.name == "run"
    assert_same(whole, resumed)
    assert cl.train(config, quiet(tmp_path / "new")).config.precision == "fp32"


def test_a_refused_resume_names_the_setting(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(), quiet(tmp_path))
    with pytest.raises(InputError, match=r"was begun with lr=0\.05, epochs=2\.0|epochs=2\.0, lr=0\.05"):
        cl.train(small(lr=0.1, epochs=3), quiet(tmp_path, resume=str(run.path)))


def test_resume_auto_keeps_to_the_named_folder_and_leaves_a_running_one_alone(tiny: str, tmp_path: Path) -> None:
    from cifarlab.runs import RunFolder

    first = cl.train(small(), quiet(tmp_path, name="a"))
    assert cl.train(small(), quiet(tmp_path, name="a", resume="auto")).path == first.path  # finished: a requeued job ends well
    (first.path / "result.json").unlink()
    assert cl.train(small(), quiet(tmp_path, name="b", resume="auto")).path.name == "b"
    (tmp_path / "b" / "result.json").unlink()
    with RunFolder(tmp_path / "b"):
        assert cl.train(small(), quiet(tmp_path, name="", resume="auto")).path.name == "a"


def test_two_processes_cannot_hold_one_folder(tiny: str, tmp_path: Path) -> None:
    from cifarlab.runs import RunFolder

    run = cl.train(small(), quiet(tmp_path))
    (run.path / "result.json").unlink()
    with RunFolder(run.path), pytest.raises(InputError, match="in use by another process"):
        cl.train(small(), quiet(tmp_path, resume=str(run.path)))


def test_a_finished_run_is_not_overwritten(tiny: str, tmp_path: Path) -> None:
    cl.train(small(), quiet(tmp_path))
    with pytest.raises(InputError, match="exists already"):
        cl.train(small(), quiet(tmp_path))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
    """The command line with a net that takes a tenth of a second an update, so that the signal comes in the middle."""
    command = [sys.executable, str(TESTS / "study_models.py"), "train", "quick", "--model", "slow", "--epochs", "2",
               "--train-images", "48", "--batch-size", "4", "--runs-dir", str(tmp_path), "--name", "run", "--log-every", "1",
               "--no-forecast", "--no-figures"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rows = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert rows.stat().st_size, "it has not begun"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert f"--resume {tmp_path / 'run'}" in errors
    assert "Traceback" not in errors
    run = Run(tmp_path / "run")
    assert find_checkpoints(run.path / "checkpoints")
    assert not run.is_finished
    monkeypatch.setitem(MODELS, "slow", MODELS[tiny])  # the same numbers, sooner
    assert main(["train", "--resume", str(run.path), "--progress", "none", "--no-figures"]) == 0
    assert run.result["step"] == 24
