"""W&B and TensorBoard as mirrors of the run folder: what they wrote is read from their own files, against what labs must find."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cifarlab as cl
from cifarlab.cli import main
from cifarlab.config import InputError
from cifarlab.runs import Run, RunFolder

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT / "tests"))
from mirror_reading import WandbFile, read_tensorboard, read_wandb  # noqa: E402

sys.path.pop(0)
wandb = pytest.importorskip("wandb", reason="W&B is not installed (pip install 'cifarlab[wandb]')")
pytest.importorskip("tensorboard", reason="TensorBoard is not installed (pip install 'cifarlab[tensorboard]')")

NAMES = ("0.weight", "1.weight", "1.bias", "5.weight", "5.bias")  # of the tiny net's parameters
CONFIG = cl.TrainConfig(data="digits", model="tiny", train_images=320, batch_size=16, epochs=3, lr=1e-7, cycle_momentum=True,
                        schedule="one-cycle")  # fmt: skip
STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def own_wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B with a home of its own, no key, and nobody to ask."""
    home = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
            patch.setenv(name, home)
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "NETRC"):
            patch.delenv(name, raising=False)
        patch.setattr("builtins.input", lambda *_: pytest.fail("a tracker prompted"))
        patch.setattr("getpass.getpass", lambda *_: pytest.fail("a tracker prompted"))
        yield
        wandb.teardown()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tiny: str) -> Iterator[None]:
    yield
    wandb.teardown()  # it keeps the settings of the first use


