"""The recipe check: known mistakes in the settings of a training, named with place and remedy before it costs a night.

A remark is a mistake or a note. What a lab's own recipe prescribes is never called a mistake, only noted. Importing this imports
no torch; the rules that need a network are in `checks.network`.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

from cifarlab.checks import recorded, settings
from cifarlab.checks.remark import Remark
from cifarlab.checks.setup import Setup
from cifarlab.config import TrainConfig
from cifarlab.recipes import RECIPES

__all__ = ["RULES", "Remark", "Setup", "check_settings", "judge"]

RULES: dict[str, Callable[[Setup], Remark | None]] = {
    "wrong_statistics": settings.wrong_statistics,
    "batch_too_large": settings.batch_too_large,
    "schedule_does_not_fit": settings.schedule_does_not_fit,
    "lr_outside_range_test": settings.lr_outside_range_test,
    "smoothing_with_mixing": settings.smoothing_with_mixing,
    "fp16_where_bf16_runs": settings.fp16_where_bf16_runs,
    "norms_decay": settings.norms_decay,
    "test_set_chooses": recorded.test_set_chooses,
    "always_clipped": recorded.always_clipped,
}


def check_settings(setup: Setup) -> list[Remark]:
    """What all rules find in a set-up, mistakes first."""
    return judge([remark for rule in RULES.values() if (remark := rule(setup))], setup.config)


def judge(remarks: Iterable[Remark], config: TrainConfig) -> list[Remark]:
    """Mistakes first; what the config's recipe itself prescribes becomes a note."""
    judged = []
    for remark in remarks:
        if remark.is_mistake and remark.fields and config.recipe in RECIPES:
            prescribed = RECIPES[config.recipe].build()
            if all(getattr(prescribed, name) == getattr(config, name) for name in remark.fields):
                remark = replace(remark, kind="note", told=f"{remark.told} (as the recipe has it)")
        judged.append(remark)
    return sorted(judged, key=lambda remark: not remark.is_mistake)
