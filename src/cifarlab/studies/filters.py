"""Study 5: what the filters of a trained network look for, and which pixels its decisions hang on."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cifarlab.arrays import read_arrays
from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.figures import draw_exciting, draw_feature_maps, draw_filters, draw_saliency
from cifarlab.runs import Run, write_atomically
from cifarlab.studies.landscape import build_before, find_runs, tell_runs
from cifarlab.studies.study import Arm, Results, Study

if TYPE_CHECKING:
    from torch import nn

    from cifarlab.data.dataset import Split

SHOWN_CHANNELS = 8
DEAD = 0.05  # of the strongest filter's norm
COPIES = 0.95  # cosine of two filters that say the same


def plan(base: TrainConfig, values: Mapping[str, list[Any]]) -> list[Arm]:
    return [Arm(name="base", is_base=True)]


def analyse(results: Results, watch: WatchConfig) -> None:
    """Writes analysis/filters.npz: all that the figures and the conclusion are made of."""
    from cifarlab.analysis.filters import list_convolutions, read_filters
    from cifarlab.data.load import load_dataset
    from cifarlab.distributed import pick_device
    from cifarlab.inference import load_model

    run, options = find_runs(results)[0], results.options
    config = run.config
    dataset = load_dataset(config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels,
                           image_size=config.image_size, statistics=config.statistics)  # fmt: skip
    device = pick_device(watch.device)
    model, names = load_model(run).to(device), list_convolutions(load_model(run))
    deep = options["layer"] or names[(2 * len(names)) // 3]
    read_filters(model, deep)  # a wrong name is found here
    if wrong := [index for index in options["images"] if not 0 <= index < len(dataset.test)]:
        raise InputError(f"images={wrong[0]} cannot be used: the test set has 0 to {len(dataset.test) - 1}")
    chosen = dataset.test.take(np.array(options["images"], dtype=np.int64))
    look = {"mean": dataset.mean, "std": dataset.std}
    arrays: dict[str, Any] = {"class_names": np.array(dataset.class_names), "images": chosen.images, "labels": chosen.labels,
                              "layers": np.array([names[0], deep])}  # fmt: skip
    arrays |= _look_at_filters(model, names[0], deep, chosen.images, look)
    arrays |= _look_for_exciting(model, deep, dataset.test, options["searched"], look)
    arrays |= _look_at_decisions(run, model, build_before(run, device), chosen.images, look)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    (results.folder / "analysis").mkdir(parents=True, exist_ok=True)
    write_atomically(results.folder / "analysis" / "filters.npz", content.getvalue())
    _write_table(results, arrays)


def _look_at_filters(model: "nn.Module", first: str, deep: str, images: NDArray[np.uint8],
                     look: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    from cifarlab.analysis.filters import apply_filters, read_filters

    found: dict[str, Any] = {}
    for name, layer in (("first", first), ("deep", deep)):
        weights = read_filters(model, layer)
        strongest = np.argsort(-np.square(weights).sum((1, 2, 3)), kind="stable")[:SHOWN_CHANNELS]
        found |= {f"{name}_filters": weights, f"{name}_channels": strongest,
                  f"{name}_maps": apply_filters(model, images, layer, strongest.tolist(), **look)}  # fmt: skip
    return found


def _look_for_exciting(model: "nn.Module", layer: str, test: "Split", searched: int, look: dict[str, Any]) -> dict[str, Any]:
    from cifarlab.analysis.filters import excite, find_exciting, read_filters
    from cifarlab.data.dataset import balanced_subset

    places = balanced_subset(test.labels, min(searched, len(test)), 0)
    images = np.ascontiguousarray(test.images[places])
    channels = np.linspace(0, len(read_filters(model, layer)) - 1, 6).astype(int).tolist()  # evenly spaced: not picked
    channels = list(dict.fromkeys(channels))
    found = find_exciting(model, images, layer, channels, **look)
    size = (int(images.shape[2]), int(images.shape[3]))
    made, reached = excite(model, layer, channels, image_size=size, smoothness=1.0, **look)
    return {
        "exciting_channels": np.array(channels), "exciting_images": images[found.indices], "exciting_values": found.values,
        "exciting_boxes": found.boxes, "exciting_labels": test.labels[places][found.indices], "made": made, "reached": reached,
        "searched": np.array(len(images)),
    }  # fmt: skip


def _look_at_decisions(run: Run, model: "nn.Module", before: "nn.Module", images: NDArray[np.uint8],
                       look: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    """Maps for the class that the trained network predicts; of the untrained one for the same class, as a control."""
    from cifarlab.analysis.filters import grad_cam, last_maps, rank_correlation, saliency
    from cifarlab.evaluate import predict_logits

    device = next(model.parameters()).device
    probabilities = predict_logits(model, images, device=device, channels_last=run.config.channels_last, **look).softmax(1)
    predicted = probabilities.argmax(1).numpy()
    layer = last_maps(model, images.shape[1:])
    surest = probabilities.max(1).values.numpy()
    found: dict[str, Any] = {"predicted": predicted, "probability": surest, "cam_layer": np.array(layer)}
    for name, network in (("trained", model), ("untrained", before)):
        found[f"saliency_{name}"] = saliency(network, images, predicted, **look)
        found[f"cam_{name}"] = grad_cam(network, images, layer, predicted, **look)
    for kind in ("saliency", "cam"):
        pairs = zip(found[f"{kind}_trained"], found[f"{kind}_untrained"], strict=True)
        found[f"{kind}_control"] = np.array([rank_correlation(trained, untrained) for trained, untrained in pairs])
    return found


def _write_table(results: Results, arrays: Mapping[str, Any]) -> None:
    """filters.csv: a line a filter of both layers, with its norm, its nearest other one, and the channel's mean response."""
    lines = ["layer,filter,norm,norm_share_of_strongest,largest_cosine_to_another"]
    for k, name in enumerate(("first", "deep")):
        norms, cosines = _compare(arrays[f"{name}_filters"])
        lines += [f"{arrays['layers'][k]},{c},{norm:.6g},{norm / max(norms.max(), 1e-30):.6g},{cosine:.6g}"
                  for c, (norm, cosine) in enumerate(zip(norms, cosines, strict=True))]  # fmt: skip
    write_atomically(results.folder / "filters.csv", ("\n".join(lines) + "\n").encode())


