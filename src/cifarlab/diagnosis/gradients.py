"""Rules on gradients: vanishing, exploding, not finite."""

import numpy as np

from cifarlab.diagnosis.evidence import WINDOW, Array, Evidence
from cifarlab.diagnosis.finding import Finding

VANISHED = 1e-4  # of the largest layer's mean |g|: healthy nets, ResNet-34 and plain ones, stay above 1e-3
SUDDEN = 0.6  # of the fall (in powers of ten) within one layer: then it is cut off there, and does not fade
EXPLODED, OVERGROWN = 100.0, 10.0  # times the first step's norm, of the gradient and of the weights
REWRITTEN = 0.9  # ‖Δw‖/‖w‖ of the first update: Adam at lr 1 has 1.0, at 0.01 0.1 (conv net) to 0.3 (plain net), SGD at 0.05 0.01
STILL_STEPS = 20
TIGHT = 0.5  # of the gradient's norm: a clip that leaves more is felt, but is no other learning rate


def vanishing(e: Evidence) -> Finding | None:
    """The gradient fades from layer to layer towards the input.

    Found where the first weight matrix gets less than VANISHED of the strongest one's mean |g| (medians over the last 20 steps),
    and the way there is gradual: rank correlation of depth and size above 0.7, and no layer takes more than SUDDEN of the fall.
    A sudden stop is another trouble (dead units, a zero layer).
    """
    sizes = _recent(e, "mean_abs", 20)
    if sizes is None or len(e.matrices) < 4:
        return None
    sizes = sizes[e.matrices]
    known = np.isfinite(sizes)
    if known.sum() < 4 or not known[0]:
        return None
    names = [e.name(k) for k in e.matrices[known]]
    sizes = sizes[known]
    top = sizes.max()
    faded = sizes < VANISHED * top
    if top == 0 or not faded[0] or faded.sum() < 2 or _rank_correlation(sizes) < 0.7:
        return None
    height = np.log10(np.maximum(sizes / top, 1e-38))
    if np.diff(height).max() > SUDDEN * -height.min():
        return None
    worst = np.argsort(sizes, kind="stable")
    count = int(faded.sum())
    return Finding(
        layers=tuple(names[k] for k in worst if faded[k]),
        evidence=f"mean |g| falls from {top:.1e} in {names[int(sizes.argmax())]} to {sizes[0]:.1e} in {names[0]}, "
        f"and {count} of {len(sizes)} weight matrices get less than {VANISHED:g} of the strongest",
        cause="each layer passes on only a part of the gradient, so a deep stack of them passes on nothing: saturating "
        "activation functions, too small initial weights, no normalisation or no shortcuts",
        remedy="use ReLU-like activations with He initialisation, batch norm, or residual connections; fewer layers also help",
        reference="Glorot & Bengio 2010; He et al. 2015, arXiv:1512.03385",
    )


def exploding(e: Evidence) -> Finding | None:
    """Gradients, weights or the loss grow without bound, and the loss does not fall.

    Found where, against the first step, the gradient's norm has grown a hundredfold, the weights' tenfold or the loss thirtyfold,
    in two steps of the window or right before the numbers end; or where the first update replaces the weights. Where no
    loss is known, a hundred times as much is asked of the gradient and ten times of the weights, for both grow in healthy nets
    that begin with small ones.
    """
    fell_to = e.loss_fell_to()
    if fell_to < 0.9:  # a gradient that begins near zero may grow a thousandfold while all goes well
        return None
    unknown = np.isnan(fell_to)
    grown = []
    for key, factor, name in (
        ("gradient_flow/norm", EXPLODED * (100 if unknown else 1), "the gradient's norm"),
        ("weight_flow/norm", OVERGROWN * (10 if unknown else 1), "the weights' norm"),
        ("train/loss", 30.0, "the loss"),
    ):
        start, values = e.values(key, e.beginning[:1]), e.values(key)
        steps = e.values("step", [row for row in e.rows if key in row])
        finite = np.isfinite(values)
        if not len(start) or not np.isfinite(start[0]) or start[0] <= 0 or not finite.any():
            continue
        reference = max(start[0], 2.3 if key == "train/loss" else 0)
        high = finite & (values > factor * reference)
        # More than one outlier: two steps, or one right before the numbers end.
        if high.sum() >= 2 or (high.any() and not finite[-1]):
            peak = values[finite].max()
            grown.append((int(steps[high][0]), f"{name} has grown from {start[0]:.3g} to {peak:.3g}"))
    first = e.values("update_flow/ratio", e.beginning[:1])
    if len(first) and not unknown and first[0] > REWRITTEN:
        grown.append((1, f"the first update was {first[0]:.2g} times as large as the weights"))
    if not grown:
        return None
    ratios = e.column_at_first("update_flow", "ratio")
    layers: tuple[str, ...] = ()
    if ratios.size:
        worst = np.where(np.isfinite(ratios), ratios, 0)[:, e.matrices].max(axis=0)
        layers = tuple(e.name(e.matrices[k]) for k in np.argsort(-worst, kind="stable")[:5] if worst[k] > 0.1)
    lr = max(e.values("lr"), default=0.0)
    return Finding(
        step=min(step for step, _ in grown),
        layers=layers,
        evidence="; ".join(text for _, text in grown),
        cause="steps are too long for the slope they follow, so each makes the next one longer"
        + (f"; the learning rate was {lr:.3g}" if lr else ""),
        remedy="lower the learning rate tenfold, warm it up over the first epoch, or clip the gradient's norm to 1",
        reference="Pascanu et al. 2012, arXiv:1211.5063",
    )


