"""Models: the published counts exactly, one contract for every entry of MODELS, and what each docstring claims."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cifarlab.config import InputError
from cifarlab.models import MODELS, create_model, list_models
from cifarlab.models.airbench import Airbench
from cifarlab.models.simple_cnn import SimpleCNN

FACTS = [  # name, classes, image side, parameters, multiply-adds of convolutions and linear layers
    ("resnet18", 10, 32, 11_173_962, 555_422_720),
    ("resnet34", 100, 32, 21_328_292, 1_159_448_576),
    ("resnet18-imagenet-stem", 10, 32, 11_181_642, 37_016_576),
    ("resnet18-imagenet-stem", 1000, 224, 11_689_512, 1_814_073_344),  # torchvision's, the "1.8 GFLOPs"
    ("simple_cnn", 10, 32, 4_441_130, 80_581_632),
    ("resnet9", 10, 32, 6_573_120, 379_261_952),
    ("separable", 10, 32, 879_114, 114_807_808),
    ("airbench", 10, 32, 1_645_088, 98_683_168),
    ("airbench-large", 10, 32, 5_566_224, 170_545_824),
    ("airbench-residual", 10, 32, 2_481_088, 80_381_472),
]


@pytest.mark.parametrize(("name", "num_classes", "side", "params", "macs"), FACTS)
def test_parameter_and_mac_counts(name: str, num_classes: int, side: int, params: int, macs: int) -> None:
    with torch.device("meta"):
        model = create_model(name, num_classes).eval()
        images = torch.empty(1, 3, side, side)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert sum(p.numel() for p in model.parameters()) == params
    assert counter.get_total_flops() == 2 * macs


def test_every_model_has_its_counts_tested() -> None:
    assert {fact[0] for fact in FACTS} == set(MODELS)


def test_resnet9_convolution_and_linear_weights() -> None:
    model = create_model("resnet9")
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)) == 6_568_640


def strides(tensor: Tensor) -> list[int]:
    """Strides that mean something: those of axes longer than 1."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


@pytest.mark.parametrize("name", MODELS)
def test_contract(name: str) -> None:
    """Other class counts and image sizes, a gradient in every parameter, the same weights from the same seed.

    And gradients in the weights' memory order under channels_last: fused CPU optimizers take that for granted.
    """
    torch.manual_seed(0)
    twin = create_model(name, 7)
    torch.manual_seed(0)
    model = create_model(name, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))
    model.to(memory_format=torch.channels_last)
    for side in (32, 48):
        logits = model(torch.randn(2, 3, side, side))
        assert logits.shape == (2, 7)
    F.cross_entropy(logits, torch.tensor([0, 6])).backward()
    for param_name, param in model.named_parameters():
        if not param.requires_grad:
            assert name.startswith("airbench"), param_name  # whitening, and batch norm's scales
            continue
        assert param.grad is not None, param_name
        assert param.grad.isfinite().all(), param_name
        assert param.grad.any(), param_name
        assert strides(param.grad) == strides(param), param_name


@pytest.mark.parametrize("name", MODELS)
def test_memory_order_does_not_matter(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        actual = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_see_activations_unchanged(name: str) -> None:
    """An in-place ReLU would overwrite the batch-norm output that a hook keeps."""
    model = create_model(name).eval()
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _m, _x, out: kept.append((out, out.clone())))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert kept
    assert all(torch.equal(out, copy) for out, copy in kept)


