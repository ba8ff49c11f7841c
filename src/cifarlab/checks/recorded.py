"""Mistakes that show in what runs have recorded. Each rule gives its remark, or None."""

from typing import Literal

import numpy as np

from cifarlab.checks.remark import Remark
from cifarlab.checks.setup import Setup

CLIPPED_ROWS = 100  # steps after which "every step was clipped" is said
FEW_RUNS = 3  # other settings tried, from which on the best is being chosen
TIGHT = 0.5  # of the gradient's norm, below which clipping is not a safeguard but another learning rate


def test_set_chooses(setup: Setup) -> Remark | None:
    """The test set has chosen a step, or is about to choose among settings."""
    config = setup.config
    # Rows that end before the reported step were lost, and tell nothing.
    if not config.val_fraction and (setup.reported_step or 0) < (setup.last_step or 0) and setup.reported_step is not None:
        return Remark(kind="mistake", rule="test_set_chooses", place="result.json",
                      told=f"its numbers are those of step {setup.reported_step:,} of {setup.last_step:,}, none held out: "
                           "the test set has chosen it", remedy="report the last step, or use --val-fraction 0.1")  # fmt: skip
    if config.val_fraction or config.is_range_test:
        return None
    tried = [other for other in setup.others if not config.matches(other, seed=False) and not other.val_fraction]
    if len({other.hash for other in tried}) < FEW_RUNS:
        return None
    return Remark(kind="note", rule="test_set_chooses", place="--val-fraction",
                  told=f"{len(tried)} runs of {config.model} on {config.data} tried other settings, none with images held out: "
                       "taking the best by test accuracy lets the test set choose", remedy="use --val-fraction 0.1")  # fmt: skip


def always_clipped(setup: Setup) -> Remark | None:
    """Every step's gradient was clipped, so that the clip is a second learning rate. From rows with the probe gradient_flow."""
    config = setup.config
    if not (config.clip_norm or config.clip_value):
        return None
    norms = [(row["gradient_flow/norm"], row.get("gradient_flow/clipped_norm"))
             for row in setup.rows if "gradient_flow/norm" in row][-CLIPPED_ROWS:]  # fmt: skip
    if len(norms) < CLIPPED_ROWS or any(clipped is None for _, clipped in norms):
        return None
    whole = float(np.median([norm for norm, _ in norms]))
    kept = float(np.median([(clipped or 0.0) / norm for norm, clipped in norms if norm > 0] or [1.0]))
    name, value = ("--clip-norm", config.clip_norm) if config.clip_norm else ("--clip-value", config.clip_value)
    remedy = "raise it, or use --clip-norm"
    if config.clip_norm:
        remedy = f"use --clip-norm {2 * whole:.2g}, which clips the exceptions"
    kind: Literal["mistake", "note"] = "mistake" if kept < TIGHT else "note"
    return Remark(kind=kind, rule="always_clipped", place=name, fields=("clip_norm", "clip_value"),
                  told=f"{value:g} clips every step, to {100 * kept:.0f} % of the gradient's norm (median {whole:.2g})",
                  remedy=remedy)  # fmt: skip