def train(folder: Path, config: cl.TrainConfig = CONFIG, **watch: Any) -> Run:
    settings = dict(runs_dir=folder, name="run", progress="none", forecast=False, figures=False, probe_every=20)
    return cl.train(config, cl.WatchConfig(**(settings | watch)))


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with everything on, mirrored to both while it ran, with a rule that always finds something."""
    from cifarlab.diagnosis import RULES, Finding, Rule
    from cifarlab.models import MODELS

    found = Finding(evidence="it is a test", cause="As planned", remedy="Read on", reference="none", layers=NAMES[:1])
    rule = Rule(lambda evidence: found if evidence.step >= 40 else None, ("train/loss",))

    sys.path.insert(0, str(PROJECT / "tests"))
    import tiny_models

    sys.path.remove(str(PROJECT / "tests"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", tiny_models.tiny)
        patch.setitem(RULES, "made_up", rule)
        return train(tmp_path_factory.mktemp("mirrored"), figures=True, probes="all", tensorboard=True, wandb_mode="offline",
                     wandb_project="a-project", wandb_name="my experiment", wandb_entity="a-team", wandb_tags="lab, first",
                     wandb_weights=True)  # fmt: skip


@pytest.fixture(scope="module")
def in_wandb(mirrored: Run) -> WandbFile:
    return read_wandb(mirrored.path)


@pytest.fixture(scope="module")
def in_tensorboard(mirrored: Run) -> Any:
    return read_tensorboard(mirrored.path)


def merged(run: Run) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    for row in run.metrics.rows:
        rows[int(row["step"])] = rows.get(int(row["step"]), {}) | row
    return rows


# ---- what the labs must find ---------------------------------------------------------------------------------------------

LAB_SCALARS = [  # A: curves, LR, flows of each layer; B: weight flow; C: update flow; D: momentum; E: all of these
    "lr", "momentum", "train/loss", "train/accuracy", "train_epoch/loss", "train_epoch/accuracy", "test/loss", "test/accuracy",
    "gradient_flow/norm", "weight_flow/norm", "update_flow/ratio", "time/train_seconds", "time/images_per_second", "epoch",
    *(f"gradient_flow/{column}/{name}" for column in ("mean_abs", "max_abs", "norm") for name in NAMES),
    *(f"weight_flow/{column}/{name}" for column in ("mean_abs", "max_abs", "norm", "variance") for name in NAMES),
    *(f"update_flow/{column}/{name}" for column in ("norm", "mean_abs", "max_abs", "variance") for name in NAMES),
    *(f"update_flow/ratio/{name}" for name in NAMES if name != "1.bias"),  # those of a bias that begins at 0 are infinite
    "activations/dead_share/2.relu", "curvature/sharpness", "noise/noise_trace",
]  # fmt: skip
LAB_HISTOGRAMS = [f"distributions/{kind}/{name}" for kind in ("weight", "gradient", "update") for name in NAMES]
LAB_FIGURES = [
    "gradient_flow", "gradient_flow_over_time", "update_ratio", "update_flow_over_time", "weight_magnitude",
    "distributions_weight", "distributions_gradient", "distributions_update", "activations", "sharpness", "noise",
    "learning_curves", "learning_rate", "confusion", "class_accuracy", "mistakes", "doubtful", "samples",
]  # fmt: skip


@pytest.mark.parametrize("key", LAB_SCALARS)
def test_every_number_of_the_labs_is_in_both(key: str, mirrored: Run, in_wandb: WandbFile, in_tensorboard: Any) -> None:
    ours = {step: row[key] for step, row in in_wandb.history.items() if key in row}
    theirs = {event.step: event.value for event in in_tensorboard.Scalars(key)}
    assert ours
    assert sorted(ours) == sorted(theirs)
    np.testing.assert_allclose(np.array(list(ours.values()), float), list(theirs.values()), rtol=1e-6)
    if key in mirrored.metrics:  # what is in rows is there at each of them
        assert sorted(ours) == mirrored.metrics.steps(key).tolist()


@pytest.mark.parametrize("key", LAB_HISTOGRAMS)
def test_every_histogram_of_the_labs_is_in_both(key: str, mirrored: Run, in_wandb: WandbFile, in_tensorboard: Any) -> None:
    shape = next(p["shape"] for p in mirrored.probed["parameters"] if key.endswith("/" + p["name"]))
    for step in (1, 20, 40, 60):
        ours = in_wandb.history[step][key]
        theirs = next(event.histogram_value for event in in_tensorboard.Histograms(key) if event.step == step)
        assert ours["_type"] == "histogram"
        assert sum(ours["values"]) == theirs.num == np.prod(shape)
        assert ours["values"] == list(theirs.bucket)
        assert ours["bins"][1:] == pytest.approx(theirs.bucket_limit)
    assert len(in_tensorboard.Histograms(key)) == 4


def test_the_last_step_is_found_from_the_end_of_wandbs_file(in_wandb: WandbFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifarlab.trackers import wandb as sink

    [path] = in_wandb.folders[0].glob("run-*.wandb")
    whole, blocks = list(sink._records(path)), path.stat().st_size // sink.BLOCK
    assert blocks >= 2
    counts = []
    for start in range(1, blocks + 1):
        part = list(sink._records(path, start))
        assert part == whole[len(whole) - len(part) :]
        counts.append(len(part))
    assert len(whole) > counts[0] >= counts[-1]
    monkeypatch.setattr(sink, "TAIL_BLOCKS", 1)
    assert sink._last_in(path) == max(in_wandb.history)


def test_a_histogram_says_where_the_weights_are(mirrored: Run, in_wandb: WandbFile) -> None:
    """Against numpy on the weights themselves."""
    from safetensors.numpy import load_file

    weights = load_file(mirrored.path / "model.safetensors")
    for name in NAMES:
        found = in_wandb.history[STEPS][f"distributions/weight/{name}"]
        counts, _ = np.histogram(weights[name].astype(float), bins=np.array(found["bins"]))
        assert abs(counts - found["values"]).sum() <= 0.01 * weights[name].size


@pytest.mark.parametrize("name", LAB_FIGURES)
def test_every_figure_of_the_labs_is_in_both(name: str, mirrored: Run, in_wandb: WandbFile, in_tensorboard: Any) -> None:
    drawn = Image.open(mirrored.path / "figures" / f"{name}.png").convert("RGB")
    value = [row[f"figures/{name}"] for row in in_wandb.history.values() if f"figures/{name}" in row][-1]
    [path] = [next(in_wandb.folders[0].joinpath("files").glob(f)) for f in value["filenames"]] if "filenames" in value else [
        in_wandb.media(value)]  # fmt: skip
    event = in_tensorboard.Images(f"figures/{name}")[-1]
    for found in (Image.open(path), Image.open(io.BytesIO(event.encoded_image_string))):
        assert np.array_equal(np.asarray(found.convert("RGB")), np.asarray(drawn))
    assert (event.width, event.height) == drawn.size


def test_sample_predictions_are_images_with_names(mirrored: Run, in_wandb: WandbFile, in_tensorboard: Any) -> None:
    from cifarlab.evaluate import load_samples

    samples = load_samples(mirrored.path)
    tags = in_tensorboard.Tags()["images"]
    for kind, wanted in (("right", True), ("wrong", False)):
        ours = [sample for sample in samples if (sample.true == sample.predicted) is wanted]
        value = next(row[f"samples/{kind}"] for row in in_wandb.history.values() if f"samples/{kind}" in row)
        assert len(ours) == value["count"] == len(value["captions"]) > 0
        found = sorted(tag for tag in tags if tag.startswith(f"samples/{kind}/"))
        assert len(found) == len(ours)
        for k, (sample, caption, tag) in enumerate(zip(ours, value["captions"], found, strict=True)):
            told = sample.true if wanted else f"{sample.true} taken for {sample.predicted}"
            assert caption == f"{told}, {100 * sample.probability:.1f} % sure"
            assert tag == f"samples/{kind}/{k + 1:02d} {caption}"
            pixels = np.asarray(Image.open(io.BytesIO(in_tensorboard.Images(tag)[0].encoded_image_string)))
            assert np.array_equal(pixels.transpose(2, 0, 1), sample.image)
            theirs = np.asarray(Image.open(in_wandb.folders[0] / "files" / value["filenames"][k]))
            assert np.array_equal(theirs, pixels)


def test_costs_classes_and_confusion_are_tables(mirrored: Run, in_wandb: WandbFile, in_tensorboard: Any) -> None:
    last = {key: value for row in in_wandb.history.values() for key, value in row.items()}
    columns, rows = in_wandb.table(last["model/layers"])
    assert columns[3:6] == ["parameters", "forward MAC", "forward FLOP"]
    assert rows[-1][0] == "total"
    assert rows[-1][3:] == [2278, 16660, 33320, 100.0]
    assert sum(row[4] for row in rows[:-1]) == 16660

    columns, rows = in_wandb.table(last["test/classes"])
    assert columns == ["class", "accuracy", "precision", "f1", "support"]
    assert [row[1] for row in rows] == [row["accuracy"] for row in mirrored.evaluation["per_class"]]
    assert last["test/classes_chart_table"]

    columns, rows = in_wandb.table(last["test/confusion_matrix_table"])
    assert columns == ["Actual", "Predicted", "nPredictions"]
    assert np.array_equal(np.reshape([row[2] for row in rows], (10, 10)), mirrored.evaluation["confusion"])

    def text(tag: str) -> str:
        return str(in_tensorboard.Tensors(tag)[-1].tensor_proto.string_val[0].decode())

    assert "| total | Sequential |  | 2,278 | 16,660 | 33,320 | 100 |" in text("model/layers")
    assert f"| 0 | {mirrored.evaluation['per_class'][0]['accuracy']:.6g} |" in text("test/classes")
    first = " | ".join(map(str, mirrored.evaluation["confusion"][0]))
    assert f"| 0 | {first} |" in text("test/confusion_matrix")
    assert "| lr | 1e-07 |" in text("config")
    assert f"| test/accuracy | {mirrored.result['test/accuracy']:.6g} |" in text("summary")


def test_alarms_are_in_both(mirrored: Run, in_wandb: WandbFile, in_tensorboard: Any) -> None:
    assert "made_up" in {alarm["rule"] for alarm in mirrored.alarms}
    for alarm in mirrored.alarms:
        rule = alarm["rule"]
        at = [step for step, row in in_wandb.history.items() if f"alarms/{rule}" in row]
        assert at == [event.step for event in in_tensorboard.Scalars(f"alarms/{rule}")] == [alarm["noticed"]]
        assert alarm["evidence"] in in_wandb.summary[f"alarm/{rule}"]
        assert alarm["remedy"] in in_tensorboard.Tensors(f"alarm/{rule}")[0].tensor_proto.string_val[0].decode()
    assert [alert.title for alert in in_wandb.alerts] == [f"cifarlab: {a['rule'].replace('_', ' ')}" for a in mirrored.alarms]


def test_steps_settings_and_the_end_in_wandb(mirrored: Run, in_wandb: WandbFile) -> None:
    rows = merged(mirrored)
    assert in_wandb.order == list(range(1, STEPS + 1))  # W&B's own axis is the optimizer step too
    for step, row in rows.items():
        assert {key: in_wandb.history[step][key] for key in row} == row
    assert in_wandb.metrics["*"].step_metric == "step"
    begun = in_wandb.runs[0]
    assert (begun.project, begun.display_name, begun.entity, list(begun.tags)) == (
        "a-project", "my experiment", "a-team", ["lab", "first"])  # fmt: skip
    for key, value in mirrored.config.to_dict().items():
        assert in_wandb.config[key] == value
    assert in_wandb.config["parameters"] == 2278
    assert in_wandb.config["dataset_fingerprint"] == mirrored.dataset["fingerprint"]
    wanted = mirrored.result | {"model/parameters": 2278, "model/forward_macs": 16660, "model/forward_flops": 33320,
                                "test/macro_f1": mirrored.evaluation["macro"]["f1"],
                                "test/macro_recall": mirrored.evaluation["macro"]["recall"]}  # fmt: skip
    assert {key: in_wandb.summary[key] for key in wanted} == wanted
    assert in_wandb.exit_codes == [0]
    [artifact] = [artifact for artifact in in_wandb.artifacts if artifact.type == "model"]  # only because it was asked for
    assert [entry.path for entry in artifact.manifest.contents] == ["model.safetensors"]


# ---- sync ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(mirrored: Run, tmp_path: Path) -> Run:
    """The same run as if it had never been mirrored."""
    path = tmp_path / "run"
    shutil.copytree(mirrored.path, path, ignore=shutil.ignore_patterns("wandb", "tensorboard", "mirrors", ".lock"))
    return Run(path)


def sync(run: Run, *options: str) -> int:
    return main(["sync", str(run.path), *options])


OFFLINE = ("--wandb", "--wandb-mode", "offline")


def test_sync_sends_what_the_live_mirror_sent_and_nothing_twice(
    bare: Run, in_wandb: WandbFile, in_tensorboard: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync(bare, *OFFLINE, "--tensorboard") == 0
    assert capsys.readouterr().out == (f"W&B now has {bare.path} up to step 60 (60 steps sent)\n"
                                       f"TensorBoard now has {bare.path} up to step 60 (60 steps sent)\n")  # fmt: skip
    files = sorted(path for folder in ("wandb", "tensorboard") for path in bare.path.glob(f"{folder}/**/*") if path.is_file())
    assert sync(bare, *OFFLINE, "--tensorboard") == 0
    assert capsys.readouterr().out == (f"W&B has all of {bare.path} up to step 60: nothing new to send\n"
                                       f"TensorBoard has all of {bare.path} up to step 60: nothing new to send\n")  # fmt: skip
    assert files == sorted(path for folder in ("wandb", "tensorboard") for path in bare.path.glob(f"{folder}/**/*")
                           if path.is_file())  # fmt: skip
    again = read_wandb(bare.path)
    assert again.order == in_wandb.order
    for step, row in again.history.items():
        assert _plain(row) == _plain(in_wandb.history[step])
    assert {artifact.type for artifact in again.artifacts} == {"run_table"}  # weights only on request
    events = read_tensorboard(bare.path)
    now, live = ({kind: sorted(tags) if isinstance(tags, list) else tags for kind, tags in each.Tags().items()}
                 for each in (events, in_tensorboard))  # fmt: skip
    assert now == live  # in another order: figures that the run draws now and then came live before others
    for tag in events.Tags()["scalars"]:
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [(e.step, e.value) for e in in_tensorboard.Scalars(tag)]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Without pictures and tables: which step they go with depends on when they were drawn."""
    return {key: value for key, value in row.items() if not (isinstance(value, dict) and value["_type"] != "histogram")}


