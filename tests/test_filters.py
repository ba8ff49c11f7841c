"""Filters, feature maps, exciting images, saliency and Grad-CAM against nets so small that the answer is known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cifarlab.analysis.filters import (
    apply_filters,
    excite,
    feature_maps,
    find_exciting,
    grad_cam,
    last_maps,
    list_convolutions,
    rank_correlation,
    read_filters,
    saliency,
)
from cifarlab.config import InputError

PLAIN: dict[str, Any] = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
STATISTICS: dict[str, Any] = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))


def images_of(count: int = 5, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def as_floats(images: np.ndarray, mean: Any, std: Any) -> Tensor:
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (torch.tensor(images).float() / 255 - shift) / scale


class ClassMaps(nn.Module):
    """conv → in-place ReLU → mean over the map → linear: for this net Grad-CAM is the class activation map of Zhou et al."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.norm, self.linear = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.relu(self.norm(self.conv(images))).mean((2, 3)))  # type: ignore[no-any-return]


def test_filters_are_the_weights_of_the_layer_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 5))
    assert list_convolutions(model) == ["0", "2"]
    np.testing.assert_array_equal(read_filters(model), model[0].weight.detach())
    np.testing.assert_array_equal(read_filters(model, "2"), model[2].weight.detach())
    read_filters(model)[:] = 0
    assert model[0].weight.any()  # it was a copy
    with pytest.raises(InputError, match="'1' is no convolution"):
        read_filters(model, "1")
    with pytest.raises(InputError, match="no 2-D convolution"):
        read_filters(nn.Linear(2, 2))


def test_feature_maps_are_what_the_layers_gave_also_before_a_relu_in_place() -> None:
    model, images = ClassMaps().train(), images_of()
    found = feature_maps(model, images, ["conv", "norm", "relu", "linear"], **STATISTICS)
    with torch.no_grad():
        conv = nn.functional.conv2d(as_floats(images, **STATISTICS), model.conv.weight, model.conv.bias, padding=1)
        norm = conv / (1 + 1e-5) ** 0.5  # fresh running statistics: 0 and 1
        expected = {"conv": conv, "norm": norm, "relu": norm.relu(), "linear": model.linear(norm.relu().mean((2, 3)))}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)
    assert found["norm"].min() < 0


def test_a_single_filter_on_an_image_is_that_convolution() -> None:
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 5, 3)), images_of(2)
    edge = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    with torch.no_grad():
        model[0].weight[2] = edge / 3
    responses = apply_filters(model, images, channels=[2], **PLAIN)
    assert responses.shape == (2, 1, 8, 8)
    padded = np.pad(images.mean(1) / 255, ((0, 0), (1, 1), (1, 1)))
    for y in range(8):
        for x in range(8):
            by_hand = (padded[:, y : y + 3, x : x + 3] * edge.numpy()).sum((1, 2))
            np.testing.assert_allclose(responses[:, 0, y, x], by_hand, atol=1e-5)
    deep = apply_filters(model, images, "2", **PLAIN)  # of a deeper layer: on what reaches it
    with torch.no_grad():
        np.testing.assert_allclose(deep, model(as_floats(images, **PLAIN)), atol=1e-5)
    with pytest.raises(InputError, match="no filter 4"):
        apply_filters(model, images, channels=[4], **PLAIN)


def test_the_most_exciting_images_are_those_with_the_pattern_and_the_box_encloses_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight[0] = 1.0
        model[0].weight[1] = -1.0
    images = np.full((40, 3, 9, 9), 100, np.uint8)
    images[17, :, 4:7, 2:5] = 255  # the brightest window
    images[3, :, 0:3, 6:9] = 200
    images[25] = 0  # the darkest
    found = find_exciting(model, images, "0", [0, 1], top=2, batch_size=7, **PLAIN)
    assert found.indices[0].tolist() == [17, 3]
    assert found.indices[1, 0] == 25
    assert found.positions[0].tolist() == [[2, 1], [0, 3]]
    assert found.boxes[0].tolist() == [[4, 2, 7, 5], [0, 6, 3, 9]]
    assert found.values[0].tolist() == pytest.approx([27.0, 27 * 200 / 255])
    # the same by brute force, for random filters
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 5, 3))
    images = images_of(30)
    found = find_exciting(model, images, "2", [4, 0], top=30, batch_size=8, **STATISTICS)
    with torch.no_grad():
        all_maps = model(as_floats(images, **STATISTICS)).flatten(2).amax(2)[:, [4, 0]].T.numpy()
    np.testing.assert_array_equal(found.indices, np.argsort(-all_maps, axis=1))
    np.testing.assert_allclose(found.values, -np.sort(-all_maps, axis=1), atol=1e-6)


