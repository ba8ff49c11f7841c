"""Study 3: what each augmentation does, by taking it away and by leaving it alone."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cifarlab.config import InputError, TrainConfig
from cifarlab.studies.comparison import draw_accuracy, draw_curves, gap, table, tell_best, tell_comparisons
from cifarlab.studies.study import Arm, Results, Study

JITTER = ("brightness", "contrast", "saturation", "hue")
OFF: dict[str, dict[str, Any]] = {  # what turns each off
    "crop": {"crop_padding": 0},
    "flip": {"flip": "none"},
    "jitter": dict.fromkeys(JITTER, 0.0),
    "cutout": {"cutout": 0},
    "mixup": {"mixup_alpha": 0.0},
    "cutmix": {"cutmix_alpha": 0.0},
}
USUAL: dict[str, Callable[[TrainConfig], dict[str, Any]]] = {  # strengths where the base has it off
    "crop": lambda base: {"crop_padding": max(1, base.image_size // 8)},
    "flip": lambda base: {"flip": "random"},
    "jitter": lambda base: {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2},
    "cutout": lambda base: {"cutout": base.image_size // 4},
    "mixup": lambda base: {"mixup_alpha": 0.2},
    "cutmix": lambda base: {"cutmix_alpha": 1.0},
}
CLEAN_IMAGES = 1000  # for the generalisation gap


def active(config: TrainConfig) -> list[str]:
    """Names of the augmentations that a config uses."""
    return [name for name, off in OFF.items() if any(getattr(config, field) != value for field, value in off.items())]


def prepare(base: TrainConfig) -> TrainConfig:
    """Clean training images for the gap; a base with fewer than two augmentations gets crop, flip, jitter and cutout."""
    if len(active(base)) < 2:
        for name in ("crop", "flip", "jitter", "cutout"):
            base = switch_on(base, name)
    return base if base.clean_images else replace(base, clean_images=CLEAN_IMAGES)


def switch_on(base: TrainConfig, name: str) -> TrainConfig:
    return base if name in active(base) else replace(base, **USUAL[name](base))


def plan(base: TrainConfig, values: Mapping[str, list[Any]]) -> list[Arm]:
    """All of them (the base), each removed, each alone, none."""
    names = active(base)
    if len(names) < 2:
        raise InputError("study augmentation needs a base with two augmentations or more: set some, such as --set cutout=8")
    none = {field: value for name in names for field, value in OFF[name].items()}
    kept = {name: {field: getattr(base, field) for field in OFF[name]} for name in names}
    seen = {name: name != "none" for name in names}
    return [
        Arm(name="all", changes={}, is_base=True, settings=seen),
        *(Arm(name=f"without {name}", changes=OFF[name], settings=seen | {name: False}) for name in names),
        *(Arm(name=f"{name} alone", changes=none | kept[name], settings={other: other == name for other in names})
          for name in names if len(names) > 2),
        Arm(name="none", changes=none, settings=dict.fromkeys(names, False)),
    ]  # fmt: skip


def draw(results: Results) -> dict[str, Any]:
    few = [arm for arm in results.arms if arm.name in ("all", "none") or arm.name.startswith("without")]
    return {
        "accuracy-and-gap": draw_accuracy(results, "What each augmentation does", with_gap=True),
        "validation-curves": draw_curves(results, "Validation accuracy with and without augmentations", few[:8]),
    }


def conclude(results: Results) -> str:
    names = active(results.base)
    strengths = ", ".join(f"{name} ({'; '.join(_told(results.base, name))})" for name in names)
    gaps = tell_comparisons(results, quantity="generalisation gap (clean training − validation accuracy)", values=gap, scale=1.0)
    return "\n\n".join([
        f"Augmentations of the base: {strengths}.",
        tell_best(results) + " " + tell_comparisons(results),
        gaps if len(results.seeds) > 1 else "",
        "The gap compares training images *without* augmentation with validation images, under the same weights, so that it is "
        "overfitting and not the augmentation's own difficulty.",
        table(results, with_gap=True),
    ])  # fmt: skip


def _told(base: TrainConfig, name: str) -> list[str]:
    fields = [field for field, value in OFF[name].items() if getattr(base, field) != value]
    return [f"{field} {getattr(base, field)}" for field in fields]


STUDY = Study(
    name="augmentation", question="What does each augmentation do for accuracy and for the generalisation gap?",
    source="Shorten and Khoshgoftaar 2019 (J. Big Data 6:60) for the kinds",
    answer="differences in accuracy and gap of each removed and each alone, against all together",
    plan=plan, draw=draw, conclude=conclude, prepare=prepare,
)  # fmt: skip