def test_a_running_run_is_sent_bit_by_bit(bare: Run, in_wandb: WandbFile, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, result = bare.path / "metrics.jsonl", (bare.path / "result.json").read_bytes()
    whole = metrics.read_bytes()
    (bare.path / "result.json").unlink()
    lines = whole.splitlines(keepends=True)
    at = next(k for k, line in enumerate(lines) if b'"epoch"' in line)  # the row of the first evaluation
    with RunFolder(bare.path):  # a training holds the folder all the while
        for until in (at, at + 1, at + 7, len(lines)):
            metrics.write_bytes(b"".join(lines[:until]) + lines[until % len(lines)][:11])  # with a torn last row
            assert sync(bare, *OFFLINE, "--tensorboard") == 0
    assert "more to come, the run has not ended" in capsys.readouterr().out
    metrics.write_bytes(whole)
    (bare.path / "result.json").write_bytes(result)
    assert sync(bare, *OFFLINE, "--tensorboard") == 0
    found = read_wandb(bare.path)
    assert found.order == list(range(1, STEPS + 1))
    assert len(found.folders) > 2
    # Interrupted is not finished: W&B shows such a session as preempted, until the next one goes on with it.
    assert found.exit_codes == [1] * (len(found.folders) - 1) + [0]
    assert found.preemptions == len(found.folders) - 1
    assert len({run.run_id for run in found.runs}) == 1
    for step, row in merged(bare).items():
        assert {key: found.history[step][key] for key in row} == row
    assert {key for row in found.history.values() for key in row} == {key for row in in_wandb.history.values() for key in row}
    events = read_tensorboard(bare.path)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("test/accuracy")] == [20, 40, 60]
    # A figure that is drawn anew later is sent, and nothing else.
    before = len(found.order)
    Image.new("RGB", (8, 4)).save(bare.path / "figures" / "confusion.png")
    assert sync(bare, *OFFLINE) == 0
    late = read_wandb(bare.path)
    assert len(late.order) == before + 1
    assert set(late.history[STEPS + 1]) == {"step", "figures/confusion"}
    assert late.history[STEPS + 1]["step"] == STEPS


