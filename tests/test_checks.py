"""The recipe check: every rule fires where its mistake is, keeps silent where it is not, and no lab is scolded for its recipe."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR, SequentialLR

import cifarlab as cl
from cifarlab.checks import RULES, Remark, Setup, check_settings
from cifarlab.checks.network import check_network
from cifarlab.cli import main
from cifarlab.config import InputError, TrainConfig
from cifarlab.lr_curve import FILE, Curve, LrRange
from cifarlab.models import MODELS, create_model
from cifarlab.recipes import RECIPES

LRS = tuple(1e-5 * 1e6 ** (np.arange(100) / 99))
CIFAR = {"own_mean": (0.4914, 0.4822, 0.4465), "own_std": (0.2470, 0.2435, 0.2616)}


def fall(lr: float) -> float:
    """Falls around 1e-3, breaks away from 0.3 on."""
    return 1.3 - float(np.tanh((np.log10(lr) + 3) / 0.4)) + 50 * max(0.0, float(np.log10(lr / 0.3)))


def range_test(config: TrainConfig) -> LrRange:
    kept = [lr for lr in LRS if lr < 0.5]
    curve = Curve(seed=0, lrs=tuple(kept), losses=tuple(fall(lr) for lr in kept), end="climbed")
    return LrRange(mode="exponential", per="step", start=1e-5, end=10.0, points=100, split="train", curves=(curve,),
                   config=config.to_dict(), path=Path("runs/lr-range-x"))  # fmt: skip


def rows(norm: float, clipped: float | None, count: int = 100) -> list[dict[str, float]]:
    more = {} if clipped is None else {"gradient_flow/clipped_norm": clipped}
    return [{"step": k, "gradient_flow/norm": norm} | more for k in range(1, count + 1)]


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**({"weight_decay": 0.0} | settings))


TRIED = tuple(config(lr=lr, seed=seed) for lr in (0.1, 0.01, 0.001) for seed in (0, 1))
PLAIN = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}

FIRES: list[tuple[str, Setup, str, str]] = [  # rule, set-up, kind, what is said
    ("wrong_statistics", Setup(config=config(), mean=PLAIN["mean"], std=(0.2023, 0.1994, 0.2010)), "mistake",
     "mean of single images' stds, not CIFAR-10's std; use 0.2470 0.2435 0.2616"),
    ("wrong_statistics", Setup(config=config(), mean=(125.3, 123, 113.9), std=(63, 62.1, 66.7)), "mistake", "divide both by 255"),
    ("wrong_statistics", Setup(config=config(), mean=(0.3, 0.3, 0.3), std=(0.25, 0.25, 0.25), **CIFAR), "mistake",
     "are not those of cifar10; use the data's own: mean 0.4914"),
    ("wrong_statistics",
     Setup(config=config(statistics="imagenet"), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), **CIFAR), "note",
     "ImageNet's mean and std on cifar10"),
    ("batch_too_large", Setup(config=config(batch_size=512), num_images=300), "mistake",
     "512 is more than the 300 training images"),
    ("schedule_does_not_fit", Setup(config=config(schedule="one-cycle", schedule_per="epoch")), "mistake",
     "--schedule-per: one-cycle moves at every step"),
    ("schedule_does_not_fit", Setup(config=config(schedule="one-cycle", peak_at=1.0)), "mistake", "longer than the run"),
    ("schedule_does_not_fit", Setup(config=config(schedule="one-cycle", peak_at=0.5, warmup_epochs=24)), "mistake",
     "longer than"),
    ("schedule_does_not_fit", Setup(config=config(schedule="step", decay_epochs=30)), "mistake", "is beyond the run of 25"),
    ("schedule_does_not_fit", Setup(config=config(schedule="restarts", restart_epochs=20), num_images=6400), "note",
     "500 steps into its last cycle, at 85 % of the peak"),
    ("lr_outside_range_test", Setup(config=config(lr=2.0), range_test=range_test(config())), "mistake",
     "2 is above 0.46, where runs/lr-range-x broke away; it suggests --lr"),
    ("lr_outside_range_test", Setup(config=config(lr=2e-5), range_test=range_test(config())), "note", "over ten times below"),
    ("lr_outside_range_test", Setup(config=config(lr=1e-6), range_test=range_test(config())), "note", "lies outside 1e-05 … 10"),
    ("smoothing_with_mixing", Setup(config=config(label_smoothing=0.1, mixup_alpha=0.2)), "note",
     "MixUp softens the targets already"),
    ("smoothing_with_mixing", Setup(config=config(label_smoothing=0.1, cutmix_alpha=0.2)), "note", "CutMix softens"),
    ("fp16_where_bf16_runs", Setup(config=config(precision="fp16"), bf16=True), "note", "use --precision bf16"),
    ("norms_decay", Setup(config=config(weight_decay=5e-4)), "note", "--no-decay-norms spares them"),
    ("test_set_chooses", Setup(config=config(lr=1.0), others=TRIED), "note",
     "6 runs of resnet18 on cifar10 tried other settings"),
    ("test_set_chooses", Setup(config=config(), reported_step=70, last_step=100), "mistake", "those of step 70 of 100"),
    ("always_clipped", Setup(config=config(clip_norm=0.1), rows=rows(5.0, 0.1)), "mistake",
     "0.1 clips every step, to 2 % of the gradient's norm (median 5); use --clip-norm 10"),
    ("always_clipped", Setup(config=config(clip_value=0.1), rows=rows(5.0, 4.5)), "note", "to 90 % of the gradient's norm"),
]  # fmt: skip

SILENT: list[tuple[str, Setup]] = [
    ("wrong_statistics", Setup(config=config(), **PLAIN, **CIFAR)),
    ("wrong_statistics", Setup(config=config())),
    ("batch_too_large", Setup(config=config(batch_size=300), num_images=300)),
    ("batch_too_large", Setup(config=config(batch_size=512))),
    ("schedule_does_not_fit", Setup(config=config(schedule="one-cycle"))),
    ("schedule_does_not_fit", Setup(config=config(schedule="step", decay_epochs=10))),
    ("schedule_does_not_fit", Setup(config=config(schedule="cosine", schedule_per="epoch"))),
    ("schedule_does_not_fit", Setup(config=config(schedule="restarts", restart_epochs=5, epochs=25), num_images=6400)),
    ("lr_outside_range_test", Setup(config=config(lr=0.01), range_test=range_test(config()))),
    ("lr_outside_range_test", Setup(config=config(lr=99.0))),
    ("smoothing_with_mixing", Setup(config=config(label_smoothing=0.1))),
    ("smoothing_with_mixing", Setup(config=config(mixup_alpha=0.1))),
    ("fp16_where_bf16_runs", Setup(config=config(precision="fp16"), bf16=False)),
    ("fp16_where_bf16_runs", Setup(config=config(precision="fp16"))),
    ("fp16_where_bf16_runs", Setup(config=config(precision="bf16"), bf16=True)),
    ("norms_decay", Setup(config=config())),
    ("norms_decay", Setup(config=config(weight_decay=5e-4, decay_norms=False))),
    ("test_set_chooses", Setup(config=config(lr=1.0, val_fraction=0.1), others=TRIED)),
    ("test_set_chooses", Setup(config=config(), others=tuple(config(seed=seed) for seed in range(9)))),  # seeds choose nothing
    ("test_set_chooses", Setup(config=config(precision="auto"), others=tuple(config(seed=seed) for seed in range(9)))),
    ("test_set_chooses", Setup(config=config(), others=tuple(replace(other, val_fraction=0.1) for other in TRIED))),
    ("test_set_chooses", Setup(config=config(), reported_step=100, last_step=100)),
    ("test_set_chooses", Setup(config=config(val_fraction=0.1), reported_step=70, last_step=100)),
    ("always_clipped",
     Setup(config=config(clip_norm=0.1), rows=[*rows(5.0, 0.1, 60), *rows(0.05, None, 1), *rows(5.0, 0.1, 39)])),
    ("always_clipped", Setup(config=config(clip_norm=0.1), rows=rows(5.0, 0.1, 99))),
    ("always_clipped", Setup(config=config(), rows=rows(5.0, 0.1))),
    ("always_clipped", Setup(config=config(clip_norm=0.1), rows=[{"step": 1, "train/loss": 2.0}] * 200)),  # nothing was probed
]  # fmt: skip


@pytest.mark.parametrize(("rule", "setup", "kind", "told"), FIRES, ids=[f"{rule}-{k}" for k, (rule, *_) in enumerate(FIRES)])
def test_a_rule_fires_and_names_place_and_remedy(rule: str, setup: Setup, kind: str, told: str) -> None:
    remark = RULES[rule](setup)
    assert remark is not None
    assert (remark.rule, remark.kind) == (rule, kind)
    assert told in str(remark)
    assert remark.place
    assert remark.remedy
    assert "\n" not in str(remark)
    assert len(str(remark)) < 240
    assert [found.rule for found in check_settings(setup)].count(rule) == 1


@pytest.mark.parametrize(("rule", "setup"), SILENT, ids=[f"{rule}-{k}" for k, (rule, _) in enumerate(SILENT)])
def test_a_rule_keeps_silent(rule: str, setup: Setup) -> None:
    assert RULES[rule](setup) is None


def test_every_rule_is_tested_both_ways() -> None:
    assert {rule for rule, *_ in FIRES} == {rule for rule, _ in SILENT} == set(RULES)


# ---- networks --------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """A stem for large images that no module tells of: pooling by a function, layers with names of nothing."""

    def __init__(self, stride: int = 2, end: str = "logits") -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 7, stride, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)
        self.drop, self.stride, self.end = nn.Dropout(0.5), stride, end

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.max_pool2d(x, 3, 2, 1) if self.stride > 1 else x
        x = self.c(self.drop(self.b(x).mean((2, 3))))
        return {"logits": x, "softmax": x.softmax(1), "log": F.log_softmax(x, 1)}[self.end]


def rules_of(remarks: Sequence[Remark]) -> list[tuple[str, str]]:
    return [(remark.rule, remark.kind) for remark in remarks]


@pytest.mark.parametrize("name", MODELS)
def test_only_the_imagenet_stem_is_one(name: str) -> None:
    found = check_network(create_model(name), (3, 32, 32))
    assert rules_of(found) == ([("imagenet_stem", "mistake")] if name == "resnet18-imagenet-stem" else [])


def test_a_stem_is_found_by_what_it_does() -> None:
    (remark,) = check_network(Functional(), (3, 32, 32))
    assert str(remark).startswith("mistake: a: a stem for large images (here 7×7, stride 2) leaves 8×8 of 32×32")
    assert check_network(Functional(stride=1), (3, 32, 32)) == []
    assert check_network(Functional(), (3, 224, 224)) == []  # what it was made for
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    assert check_network(patches, (3, 32, 32)) == []


def test_outputs_that_are_no_logits_are_found_by_their_values() -> None:
    (softmax,) = check_network(Functional(1, "softmax"), (3, 32, 32))
    assert (softmax.rule, softmax.kind) == ("softmax_twice", "mistake")
    # The loss of a certain and right answer: softmax of (1, 0, …, 0) over ten classes.
    least = float(F.cross_entropy(torch.eye(10)[:1], torch.tensor([0])))
    assert f"cannot fall below {least:.2f}" in softmax.told
    (log,) = check_network(Functional(1, "log"), (3, 32, 32))
    assert (log.rule, log.kind) == ("softmax_twice", "note")  # log-softmax of log-softmax is itself
    named = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.LogSoftmax(1))
    assert check_network(named, (3, 32, 32))[0].place == "2"


def test_a_checked_network_comes_back_as_it_was() -> None:
    net = create_model("simple_cnn").train()
    net.features[1].eval()  # type: ignore[union-attr,index,operator]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags, state = [module.training for module in net.modules()], torch.random.get_rng_state()
    check_network(net, (3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert flags == [module.training for module in net.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert not any(module._forward_hooks for module in net.modules())


def test_somebodys_own_optimizer_and_schedule() -> None:
    net = create_model("simple_cnn")
    decaying = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1e-4)
    (remark,) = cl.check_objects(net, optimizer=decaying)
    assert (remark.rule, remark.place) == ("norms_decay", "features.1")
    assert "4 batch norms" in remark.told
    for total, told in ((24, "its 24 steps are the epochs"), (9999, "never comes down"), (1000, "over before"), (2352, None)):
        schedule = OneCycleLR(torch.optim.SGD(net.parameters(), lr=0.1), 0.1, total_steps=total)
        found = cl.check_objects(net, scheduler=schedule, num_steps=2352, steps_per_epoch=98)
        assert (told is None and not found) or (told is not None and told in found[0].told)


def test_a_one_cycle_after_a_warm_up_is_looked_at() -> None:
    net = create_model("simple_cnn")
    for total, told in ((19, "its 19 steps are the epochs"), (2352, "never comes down"), (2347, None)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        whole = SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1, 5), OneCycleLR(optimizer, 0.1, total_steps=total)], [5])
        found = cl.check_objects(net, scheduler=whole, num_steps=2352, steps_per_epoch=98)
        assert (told is None and not found) or (told is not None and told in found[0].told)
    assert "give total_steps=2347" in cl.check_objects(net, scheduler=OneCycleLR(optimizer, 0.1, 9), num_steps=2347)[0].remedy


def test_outputs_in_a_tuple_or_a_dict_are_looked_at() -> None:
    class Wrapping(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.net, self.wrap = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Softmax(1)), wrap

        def forward(self, images: torch.Tensor) -> Any:
            return self.wrap(self.net(images))

    for wrap in (lambda outputs: outputs, lambda outputs: (outputs, 3), lambda outputs: {"logits": outputs}):
        (remark,) = cl.check_objects(Wrapping(wrap), (3, 8, 8))
        assert remark.rule == "softmax_twice"
    assert cl.check_objects(Wrapping(lambda outputs: {"boxes": outputs}), (3, 8, 8)) == []
    assert cl.check_objects(Wrapping(lambda outputs: ()), (3, 8, 8)) == []


def test_images_of_another_shape_than_the_models_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout())
    with pytest.raises(InputError, match=r"takes no images of shape 3×32×32 \(.*\): give shape=\(C, H, W\)"):
        cl.check_objects(net)
    assert all(module.training and not module._forward_hooks for module in net.modules())
    assert cl.check_objects(net, (1, 28, 28)) == []


# ---- recipes and runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_is_called_a_mistake(name: str, tmp_path: Path) -> None:
    remarks = cl.check(RECIPES[name].build(), cl.WatchConfig(runs_dir=tmp_path, device="cpu"))
    assert [remark for remark in remarks if remark.is_mistake] == []


def test_what_a_recipe_prescribes_is_a_note_and_what_was_changed_is_not() -> None:
    clipped = rows(5.0, 0.1)
    lab_e = RECIPES["resnet34-cifar100"].build()
    (remark,) = [found for found in check_settings(Setup(config=lab_e, rows=clipped)) if found.rule == "always_clipped"]
    assert remark.kind == "note"
    assert "(as the recipe has it)" in remark.told
    (remark,) = [found for found in check_settings(Setup(config=replace(lab_e, clip_value=0.01), rows=clipped))
                 if found.rule == "always_clipped"]  # fmt: skip
    assert remark.kind == "mistake"


def small(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = dict(data="digits", model="tiny", train_images=96, batch_size=16, epochs=20, lr=0.05)
    return TrainConfig(**(settings | changes))


def quiet(folder: Path, name: str, **changes: Any) -> cl.WatchConfig:
    return cl.WatchConfig(**(dict(runs_dir=folder, name=name, figures=False, forecast=False, progress="lines") | changes))


def test_training_begins_with_the_check_and_tells_of_clipping_while_it_runs(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cl.train(small(clip_norm=1e-3, batch_size=200, weight_decay=1e-4, epochs=110, eval_every=0), quiet(tmp_path, "run"))
    told = capsys.readouterr().out
    assert "  check   mistake: --batch-size: 200 is more than the 96 training images" in told
    assert "  check   note: --weight-decay: " in told
    assert [alarm["rule"] for alarm in run.alarms] == ["always_clipped"]
    assert "ALARM" in told
    assert "always clipped" in told
    found = cl.check(run)
    assert ("always_clipped", "mistake") in rules_of(found)
    assert run.result["state"] == "finished"


def test_the_check_never_stops_a_training(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a rule is wrong")

    monkeypatch.setattr("cifarlab.checks.whole.check_network", fail)
    run = cl.train(small(epochs=1), quiet(tmp_path, "run"))
    assert run.result["state"] == "finished"
    assert "not all could be checked (ValueError: a rule is wrong)" in capsys.readouterr().out


def test_past_runs_and_range_tests_of_the_folder_are_looked_at(tiny: str, tmp_path: Path) -> None:
    for lr in (0.1, 0.05, 0.02):
        cl.train(small(lr=lr, epochs=1), quiet(tmp_path, f"lr{lr}", progress="none"))
    (tmp_path / "range").mkdir()
    (tmp_path / "range" / FILE).write_text(json.dumps(range_test(small()).to_dict()))
    watch = cl.WatchConfig(runs_dir=tmp_path, device="cpu")
    found = cl.check(small(lr=9.0), watch)
    assert rules_of(found) == [("lr_outside_range_test", "mistake"), ("test_set_chooses", "note")]
    assert f"where {tmp_path / 'range'} broke away" in found[0].told
    assert cl.check(small(lr=0.01, val_fraction=0.1), watch) == []
    assert cl.check(small(lr=9.0, optimizer="adam", val_fraction=0.1), watch) == []  # another family
    assert rules_of(cl.check(tmp_path / "lr0.1")) == []  # itself is not one of the others


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["check", "resnet9-onecycle"]) == 0
    assert "no known mistakes, 2 notes" in capsys.readouterr().out
    line = "--model resnet18-imagenet-stem --schedule one-cycle --schedule-per epoch --std 0.2023 0.1994 0.2010 --no-decay-norms"
    assert main(["check", *line.split()]) == 1
    told = capsys.readouterr().out
    assert "3 known mistakes, no notes" in told
    assert "mistake: conv1: a stem for large images" in told
    assert "mistake: std: 0.2023 0.1994 0.2010" in told
    assert max(map(len, told.splitlines())) <= 100
    assert main(["check", "quick", "--batch-size", "2000", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["rule"] == "batch_too_large"
    assert main(["check", "quik"]) == 2
    assert "did you mean 'quick'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_on_a_run(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = cl.train(small(epochs=1, weight_decay=1e-3), quiet(tmp_path, "run", progress="none"))
    assert main(["check", str(run.path)]) == 0
    assert "no known mistakes, 1 note" in capsys.readouterr().out
    facts = json.loads((run.path / "dataset.json").read_text())
    (run.path / "dataset.json").write_text(json.dumps(facts | {"std": [0.2023, 0.1994, 0.2010]}))
    assert main(["check", str(run.path)]) == 1
    assert main(["check", str(run.path), "--lr", "3"]) == 2
    with pytest.raises(InputError, match="is not a run folder"):
        cl.check(tmp_path)
