"""Settings: what is refused and how, and that a config's hash is the run's identity."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from cifarlab.config import InputError, TrainConfig, WatchConfig, did_you_mean

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 0}, "batch_size=0 cannot be used: it must be at least 1"),
    ({"batch_size": 64.0}, "batch_size=64.0 cannot be used: it must be of type int"),
    ({"batch_size": True}, "batch_size=True cannot be used: it must be of type int"),
    ({"epochs": 0}, "epochs=0.0 cannot be used: it must be a number above 0"),
    ({"epochs": "3"}, "epochs='3' cannot be used: it must be of type float"),
    ({"lr": -0.1}, "lr=-0.1 cannot be used: it must be at least 0"),
    ({"lr": float("nan")}, "lr=nan cannot be used: it must be a finite number"),
    ({"lr": float("inf")}, "lr=inf cannot be used: it must be a finite number"),
    ({"momentum": 1}, "momentum=1.0 cannot be used: it must be a number from 0 to below 1"),
    ({"label_smoothing": -0.1}, "label_smoothing=-0.1 cannot be used: it must be a number from 0 to below 1"),
    ({"val_fraction": 1.0}, "val_fraction=1.0 cannot be used: it must be a number from 0 to below 1"),
    ({"hue": 0.6}, "hue=0.6 cannot be used: it must be a number from 0 to 0.5, in turns of the colour circle"),
    ({"peak_at": 0}, "peak_at=0.0 cannot be used: it must be a number above 0, at most 1"),
    ({"seed": 2**63}, "seed=9223372036854775808 cannot be used: it must be a whole number from 0 to below 2**63"),
    ({"seed": -1}, "seed=-1 cannot be used: it must be at least 0"),
    ({"data": ""}, "data='' cannot be used: it must be a name that is not empty"),
    ({"optimizer": "adan"},
     "optimizer='adan' cannot be used: it must be one of sgd, adam, adamw, rmsprop, muon; did you mean 'adam'?"),
    ({"schedule": "cosin"}, "schedule='cosin' cannot be used: it must be one of constant, step, linear, cosine, restarts, "
                            "one-cycle, range-exponential, range-linear; did you mean 'cosine'?"),
    ({"schedule": ["cosine"]}, "schedule=['cosine'] cannot be used: it must be one of"),
    ({"warmup_epochs": 25}, "warmup_epochs=25.0 cannot be used: it must be less than epochs=25"),
    ({"crop_mode": "reflect", "crop_padding": 32}, "crop_padding=32 cannot be used: it must be less than image_size=32"),
    ({"nesterov": True, "momentum": 0}, "nesterov=True cannot be used: it must be False when momentum is 0"),
    ({"schedule": "range-exponential"}, "min_lr=0.0 cannot be used: it must be below lr=0.1 for a range test, and above 0 where"),
    ({"schedule": "range-linear", "min_lr": 0.1}, "min_lr=0.1 cannot be used: it must be below lr=0.1 for a range test"),
    ({"schedule": "range-linear", "warmup_epochs": 1}, "warmup_epochs=1.0 cannot be used: it must be 0 for a range test"),
    ({"stop_loss": -1}, "stop_loss=-1.0 cannot be used: it must be at least 0"),
    ({"muon_steps": 0}, "muon_steps=0 cannot be used: it must be at least 1"),
    ({"bias_lr": -1}, "bias_lr=-1.0 cannot be used: it must be at least 0"),
    ({"tta_share": 1.5}, "tta_share=1.5 cannot be used: it must be a number from 0 to 1"),
    *(({"small_sides": text}, f"small_sides={text!r} cannot be used: it must be sides in pixels with rising shares of the run")
      for text in ("20", "20:0.5,24:0.5", "24:0.5,20:0.15", "0:0.5", "20:1.0", "20:0", "20:0.1,", "x:0.1", "-4:0.5")),
    ({"micro_batch_size": 65}, "micro_batch_size=65 cannot be used: it must be at most batch_size=64"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[", ".join(f"{k}={v}" for k, v in s.items()) for s, _ in REFUSED])
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainConfig(**settings)
    assert str(caught.value).startswith(message)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_every": 0}, "log_every=0 cannot be used: it must be at least 1"),
        ({"save_minutes": -1}, "save_minutes=-1.0 cannot be used: it must be at least 0"),
        ({"progress": "lots"}, "progress='lots' cannot be used: it must be one of auto, bar, lines, none"),
        ({"wandb": "yes"}, "wandb='yes' cannot be used: it must be of type bool | None"),
        *(({"name": name}, f"name={name!r} cannot be used: it must be a plain folder name")
          for name in ("a/b", "..", "a\\b", "a\0b", "a\nb", "C:x")),
    ],
)  # fmt: skip
def test_a_bad_watch_setting_is_named_too(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        WatchConfig(**settings)
    assert str(caught.value) == message


def another(name: str) -> Any:
    """A valid value of that field which is not its default."""
    hint, value = get_type_hints(TrainConfig)[name], getattr(TrainConfig(), name)
    if get_origin(hint) is Literal:
        return next(choice for choice in get_args(hint) if choice != value)
    if hint is bool:
        return not value
    if name == "small_sides":
        return "16:0.25, 20:0.5"
    if hint is str:
        return value + "x"
    if name == "micro_batch_size":
        return 8
    return value / 2 if hint is float and value else value + (1 if hint is int else 0.25)


def test_the_hash_is_stable_and_knows_every_field_but_the_label() -> None:
    assert TrainConfig().hash == TrainConfig(recipe="renamed").hash
    assert TrainConfig(epochs=25).hash == TrainConfig(epochs=25.0).hash
    hashes = {TrainConfig().hash}
    for field in fields(TrainConfig):
        changed = replace(TrainConfig(), **{field.name: another(field.name)})
        if field.name in ("recipe", "lr_from"):
            assert changed == TrainConfig()
            assert changed.hash == TrainConfig().hash
            continue
        assert changed != TrainConfig(), field.name
        assert changed.hash not in hashes, field.name
        hashes.add(changed.hash)


def test_a_field_that_came_later_leaves_the_hash_of_older_runs_alone() -> None:
    """Runs of before these fields are found by their hash, and a study's trials by their folder names."""
    config = TrainConfig(data="digits", epochs=2)
    later = {f.name for f in fields(config) if f.metadata}
    assert later == {"bias_lr", "head_lr", "muon_steps", "renormalize", "small_sides", "tta_share"}
    assert config.hash == "edc1563fc8e6"
    values = {name: value for name, value in config.to_dict().items() if name not in later}
    assert TrainConfig.from_dict(values).hash == config.hash


