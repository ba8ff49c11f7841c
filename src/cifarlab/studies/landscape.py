"""Study 4: what the loss looks like around a network, before and after training."""

import csv
import io
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.analysis.grid import Landscape, read_landscape
from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.figures import draw_landscape_contour, draw_landscape_line, draw_landscape_surface
from cifarlab.runs import Run, load_run, write_atomically
from cifarlab.studies.study import Arm, Results, Study

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MOST_POINTS = 50
POLICIES = {"frozen": "batch norm frozen", "recomputed": "batch norm recomputed"}
RANDOM_WALK = (8 / math.pi**2, 8 / (9 * math.pi**2))  # shares of a random walk's movement, see analysis/landscape.py


def plan(base: TrainConfig, values: Mapping[str, list[Any]]) -> list[Arm]:
    """One training for each seed: the first is looked into, and from it a line goes to the second."""
    return [Arm(name="base", is_base=True)]


def analyse(results: Results, watch: WatchConfig) -> None:
    """Measures every landscape of the study into analysis/*.jsonl; killed, it goes on with the point where it was."""
    from cifarlab.analysis.landscape import build_sample, line_between, measure_landscape, random_plane, trajectory_plane
    from cifarlab.data.load import load_dataset
    from cifarlab.data.splits import split_dataset
    from cifarlab.distributed import pick_device
    from cifarlab.inference import load_model

    options, folder, (run, *others) = results.options, results.folder / "analysis", find_runs(results)
    config = run.config
    dataset = load_dataset(config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels,
                           image_size=config.image_size, statistics=config.statistics)  # fmt: skip
    device = pick_device(watch.device)
    sample = build_sample(split_dataset(dataset, config)["train"], mean=dataset.mean, std=dataset.std, device=device,
                          num_images=options["images"], num_norm_images=options["norm_images"],
                          batch_size=min(config.batch_size, 250), channels_last=config.channels_last)  # fmt: skip
    after, seed = load_model(run).to(device), options["directions_seed"]
    points, across = (np.linspace(-options["span"], options["span"], options[name]) for name in ("points", "grid"))
    wanted: list[tuple[Any, ...]] = []  # name, model, plane, xs, ys
    for when, model in (("before", build_before(run, device)), ("after", after)):
        wanted.append((f"line-{when}", model, random_plane(model, 1, seed=seed), points, None))
        wanted.append((f"plane-{when}", model, random_plane(model, 2, seed=seed), across, across))
    if others:
        ends = after.state_dict(), load_model(others[0]).to(device).state_dict()
        sixths = max(1, round((options["points"] - 1) / 6))  # so that both runs are among the points
        wanted.append(("between", after, line_between(*ends), np.linspace(-0.25, 1.25, 6 * sixths + 1), None))
    trajectory = _load_trajectory(run)
    with suppress(InputError):  # none kept, or too short a one for a plane: the conclusion says so
        plane = trajectory_plane(after, [weights for _, weights in trajectory], [step for step, _ in trajectory])
        xs, ys = (_around(plane.coordinates[:, k], options["grid"]) for k in (0, 1))
        wanted.append(("trajectory", after, plane, xs, ys))
    folder.mkdir(parents=True, exist_ok=True)
    for name, model, plane, xs, ys in wanted:
        for policy in POLICIES:
            measure_landscape(model, plane, sample, xs, ys, batch_norm=policy, path=folder / f"{name}-{policy}.jsonl")  # type: ignore[arg-type]
    _write_table(results)


def find_runs(results: Results) -> list[Run]:
    """The runs to look into: those named by the options run and other, else the study's own finished ones.

    Raises InputError when there is none.
    """
    named = [results.options[name] for name in ("run", "other") if results.options.get(name)]
    runs = [load_run(path) for path in named] or [run for arm in results.arms for run in results.runs(arm)]
    runs = [run for run in runs if run.result.get("state") == "finished"]
    if not runs:
        raise InputError("there is no finished run to look into: name one with --set run=FOLDER, or let the study train")
    return runs


def tell_runs(results: Results) -> str:
    """Which runs the study looked into, with what they are."""
    named = [str(results.options[name]) for name in ("run", "other") if results.options.get(name)]
    try:
        runs = find_runs(results)
    except InputError:  # moved away since: the numbers are here all the same
        return f"Looked into: {', '.join(named)}."
    told = [f"{run.path.name} ({run.config.model} on {run.config.data}, {100 * run.result['test/accuracy']:.1f} % of test images)"
            for run in runs]  # fmt: skip
    return f"Looked into: {', '.join(told)}."


