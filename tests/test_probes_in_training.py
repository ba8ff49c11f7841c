"""Probes in the training loop: invisible to the weights, the same after a resume, on ranks and whenever they are written."""

import json
import os
import socket
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import cifarlab as cl
from cifarlab.checkpoint import find_checkpoints, load_weights
from cifarlab.config import InputError
from cifarlab.diagnosis import Diagnosis
from cifarlab.models import MODELS
from cifarlab.probes import PROBES, activations, panel
from cifarlab.probes.incident import load_incident
from cifarlab.probes.panel import Panel
from cifarlab.runs import Followed, Run
from cifarlab.trackers.local import Local

CONFIGS: dict[str, dict[str, Any]] = {
    "sgd, dropout": {},
    "adam": dict(optimizer="adam", lr=1e-3),
    "clipped by norm and value": dict(clip_norm=0.5, clip_value=0.01),
    "averaged": {"ema_decay": 0.9, "ema_batch_norm": "recompute"},
    "micro-batches": {"micro_batch_size": 5},
    "fp16": {"precision": "fp16"},
    "mixup": {"mixup_alpha": 0.4, "label_smoothing": 0.1},
    "channels_last": {"channels_last": True, "optimizer": "rmsprop", "lr": 1e-3},
}


def small(**changes: Any) -> cl.TrainConfig:
    """Twelve updates of the tiny net: two epochs of six."""
    settings: dict[str, Any] = dict(
        data="digits", model="tiny", train_images=96, batch_size=16, epochs=2, lr=0.05, weight_decay=1e-3
    )
    return cl.TrainConfig(**(settings | changes))


def probing(folder: Path, **changes: Any) -> cl.WatchConfig:
    settings: dict[str, Any] = dict(runs_dir=folder, name="run", progress="none", forecast=False, figures=False, save_minutes=0)
    return cl.WatchConfig(**(settings | {"probes": "all", "probe_every": 4} | changes))


def timeless(run: Run) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in run.metrics.rows]


def numbers(run: Run) -> list[dict[str, float]]:
    """What a run has without probes too."""
    probed = tuple(f"{name}/" for name in PROBES)
    return [{key: value for key, value in row.items() if not key.startswith(probed)} for row in timeless(run)]


def assert_same_tables(run: Run, other: Run) -> None:
    """Bit by bit; NaN is NaN."""
    assert run.tables.keys() == other.tables.keys() == set(PROBES)
    for name, table in run.tables.items():
        assert (table.items, table.columns) == (other.tables[name].items, other.tables[name].columns)
        np.testing.assert_array_equal(table.steps, other.tables[name].steps, err_msg=name)
        np.testing.assert_array_equal(table.values, other.tables[name].values, err_msg=name)