def test_stages_are_read_from_their_text() -> None:
    assert TrainConfig(small_sides="20:0.15, 24:.5").stages == [(20, 0.15), (24, 0.5)]
    assert TrainConfig().stages == []


def test_the_hash_of_a_config_is_the_same_tomorrow() -> None:
    """Old runs are found again by their hash."""
    values = {"data": "digits", "epochs": 2.0}
    first, second = TrainConfig(**values), TrainConfig(**dict(reversed(values.items())))
    assert first.hash == second.hash
    assert len(first.hash) == 12
    assert int(first.hash, 16) >= 0


@pytest.mark.parametrize("field", [field.name for field in fields(TrainConfig)])
def test_a_config_survives_json(field: str) -> None:
    config = replace(TrainConfig(), **{field: another(field)})
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.recipe == config.recipe
    assert again.hash == config.hash


def test_an_unknown_field_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"TrainConfig has no field 'batchsize'; did you mean 'batch_size'\?"):
        TrainConfig.from_dict({"batchsize": 3})
    assert did_you_mean("resnet_18", ["resnet18", "resnet34"]) == "; did you mean 'resnet18'?"
    assert did_you_mean("zebra", ["resnet18"]) == ""


def test_paths_may_be_text() -> None:
    watch = WatchConfig(runs_dir="x", data_dir="y")  # type: ignore[arg-type]
    assert (watch.runs_dir, watch.data_dir) == (Path("x"), Path("y"))