def test_what_excites_a_linear_unit_is_white_where_its_weight_is_positive() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 6 * 6, 4))
    pictures, reached = excite(model, "1", [2, 0], image_size=(6, 6), steps=200, **STATISTICS)
    for k, unit in enumerate([2, 0]):
        weight = model[1].weight[unit].detach().view(3, 6, 6).numpy()
        strong = np.abs(weight) > 0.2 * np.abs(weight).max()  # steps are in proportion to the weights
        np.testing.assert_array_equal(pictures[k][strong], (weight > 0)[strong])
        pixels = as_floats((weight > 0).astype(np.uint8) * 255, **STATISTICS).numpy()
        best = float((pixels * weight).sum() + model[1].bias[unit].detach())
        assert reached[k] > 0.95 * best
        assert reached[k] <= best + 1e-4
    again, _ = excite(model, "1", [2, 0], image_size=(6, 6), steps=200, **STATISTICS)
    np.testing.assert_array_equal(again, pictures)


def test_smoothness_makes_the_exciting_image_smooth() -> None:
    model = ClassMaps()
    rough, smooth = (excite(model, "conv", [0], image_size=(8, 8), steps=30, smoothness=s, **STATISTICS) for s in (0.0, 1.0))
    assert np.abs(np.diff(smooth[0], axis=-1)).mean() < np.abs(np.diff(rough[0], axis=-1)).mean()
    assert rough[1] > smooth[1]


def test_saliency_of_a_linear_net_is_its_weights() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), images_of(3)
    maps = saliency(model, images, [3, 0, 3], **STATISTICS)
    for k, label in enumerate([3, 0, 3]):
        weight = model[1].weight[label].detach().view(3, 8, 8) / torch.tensor(STATISTICS["std"]).view(3, 1, 1)
        np.testing.assert_allclose(maps[k], weight.abs().amax(0), rtol=1e-4)
    with torch.no_grad():
        predicted = model(as_floats(images, **STATISTICS)).argmax(1)
    np.testing.assert_array_equal(saliency(model, images, **STATISTICS), saliency(model, images, predicted, **STATISTICS))


def test_saliency_of_a_net_is_its_slope_by_differences() -> None:
    model, images = ClassMaps().double(), images_of(1, side=6)
    (slopes,) = saliency(model.float(), images, [1], **STATISTICS)
    model.double().eval()
    start, at = as_floats(images, **STATISTICS).double(), torch.tensor(STATISTICS["std"]).double()
    for y, x in [(0, 0), (2, 3), (5, 4)]:
        found = []
        for channel in range(3):
            values = []
            for sign in (1, -1):
                moved = start.clone()
                moved[0, channel, y, x] += sign * 1e-6 / at[channel]
                with torch.no_grad():
                    values.append(float(model(moved)[0, 1]))
            found.append(abs(values[0] - values[1]) / 2e-6)
        assert slopes[y, x] == pytest.approx(max(found), rel=1e-3)