def build_before(run: Run, device: "torch.device") -> "nn.Module":
    """The network as it was before its first update: drawn again from the seed, as the training did."""
    import torch

    from cifarlab.models import create_model
    from cifarlab.train import fold_seed

    with torch.random.fork_rng([]):
        torch.manual_seed(fold_seed(run.config.seed, "weights"))
        model = create_model(run.config.model, len(run.dataset["class_names"]))
    if run.config.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().to(device)


def _load_trajectory(run: Run) -> list[tuple[int, dict[str, "Tensor"]]]:
    """At most MOST_POINTS of the kept points, evenly spaced: a long run may have kept more than memory holds."""
    from cifarlab.checkpoint import load_weights

    files = sorted((run.path / "trajectory").glob("step-*.safetensors"))
    files = [files[k] for k in np.unique(np.linspace(0, len(files) - 1, min(len(files), MOST_POINTS)).round().astype(int))]
    return [(int(path.stem.removeprefix("step-")), load_weights(path)) for path in files]


def _around(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Evenly spaced coordinates over the values and 0, with a quarter of room on each side."""
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    return np.linspace(low - 0.25 * (high - low), high + 0.25 * (high - low), count)


def _write_table(results: Results) -> None:
    """landscape.csv: a line a point of every landscape."""
    columns = ("loss", "loss_error", "difference_error", "accuracy")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["landscape", "batch_norm", "x", "y", *columns, "images", "nonfinite_images", "first_nonfinite_layer"])
    for path in sorted((results.folder / "analysis").glob("*.jsonl")):
        found = read_landscape(path)
        for i, j in np.ndindex(found.loss.shape):
            writer.writerow([
                path.stem.rpartition("-")[0], found.facts["batch_norm"], f"{found.xs[j]:.6g}", f"{found.ys[i]:.6g}",
                *(f"{getattr(found, column)[i, j]:.6g}" for column in columns), found.facts["num_images"],
                found.num_nonfinite[i, j], found.layers.get((i, j), ""),
            ])  # fmt: skip
    write_atomically(results.folder / "landscape.csv", text.getvalue().encode())


# ---- figures -------------------------------------------------------------------------------------------------------------


def read_all(results: Results) -> dict[tuple[str, str], Landscape]:
    """By (landscape, policy), those that are measured whole."""
    found = {}
    for path in sorted((results.folder / "analysis").glob("*.jsonl")):
        name, _, policy = path.stem.rpartition("-")
        if (landscape := read_landscape(path)).is_complete:
            found[name, policy] = landscape
    return found


def draw(results: Results) -> dict[str, Any]:
    found = read_all(results)
    figures: dict[str, Any] = {}
    lines = {f"{when} training, {words}": found[f"line-{when}", policy] for when in ("before", "after")
             for policy, words in POLICIES.items() if (f"line-{when}", policy) in found}  # fmt: skip
    if lines:
        figures["landscape_line"] = _line(lines, title="Loss along a random direction", marks={"the network": 0.0},
                                          x_name="distance in filter norms (1 = as far as the weights are long)")  # fmt: skip
    between = {words: found["between", policy] for policy, words in POLICIES.items() if ("between", policy) in found}
    if between:
        ends = {"first run": 0.0, "second run": 1.0}
        title = "Loss on the straight line between two runs"
        figures["landscape_between_runs"] = _line(between, title=title, marks=ends, x_name="share of the way")
    planes = [_panel(f"{when}, {words}", found[f"plane-{when}", policy]) for when in ("before", "after")
              for policy, words in POLICIES.items() if (f"plane-{when}", policy) in found]  # fmt: skip
    if planes:
        title = "Loss over a plane of two random directions"
        figures["landscape_plane"] = draw_landscape_contour(
            planes, title=title, x_name="first random direction, filter norms", y_name="second random direction"
        )
        figures["landscape_surface"] = draw_landscape_surface(planes, title=title, x_name="first direction", y_name="second")
    walked = [_panel(words, found["trajectory", policy]) for policy, words in POLICIES.items()
              if ("trajectory", policy) in found]  # fmt: skip
    if walked:
        first, second = next(each for (name, _), each in found.items() if name == "trajectory").facts["explained"]
        figures["landscape_trajectory"] = draw_landscape_contour(
            walked, title="Loss over the plane of the training trajectory",
            x_name=f"distance between weights, {100 * first:.0f} % of the movement", y_name=f"{100 * second:.0f} % of it",
        )  # fmt: skip
    return figures


def _line(curves: Mapping[str, Landscape], **how: Any) -> Any:
    return draw_landscape_line(
        next(iter(curves.values())).xs, {name: each.loss[0] for name, each in curves.items()},
        errors={name: each.loss_error[0] for name, each in curves.items()},
        shape_errors={name: each.difference_error[0] for name, each in curves.items()}, **how,
    )  # fmt: skip


def _panel(name: str, landscape: Landscape) -> dict[str, Any]:
    path = np.array(landscape.facts["coordinates"], dtype=float)
    walked = path if landscape.facts["kind"] == "training trajectory" else None
    return {"name": name, "xs": landscape.xs, "ys": landscape.ys, "loss": landscape.loss, "path": walked}


# ---- conclusion ----------------------------------------------------------------------------------------------------------


def conclude(results: Results) -> str:
    """Sentences by rules from the numbers; 95 % intervals are ±1.96 standard errors over the images."""
    found = read_all(results)
    if not found:
        return "Nothing has been measured whole yet; the same command goes on."
    facts = next(iter(found.values())).facts
    told = [tell_runs(results),
            f"All losses are means over the same {facts['num_images']} training images without augmentation; ± is the 95 % "
            "interval of the sampling error over images, for one network and one draw of directions."]  # fmt: skip
    for when in ("before", "after"):
        if landscape := found.get((f"line-{when}", "recomputed")):
            told.append(_tell_valley(when, landscape))
    if facts["has_batch_norm"]:
        told += [_tell_policies(name, found) for name in ("line-after", "plane-after", "trajectory")
                 if all((name, policy) in found for policy in POLICIES)]  # fmt: skip
    else:
        told.append("The network has no batch norm with running statistics: frozen and recomputed are the same.")
    if landscape := found.get(("plane-after", "recomputed")):
        told.append(_tell_plane(landscape))
    if landscape := found.get(("trajectory", "recomputed")):
        told.append(_tell_trajectory(landscape))
    else:
        told.append("The run kept no trajectory that spans a plane (`--trajectory-every` keeps one), so that is not shown.")
    told += [_tell_barrier(words, found["between", policy]) for policy, words in POLICIES.items() if ("between", policy) in found]
    if ("between", "frozen") not in found:
        told.append("There was one run only, so no line between two.")
    broken = [f"{name}, {POLICIES[policy]}: {landscape.tell_nonfinite()}" for (name, policy), landscape in found.items()
              if landscape.layers]  # fmt: skip
    told.append("Not finite: " + "; ".join(broken) + "." if broken else "The loss was finite at every point.")
    return "\n".join(f"- {line}" for line in told)


def _tell_valley(when: str, landscape: Landscape) -> str:
    """A valley: at both ends of the line the loss is higher by more than its error and by a fifth of the network's own."""
    xs, loss, half = landscape.xs, landscape.loss[0], 1.96 * landscape.difference_error[0]
    at = int(np.abs(xs).argmin())
    start = f"{when.capitalize()} training the loss is {loss[at]:.3g} ± {1.96 * landscape.loss_error[0, at]:.2g}"
    rise = np.where(np.isfinite(loss), loss - loss[at], np.inf)
    is_higher = (rise > np.where(np.isfinite(half), half, 0)) & (rise > 0)
    if all(is_higher[end] and rise[end] > 0.2 * loss[at] for end in (0, -1)):
        left, right = (int(np.flatnonzero(~side).max(initial=-1)) + 1 for side in (is_higher[at::-1], is_higher[at:]))
        ends = f"to {loss[0]:.3g} and {loss[-1]:.3g} at {xs[0]:.2g} and {xs[-1]:.2g} filter norms"
        return (f"{start}; along a random direction it rises on both sides, {ends}, and stays above the sampling error from "
                f"{xs[at - left]:.2g} and {xs[at + right]:.2g} on: a valley.")  # fmt: skip
    lower = np.flatnonzero(rise < -half)
    if len(lower):
        best = int(lower[rise[lower].argmin()])
        return f"{start}, and there is no valley around it: {loss[best]:.3g} at {xs[best]:.2g} filter norms is lower."
    change = np.abs(rise[np.isfinite(rise)]).max()
    reach = f"within ±{xs.max():.2g} filter norms along a random direction"
    return f"{start}; {reach} it changes by {change:.2g} at most: no valley."


def _tell_policies(name: str, found: Mapping[tuple[str, str], Landscape]) -> str:
    frozen, anew = found[name, "frozen"], found[name, "recomputed"]
    with np.errstate(invalid="ignore"):
        apart = np.abs(frozen.loss - anew.loss)
        clear = apart > 1.96 * np.hypot(frozen.loss_error, anew.loss_error)
    where = {"line-after": "Along the random line", "plane-after": "Over the random plane",
             "trajectory": "Over the trajectory's plane"}[name]  # fmt: skip
    if not clear.any():
        return f"{where}, frozen and recomputed batch norm show no difference beyond the sampling error."
    ratio = frozen.loss[clear] / anew.loss[clear]
    most = ratio[np.abs(np.log(np.maximum(ratio, 1e-300))).argmax()]
    told = f"{most:.2g} times" if most >= 1 else f"1/{1 / most:.2g} of"
    return (f"{where}, batch norm decides what is seen: at {int(clear.sum())} of {clear.size} points frozen statistics give "
            f"another loss, up to {told} that of recomputed ones.")  # fmt: skip


def _tell_plane(landscape: Landscape) -> str:
    i, j = (int(np.abs(values).argmin()) for values in (landscape.ys, landscape.xs))
    below = landscape.loss[i, j] - landscape.loss - 1.96 * landscape.difference_error
    if not (below > 0).any():
        told = "No point of the random plane is lower than the network by more than the sampling error"
    else:
        at = np.unravel_index(np.nanargmax(below), below.shape)
        told = (f"Lower than the network by more than the sampling error: {int((below > 0).sum())} of {below.size} points of the "
                f"random plane, the clearest {landscape.loss[at]:.3g}")  # fmt: skip
    minima = len(_local_minima(landscape))
    return f"{told}; the plane has {minima} local {'minimum' if minima == 1 else 'minima'} on its grid, the border left out."


def _local_minima(landscape: Landscape) -> list[tuple[int, int]]:
    """Inner points lower than all eight neighbours."""
    loss = np.where(np.isfinite(landscape.loss), landscape.loss, np.inf)
    found = []
    for i in range(1, loss.shape[0] - 1):
        for j in range(1, loss.shape[1] - 1):
            around = np.delete(loss[i - 1 : i + 2, j - 1 : j + 2].ravel(), 4)
            if loss[i, j] < around.min():
                found.append((i, j))
    return found


def _tell_trajectory(landscape: Landscape) -> str:
    first, second = landscape.facts["explained"]
    steps = landscape.facts["steps"]
    walk = sum(RANDOM_WALK)
    told = (f"The plane of the trajectory ({len(steps)} points over {steps[-1]} updates) holds {100 * first:.0f} % + "
            f"{100 * second:.0f} % of the movement; a long random walk gives {100 * RANDOM_WALK[0]:.0f} % + "
            f"{100 * RANDOM_WALK[1]:.0f} % already")  # fmt: skip
    if first + second > walk + 0.05:
        return f"{told}, so training moved more straightly than one."
    return f"{told}, so the shape of the path by itself shows nothing about the loss."


def _tell_barrier(words: str, landscape: Landscape) -> str:
    xs, loss, error = landscape.xs, landscape.loss[0], landscape.difference_error[0]
    inside = np.flatnonzero((xs > -1e-9) & (xs < 1 + 1e-9))
    if not np.isfinite(loss[inside]).all():
        return f"Between the two runs, {words}: no barrier can be told, since the loss is not finite on the way."
    chord = (1 - xs) * loss[inside[0]] + xs * loss[inside[-1]]
    above = (loss - chord)[inside]
    at = inside[above.argmax()]
    if above.max() > 1.96 * error[at]:
        return (f"Between the two runs, {words}: a barrier of {above.max():.3g} ± {1.96 * error[at]:.2g} at {100 * xs[at]:.0f} % "
                "of the way; they lie in different valleys as far as a straight line can tell.")  # fmt: skip
    return f"Between the two runs, {words}: no barrier could be shown (largest rise {above.max():.2g} ± {1.96 * error[at]:.2g})."


STUDY = Study(
    name="landscape",
    question="What does the loss look like around the network, before and after training?",
    source="Li et al. 2018, arXiv:1712.09913; Frankle et al. 2020, arXiv:1912.05671",
    answer="Whether the trained network lies in a valley and how wide it is in filter norms, with the sampling error; what of it "
    "is batch norm's doing; whether a barrier lies between two runs.",
    plan=plan,
    options={
        "run": "", "other": "", "grid": 11, "points": 21, "span": 1.0, "images": 250, "norm_images": 125, "directions_seed": 0,
    },
    analyse=analyse,
    draw=draw,
    conclude=conclude,
    watch=lambda base: {"trajectory_every": base.epochs / 24},  # 25 points, however long the training
    needs_validation=False,
    seeds=(0, 1),
)  # fmt: skip
