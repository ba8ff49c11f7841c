"""The studies that look into trained networks: what they leave, that they go on, and that their words follow from the numbers."""

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cifarlab as cl
from cifarlab.analysis.grid import Landscape, read_landscape
from cifarlab.checkpoint import load_weights
from cifarlab.cli import main
from cifarlab.config import InputError, WatchConfig
from cifarlab.studies import STUDIES, Results
from cifarlab.studies.conduct import job_of, study
from cifarlab.studies.landscape import build_before, conclude
from cifarlab.studies.plan import load_results, make_plan

SMALL = {"grid": 5, "points": 7, "images": 60, "norm_images": 40}


@pytest.fixture(scope="module")
def tiny_net() -> Iterator[str]:
    """As `tiny`, for all of this file's tests."""
    sys.path.insert(0, str(Path(__file__).parent))  # where the engine's processes find it, too
    import tiny_models

    yield from tiny_models.registered()
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def trained(tiny_net: str, tmp_path_factory: pytest.TempPathFactory, own_cache: None) -> list[Path]:
    """Two short trainings on digits with their trajectories."""
    quiet: dict[str, Any] = dict(runs_dir=tmp_path_factory.mktemp("trained"), progress="none", forecast=False, figures=False,
                                 probes="none")  # fmt: skip
    return [cl.train(cl.recipes.quick(model=tiny_net, epochs=4, train_images=400, seed=seed),
                     cl.WatchConfig(name=f"run-{seed}", trajectory_every=1.0, **quiet)).path for seed in (0, 1)]  # fmt: skip


@pytest.fixture
def two_runs(trained: list[Path], tmp_path: Path) -> list[Path]:
    """The same for each test anew, to do with what it likes."""
    return [Path(shutil.copytree(path, tmp_path / "runs" / path.name)) for path in trained]


def look(name: str, folder: Path, **values: Any) -> Results:
    return study(name, values=values, folder=folder, watch=WatchConfig(progress="none"))


