"""The images behind the confusion matrix: which are kept, how small, and what a page gets of them."""

import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import cifarlab as cl
from cifarlab.cli import main
from cifarlab.config import InputError
from cifarlab.evaluate import load_evaluation
from cifarlab.report.pictures import BUDGET, load_pictures
from cifarlab.runs import Run
from cifarlab.thumbnails import SIDE, SUREST, choose_rows, load_thumbnails, save_thumbnails

sys.path.insert(0, str(Path(__file__).parent))
from run_folders import calibrated_logits, make_run

sys.path.pop(0)


def make_images(n: int, side: int = 8) -> NDArray[np.uint8]:
    """Each of one colour, its number in the first two channels, so that it is known again."""
    images = np.zeros((n, 3, side, side), np.uint8)
    images[:, 0], images[:, 1] = (np.arange(n) % 256)[:, None, None], (np.arange(n) // 256)[:, None, None]
    return images


def test_every_cell_has_its_surest_mistakes() -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    probability = rng.random(500).astype(np.float32)
    rows = choose_rows(true, predicted, probability, at_most=1000, per_cell=3, right_per_class=2)
    for i in range(4):
        for j in range(4):
            cell = np.flatnonzero((true == i) & (predicted == j))
            kept = [row for row in rows if true[row] == i and predicted[row] == j]
            if i == j:
                assert len(kept) == 2
            else:
                assert set(cell[np.argsort(-probability[cell])][:3]) <= set(kept)  # more only where they are among the surest
    wrong = np.flatnonzero(true != predicted)
    assert set(wrong[np.argsort(-probability[wrong])][:SUREST]) <= set(rows)
    mistakes = [row for row in rows if true[row] != predicted[row]]
    assert list(probability[mistakes]) == sorted(probability[mistakes], reverse=True)


def test_large_cells_come_first_where_not_all_fit() -> None:
    true = np.array([0] * 50 + [1] * 20 + [2] * 2 + [3] * 900)
    predicted = np.array([1] * 50 + [2] * 20 + [3] * 2 + [3] * 900)
    probability = np.linspace(1, 0.1, len(true)).astype(np.float32)
    rows = choose_rows(true, predicted, probability, at_most=SUREST + 8, per_cell=90)
    assert len(rows) == SUREST + 8 + 3
    kept = [int((true[rows[:-3]] == k).sum()) for k in range(4)]
    assert kept[0] > kept[1] > 0
    assert kept[2] == kept[3] == 0  # a cell of two has no claim beside 50/37 and 20/8


@pytest.mark.parametrize(("num_classes", "most"), [(10, 600 + 30), (100, 600 + 100)])
def test_a_bad_network_leaves_no_more_than_the_bound(num_classes: int, most: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(4000, num_classes)), rng.integers(0, num_classes, 4000)
    names = [str(k) for k in range(num_classes)]
    images = rng.integers(0, 256, (4000, 3, 32, 32), dtype=np.uint8)  # noise: nothing packs it
    run = make_run(tmp_path / "run", names=names, logits=logits, labels=labels, images=images)
    kept = load_thumbnails(run.path, num_classes)
    assert kept is not None
    assert 500 < len(kept.images) <= most
    assert (run.path / "thumbnails.npz").stat().st_size < 2.3e6
    pictures = load_pictures(run)
    assert pictures is not None
    assert len(pictures.pictures) == len(kept.images)
    assert len(pictures.data_uri) <= BUDGET
    if num_classes == 10:
        assert all(len(places) <= 6 + SUREST for cell, places in pictures.cells.items() if cell[0] != cell[1])
        assert len(pictures.cells) == 100


def test_a_page_finds_each_image_in_its_place(tmp_path: Path) -> None:
    logits, labels = calibrated_logits(1000)
    run = make_run(tmp_path / "run", logits=logits, labels=labels, images=make_images(1000))
    pictures = load_pictures(run)
    assert pictures is not None
    kind, _, content = pictures.data_uri.partition(",")
    assert kind == "data:image/webp;base64"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))
    assert pixels.shape == (pictures.rows * pictures.height, pictures.columns * pictures.width, 3)
    predicted = logits.argmax(axis=1)
    for picture in pictures.pictures:
        left, top = pictures.position(picture.place)
        # Without loss, since these are small.
        assert pixels[top + 3, left + 3, :2].tolist() == [picture.index % 256, picture.index // 256]
        assert (picture.true, picture.predicted) == (labels[picture.index], predicted[picture.index])
    assert all(pictures.pictures[place].true != pictures.pictures[place].predicted for place in pictures.mistakes)
    sure = [pictures.pictures[place].probability for place in pictures.mistakes]
    assert sure == sorted(sure, reverse=True)
    wrong = np.flatnonzero(labels != predicted)
    assert {pictures.pictures[place].index for place in pictures.mistakes} <= set(wrong.tolist())


def test_large_images_are_shrunk_and_fewer(tmp_path: Path) -> None:
    logits, labels = np.eye(10)[(np.arange(900) + 1) % 10], np.arange(900) % 10  # all wrong
    run = make_run(tmp_path / "run", logits=logits, labels=labels, images=make_images(900, side=100)[:, :, :, :50])
    kept = load_thumbnails(run.path, 10)
    assert kept is not None
    assert kept.images.shape[2:] == (SIDE, SIDE // 2)
    assert kept.images[5, 0].mean() == kept.index[5] % 256


def test_an_older_run_shows_its_samples_and_one_without_any_nothing(tmp_path: Path) -> None:
    logits, labels = calibrated_logits(500)
    older = make_run(tmp_path / "older", logits=logits, labels=labels, images=make_images(500), thumbnails=False)
    pictures = load_pictures(older)
    assert pictures is not None
    assert len(pictures.pictures) == 24
    assert {picture.index for picture in pictures.pictures} == {-1}
    assert len(pictures.mistakes) == 12
    assert load_pictures(make_run(tmp_path / "none")) is None
    (older.path / "config.json").unlink()
    (older.path / "watch.json").write_text("{}")
    assert load_pictures(Run(older.path)) is None


def test_a_run_without_mistakes(tmp_path: Path) -> None:
    labels = np.arange(100) % 10
    run = make_run(tmp_path / "run", logits=np.eye(10)[labels], labels=labels, images=make_images(100))
    pictures = load_pictures(run)
    assert pictures is not None
    assert pictures.mistakes == ()
    assert len(pictures.pictures) == 30


def test_images_without_finite_logits_are_in_no_cell(tmp_path: Path) -> None:
    logits, labels = calibrated_logits(200)
    logits[:] = np.nan
    run = make_run(tmp_path / "run", logits=logits, labels=labels, images=make_images(200), thumbnails=False)
    save_thumbnails(run.path, load_evaluation(run.path)[0], make_images(200))
    kept = load_thumbnails(run.path, 10)
    assert kept is not None
    assert len(kept.images) == 0
    (run.path / "samples.npz").unlink()
    assert load_pictures(run) is None


@pytest.mark.parametrize("damage", ["torn", "classes", "columns", "pixels"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    logits, labels = calibrated_logits(200)
    run = make_run(tmp_path / "run", logits=logits, labels=labels, images=make_images(200))
    path = run.path / "thumbnails.npz"
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:200])
    else:
        with np.load(path) as archive:
            columns = {name: archive[name] for name in archive}
        columns["true"] = columns["true"] + 10 * (damage == "classes")
        columns["index"] = columns["index"][damage == "columns" :]
        columns["images"] = columns["images"].astype(np.float32 if damage == "pixels" else np.uint8)
        np.savez(path, **columns)
    with pytest.raises(InputError, match=r"thumbnails\.npz cannot be read"):
        load_pictures(run)


def test_a_training_and_an_evaluation_leave_them(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = cl.TrainConfig(data="digits", model=tiny, train_images=64, batch_size=32, epochs=1, lr=0.01)
    run = cl.train(config, cl.WatchConfig(runs_dir=tmp_path, name="run", figures=False, forecast=False, progress="none"))
    kept, (evaluation, _) = load_thumbnails(run.path, 10), load_evaluation(run.path)
    assert kept is not None
    digits = cl.load_dataset("digits")
    np.testing.assert_array_equal(kept.images, digits.test.images[kept.index])
    np.testing.assert_array_equal(kept.true, digits.test.labels[kept.index])
    np.testing.assert_array_equal(kept.predicted, evaluation.predicted[kept.index])
    (run.path / "thumbnails.npz").unlink()  # as in a run of an older version
    assert main(["evaluate", str(run.path), "--device", "cpu"]) == 0
    again = load_thumbnails(run.path, 10)
    assert again is not None
    np.testing.assert_array_equal(again.images, kept.images)
    capsys.readouterr()