NOT_FINITE = "a division by zero, a logarithm or root of a negative number, an overflow in half precision, or broken input"


def non_finite(e: Evidence) -> Finding | None:
    """A gradient or the loss is NaN or infinite.

    A step that a gradient scaler skipped (no weight moved) is none: it does that to find its scale. Where updates are not
    measured, only one with a loss that is not finite, there or at the step after, counts.
    """
    losses = e.values("train/loss")
    steps_of = e.values("step", [row for row in e.rows if "train/loss" in row])
    bad_losses = set(steps_of[~np.isfinite(losses)].astype(int).tolist())
    bad, moved, steps = e.column("gradient_flow", "non_finite"), e.column("update_flow", "norm"), e.steps("gradient_flow")
    if bad.size:
        broken = np.nan_to_num(bad, nan=0.0) > 0
        at = broken.any(axis=1)
        if moved.shape == bad.shape:
            at &= np.nan_to_num(moved, nan=1.0).max(axis=1) > 0
        elif e.has("train/loss"):
            at &= np.array([step in bad_losses or step + 1 in bad_losses for step in steps.tolist()])
        if at.any():
            first = int(np.argmax(at))
            layers = np.flatnonzero(broken[first])
            # Backward runs from the last layer to the first: where it began is the last one that is broken.
            names = tuple(e.name(int(k)) for k in layers[::-1])
            whole = len(layers) == broken.shape[1]
            where = f"in {len(layers)} of {broken.shape[1]} parameter tensors"
            told = f"{int(np.nansum(bad[first])):,} entries of the gradient are NaN or infinite, {where}"
            step = int(steps[first])
            incident = e.incident(step)
            if incident is None and (earlier := e.incident(step - 1)):  # it began where nothing is measured
                step, incident = step - 1, earlier
                told = f"the gradient is NaN or infinite in parameters that no probe measures, and a step later {where}"
            if incident:
                images = ", ".join(map(str, incident["images"][:8]))
                told += f"; {incident['found']}" + (f" (images {images} of the training set)" if images else "")
                names = (incident["layer"],) if incident["layer"] else ()
            elif whole:
                told, names = told + ": the loss itself was not finite", ()
            return Finding(
                step=step,
                layers=names,
                evidence=told,
                cause=NOT_FINITE,
                remedy=("look into incidents/ of the run folder, with that step's samples and weights; " if incident else "")
                + "check the input, add an eps, or compute that layer in float32",
                reference="Micikevicius et al. 2017, arXiv:1710.03740",
            )
    if bad_losses and not (bad.size and moved.shape == bad.shape):
        return Finding(
            step=min(bad_losses),
            evidence="the training loss is NaN or infinite",
            cause=NOT_FINITE,
            remedy="train again with --probes default to learn the first layer, or lower the learning rate",
            reference="Micikevicius et al. 2017, arXiv:1710.03740",
        )
    return None


def no_gradient(e: Evidence) -> Finding | None:
    """A weight matrix gets a gradient of exactly zero for twenty steps, while another's is not."""
    largest = e.column("gradient_flow", "max_abs")[-STILL_STEPS:]
    if len(largest) < STILL_STEPS:
        return None
    largest = largest[:, e.matrices]
    zero = (largest == 0).all(axis=0)  # one without a gradient at all is NaN here
    if not zero.any() or not (largest[:, ~zero] > 0).any(axis=1).all():
        return None
    names = tuple(e.name(k) for k in e.matrices[zero])
    return Finding(
        layers=names,
        evidence=f"the gradient of {len(names)} of {len(zero)} weight matrices has been exactly zero for {STILL_STEPS} steps",
        cause="what they are multiplied with is zero: their input, or the gradient that comes back from dead or masked units",
        remedy="look at the input, at the activations behind these layers, at biases and at masks",
        reference="Goodfellow et al. 2016, Deep Learning, section 6.3",
    )


def always_clipped(e: Evidence) -> Finding | None:
    """Every one of a hundred steps was clipped, to less than half of its gradient's norm: the clip is a second learning rate."""
    norms = e.values("gradient_flow/norm")
    clipped = e.values("gradient_flow/clipped_norm")
    if not len(e.rows) == len(norms) == len(clipped) == WINDOW or not (norms > 0).all():
        return None
    kept, whole = float(np.median(clipped / norms)), float(np.median(norms))
    if not kept < TIGHT:
        return None
    return Finding(
        evidence=f"each of the last {WINDOW} steps was clipped, to {100 * kept:.0f} % of its gradient's norm in the median "
        f"({whole:.3g}, clipped to {float(np.median(clipped)):.3g})",
        cause="the clip is below the usual gradient, so that it sets the length of every step, and the learning rate does not",
        remedy=f"clip the norm to about {2 * whole:.2g}, which leaves usual steps alone, and lower the learning rate if they "
        "are then too long; leave it if steps of one length are meant",
        reference="Pascanu et al. 2012, arXiv:1211.5063: a threshold of half to ten times the average norm",
    )


def _recent(e: Evidence, column: str, steps: int) -> Array | None:
    """The median over the last steps of a column of gradient_flow: (parameters,)."""
    values = e.column("gradient_flow", column)[-steps:]
    if len(values) < min(steps, 10):
        return None
    with np.errstate(invalid="ignore"):
        return np.asarray(np.median(values, axis=0))


def _rank_correlation(sizes: Array) -> float:
    """Spearman's, of depth and size; equal sizes share their rank."""
    _, ranks = np.unique(sizes, return_inverse=True)
    depth = np.arange(len(sizes))
    return float(np.corrcoef(depth, ranks)[0, 1]) if ranks.max() else 0.0