@pytest.fixture(scope="module")
def landscape(trained: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The landscape of both."""
    return look("landscape", tmp_path_factory.mktemp("studies"), run=str(trained[0]), other=str(trained[1]), **SMALL)


def test_the_landscape_study_of_finished_runs(landscape: Results, trained: list[Path]) -> None:
    results = landscape
    names = {path.stem for path in (results.folder / "figures").glob("*.png")}
    assert names == {"landscape_line", "landscape_plane", "landscape_surface", "landscape_trajectory", "landscape_between_runs"}
    assert names == {path.stem for path in (results.folder / "figures").glob("*.svg")}
    with (results.folder / "landscape.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 * 7 + 2 * 25 + 25 + 7)  # frozen and recomputed: lines, planes, the trajectory's plane, between
    assert {row["batch_norm"] for row in rows} == {"frozen", "recomputed"}
    text = (results.folder / "conclusion.md").read_text()
    for words in ("over images", "Before training", "After training", "batch norm", "random walk", "Between the two runs",
                  "finite at every", "run-0 (tiny on digits"):  # fmt: skip
        assert words in text
    # the centre is the network itself: its loss on these images, and both ends of the line are the two runs
    line, plane, between = (read_landscape(results.folder / "analysis" / f"{name}-frozen.jsonl")
                            for name in ("line-after", "plane-after", "between"))  # fmt: skip
    values = [line.loss[0, 3], plane.loss[2, 2], between.loss[0, 1]]
    assert values[0] == values[1] == values[2]
    # done again, nothing is measured again
    before = {path: path.stat().st_mtime_ns for path in (results.folder / "analysis").iterdir()}
    again = look("landscape", results.folder.parent, run=str(trained[0]), other=str(trained[1]), **SMALL)
    assert again.folder == results.folder
    assert before == {path: path.stat().st_mtime_ns for path in (results.folder / "analysis").iterdir()}
    # a laptop without torch draws and concludes the same
    (results.folder / "conclusion.md").unlink()
    script = ("import sys; sys.modules['torch'] = None\nfrom cifarlab.studies.conduct import write_findings\n"
              "write_findings(sys.argv[1])")  # fmt: skip
    subprocess.run([sys.executable, "-c", script, str(results.folder)], check=True, timeout=120)
    assert (results.folder / "conclusion.md").read_text() == text


def test_a_study_that_was_stopped_half_way_draws_and_tells_what_it_has(landscape: Results, tmp_path: Path) -> None:
    results = load_results(shutil.copytree(landscape.folder, tmp_path / "study"))
    whole = {path: path.read_bytes() for path in (results.folder / "analysis").iterdir()}
    files = sorted(whole)
    for kept in range(len(files) + 1):  # any number of them whole, the next one torn
        for k, path in enumerate(files):
            path.write_bytes(whole[path][: len(whole[path]) if k < kept else len(whole[path]) // 2 if k == kept else 0])
            if k > kept:
                path.unlink()
        assert len(STUDIES["landscape"].conclude(results)) > 20
    path = results.folder / "analysis" / "trajectory-frozen.jsonl"
    path.write_bytes(whole[path][:-20])
    assert "landscape_trajectory" in STUDIES["landscape"].draw(results)


def test_the_network_before_training_is_the_one_that_was_trained(two_runs: list[Path]) -> None:
    for path in two_runs:
        weights = build_before(cl.load_run(path), torch.device("cpu")).state_dict()
        kept = load_weights(path / "trajectory" / "step-00000000.safetensors")
        assert all(torch.equal(weights[name], tensor) for name, tensor in kept.items())


def test_a_run_without_trajectory_and_without_a_second_one_is_said_so(two_runs: list[Path], tmp_path: Path) -> None:
    for path in (two_runs[0] / "trajectory").iterdir():
        path.unlink()
    results = look("landscape", tmp_path / "studies", run=str(two_runs[0]), **SMALL)
    text = (results.folder / "conclusion.md").read_text()
    assert "kept no trajectory that spans a plane" in text
    assert "one run only" in text
    assert not (results.folder / "figures" / "landscape_trajectory.png").exists()


def test_the_filter_study_of_a_finished_run(two_runs: list[Path], tmp_path: Path) -> None:
    results = look("filters", tmp_path / "studies", run=str(two_runs[0]), images=[3, 1], searched=50)
    names = {path.stem for path in (results.folder / "figures").glob("*.png")}
    assert names == {"filters_first", "filters_deep", "maps_first", "maps_deep", "exciting", "saliency", "saliency_untrained"}
    with (results.folder / "filters.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2 * 4
    text = (results.folder / "conclusion.md").read_text()
    for words in ("of 4 filters", "chance gives", "rank correlation with the untrained network", "of the 2 images shown"):
        assert words in text
    with np.load(results.folder / "analysis" / "filters.npz") as found:
        images = found["images"]
    digits = cl.load_dataset("digits")
    np.testing.assert_array_equal(images, digits.test.images[[3, 1]])
    with pytest.raises(InputError, match="images=99999 cannot be used"):
        look("filters", tmp_path / "studies", run=str(two_runs[0]), images=[99999])
    with pytest.raises(InputError, match="no convolution of this model"):
        look("filters", tmp_path / "studies", run=str(two_runs[0]), layer="0.5")


def test_stride_and_padding_need_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "stride-padding", "--folder", str(tmp_path), "--progress", "none"]) == 0
    told = capsys.readouterr().out
    assert "agree in all 9 cases" in told
    assert "The size is kept by stride 1, padding 1." in told
    (folder,) = tmp_path.iterdir()
    assert {path.stem for path in (folder / "figures").glob("*.svg")} == {"geometry_usage", "geometry_first", "geometry_second"}
    with (folder / "geometry.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["stride"], row["padding"]) for row in rows] == [(s, p) for s in "123" for p in "012"]
    assert all(row["size1_formula"] == row["size1_run"] and row["size2_formula"] == row["size2_run"] for row in rows)


def test_stride_and_padding_with_the_filters_of_a_run(two_runs: list[Path], tmp_path: Path) -> None:
    results = look("stride-padding", tmp_path / "studies", run=str(two_runs[0]), strides=[1, 2], paddings=[0, 2])
    with np.load(results.folder / "analysis" / "geometry.npz") as found:
        assert found["is_trained"]
        assert int(found["kernel"]) == 5  # that of the tiny net's first convolution
        assert found["formula"].shape == (4, 2, 2)


def test_the_landscape_study_trains_its_own_runs_with_their_trajectory(tiny_net: str, tmp_path: Path) -> None:
    """Through the command, with the engine's own processes."""
    words = ["study", "landscape", "--seeds", "0,1", "--progress", "none", "--jobs", "1"]
    settings = {"model": tiny_net, "epochs": 2, "train_images": 64, "batch_size": 32, "grid": 3, "points": 3, "images": 16,
                "norm_images": 16}  # fmt: skip
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    assert main([*words, *arguments, "--folder", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert (folder / "figures" / "landscape_trajectory.png").exists()
    assert (folder / "figures" / "landscape_between_runs.png").exists()
    assert len(list(folder.glob("trials/*/trajectory/step-*.safetensors"))) == 2 * 5


def test_a_named_run_is_not_trained_and_studies_ask_for_what_they_need(two_runs: list[Path], tmp_path: Path) -> None:
    base = cl.recipes.quick()
    for name in ("landscape", "filters"):
        assert not make_plan(STUDIES[name], base, {"run": [str(two_runs[0])]}, (0,)).trials
        assert len(make_plan(STUDIES[name], base, {}, (0, 1)).trials) == 2
    plan = make_plan(STUDIES["landscape"], base, {}, (0,))
    needed = STUDIES["landscape"].watch(base)
    assert needed == {"trajectory_every": base.epochs / 24}
    assert job_of(plan.trials[0].config, tmp_path, plan, WatchConfig(**needed)).watch.trajectory_every == base.epochs / 24
    with pytest.raises(InputError, match="there is no run folder"):
        look("landscape", tmp_path / "studies", run=str(tmp_path / "nowhere"))
    assert not (tmp_path / "studies").exists()  # refused before there is a folder


def test_a_trajectory_has_as_many_points_when_a_budget_cuts_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut to an epoch of 25, it kept a single point, and there was no plane."""
    seen: list[WatchConfig] = []

    def begin(plan: Any, place: Path, *_: Any) -> Any:
        cut = replace(plan, cut={"epochs_share": 0.04, "train_images": 0, "told": "", "budget_minutes": 1.0})
        cut.save(place)
        return cut

    def train_all(plan: Any, place: Path, watch: WatchConfig, *_: Any) -> None:
        seen.append(watch)
        raise InputError("far enough")

    monkeypatch.setattr("cifarlab.studies.conduct._begin", begin)
    monkeypatch.setattr("cifarlab.studies.conduct._train_all", train_all)
    with pytest.raises(InputError, match="far enough"):
        study("landscape", cl.recipes.quick(epochs=25), folder=tmp_path, watch=WatchConfig(progress="none"))
    assert seen[0].trajectory_every == pytest.approx(1 / 24)


# ---- words follow from numbers ----------------------------------------------------------------------------------------------


def make_line(loss: Any, error: float = 0.01, *, policy: str = "recomputed", kind: str = "random 1-D") -> Landscape:
    values = np.atleast_2d(np.asarray(loss, dtype=float))
    ys = np.linspace(-1, 1, len(values)) if len(values) > 1 else np.zeros(1)
    lost = ~np.isfinite(values)
    facts = {"num_images": 100, "has_batch_norm": True, "batch_norm": policy, "explained": [0.9, 0.08], "steps": [0, 8],
             "kind": kind}  # fmt: skip
    errors, layers = np.full_like(values, error), {(int(i), int(j)): "3" for i, j in np.argwhere(lost)}
    return Landscape(np.linspace(-1, 1, values.shape[1]), ys, values, errors, errors.copy(), np.zeros_like(values),
                     lost.astype(np.int64), layers, facts)  # fmt: skip


def told_by(found: dict[tuple[str, str], Landscape], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr("cifarlab.studies.landscape.read_all", lambda results: found)
    results = Results(folder=tmp_path, base=cl.recipes.quick(), arms=(), seeds=(0,), outcomes=())
    return conclude(results)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ([4, 2, 0.51, 0.5, 0.51, 3, 5], "to 4 and 5 at -1 and 1 filter norms"),
        ([4, 2, 0.51, 0.5, 0.51, 3, 5], "stays above the sampling error from -0.67 and 0.67 on: a valley"),
        ([4, 2, 0.51, 0.5, 0.52, 3, np.nan], "to 4 and nan at -1 and 1 filter norms"),
        ([2.3, 2.3, 2.31, 2.3, 2.3, 2.31, 2.3], "changes by 0.01 at most: no valley"),
        ([2.5, 2.4, 2.3, 2.3, 2.3, 2.4, 2.5], "changes by 0.2 at most: no valley"),
        ([2.3, 2.2, 2.25, 2.3, 2.3, 2.1, 2.3], "there is no valley around it: 2.1 at 0.67 filter norms is lower"),
    ],
)
def test_a_valley_is_only_told_where_one_is(loss: list[float], words: str, monkeypatch: Any, tmp_path: Path) -> None:
    assert words in told_by({("line-after", "recomputed"): make_line(loss)}, monkeypatch, tmp_path)


def test_policies_and_barriers_are_judged_by_their_errors(monkeypatch: Any, tmp_path: Path) -> None:
    flat, hump = np.full(7, 1.0), np.array([1, 1, 1, 1.0, 1.3, 1.0, 1.0])
    between = replace(make_line(hump), xs=np.linspace(-0.5, 1, 7))
    told = told_by({("line-after", "recomputed"): make_line(flat), ("line-after", "frozen"): make_line(3 * flat),
                    ("between", "recomputed"): between}, monkeypatch, tmp_path)  # fmt: skip
    assert "at 7 of 7 points frozen statistics give another loss, up to 3 times" in told
    assert "a barrier of 0.3 ± 0.02 at 50 % of the way" in told
    wide = {("line-after", policy): make_line(values, error=1.0) for policy, values in (("recomputed", flat), ("frozen", hump))}
    assert "no difference beyond the sampling error" in told_by(wide, monkeypatch, tmp_path)
    between.difference_error[:] = 0.5
    assert "no barrier could be shown" in told_by({("between", "recomputed"): between}, monkeypatch, tmp_path)


def test_planes_trajectories_and_nan_are_told(monkeypatch: Any, tmp_path: Path) -> None:
    x, y = np.meshgrid(np.linspace(-1, 1, 7), np.linspace(-1, 1, 7))
    plane = x**2 + y**2 + 1
    told = told_by({("plane-after", "recomputed"): make_line(plane)}, monkeypatch, tmp_path)
    assert "No point of the random plane is lower" in told
    plane[5, 5] = 0.3
    told = told_by({("plane-after", "recomputed"): make_line(plane)}, monkeypatch, tmp_path)
    assert "Lower than the network by more than the sampling error: 1 of 49 points" in told
    assert "2 local minima" in told
    plane[0, 0] = np.nan
    walk = make_line(plane, kind="training trajectory")
    told = told_by({("trajectory", "recomputed"): walk}, monkeypatch, tmp_path)
    assert "90 % + 8 % of the movement; a long random walk gives 81 % + 9 % already, so training moved more straightly" in told
    assert "Not finite: trajectory, batch norm recomputed: the loss is not finite at 1 of 49 points: (-1, -1) in 3" in told
    walk.facts["explained"] = [0.8, 0.1]
    assert "by itself shows nothing" in told_by({("trajectory", "recomputed"): walk}, monkeypatch, tmp_path)
    assert "same command goes on" in told_by({}, monkeypatch, tmp_path)