def _compare(filters: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(norm of each filter, its largest cosine to another one; nan where there is no other)."""
    flat = filters.reshape(len(filters), -1).astype(float)
    norms = np.sqrt(np.square(flat).sum(1))
    cosines = (flat @ flat.T) / np.maximum(np.outer(norms, norms), 1e-30)
    np.fill_diagonal(cosines, -np.inf)
    return norms, np.where(len(filters) > 1, cosines.max(1), np.nan)


def _load(results: Results) -> dict[str, Any]:
    return dict(read_arrays(results.folder / "analysis" / "filters.npz", remedy="remove it, and the same study makes it anew"))


def draw(results: Results) -> dict[str, Any]:
    found = _load(results)
    classes, (first, deep) = found["class_names"], found["layers"]
    titles = [f"{classes[k]}, {100 * p:.0f} %" for k, p in zip(found["predicted"], found["probability"], strict=True)]
    names = {name: [f"filter {c}" for c in found[f"{name}_channels"]] for name in ("first", "deep")}
    return {
        "filters_first": draw_filters(found["first_filters"], title=f"Filters of the first convolution, {first}"),
        "filters_deep": draw_filters(found["deep_filters"], title=f"Filters of {deep}"),
        "maps_first": draw_feature_maps(found["images"], found["first_maps"], names["first"],
                                        title=f"Before and after the strongest filters of {first}"),
        "maps_deep": draw_feature_maps(found["images"], found["deep_maps"], names["deep"],
                                       title=f"Before and after the strongest filters of {deep}"),
        "exciting": draw_exciting(found["made"], found["exciting_images"], found["exciting_values"],
                                  [f"channel {c}" for c in found["exciting_channels"]], boxes=found["exciting_boxes"],
                                  title=f"What excites channels of {deep}"),
        "saliency": draw_saliency(found["images"], found["saliency_trained"], found["cam_trained"], titles,
                                  title="Which pixels the decision hangs on"),
        "saliency_untrained": draw_saliency(found["images"], found["saliency_untrained"], found["cam_untrained"], titles,
                                            title="Control: the same of the untrained network"),
    }  # fmt: skip


def conclude(results: Results) -> str:
    """Sentences by rules from the numbers."""
    found = _load(results)
    told = [tell_runs(results)]
    for name, layer in zip(("first", "deep"), found["layers"], strict=True):
        norms, cosines = _compare(found[f"{name}_filters"])
        dead, copies = int((norms < DEAD * norms.max()).sum()), int((cosines > COPIES).sum())
        verdict = "all are used" if not dead else f"{dead} are as good as dead (norm below {100 * DEAD:.0f} % of the strongest)"
        same = "none is a copy of another" if not copies else f"{copies} have a near copy (cosine above {COPIES:g})"
        told.append(f"Layer {layer}: of {len(norms)} filters {verdict}, {same}.")
    labels = found["exciting_labels"]
    purity = np.array([np.bincount(row).max() / len(row) for row in labels])
    chance = _chance_purity(labels.shape[1], len(found["class_names"]))
    said = ", ".join(f"{c}: {100 * p:.0f} %" for c, p in zip(found["exciting_channels"], purity, strict=True))
    verdict = ("its channels are near to single classes" if purity.mean() > 2 * chance else
               "its channels prefer some classes" if purity.mean() > 1.3 * chance else
               "its channels are general, not a matter of one class")  # fmt: skip
    top, searched = labels.shape[1], int(found["searched"])
    told.append(f"Of the {top} of {searched:,} images that excite a channel of {found['layers'][1]} most, the commonest class "
                f"has {100 * purity.mean():.0f} % ({said}); chance gives {100 * chance:.0f} %: {verdict}.")  # fmt: skip
    for kind, words in (("saliency", "Saliency"), ("cam", "Grad-CAM")):
        control = found[f"{kind}_control"]
        known = control[np.isfinite(control)]
        if not len(known):
            told.append(f"{words}: no comparison with the untrained network, whose maps are the same everywhere.")
            continue
        mean = float(known.mean())
        half = 1.96 * float(known.std(ddof=1)) / len(known) ** 0.5 if len(known) > 1 else float("nan")
        verdict = ("an untrained network draws much the same, so it tells little of what was learned" if mean > 0.5 else
                   "what it shows comes from training, not from the architecture alone" if mean + half < 0.5 else
                   "whether it shows what was learned is left open")  # fmt: skip
        told.append(f"{words}: rank correlation with the untrained network's map for the same class {mean:.2f} ± {half:.2f} over "
                    f"{len(known)} images: {verdict}.")  # fmt: skip
    right = int((found["predicted"] == found["labels"]).sum())
    told.append(f"{right} of the {len(found['labels'])} images shown are classified rightly; maps are for the class predicted.")
    return "\n".join(f"- {line}" for line in told)


def _chance_purity(count: int, num_classes: int) -> float:
    """Expected share of the commonest class among `count` images drawn at random: 20,000 draws from a fixed seed."""
    draws = np.random.default_rng(0).multinomial(count, np.full(num_classes, 1 / num_classes), size=20_000)
    return float(draws.max(axis=1).mean() / count)


STUDY = Study(
    name="filters",
    question="What do the filters of the trained network look for, and which pixels do its decisions hang on?",
    source="Zeiler & Fergus 2013, arXiv:1311.2901; Simonyan et al. 2013, arXiv:1312.6034; Selvaraju et al. 2016, "
    "arXiv:1610.02391; controls: Adebayo et al. 2018, arXiv:1810.03292",
    answer="How many filters are used, how pure the channels are, and whether saliency shows more than an untrained network's.",
    plan=plan,
    options={"run": "", "layer": "", "images": (0, 1, 2, 3, 4, 5), "searched": 1000},
    analyse=analyse,
    draw=draw,
    conclude=conclude,
    needs_validation=False,
    seeds=(0,),
)
