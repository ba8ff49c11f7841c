"""Named TrainConfigs: the five labs with their exact settings, two fast ones and a quick one. No torch here.

All but the quick one are computed in the fastest precision that the device has (`precision="auto"`: weights and updates stay in
fp32 all the same); `precision="fp32"` is what the labs used.

A recipe is a plain function; its keyword arguments change any field of the config:

    cl.train(cl.recipes.resnet9_onecycle(epochs=2, seed=1))

To add one: write a function like those below and add a line to RECIPES.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cifarlab.config import InputError, TrainConfig, did_you_mean


def resnet18_cosine(**changes: Any) -> TrainConfig:
    """ResNet-18 on CIFAR-10, SGD with a cosine schedule.

    Batch 64, 25 epochs, SGD lr 0.15 momentum 0.9 weight decay 5e-4, cosine to 0; crop, flip and colour jitter.
    Source: lab A; the net is He et al. 2015 (arXiv:1512.03385) with the CIFAR stem; the schedule arXiv:1608.03983.
    """
    settings: dict[str, Any] = dict(
        recipe="resnet18-cosine", data="cifar10", model="resnet18", precision="auto", epochs=25, batch_size=64,
        optimizer="sgd", lr=0.15, momentum=0.9, weight_decay=5e-4, schedule="cosine", min_lr=0.0,
        crop_padding=4, flip="random", brightness=0.2, contrast=0.2, saturation=0.2,
    )  # fmt: skip
    return TrainConfig(**(settings | changes))


def simplecnn_adam(**changes: Any) -> TrainConfig:
    """SimpleCNN on CIFAR-10, Adam: four conv blocks, two linear layers.

    Batch 128, 30 epochs, Adam lr 1e-3 held constant; crop and flip.
    Source: lab B.
    """
    settings: dict[str, Any] = dict(
        recipe="simplecnn-adam", data="cifar10", model="simple_cnn", precision="auto", epochs=30, batch_size=128,
        optimizer="adam", lr=1e-3, schedule="constant", crop_padding=4, flip="random",
    )  # fmt: skip
    return TrainConfig(**(settings | changes))


def resnet18_adam(**changes: Any) -> TrainConfig:
    """ResNet-18 on CIFAR-10, Adam at a constant learning rate.

    Batch 128, 30 epochs, Adam lr 1e-3; crop and flip.
    Source: lab C.
    """
    settings: dict[str, Any] = dict(
        recipe="resnet18-adam", data="cifar10", model="resnet18", precision="auto", epochs=30, batch_size=128,
        optimizer="adam", lr=1e-3, schedule="constant", crop_padding=4, flip="random",
    )  # fmt: skip
    return TrainConfig(**(settings | changes))


def resnet9_onecycle(**changes: Any) -> TrainConfig:
    """ResNet-9-like net on CIFAR-10, SGD with a linear one-cycle.

    Batch 512, 24 epochs, SGD momentum 0.9 weight decay 0.005; the learning rate climbs linearly from 0.004006 to 0.04006 in
    five epochs and falls back as far; reflect-padded crop, flip, cutout 16×16; the lab's ImageNet statistics
    (`statistics="dataset"` for CIFAR-10's own).
    Source: lab D; one-cycle is Smith 2018 (arXiv:1803.09820), cutout arXiv:1708.04552.
    """
    settings: dict[str, Any] = dict(
        recipe="resnet9-onecycle", data="cifar10", model="resnet9", precision="auto", epochs=24, batch_size=512,
        statistics="imagenet", optimizer="sgd", lr=0.04006, momentum=0.9, weight_decay=0.005,
        schedule="one-cycle", peak_at=5 / 24, div_factor=10.0, final_div_factor=1.0, anneal="linear", cycle_momentum=False,
        crop_padding=4, crop_mode="reflect", flip="random", cutout=16,
    )  # fmt: skip
    return TrainConfig(**(settings | changes))


def resnet34_cifar100(**changes: Any) -> TrainConfig:
    """ResNet-34 on CIFAR-100, Adam with a cosine one-cycle.

    Batch 400, 120 epochs, Adam, one-cycle to 0.01 (beta1 cycled, as torch's OneCycleLR does by default), weight decay 1e-4,
    gradients clipped at ±0.1; crop, flip and colour jitter (hue too).
    Source: lab E.
    """
    settings: dict[str, Any] = dict(
        recipe="resnet34-cifar100", data="cifar100", model="resnet34", precision="auto", epochs=120, batch_size=400,
        optimizer="adam", lr=0.01, weight_decay=1e-4, clip_value=0.1,
        schedule="one-cycle", peak_at=0.3, div_factor=25.0, final_div_factor=1e4, anneal="cos", cycle_momentum=True,
        crop_padding=4, flip="random", brightness=0.1, contrast=0.1, saturation=0.1, hue=0.02,
    )  # fmt: skip
    return TrainConfig(**(settings | changes))


def quick(**changes: Any) -> TrainConfig:
    """SimpleCNN on scikit-learn's handwritten digits: real data that is always there, done in about a minute.

    Batch 64, 8 epochs, Adam with a one-cycle to 2e-3; crop of ±2 pixels, no flip (a mirrored digit is no digit).
    Source: lab B's network with one-cycle (arXiv:1803.09820); the settings are ours.
    """
    settings: dict[str, Any] = dict(
        recipe="quick", data="digits", model="simple_cnn", epochs=8, batch_size=64,
        optimizer="adam", lr=2e-3, schedule="one-cycle", peak_at=0.3, crop_padding=2, flip="none",
    )  # fmt: skip
    return TrainConfig(**(settings | changes))


def fast(**changes: Any) -> TrainConfig:
    """Airbench with residual pairs on CIFAR-10, Muon: a good classifier in the shortest time.

    Batch 500 in pieces of 250, 13 epochs, Muon at relative updates of 0.12 falling linearly to 0, batch-norm biases at 600 times
    that rate; label smoothing 0.2; images of 20 pixels for 15 % of the steps, 24 to the half, then 32; shifts by up to 2 pixels,
    alternating flip. `test/tta_accuracy` averages six views of the least sure quarter of the test images. On CIFAR-10 JPEG q75 it
    reached 90.1 % (91.3 % with views; bf16, means of three seeds), a plain port of its source 89.7 % (90.7 %).
    Source: airbench94_muon (Keller Jordan 2024, arXiv:2404.00498 and github.com/KellerJordan/cifar10-airbench). Ours differs in
    the net (see models/airbench.py), in smaller batches with the rates that go with them, one momentum for all, no weight decay,
    more epochs, and in images that grow, as in several CIFAR-100 speedruns.
    """
    settings: dict[str, Any] = dict(
        recipe="fast", data="cifar10", model="airbench-residual", precision="auto", epochs=13, batch_size=500,
        micro_batch_size=250, drop_last=True, optimizer="muon", lr=0.12, momentum=0.6, nesterov=True, bias_lr=600.0,
        head_lr=0.12, muon_steps=3, renormalize=True, schedule="linear", label_smoothing=0.2, small_sides="20:0.15,24:0.5",
        crop_padding=2, crop_mode="reflect", flip="alternating", eval_every=0, tta_share=0.25,
    )  # fmt: skip
    return TrainConfig(**(settings | changes))


def fast_large(**changes: Any) -> TrainConfig:
    """A wider Airbench with residual pairs on CIFAR-10, Muon: `fast` for the last points of accuracy.

    The settings of `fast`, but 16 epochs of a net of one and a half times its widths. On CIFAR-10 JPEG q75 it reached 91.0 %
    (92.1 % with views; bf16, seed 0).
    Source: as `fast`; that width and length are raised together is from airbench95 and 96 (Keller Jordan 2024, arXiv:2404.00498).
    """
    return fast(**({"recipe": "fast-large", "model": "airbench-large", "epochs": 16} | changes))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named config, and what to expect of it.

    petaflops: forward + backward of the whole training, convolutions and linear layers, one multiply-add = 2 FLOP
    (a test holds it against the network); evaluation is not in it. accuracy: the expected figure as numbers, from and to (0…1);
    None where there is none.
    """

    build: Callable[..., TrainConfig]
    petaflops: float
    expected: str
    source: str
    accuracy: tuple[float, float] | None = None

    @property
    def summary(self) -> str:
        return (self.build.__doc__ or "").splitlines()[0].rstrip(".")


RECIPES: dict[str, Recipe] = {
    "resnet18-cosine": Recipe(
        build=resnet18_cosine, petaflops=4.161, source="lab A; arXiv:1512.03385, 1608.03983",
        expected="about 94 % (public runs of this net and length)", accuracy=(0.935, 0.945),
    ),
    "simplecnn-adam": Recipe(build=simplecnn_adam, petaflops=0.7226, source="lab B", expected="84.54 % (the lab's figure)",
                             accuracy=(0.8454, 0.8454)),
    "resnet18-adam": Recipe(
        build=resnet18_adam, petaflops=4.993, source="lab C; arXiv:1512.03385", expected="no published figure"
    ),
    "resnet9-onecycle": Recipe(
        build=resnet9_onecycle, petaflops=2.727, source="lab D; arXiv:1803.09820, 1708.04552",
        expected="92.22 % (the lab's figure)", accuracy=(0.9222, 0.9222),
    ),
    "resnet34-cifar100": Recipe(
        build=resnet34_cifar100, petaflops=41.72, source="lab E; arXiv:1512.03385", expected="70–75 % (the lab's range)",
        accuracy=(0.70, 0.75),
    ),
    "fast": Recipe(
        build=fast, petaflops=0.2124, source="airbench94_muon; arXiv:2404.00498",
        expected="no figure on the official images yet (90.1 % on JPEG q75, three seeds); its source: 94.0 % with six views",
    ),
    "fast-large": Recipe(
        build=fast_large, petaflops=0.5639, source="airbench94_muon; arXiv:2404.00498",
        expected="no figure on the official images yet (91.0 % on JPEG q75, 92.1 % with six views, seed 0)",
    ),
    "quick": Recipe(build=quick, petaflops=0.00554, source="cifarlab", accuracy=(0.969, 0.989),
                    expected="96.9–98.9 % (measured, seed 0: with one thread and with two)"),
}  # fmt: skip


def load_recipe(name: str, **changes: Any) -> TrainConfig:
    """The config of a recipe by its name; raises InputError with the nearest name."""
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise InputError(f"there is no recipe {name!r}{did_you_mean(name, RECIPES)}; the recipes are {known}")
    return RECIPES[name].build(**changes)
