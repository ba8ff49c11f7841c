"""A run put to use: evaluated again it gives its own numbers, and files are seen as the network's test images were."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cifarlab as cl
from cifarlab.checkpoint import load_weights, save_weights
from cifarlab.config import InputError
from cifarlab.data.augment import normalize_batch
from cifarlab.inference import evaluate_run, load_model, predict
from cifarlab.runs import Run


@pytest.fixture
def run(tiny: str, tmp_path: Path) -> Run:
    """A finished run with averaged weights and a validation split, whose best step is not its last."""
    config = cl.TrainConfig(
        data="digits", model=tiny, batch_size=64, epochs=1, lr=0.2, val_fraction=0.2, eval_every=0.2, ema_decay=0.5
    )
    watch = cl.WatchConfig(runs_dir=tmp_path, name="run", progress="none", forecast=False, figures=False)
    return cl.train(config, watch)


def unfinished(run: Run) -> Run:
    """The run as it was before its end: with its checkpoints only."""
    path = run.path.with_name("unfinished")
    shutil.copytree(run.path, path)
    for name in ("result.json", "model.safetensors", "evaluation.json", "predictions.npz"):
        (path / name).unlink()
    return Run(path)


def test_evaluating_a_finished_run_gives_its_own_numbers(run: Run) -> None:
    evaluation, images = evaluate_run(run)
    assert evaluation.top1 == run.result["test/accuracy"]
    assert evaluation.loss == run.result["test/loss"]
    assert evaluation.top5 == run.result["test/top5"]
    np.testing.assert_array_equal(evaluation.logits, np.load(run.path / "predictions.npz")["logits"])
    assert len(images) == len(evaluation.labels) == 360
    validation, _ = evaluate_run(str(run.path), "val")
    assert validation.top1 == pytest.approx(run.result["val/accuracy"])
    assert len(evaluate_run(run, "train")[0].labels) == 1437 - len(validation.labels)


def test_evaluating_an_unfinished_run_gives_the_numbers_of_its_last_checkpoint(run: Run) -> None:
    evaluation, _ = evaluate_run(unfinished(run))
    assert evaluation.top1 == pytest.approx(run.metrics["test/accuracy"][-1])
    assert evaluation.loss == pytest.approx(run.metrics["test/loss"][-1], rel=1e-5)


def test_an_unknown_split_is_refused(run: Run) -> None:
    with pytest.raises(InputError, match=r"has no split 'clean': choose train, val, test"):
        evaluate_run(run, "clean")


def test_predicting_files_equals_calling_the_network(run: Run, tmp_path: Path) -> None:
    dataset = cl.load_dataset("digits")
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(dataset.test.images[index].transpose(1, 2, 0)).save(paths[-1])
    grey = tmp_path / "grey.png"  # the digits are grey, so this is the first one again
    Image.fromarray(dataset.test.images[0, 0]).save(grey)
    found = predict(run, [*paths, str(grey)], top=3)

    with torch.no_grad():
        inputs = normalize_batch(torch.tensor(dataset.test.images[:3]), dataset.mean, dataset.std, torch.device("cpu"), False)
        expected = load_model(run)(inputs).softmax(1)
    for prediction, path, row in zip(found, paths, expected, strict=False):
        values, classes = row.topk(3)
        assert prediction.image == path
        assert prediction.classes == tuple(dataset.class_names[k] for k in classes)
        assert prediction.probabilities == pytest.approx(values.tolist(), rel=1e-4)
    assert found[3].image == grey
    assert (found[3].classes, found[3].probabilities) == (found[0].classes, pytest.approx(found[0].probabilities))
    assert sum(predict(run, paths[:1], top=99)[0].probabilities) == pytest.approx(1)
    assert predict(run, []) == []


def test_what_is_no_image_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    for name in ("missing.png", "text.png"):
        with pytest.raises(InputError, match=name):
            predict(run, [tmp_path / name])


def without_a_tensor(path: Path) -> None:
    weights = load_weights(path)
    del weights["0.weight"]
    save_weights(weights, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_tensor, "the weights in .* do not fit its model 'tiny'"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "model.safetensors cannot be read"),
        (lambda path: path.write_bytes(b""), "model.safetensors cannot be read"),
    ],
    ids=["another network's", "torn", "empty"],
)
def test_wrong_weights_are_refused(run: Run, damage: Any, message: str) -> None:
    damage(run.path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_model(run)


def test_a_run_of_an_unknown_model_or_without_weights_is_refused(run: Run) -> None:
    bare = unfinished(run)
    shutil.rmtree(bare.path / "checkpoints")
    with pytest.raises(InputError, match=r"has no weights yet, neither model\.safetensors nor"):
        load_model(bare)
    values = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(values | {"model": "resnet_18"}))
    with pytest.raises(InputError, match=r"model 'resnet_18' is not one of .*; did you mean 'resnet18'\?"):
        load_model(str(run.path))


def test_changed_data_is_refused(tiny: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, name in enumerate(("ant", "bee")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for k in range(3):
                grey = Image.new("L", (32, 32), 80 * number + 10 * k + (split == "test"))
                grey.save(tmp_path / "data" / split / name / f"{k}.png")
    watch = cl.WatchConfig(runs_dir=tmp_path, name="run", progress="none", forecast=False, figures=False)
    run = cl.train(cl.TrainConfig(data=str(tmp_path / "data"), model=tiny, epochs=1, crop_padding=0), watch)
    assert evaluate_run(run)[0].top1 == run.result["test/accuracy"]
    for split in ("train", "test"):
        (tmp_path / "data" / split / "ant").rename(tmp_path / "data" / split / "zebra")
    with pytest.raises(InputError, match="not the data that"):
        evaluate_run(run)