def test_a_probe_that_fails_does_not_end_the_training(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plain = cl.train(small(), watch=probing(tmp_path, name="plain", probes="none"))
    monkeypatch.setattr(panel, "measure_curvature", fail)
    run = cl.train(small(), watch=probing(tmp_path))
    assert run.result["state"] == "finished"
    assert run.result["probes_lost"] == {"curvature": "OutOfMemoryError: CUDA out of memory"}
    assert run.result["test/accuracy"] == plain.result["test/accuracy"]
    assert run.tables.keys() == set(PROBES) - {"curvature"}
    assert len(run.tables["noise"]) == 4
    assert capsys.readouterr().err.count("curvature could not be measured, and will not be any more (OutOfMemoryError") == 1


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_probes_are_invisible_and_so_is_a_resume_to_them(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """With all probes and without, rows and weights are the same bits; cut in mid-epoch, so are tables, rows and alarms.

    The checkpoint is of step 7, between the gradient that the noise probe keeps and the one it is compared with."""
    from tiny_models import dies_at

    config = small(**changes)
    plain = cl.train(config, probing(tmp_path / "plain", probes="none"))
    whole = cl.train(config, probing(tmp_path / "whole"))
    assert numbers(plain) == numbers(whole)
    weights, others = (load_weights(run.path / "model.safetensors") for run in (plain, whole))
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)
    assert not (plain.path / "probes").exists()
    assert not (plain.path / "probes.json").exists()
    assert plain.result["probe_share"] == 0
    assert 0 < whole.result["probe_share"] < 1

    for name, table in whole.tables.items():
        assert table.steps.tolist() == (list(range(1, 13)) if PROBES[name].every_step else [1, 4, 8, 12])
    assert np.isfinite(whole.tables["noise"]["cosine"][1:]).all()
    assert whole.metrics["gradient_flow/norm"].shape == (12,)

    monkeypatch.setitem(MODELS, "tiny", dies_at(10 * -(-16 // (config.micro_batch_size or 16)), []))
    with pytest.raises(RuntimeError, match="power cut"):
        cl.train(config, probing(tmp_path / "cut", save_every=7 / 6, log_every=3))
    monkeypatch.undo()
    cut = Run(tmp_path / "cut" / "run")
    assert find_checkpoints(cut.path / "checkpoints")[0].name == "step-00000007"
    assert len(cut.tables["update_flow"]) == 9
    resumed = cl.train(config, probing(tmp_path / "cut", name="", resume=str(cut.path), log_every=5))
    assert timeless(whole) == timeless(resumed)
    assert_same_tables(whole, resumed)
    assert whole.alarms == resumed.alarms


def test_an_alarm_that_is_raised_again_after_a_resume_is_there_once(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells of step 8, is raised at step 12, and the checkpoint is of step 10."""
    from tiny_models import dies_at

    config = small(lr=1.0, schedule="constant", epochs=3)
    whole = cl.train(config, probing(tmp_path / "whole", probes="default"))
    monkeypatch.setitem(MODELS, "tiny", dies_at(16, []))
    with pytest.raises(RuntimeError, match="power cut"):
        cl.train(config, probing(tmp_path / "cut", probes="default", save_every=10 / 6, log_every=3))
    monkeypatch.undo()
    cut = Run(tmp_path / "cut" / "run")
    (alarm,) = cut.alarms
    assert alarm["step"] < int(find_checkpoints(cut.path / "checkpoints")[0].name[5:]) < alarm["noticed"]
    resumed = cl.train(config, probing(tmp_path / "cut", probes="default", name="", resume=str(cut.path)))
    assert resumed.alarms == whole.alarms == [alarm]


def test_two_ranks_measure_what_one_process_does(tiny: str, tmp_path: Path) -> None:
    config = small(model="tiny-without-norm", clip_norm=0.5, momentum=0.9)
    alone = cl.train(config, probing(tmp_path / "alone", probes="default,noise"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    watch = vars(probing(tmp_path / "two", probes="default,noise")) | {"runs_dir": str(tmp_path / "two")}
    command = [sys.executable, str(Path(__file__).parent / "tiny_models.py"), json.dumps(config.to_dict()), json.dumps(watch)]
    ranks = [subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    two = Run(tmp_path / "two" / "run")
    assert two.tables.keys() == alone.tables.keys()
    for name, table in alone.tables.items():
        other = two.tables[name]
        assert (table.items, table.steps.tolist()) == (other.items, other.steps.tolist())
        if name == "distributions":  # an entry may change its power of two with its last bit
            assert np.abs(table.values - other.values).max() < 0.01
        else:
            np.testing.assert_allclose(table.values, other.values, rtol=1e-3, atol=1e-6, err_msg=name)


def test_clipping_is_seen_before_and_after(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(clip_norm=0.5), probing(tmp_path, probes="gradient_flow"))
    flow = run.tables["gradient_flow"]
    before, after = (np.sqrt((flow[column].astype(float) ** 2).sum(1)) for column in ("norm", "clipped_norm"))
    assert (before > 0.5).any()
    np.testing.assert_allclose(after, np.minimum(before, 0.5), rtol=1e-4)
    np.testing.assert_allclose(run.metrics["gradient_flow/norm"], before, rtol=1e-6)


def test_globs_choose_what_is_measured(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(epochs=0.2), probing(tmp_path, probe_include="*.weight", probe_exclude="1.*"))
    assert run.tables["gradient_flow"].items == ("0.weight", "5.weight")
    assert [p["name"] for p in run.probed["parameters"]] == ["0.weight", "5.weight"]
    with pytest.raises(InputError, match="no parameter is left to probe"):
        cl.train(small(), probing(tmp_path, name="other", probe_include="conv*"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"probes": "gradients"}, "probes='gradients' cannot be used: there is no probe 'gradients'"),
        ({"probe_every": 0}, "probe_every=0 cannot be used: it must be at least 1"),
        ({"probe_include": 3}, "probe_include=3 cannot be used: it must be of type str"),
        ({"probes": None}, "probes=None cannot be used"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        cl.train(small(model="simple_cnn"), probing(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_other_probes_at_a_resume_are_refused_or_added(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that was not there begins its table late; a table of other parameters is not mixed with the old."""
    from tiny_models import dies_at

    config, run = small(), Run(tmp_path / "run")
    monkeypatch.setitem(MODELS, "tiny", dies_at(10, []))
    with pytest.raises(RuntimeError, match="power cut"):
        cl.train(config, probing(tmp_path, probes="gradient_flow", save_every=1))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"holds other items or columns .* resume with the same --probes"):
        cl.train(config, probing(tmp_path, probes="gradient_flow", probe_exclude="1.*", resume=str(run.path)))
    cl.train(config, probing(tmp_path, probes="gradient_flow,weight_flow", resume=str(run.path)))
    assert run.tables["gradient_flow"].steps.tolist() == list(range(1, 13))
    assert run.tables["weight_flow"].steps.tolist() == list(range(7, 13))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_measured_in_the_precision_of_the_training(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Literal["fp32", "bf16"]
) -> None:
    """The first activation function follows a convolution."""
    seen = set()
    find_layer = activations._find_layer

    def find(name: str, args: Any, out: Any) -> Any:
        if "convolution" in name:
            seen.add(out.dtype)
        return find_layer(name, args, out)

    monkeypatch.setattr(activations, "_find_layer", find)
    cl.train(small(model=tiny, precision=precision), probing(tmp_path, probes="activations"))
    assert seen == {{"fp32": torch.float32, "bf16": torch.bfloat16}[precision]}


def test_a_foreign_table_stops_a_resume_with_one_sentence(tiny: str, tmp_path: Path) -> None:
    config = small()
    run = cl.train(config, probing(tmp_path, probes="gradient_flow", save_every=0.5))
    (run.path / "result.json").unlink()
    (run.path / "probes" / "gradient_flow.rec").write_bytes(b"\x00garbage")
    with pytest.raises(InputError, match=r"gradient_flow.rec is no table of measurements, .*: remove the file$"):
        cl.train(config, probing(tmp_path, probes="gradient_flow", resume=str(run.path)))


def test_an_incident_is_kept_with_all_that_is_needed_to_replay_it(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """A layer that breaks one image of step 3. Late is what a GPU does: two more steps are taken before the host looks."""
    from tiny_models import tiny as build_tiny

    class Breaks(torch.nn.Module):
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.net = build_tiny(num_classes)
            self.root = torch.nn.Identity()
            self.root.register_forward_hook(self._break)
            self.calls = 0

        def _break(self, module: Any, inputs: Any, out: torch.Tensor) -> torch.Tensor:
            self.calls += self.training
            bad = torch.zeros_like(out)
            bad[5] = torch.nan if len(out) == 16 and self.calls >= 3 else 0
            return out + bad

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.root(self.net(images))  # type: ignore[no-any-return]

    monkeypatch.setitem(MODELS, "tiny", Breaks)
    run = cl.train(small(), probing(tmp_path, probes="gradient_flow", log_every=5 if is_late else 1))
    assert run.result["state"] == "diverged"
    (alarm,) = run.alarms
    assert (alarm["step"], alarm["layers"]) == (3, ["root"])
    assert (run.path / "incidents" / "step-00000003" / "optimizer.safetensors").exists() != is_late
    weights, batch, told = load_incident(run.path, 3)
    assert (told["place"], told["layer"], told["samples"]) == ("forward", "root", [5])
    assert told["images"] == [int(batch["indices"][5])]
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert batch["images"].shape[0] == len(batch["labels"]) == 16
    assert json.loads((run.path / "incidents" / "step-00000003" / "incident.json").read_text())["step"] == 3
    with pytest.raises(InputError, match=r"has no incident of step 4; it has step-00000003"):
        load_incident(run.path, 4)


def test_an_incident_is_kept_though_the_bad_gradient_is_not_measured(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import tiny as build_tiny

    def build(num_classes: int) -> torch.nn.Module:
        net, calls = build_tiny(num_classes), iter(range(1, 1000))
        net[0].weight.register_hook(lambda gradient: gradient * torch.nan if next(calls) == 3 else gradient)
        return net

    monkeypatch.setitem(MODELS, "tiny", build)
    run = cl.train(small(), probing(tmp_path, probes="gradient_flow", probe_include="5.*"))
    assert [(alarm["rule"], alarm["step"]) for alarm in run.alarms] == [("non_finite", 3)]
    assert load_incident(run.path, 3)[2]["parameters"] == ["0.weight"]
    assert all(torch.isfinite(w).all() for w in load_incident(run.path, 3)[0].values())


def test_an_incident_of_micro_batches_is_looked_for_in_micro_batches(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiny_models import tiny as build_tiny

    class Small(torch.nn.Module):
        """Breaks what has more than four images at once, in any pass; and, once, the second piece of step 2."""

        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.net, self.root, self.calls = build_tiny(num_classes), torch.nn.Identity(), 0
            self.root.register_forward_hook(lambda module, inputs, out: out * (torch.nan if len(out) > 4 else 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = self.root(self.net(images))
            self.calls += self.training
            return logits * torch.inf if self.training and self.calls == 6 else logits  # type: ignore[no-any-return]

    monkeypatch.setitem(MODELS, "tiny", Small)
    run = cl.train(small(micro_batch_size=4), probing(tmp_path, probes="gradient_flow", log_every=1))
    told = load_incident(run.path, 2)[2]
    assert told["micro_batches"] == [4, 4, 4, 4]
    assert (told["place"], told["layer"]) == ("unknown", "")


def test_a_step_that_a_scaler_skips_is_no_incident(tiny: str, tmp_path: Path) -> None:
    run = cl.train(small(precision="fp16", epochs=0.5, lr=1e-4), probing(tmp_path, probes="gradient_flow,update_flow"))
    skipped = np.nansum(run.tables["gradient_flow"]["non_finite"], axis=1) > 0
    np.testing.assert_array_equal((run.tables["update_flow"]["norm"] == 0).all(axis=1), skipped)
    assert not (run.path / "incidents").exists()


def test_figures_are_drawn_every_so_many_epochs_and_at_the_end(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int, int]] = []

    def note(name: str) -> Any:
        return lambda run, *_: drawn.append((name, len(run.metrics["train/loss"]), len(run.tables["update_flow"])))

    for name in ("draw_recorded_figures", "draw_run_figures", "leave_report"):
        monkeypatch.setattr(import_module("cifarlab.train"), name, note(name))
    cl.train(small(epochs=5), probing(tmp_path, probes="update_flow", figures=True, figures_every=2, log_every=100))
    whole = 5 * 6
    assert drawn == [("draw_recorded_figures", 12, 12), ("draw_recorded_figures", 24, 24),
                     ("draw_run_figures", whole, whole), ("leave_report", whole, whole)]  # fmt: skip


def test_rows_that_cannot_be_read_end_no_training_that_is_to_draw_them(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Followed) -> Run:
        if len(looks) == 1:  # the first is at the start, where a resume needs the rows
            raise InputError("metrics.jsonl has a damaged row at byte 0: remove that line")
        looks.append(self)
        return look(self)

    looks, look = list[Followed](), Followed.look
    monkeypatch.setattr(Followed, "look", refuse)
    for name in ("draw_run_figures", "leave_report"):
        monkeypatch.setattr(import_module("cifarlab.train"), name, lambda *_: None)
    run = cl.train(small(epochs=2), probing(tmp_path, figures=True, figures_every=1))
    assert run.result["state"] == "finished"
    assert "not all figures could be drawn" in capsys.readouterr().err


def test_writing_rows_seldom_or_often_gives_the_same_tables(tiny: str, tmp_path: Path) -> None:
    often = cl.train(small(), probing(tmp_path / "often", log_every=1))
    assert_same_tables(often, cl.train(small(), probing(tmp_path / "seldom", log_every=100)))


def test_the_told_share_holds_writing_and_diagnosis(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, see = Local.tables, Diagnosis.see

    def slow_tables(self: Local, *arguments: Any) -> None:
        time.sleep(0.05)
        table(self, *arguments)

    def slow_see(self: Diagnosis, *arguments: Any) -> Any:
        time.sleep(0.05)
        return see(self, *arguments)

    monkeypatch.setattr(Local, "tables", slow_tables)
    monkeypatch.setattr(Diagnosis, "see", slow_see)
    result = cl.train(small(), probing(tmp_path, log_every=4, probes="gradient_flow")).result
    spent = result["probe_share"] * result["train_seconds"]
    assert 3 * 0.1 <= spent <= result["train_seconds"]
    result = cl.train(small(), probing(tmp_path / "without", log_every=4, probes="none")).result
    assert result["probe_share"] == 0


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("changes", [
    {},
    dict(optimizer="adam", lr=1e-3, clip_norm=1.0, clip_value=0.1, ema_decay=0.9, cutout=4),
    dict(optimizer="muon", renormalize=True, micro_batch_size=8, small_sides="30:0.9", flip="alternating", brightness=0.1,
         contrast=0.1, saturation=0.1, hue=0.1),
], ids=["sgd", "adam, clipped, averaged", "muon, jitter, small images"])  # fmt: skip
def test_between_two_rows_the_host_waits_for_nothing_that_a_gpu_computes(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host_waits: Any, changes: dict[str, Any]
) -> None:
    """Seen on a CPU, whose probes measure as a GPU's do. The first two steps may make what is kept."""
    after_update = Panel.after_update

    def after(self: Panel, step: int) -> None:
        after_update(self, step)
        host_waits.is_on = 2 <= step < 7  # rows are written after step 8

    monkeypatch.setattr(Panel, "after_update", after)
    monkeypatch.setattr(Panel, "_knows_at_once", False)
    watch = probing(tmp_path, probes="gradient_flow,weight_flow,update_flow", log_every=8)
    with host_waits:
        cl.train(small(eval_every=0, **changes), watch)
    assert not host_waits.found
