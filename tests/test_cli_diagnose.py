"""`cifarlab diagnose`, as typed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cifarlab as cl
from cifarlab.cli import main
from cifarlab.diagnosis import RULES
from cifarlab.models import MODELS


class Rotten(nn.Module):
    """From its seventh training batch on, the network takes the root of a negative number for that batch's fourth image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("image", torch.zeros(3, 32, 32))
        self.register_buffer("calls", torch.zeros(()))
        self.stem, self.root, self.head = nn.Conv2d(3, 4, 8, stride=8), nn.Identity(), nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls == 7:
                self.image.copy_(images[3])
        bad = (images == self.image).flatten(1).all(1) & (self.calls >= 7)
        features = self.root(self.stem(images).relu().flatten(1) - 1e9 * bad[:, None])
        return self.head((features + 1e-3).sqrt())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """healthy, rotten (diverged at step 7), frozen, and watched (a NaN planted at step 7)."""
    folder = tmp_path_factory.mktemp("runs")
    frozen = lambda num_classes: nn.Sequential(  # noqa: E731
        nn.Flatten(), nn.Linear(3072, 16).requires_grad_(False), nn.ReLU(), nn.Linear(16, num_classes))  # fmt: skip
    nets: dict[str, Any] = {
        "rotten": Rotten, "frozen": frozen,
        "healthy": lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, num_classes)),
    }  # fmt: skip
    MODELS.update(nets)
    for name in nets:
        cl.train(
            cl.TrainConfig(
                data="digits", model=name, epochs=3, batch_size=16, train_images=160, lr=0.005, crop_padding=2, flip="none"
            ),
            cl.WatchConfig(name=name, runs_dir=folder, progress="none", forecast=False, figures=False),
        )
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with cl.watch(net, optimizer, "watched", runs_dir=folder, say=None, figures=False):
        for step in range(1, 31):
            images = torch.randn(4, 3, 2, 2)
            if step == 7:
                images[2] = torch.nan
            optimizer.zero_grad()
            F.cross_entropy(net(images), torch.tensor([0, 1, 2, 0])).backward()
            optimizer.step()
    yield folder
    for name in nets:
        del MODELS[name]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What is said about bad input: one line on stderr, exit code 2."""
    capsys.readouterr()
    assert main(["diagnose", *map(str, arguments)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("cifarlab: ")
    assert told.count("\n") == 1
    return told


def test_a_healthy_run_says_what_was_asked(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(runs / "healthy")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("no alarm in 30 steps; rules: exploding, non_finite,")
    assert "not asked, as nothing of what they need was measured: unstable_lr (curvature), norm_drift" in " ".join(told.split())
    assert all(len(line) <= 100 for line in told.splitlines())


def test_alarms_have_evidence_cause_and_remedy(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(runs / "frozen")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("  ALARM at step 20: not learning · 1.weight, 1.bias\n    evidence  2 of 4 parameter tensors")
    assert "requires_grad is False" in told
    assert "1 alarm in 30 steps" in told
    assert all(len(line) <= 100 for line in told.splitlines())


def test_json_has_the_same_as_the_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state in (("healthy", "finished"), ("frozen", "finished"), ("rotten", "diverged"), ("watched", "finished")):
        assert main(["diagnose", str(runs / name), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["state"] == state
        assert told["alarms"] == cl.load_run(runs / name).alarms
        assert set(told["unasked"]) < set(RULES)


def test_a_diverged_run_is_replayed_to_the_layer_and_the_image(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs / "rotten"
    kept = json.loads((run / "incidents" / "step-00000007" / "incident.json").read_text())
    assert main(["diagnose", str(run)]) == 0
    assert "non finite" in capsys.readouterr().out
    assert main(["diagnose", str(run), "--replay", "7"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "step 7 done again with its weights and batch: the loss is nan" in told
    assert "samples 3 of the batch" in told
    assert f"by their numbers in the run's training set: {kept['images'][0]}" in told
    assert "gradients that are not finite: stem.weight, stem.bias, head.weight, head.bias" in told
    assert main(["diagnose", str(run), "--replay", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("place", "layer", "samples", "images")} == {
        key: kept[key] for key in ("place", "layer", "samples", "images")
    }
    assert found["loss"] == "nan"
    assert found["is_finite"] is False


def test_a_step_that_is_finite_when_done_again_says_so(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(runs / "rotten", tmp_path / "run"))
    MODELS["rotten"] = lambda num_classes: Mended(num_classes)
    try:
        assert main(["diagnose", str(run), "--replay", "7"]) == 0
    finally:
        MODELS["rotten"] = Rotten
    assert "all its gradients are finite here" in capsys.readouterr().out


class Mended(Rotten):
    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.stem(images).relu().flatten(1))


def test_an_unfinished_run_with_a_torn_end(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(runs / "frozen", tmp_path / "run"))
    (run / "result.json").unlink()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 31, "lr"')
    with (run / "probes" / "update_flow.rec").open("ab") as file:
        file.write(b"\0" * 9)
    assert main(["diagnose", str(run)]) == 0
    assert "1 alarm in 30 steps so far" in capsys.readouterr().out


def test_bad_input_is_told_in_one_sentence(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no run folder" in refusal(capsys, tmp_path / "nowhere")
    assert "is not a run folder" in refusal(capsys, tmp_path)
    assert "has no incident of step 8; it has step-00000007" in refusal(capsys, runs / "rotten", "--replay", "8")
    assert "has no incident of step 3; it has none" in refusal(capsys, runs / "healthy", "--replay", "3")
    assert "was recorded by cl.watch, so its network cannot be built" in refusal(capsys, runs / "watched", "--replay", "7")

    run = Path(shutil.copytree(runs / "rotten", tmp_path / "run"))
    (run / "metrics.jsonl").write_bytes(b"")
    assert "has no rows yet" in refusal(capsys, run)
    shutil.copy(runs / "rotten" / "metrics.jsonl", run)
    (run / "probes" / "update_flow.rec").write_bytes(b"{}\n")
    assert "update_flow.rec is no table" in refusal(capsys, run)
    shutil.copy(runs / "healthy" / "probes" / "update_flow.rec", run / "probes")
    assert "it mixes two runs" in refusal(capsys, run)
    (run / "probes.json").write_text('{"parameters": 7}')
    assert "probes.json lists no parameters" in refusal(capsys, run)
    (run / "incidents" / "step-00000007" / "incident.json").write_text("{")
    assert "incident.json cannot be read" in refusal(capsys, run, "--replay", "7")
    shutil.copytree(runs / "rotten" / "incidents", run / "incidents", dirs_exist_ok=True)
    shutil.copy(runs / "healthy" / "model.safetensors", run / "incidents" / "step-00000007" / "model.safetensors")
    assert "does not fit its model 'rotten'" in refusal(capsys, run, "--replay", "7")


def test_through_the_installed_command_without_torch(runs: Path) -> None:
    command = Path(sys.executable).with_name("cifarlab")
    done = subprocess.run([command, "diagnose", runs / "watched"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "first in the input, samples 2 of the batch" in " ".join(done.stdout.split())
    code = "import sys; from cifarlab.cli import main; main(['diagnose', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, runs / "watched"], capture_output=True, timeout=60).returncode == 0