def test_resnet9_is_the_labs_formula() -> None:
    """Convolution → max-pool → batch norm → ReLU in the pooled layers, x + R(x) after the first and last."""
    torch.manual_seed(0)
    model = create_model("resnet9").double()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)  # negative scales tell the order of pooling and batch norm apart
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    weights = [p for p in model.parameters() if p.ndim == 4]
    scales = [(m.weight, m.bias) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    def conv(x: Tensor, i: int, pool: int = 1) -> Tensor:
        x = F.max_pool2d(F.conv2d(x, weights[i], padding=1), pool)
        return F.batch_norm(x, None, None, *scales[i], training=True).relu()

    x = conv(conv(images, 0), 1, pool=2)
    x = x + conv(conv(x, 2), 3)
    x = conv(conv(x, 4, pool=2), 5, pool=2)
    x = x + conv(conv(x, 6), 7)
    expected = F.max_pool2d(x, 4).flatten(1) @ next(p for p in model.parameters() if p.ndim == 2).T
    torch.testing.assert_close(model(images), expected)


def test_simple_cnn_averages_larger_features_to_8x8() -> None:
    torch.manual_seed(0)
    model = SimpleCNN(10).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = F.avg_pool2d(model.features(images), 2)
        expected = model.fc2(model.fc1(features.flatten(1)).relu())
        torch.testing.assert_close(model(images), expected)


def test_whitened_outputs_are_uncorrelated_of_variance_one() -> None:
    """And each with its negative; in directions that images do have, since an ε holds the others down."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 3, 8, 8, generator=generator).cumsum(2).cumsum(3)  # neighbouring pixels are alike, as in photographs
    model = Airbench(10, (8, 8, 8))
    model.whiten(iter(images.split(16)))
    with torch.no_grad():
        outputs = model.whitening(images).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(outputs[12:], -outputs[:12])
    second_moments = outputs[:12] @ outputs[:12].T / outputs.shape[1]
    torch.testing.assert_close(second_moments, torch.eye(12, dtype=torch.float64), rtol=0, atol=0.01)
    assert not model.whitening.weight.requires_grad


def test_airbench_begins_as_the_identity_on_its_first_channels() -> None:
    model = Airbench(10, (32, 40, 40))
    residual = Airbench(10, (32, 40, 40), pairs=((32, 1, 1), (24, 3, 1), (40, 3, 3)))
    for group in (*model.groups, *residual.groups):
        for conv in (group.conv1, group.conv2):
            x = torch.randn(1, conv.in_channels, 7, 7)
            expected = x[..., 1:, 1:] if conv.kernel_size == (2, 2) else x  # unpadded: its lower right corner
            count = min(conv.in_channels, conv.out_channels)
            torch.testing.assert_close(conv(x)[:, :count], expected[:, :count])


def test_a_residual_pair_by_hand() -> None:
    torch.manual_seed(0)
    group = Airbench(10, (6, 8, 8), pairs=((6, 1, 1), (5, 3, 1), (9, 3, 3))).groups[2].eval()
    x = torch.randn(2, 8, 7, 7)
    norm = 1 / (1 + 1e-5) ** 0.5  # running statistics as they begin
    pooled = F.silu(norm * F.max_pool2d(F.conv2d(x, group.conv1.weight), 2))
    inner = F.silu(norm * F.conv2d(pooled, group.conv2.weight, padding=1))
    torch.testing.assert_close(group(x), F.silu(pooled + norm * F.conv2d(inner, group.conv3.weight, padding=1)))


def test_separable_receptive_field() -> None:
    """The field the docstring gives, against the reach of input gradients with all-positive weights."""
    model = create_model("separable").eval()
    for param in model.parameters():
        nn.init.ones_(param)
    layers = [model.prep, *model.stage1, *model.stage2, *model.stage3]
    images = torch.rand(1, 3, 96, 96, requires_grad=True)
    x, fields = images, []
    for layer in layers:
        x = layer(x)
        middle = x[0, 0, x.shape[2] // 2, x.shape[3] // 2]
        (gradient,) = torch.autograd.grad(middle, images, retain_graph=True)
        rows = gradient[0].sum((0, 2)).nonzero()
        fields.append(int(rows.max() - rows.min()) + 1)
    assert fields == [3, 5, 9, 11, 15, 23, 27, 35, 51]


@pytest.mark.parametrize("layer", ["layer2", "layer3", "layer4"])
def test_strided_shortcut_gradient_in_channels_last(layer: str) -> None:
    """oneDNN can get the weight gradient of 1×1 stride-2 NHWC convolutions wrong (its issue #6035): ours must be right."""
    torch.manual_seed(0)
    conv = create_model("resnet18").get_submodule(f"{layer}.0.downsample.0")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.kernel_size, conv.stride) == ((1, 1), (2, 2))
    images = torch.randn(32, conv.in_channels, 32, 32)
    out_gradient = torch.randn(32, conv.out_channels, 16, 16)

    exact_images = images.double().requires_grad_()
    exact_weight = conv.weight.detach().double().requires_grad_()
    F.conv2d(exact_images, exact_weight, stride=2).backward(out_gradient.double())

    conv.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
    conv(images).backward(out_gradient.contiguous(memory_format=torch.channels_last))
    assert conv.weight.grad is not None
    assert images.grad is not None
    torch.testing.assert_close(conv.weight.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(images.grad.double(), exact_images.grad, rtol=1e-4, atol=1e-4)


def test_list_models() -> None:
    assert list_models() == list(MODELS)
    assert list_models("resnet18*") == ["resnet18", "resnet18-imagenet-stem"]
    assert list_models("vgg*") == []


def test_bad_names_and_counts_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'resnet18'"):
        create_model("resnet81")
    with pytest.raises(InputError, match=r"num_classes=0 .* at least 1"):
        create_model("resnet9", 0)
