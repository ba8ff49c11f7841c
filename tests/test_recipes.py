"""The recipes: the labs' exact settings, the stated cost, and two real steps of each."""

import ast
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import cifarlab as cl
from cifarlab.config import InputError
from cifarlab.distributed import pick_precision
from cifarlab.models import create_model
from cifarlab.recipes import RECIPES, load_recipe

CROP_AND_FLIP = {"crop_padding": 4, "crop_mode": "zeros", "flip": "random"}
PLAIN = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0, "cutout": 0, "mixup_alpha": 0, "cutmix_alpha": 0,
         "label_smoothing": 0, "clip_norm": 0, "clip_value": 0, "ema_decay": 0, "warmup_epochs": 0,
         "precision": "auto"}  # fmt: skip
LABS: dict[str, dict[str, Any]] = {
    "resnet18-cosine": PLAIN | CROP_AND_FLIP | {
        "data": "cifar10", "model": "resnet18", "batch_size": 64, "epochs": 25, "statistics": "dataset",
        "optimizer": "sgd", "lr": 0.15, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4,
        "schedule": "cosine", "min_lr": 0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2,
    },
    "simplecnn-adam": PLAIN | CROP_AND_FLIP | {
        "data": "cifar10", "model": "simple_cnn", "batch_size": 128, "epochs": 30,
        "optimizer": "adam", "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0, "schedule": "constant",
    },
    "resnet18-adam": PLAIN | CROP_AND_FLIP | {
        "data": "cifar10", "model": "resnet18", "batch_size": 128, "epochs": 30,
        "optimizer": "adam", "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0, "schedule": "constant",
    },
    "resnet9-onecycle": PLAIN | {
        "data": "cifar10", "model": "resnet9", "batch_size": 512, "epochs": 24, "statistics": "imagenet",
        "crop_padding": 4, "crop_mode": "reflect", "flip": "random", "cutout": 16,
        "optimizer": "sgd", "lr": 0.04006, "momentum": 0.9, "weight_decay": 0.005,
        "schedule": "one-cycle", "peak_at": 5 / 24, "anneal": "linear", "div_factor": 10, "final_div_factor": 1,
        "cycle_momentum": False, "base_momentum": 0.85, "max_momentum": 0.95,
    },
    "resnet34-cifar100": PLAIN | CROP_AND_FLIP | {
        "data": "cifar100", "labels": "fine", "model": "resnet34", "batch_size": 400, "epochs": 120,
        "optimizer": "adam", "lr": 0.01, "weight_decay": 1e-4, "schedule": "one-cycle", "clip_value": 0.1,
        "brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.02,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LABS)
def test_a_lab_has_its_exact_settings(name: str) -> None:
    config = load_recipe(name)
    assert {field: getattr(config, field) for field in LABS[name]} == LABS[name]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_keeps_the_contract(name: str) -> None:
    recipe = RECIPES[name]
    config = recipe.build()
    assert config.recipe == name
    assert config == load_recipe(name)
    assert config.model in cl.list_models()
    assert "Source:" in (recipe.build.__doc__ or "")
    assert all((recipe.summary, recipe.expected, recipe.source))
    changed = recipe.build(epochs=2, seed=7)
    assert changed == replace(config, epochs=2, seed=7)
    assert changed.hash != config.hash
    assert replace(config, recipe="renamed").hash == config.hash
    with pytest.raises(TypeError, match="batchsize"):
        recipe.build(batchsize=3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_stated_cost_is_that_of_the_network(name: str) -> None:
    """2·MAC of forward and backward, counted on the meta device at each size of image; the first needs none of its input."""
    recipe = RECIPES[name]
    config = recipe.build()
    images, num_classes = {"cifar10": (50_000, 10), "cifar100": (50_000, 100), "digits": (1_437, 10)}[config.data]
    with torch.device("meta"):
        model = create_model(config.model, num_classes)
    mean, begun = 0.0, 0.0
    for side, until in [*config.stages, (32, 1.0)]:
        with FlopCounterMode(display=False) as both:
            model(torch.empty(2, 3, side, side, device="meta")).sum().backward()
        mean += (until - begun) * both.get_total_flops() / 2
        begun = until
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(torch.empty(2, 3, 32, 32, device="meta"))
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d) and module.weight.requires_grad)
    if first.in_channels == 3:
        spared = 2 * 32 * 32 * 2 * first.weight.numel()
    else:  # of a frozen layer nothing is needed, and of the one behind it no gradient of the input
        spared = 2 * 31 * 31 * 2 * (first.weight.numel() + 2 * 24 * 12)
    assert both.get_total_flops() == 3 * forward.get_total_flops() - spared
    assert recipe.petaflops == pytest.approx(mean * images * config.epochs / 1e15, rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates of the recipe as it is, on a few digits; the digits' test set is cut short, as ResNet-34 is slow."""
    whole = cl.load_dataset("digits")
    short = replace(whole, test=cl.Split(whole.test.images[:10], whole.test.labels[:10]))
    monkeypatch.setattr(import_module("cifarlab.train"), "load_dataset", lambda *_, **__: short)
    pieces = min(2, load_recipe(name).micro_batch_size)
    config = load_recipe(name, data="digits", train_images=8, batch_size=4, micro_batch_size=pieces, epochs=1, eval_every=0)
    watch = cl.WatchConfig(runs_dir=tmp_path, progress="none", forecast=False, figures=False, save_every=0)
    run = cl.train(config, watch)
    assert run.result["state"] == "finished"
    assert run.result["step"] == len(run.metrics["train/loss"]) == 2
    assert run.config == replace(config, precision=run.config.precision)
    assert run.config.precision == pick_precision(config.precision, torch.device("cpu"))
    assert run.config.recipe == name


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no recipe 'resnet9-one-cycle'; did you mean 'resnet9-onecycle'\?"):
        load_recipe("resnet9-one-cycle")


def test_every_function_of_the_file_is_in_the_table() -> None:
    import cifarlab.recipes

    tree = ast.parse(Path(cifarlab.recipes.__file__).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} - {"load_recipe"}
    assert functions == {recipe.build.__name__ for recipe in RECIPES.values()}
