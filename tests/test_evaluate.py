"""Scores against slow references, edge cases, ranks, and what is written."""

import inspect
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from cifarlab.config import InputError
from cifarlab.evaluate import (
    build_evaluation,
    load_evaluation,
    predict_logits,
    predict_views,
    quick_scores,
    save_evaluation,
)

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def build_net(num_classes: int = 7) -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.Linear(8 * 36, num_classes)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Flatten(), head)
    net[1].running_mean.uniform_(-1, 1)
    return net


def make_images(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)


def make_logits(n: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    return rng.normal(size=(n, num_classes)).astype(np.float32) + 1.5 * np.eye(num_classes, dtype=np.float32)[labels], labels


@pytest.mark.parametrize("batch_size", [1, 4, 13, 500])
def test_logits_are_those_of_one_image_after_another(batch_size: int) -> None:
    net, images = build_net().eval(), make_images(13)
    logits = predict_logits(net, images, mean=MEAN, std=STD, device="cpu", batch_size=batch_size)
    for image, row in zip(images, logits, strict=True):
        pixels = (image / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
        torch.testing.assert_close(row, net(torch.tensor(pixels).float()[None])[0].detach(), rtol=1e-4, atol=1e-5)
    assert logits.dtype == torch.float32
    assert not logits.is_inference()  # an ordinary tensor, that may be used in autograd


def test_each_module_gets_its_training_flag_back_also_after_a_failure() -> None:
    net = build_net().train()
    net[1].eval()  # a frozen batch norm
    statistics = net[1].running_mean.clone()
    predict_logits(net, make_images(3), mean=MEAN, std=STD, device="cpu")
    assert [m.training for m in net] == [True, False, True, True, True, True]
    assert torch.equal(net[1].running_mean, statistics)
    net.add_module("bad", nn.Linear(1, 1))
    with pytest.raises(RuntimeError):
        predict_logits(net, make_images(3), mean=MEAN, std=STD, device="cpu")
    assert [m.training for m in (net, net[0], net[1])] == [True, True, False]


def test_read_only_memory_maps_and_tensors_give_the_same(tmp_path: Path) -> None:
    images = make_images(9)
    np.save(tmp_path / "images.npy", images)
    given = [images, np.load(tmp_path / "images.npy", mmap_mode="r"), torch.tensor(images)]
    first, *rest = (predict_logits(build_net(), kind, mean=MEAN, std=STD, device="cpu", batch_size=4) for kind in given)
    assert all(torch.equal(first, other) for other in rest)


def test_half_precision_gives_float32_near_the_full_one() -> None:
    net, images = build_net(), make_images(5)
    full, half = (predict_logits(net, images, mean=MEAN, std=STD, device="cpu", precision=p) for p in ("fp32", "bf16"))
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    torch.testing.assert_close(full, half, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("images", [make_images(0), make_images(2).astype(np.float32), make_images(2)[:, :1], make_images(2)[0]])
def test_images_of_another_form_are_refused(images: np.ndarray) -> None:
    with pytest.raises(InputError, match="uint8, N×3×H×W"):
        predict_logits(build_net(), images, mean=MEAN, std=STD, device="cpu")


RANK = """
import sys, torch, numpy as np, torch.distributed as dist
from torch import nn
from cifarlab.evaluate import predict_logits
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for n in (1, 2, 13):
    whole = predict_logits(build_net(), make_images(n), mean=MEAN, std=STD, device="cpu", batch_size=4)
    ours = predict_logits(build_net(), make_images(n), mean=MEAN, std=STD, device="cpu", batch_size=4, rank=rank, world_size=2)
    torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)
    assert ours.shape == (n, 7)
dist.destroy_process_group()
"""


def test_every_rank_gets_all_logits_even_with_fewer_images_than_ranks(tmp_path: Path) -> None:
    script = inspect.getsource(build_net) + inspect.getsource(make_images) + RANK
    script = "from __future__ import annotations\n" + script
    ranks = [subprocess.Popen([sys.executable, "-c", script, str(r), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}) for r in range(2)]  # fmt: skip
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


@settings(deadline=None, max_examples=40, derandomize=True)
@given(n=st.integers(1, 60), num_classes=st.integers(1, 12), seed=st.integers(0, 99))
def test_scores_equal_plain_counting(n: int, num_classes: int, seed: int) -> None:
    logits, labels = make_logits(n, num_classes, seed)
    evaluation = build_evaluation("test", logits, labels)
    predicted = [max(range(num_classes), key=row.__getitem__) for row in logits]
    right = [int(p == y) for p, y in zip(predicted, labels, strict=True)]
    assert evaluation.top1 == pytest.approx(sum(right) / n)
    hits = sum(int(y in sorted(range(num_classes), key=row.__getitem__)[-5:]) for row, y in zip(logits, labels, strict=True))
    assert evaluation.top5 == (pytest.approx(hits / n) if num_classes > 5 else None)
    assert evaluation.loss == pytest.approx(float(cross_entropy(torch.tensor(logits).double(), torch.tensor(labels))), rel=1e-6)
    for i in range(num_classes):
        row = [sum(1 for p, y in zip(predicted, labels, strict=True) if (y, p) == (i, j)) for j in range(num_classes)]
        assert evaluation.confusion[i].tolist() == row
        expected = row[i] / sum(row) if sum(row) else math.nan
        assert evaluation.per_class["accuracy"][i] == pytest.approx(expected, nan_ok=True)
    assert evaluation.per_class["support"].sum() == n
    assert evaluation.probabilities.sum(axis=1) == pytest.approx(1, abs=1e-5)
    quick = quick_scores(torch.tensor(logits), torch.tensor(labels))
    assert quick == {"loss": pytest.approx(evaluation.loss, rel=1e-4), "accuracy": pytest.approx(evaluation.top1)}


def test_loss_weighs_images_alike_and_does_not_clip_a_sure_mistake() -> None:
    logits = np.array([[200.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert build_evaluation("test", logits, [1, 0, 1]).loss == pytest.approx((200 + 2 * math.log(2)) / 3)


def test_an_image_without_finite_logits_is_wrong_everywhere_and_says_so() -> None:
    logits, labels = make_logits(50, 8)
    logits[labels.argsort()[0]] = np.nan  # of class 0, which argmax of nan would have hit by chance
    logits[7, 3] = np.inf
    clean = build_evaluation("test", *make_logits(50, 8))
    evaluation = build_evaluation("test", logits, labels)
    lost = {int(labels.argsort()[0]), 7}
    assert evaluation.num_nonfinite == len(lost) == 2
    assert math.isnan(evaluation.loss)
    assert evaluation.confusion.sum() == 48
    assert evaluation.top1 == pytest.approx(sum(clean.predicted[i] == labels[i] for i in range(50) if i not in lost) / 50)
    assert evaluation.top5 is not None
    assert evaluation.top5 <= 48 / 50
    assert not lost & set(evaluation.mistakes(50)["row"].tolist() + evaluation.doubtful(50)["row"].tolist())
    quick = quick_scores(torch.tensor(logits), torch.tensor(labels))
    assert math.isnan(quick["loss"])
    assert quick["accuracy"] == pytest.approx(evaluation.top1)


def test_a_model_that_only_says_nan_is_right_about_nothing() -> None:
    evaluation = build_evaluation("test", np.full((6, 10), np.nan), [0] * 6)
    assert (evaluation.top1, evaluation.top5, evaluation.num_nonfinite, len(evaluation.mistakes())) == (0, 0, 6, 0)
    assert "support" in evaluation.classification_report([str(k) for k in range(10)])


def test_absent_classes_are_unmeasured_not_zero() -> None:
    logits = np.eye(100, dtype=np.float32)[[3, 3, 4, 9]]
    evaluation = build_evaluation("test", logits, [3, 3, 3, 4])  # one 3 called 4, the only 4 called 9
    assert evaluation.per_class["accuracy"][[3, 4]].tolist() == pytest.approx([2 / 3, 0])
    assert np.isnan(evaluation.per_class["accuracy"]).sum() == 98
    assert evaluation.average("macro")["recall"] == pytest.approx(1 / 3)
    assert evaluation.average("weighted")["recall"] == pytest.approx(1 / 2)
    names = ["quick\nbrown", *(f"class {k}" for k in range(1, 99)), ""]
    assert "class 3" in evaluation.classification_report(names)
    assert "class 9" not in evaluation.classification_report(names)


def test_mistakes_are_the_surest_and_doubtful_the_closest() -> None:
    logits = np.log(np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.2, 0.1, 0.7], [0.35, 0.33, 0.32], [0.5, 0.1, 0.4]]))
    evaluation = build_evaluation("test", logits, [1, 0, 2, 0, 2], indices=[10, 11, 12, 13, 14])
    mistakes = evaluation.mistakes(2)
    assert mistakes["index"].tolist() == [11, 10]
    assert (mistakes["true"].tolist(), mistakes["predicted"].tolist()) == ([0, 1], [1, 0])
    assert mistakes["probability"] == pytest.approx([0.8, 0.6], rel=1e-5)
    doubtful = evaluation.doubtful(3)
    assert doubtful["row"].tolist() == [3, 4, 0]
    assert doubtful["margin"] == pytest.approx([0.02, 0.1, 0.3], rel=1e-3)
    assert len(evaluation.mistakes(99)) == 3
    assert len(evaluation.doubtful(99)) == 5


def test_views_of_the_least_sure_images_are_averaged_and_the_rest_is_left_alone() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (10, 3, 6, 5), dtype=np.uint8)
    weights = rng.normal(size=(3 * 6 * 5, 4)) / 100

    def predict(views: np.ndarray) -> np.ndarray:
        assert views.dtype == np.uint8
        return (views.reshape(len(views), -1).astype(float) @ weights).astype(np.float32)

    evaluation = build_evaluation("test", predict(images), np.zeros(10, dtype=int))
    least_sure = set(evaluation.doubtful(3)["row"].tolist())
    result = predict_views(evaluation, images, 0.3, predict)
    for row, image in enumerate(images):
        y, x = np.abs(np.arange(-1, 7)), np.abs(np.arange(-1, 6))  # mirrored at the border, which is not repeated
        padded = image[:, np.minimum(y, 10 - y)][..., np.minimum(x, 8 - x)]
        views = [image, padded[:, :6, :5], padded[:, 2:, 2:]]
        plain, *shifted = (predict(np.stack([view, view[..., ::-1]])).mean(0) for view in views)
        mean = 0.5 * plain + 0.5 * np.mean(shifted, axis=0)
        expected = mean if row in least_sure else evaluation.logits[row]
        np.testing.assert_allclose(result[row], expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(predict_views(evaluation, images, 0.0, predict), evaluation.logits)


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    logits, labels = make_logits(40, 6)
    logits[0] = np.nan
    names = ['"a"', "<script>", "猫", "x" * 60, "", "c"]
    evaluation = build_evaluation("val", logits, labels[:40], indices=range(40, 80))
    save_evaluation(tmp_path, evaluation, names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "predictions.npz"]
    again, class_names = load_evaluation(tmp_path)
    assert class_names == tuple(names)
    assert again.split == "val"
    for name in ("logits", "labels", "indices"):
        np.testing.assert_array_equal(getattr(again, name), getattr(evaluation, name))
        assert getattr(again, name).dtype == getattr(evaluation, name).dtype

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    saved = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert saved["accuracy"] == pytest.approx(evaluation.top1)
    assert math.isnan(float(saved["loss"]))
    assert [row["name"] for row in saved["per_class"]] == names
    assert saved["confusion"] == evaluation.confusion.tolist()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 torn", b"\x80\x05pickle"])
def test_missing_and_damaged_predictions_are_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "predictions.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"predictions\.npz"):
        load_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [(np.zeros((0, 3)), []), (np.zeros((2, 0)), [0, 0]), (np.zeros(3), [0, 0, 0]),
     (np.zeros((2, 3)), [0]), (np.zeros((2, 3)), [0, 3]), (np.zeros((2, 3)), [-1, 0])],
)  # fmt: skip
def test_what_does_not_fit_is_refused(logits: np.ndarray, labels: list[int]) -> None:
    with pytest.raises(InputError, match="'test'"):
        build_evaluation("test", logits, labels)


def test_names_must_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 class names were given for 3 classes"):
        save_evaluation(tmp_path, build_evaluation("test", np.zeros((2, 3)), [0, 1]), ["a", "b"])
    assert not list(tmp_path.iterdir())


def test_reading_an_evaluation_needs_no_torch(tmp_path: Path) -> None:
    save_evaluation(tmp_path, build_evaluation("test", *make_logits(20, 10)), [str(k) for k in range(10)])
    script = ("import sys; sys.modules['torch'] = None; from pathlib import Path; from cifarlab.evaluate import load_evaluation\n"
              f"e, _ = load_evaluation(Path({str(tmp_path)!r})); assert 'sklearn' not in sys.modules; print(e.loss)")  # fmt: skip
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_arrays_of_another_kind_are_no_evaluation(tmp_path: Path) -> None:
    from cifarlab.evaluate import load_samples

    good: dict[str, Any] = {"images": np.zeros((2, 3, 4, 4), np.uint8), "true": np.array(["a", "b"]),
                            "predicted": np.array(["a", "b"]), "probability": np.ones(2)}  # fmt: skip
    for name, value, told in (("images", np.zeros((2, 4, 4), np.uint8), "no images that can be shown"),
                              ("images", np.zeros((2, 3, 4, 4)), "no images that can be shown"),
                              ("true", np.array(["a"]), "not one name and probability for each image"),
                              ("probability", np.ones(2, int), "not one name and probability for each image")):  # fmt: skip
        np.savez(tmp_path / "samples.npz", **(good | {name: value}))
        with pytest.raises(InputError, match=f"{told}: remove it and run `cifarlab evaluate"):
            load_samples(tmp_path)
    evaluation = build_evaluation("test", [[0.0, 1.0]], [1])
    save_evaluation(tmp_path, evaluation, ["a", "b"])
    kept = dict(np.load(tmp_path / "predictions.npz"))
    for name in ("split", "labels", "class_names"):
        np.savez(tmp_path / "predictions.npz", **(kept | {name: np.array([1.5])}))
        with pytest.raises(InputError, match=f"no {name} of the right kind: remove it"):
            load_evaluation(tmp_path)