def test_grad_cam_is_the_class_activation_map_where_that_exists() -> None:
    model, images = ClassMaps(), images_of(4)
    classes = [0, 1, 2, 3]
    maps = feature_maps(model, images, ["relu"], **STATISTICS)["relu"]
    weight = model.linear.weight.detach().numpy()
    expected = np.maximum(np.einsum("nk,nkhw->nhw", weight[classes], maps), 0) / 64
    assert expected.any()
    np.testing.assert_allclose(grad_cam(model, images, "relu", classes, **STATISTICS), expected, atol=1e-6)
    assert last_maps(model, (3, 8, 8)) == "relu"
    np.testing.assert_array_equal(grad_cam(model, images, classes=classes, **STATISTICS),
                                  grad_cam(model, images, "relu", classes, **STATISTICS))  # fmt: skip
    # before the in-place ReLU, by hand
    norm = feature_maps(model, images, ["norm"], **STATISTICS)["norm"]
    alpha = weight[classes] * (norm > 0).mean((2, 3)) / 64
    by_hand = np.maximum(np.einsum("nk,nkhw->nhw", alpha, norm), 0)
    np.testing.assert_allclose(grad_cam(model, images, "norm", classes, **STATISTICS), by_hand, atol=1e-6)


def test_grad_cam_finds_where_the_object_is() -> None:
    """A net that looks for red in one class and blue in the other."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(2, 2, bias=False))  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])[:, :, None, None])
        model[4].weight.copy_(torch.eye(2))
    image = np.zeros((1, 3, 8, 8), np.uint8)
    image[0, 0, 1:3, 1:3], image[0, 2, 5:7, 5:7] = 255, 255
    for label, colour in ((0, 0), (1, 2)):
        np.testing.assert_array_equal(grad_cam(model, image, "1", [label], **PLAIN)[0] > 0, image[0, colour] > 0)
        np.testing.assert_array_equal(saliency(model, image, [label], **PLAIN)[0] > 0, image[0, colour] > 0)


def test_rank_correlation_is_spearmans() -> None:
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 50), rng.normal(size=50)
    assert rank_correlation(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)
    assert rank_correlation(b, np.exp(b)) == pytest.approx(1)
    assert np.isnan(rank_correlation(a, np.ones(50)))


READERS: list[Callable[[nn.Module, np.ndarray], Any]] = [
    lambda model, images: feature_maps(model, images, ["conv"], **STATISTICS),
    lambda model, images: find_exciting(model, images, "relu", [0, 1], top=2, **STATISTICS),
    lambda model, images: excite(model, "conv", [0], image_size=(8, 8), steps=2, **STATISTICS),
    lambda model, images: saliency(model, images, **STATISTICS),
    lambda model, images: grad_cam(model, images, **STATISTICS),
]


@pytest.mark.parametrize("look", READERS)
def test_a_look_leaves_the_model_as_it_was(look: Callable[[nn.Module, np.ndarray], Any]) -> None:
    model, images = ClassMaps().train(), images_of()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    look(model, images)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [m.training for m in (model, model.conv, model.norm, model.relu)] == [True, True, False, True]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["linear.weight"]
    assert torch.equal(model.linear.weight.grad, torch.ones_like(model.linear.weight))
    assert not any(module._forward_hooks for module in model.modules())


def test_what_cannot_be_looked_at_is_refused() -> None:
    model, images = ClassMaps(), images_of()
    model.unused = nn.Conv2d(3, 3, 1)
    for look, words in [
        (lambda: feature_maps(model, images, ["cnov"], **PLAIN), "no layer of this model; did you mean 'conv'"),
        (lambda: feature_maps(model, images, ["unused"], **PLAIN), "was not called"),
        (lambda: feature_maps(model, images[0], ["conv"], **PLAIN), "give uint8"),
        (lambda: find_exciting(model, images, "conv", [6], **PLAIN), "no channel 6: it has 0 to 5"),
        (lambda: find_exciting(model, images, "linear", [0], **PLAIN), "no maps"),
        (lambda: excite(model, "conv", [9], image_size=(8, 8), **PLAIN), "no channel 9"),
        (lambda: saliency(model, images, [0, 1], **PLAIN), "do not fit 5 images"),
        (lambda: saliency(model, images, [4] * 5, **PLAIN), "4 classes"),
        (lambda: grad_cam(model, images, "linear", **PLAIN), "no maps"),
        (lambda: last_maps(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), (3, 8, 8)), "larger than 1×1"),
    ]:
        with pytest.raises(InputError, match=words):
            look()