def test_a_run_that_was_sent_to_wandb_is_still_a_run(mirrored: Run) -> None:
    """W&B leaves a link to the log of its program, which lies in its cache, in every run folder."""
    links = [path for path in mirrored.path.rglob("*") if path.is_symlink()]
    assert any(not link.resolve().is_relative_to(mirrored.path.resolve()) for link in links)
    assert cl.load_run(mirrored.path).result["state"] == "finished"


def test_two_do_not_mirror_one_run_at_once(bare: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from cifarlab.trackers.mirror import Mirror
    from cifarlab.trackers.tensorboard import Tensorboard

    mirror = Mirror(bare.path, Tensorboard())
    mirror.open()
    assert sync(bare, "--tensorboard") == 2
    assert f"{bare.path} is being sent to TensorBoard by another process" in capsys.readouterr().err
    mirror.close()


def test_lost_notes_and_lost_files_cost_nothing(bare: Run) -> None:
    """Without notes the sinks themselves know how far they are; without TensorBoard's files, all is written again."""
    assert sync(bare, *OFFLINE, "--tensorboard") == 0
    notes = bare.path / "mirrors" / "tensorboard.json"
    notes.write_bytes(notes.read_bytes()[:40])
    assert sync(bare, "--tensorboard") == 0
    assert [event.step for event in read_tensorboard(bare.path).Scalars("train/loss")] == list(range(1, STEPS + 1))
    shutil.rmtree(bare.path / "tensorboard")
    state = json.loads(notes.read_bytes())
    notes.write_text(json.dumps(state | {"clean": []}))
    assert sync(bare, "--tensorboard") == 0
    events = read_tensorboard(bare.path)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    assert "figures/confusion" in events.Tags()["images"]
    notes = bare.path / "mirrors" / "wandb.json"
    state = json.loads(notes.read_bytes())
    state["positions"]["offline"]["step"] = 33  # as after a crash between sending and noting
    notes.write_text(json.dumps(state | {"clean": []}))
    assert sync(bare, *OFFLINE) == 0
    assert read_wandb(bare.path).order == list(range(1, STEPS + 1))


@pytest.mark.parametrize("options", [(), ("--wandb-mode", "offline")])
def test_sync_must_know_where_to(bare: Run, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert sync(bare, *options) == 2
    assert "Say --wandb, --tensorboard or both" in capsys.readouterr().err


def test_sync_without_a_key_leaves_files_and_says_so(bare: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert sync(bare, "--wandb") == 0
    told = capsys.readouterr().out
    assert "W&B has no API key" in told
    assert f"`cifarlab sync {bare.path} --wandb`" in told


def test_a_watched_run_is_sent_too(tmp_path: Path) -> None:
    import torch
    from torch import nn

    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with cl.watch(model, optimizer, run="mine", runs_dir=tmp_path, every=5, figures=False, say=None) as watched:
        for _ in range(12):
            loss = model(torch.randn(16, 4)).square().mean()
            watched.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert sync(watched.run, *OFFLINE, "--tensorboard") == 0
    found, events = read_wandb(watched.run.path), read_tensorboard(watched.run.path)
    assert found.order == list(range(1, 13))
    assert (found.exit_codes, found.preemptions) == ([0], 0)
    assert [event.step for event in events.Scalars("train/loss")] == found.order
    assert [event.step for event in events.Scalars("gradient_flow/norm/0.weight")] == [1, 5, 10]
    assert found.config["optimizers"][0]["name"] == "SGD"


# ---- resume --------------------------------------------------------------------------------------------------------------


def test_after_kill_9_a_resume_goes_on_in_both(tmp_path: Path) -> None:
    """Killed with rows sent that the resume does again; and in a step in which nothing is noted yet."""
    config = dataclasses.replace(CONFIG, lr=0.05)
    watch = dict(runs_dir=str(tmp_path), name="run", progress="none", forecast=False, figures=False, probe_every=20,
                 save_every=0.4, log_every=1, tensorboard=True, wandb_mode="offline", wandb_project="p")  # fmt: skip
    for kill_at, resume in ((33, ""), (51, "auto")):
        slow = [sys.executable, str(PROJECT / "tests" / "tiny_models.py"), json.dumps(config.to_dict()),
                json.dumps(watch | {"resume": resume}), str(kill_at if not resume else kill_at - 32), "0.15"]  # fmt: skip
        done = subprocess.run(slow, capture_output=True, text=True, timeout=120, cwd=PROJECT)
        assert done.returncode == -9, done.stderr
        noted = json.loads((tmp_path / "run" / "mirrors" / "tensorboard.json").read_bytes())["positions"]["files"]["step"]
        assert 0 < noted < kill_at
    run = train(tmp_path, config, save_every=0.4, resume="auto", tensorboard=True, wandb_mode="offline", wandb_project="p")
    assert run.result["state"] == "finished"
    found = read_wandb(run.path)  # which raises where W&B got a step twice
    assert found.order == list(range(1, STEPS + 1))
    assert len(found.folders) == 3
    notes = json.loads((run.path / "mirrors" / "wandb.json").read_bytes())
    assert {begun.run_id for begun in found.runs} == {notes["about"]["id"]}
    events = read_tensorboard(run.path)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))
    for step, row in merged(run).items():
        for key, value in row.items():
            if not key.startswith("time/"):  # the rest is bitwise what an undisturbed run has
                assert found.history[step][key] == value
    losses = [event.value for event in events.Scalars("train/loss")]
    np.testing.assert_array_equal(np.float32(losses), run.metrics["train/loss"].astype(np.float32))


# ---- what is read --------------------------------------------------------------------------------------------------------


def test_a_feed_keeps_nothing_and_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over ten thousand rows its memory stays where it was, and no row is read more often than twice."""
    import tracemalloc

    from cifarlab.trackers import content
    from cifarlab.trackers.content import Feed, Position

    num_read, read = 0, content.read_rows

    def counted(path: Path, start: int = 0) -> Iterator[Any]:
        nonlocal num_read
        for found in read(path, start):
            num_read += 1
            yield found

    monkeypatch.setattr(content, "read_rows", counted)

    with RunFolder(tmp_path) as folder:
        feed = Feed(tmp_path, Position())
        sizes, steps = [], []
        tracemalloc.start()
        for start in range(0, 10_000, 500):
            folder.rows([{"step": step, "train/loss": 0.5, "lr": 0.1} for step in range(start + 1, start + 501)])
            steps += [entry.step for entry in feed.read()]
            sizes.append(tracemalloc.get_traced_memory()[0] - 40 * len(steps))
        tracemalloc.stop()
    assert steps == list(range(1, 10_000))  # the last waits: more may come to it
    assert sizes[-1] - sizes[4] < 20_000
    assert 10_000 <= num_read <= 10_000 + 20 * 2  # of each look the last row, which waits, again


def test_layers_are_sent_every_hundred_steps_and_at_evaluations(tmp_path: Path) -> None:
    from cifarlab.records import Measured
    from cifarlab.trackers.content import Feed, Position

    with RunFolder(tmp_path) as folder:
        folder.write_json("probes.json", {"every": 200, "parameters": [{"name": "w", "shape": [4]}]})
        steps = np.arange(1, 251)
        values = np.stack([steps * 1.0, steps * 1.0, steps * 2.0], -1)[:, None]
        folder.table(Measured("gradient_flow", ("w",), ("norm", "clipped_norm", "max_abs"), steps, values))
        rows = [{"step": float(step), "lr": 0.1} for step in steps]
        folder.rows([*rows[:150], {"step": 150, "epoch": 1.0}, *rows[150:]])
        entries = Feed(tmp_path, Position()).read()
    found = {entry.step: entry.scalars for entry in entries if "gradient_flow/norm/w" in entry.scalars}
    assert sorted(found) == [1, 100, 150, 200]
    assert found[100] == {"lr": 0.1, "gradient_flow/norm/w": 100.0, "gradient_flow/max_abs/w": 200.0}  # nothing was clipped
    assert len(entries) == 249


def test_both_extras_are_in_the_package() -> None:
    import tomllib

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"wandb", "tensorboard"} <= set(project)
    assert "EXTRAS ?= dev,wandb,tensorboard" in (PROJECT / "Makefile").read_text()
    assert os.environ.get("WANDB_API_KEY") is None
    with pytest.raises(InputError, match="wandb_mode"):
        cl.WatchConfig(wandb_mode="later")  # type: ignore[arg-type]
