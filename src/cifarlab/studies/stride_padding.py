"""Study 6: what stride and padding make of an image."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from cifarlab.arrays import read_arrays
from cifarlab.config import InputError, TrainConfig, WatchConfig
from cifarlab.figures import draw_geometry
from cifarlab.runs import write_atomically
from cifarlab.studies.landscape import find_runs
from cifarlab.studies.study import Arm, Results, Study


def plan(base: TrainConfig, values: Mapping[str, list[Any]]) -> list[Arm]:
    """No training: the mini-networks are measured as they are."""
    return []


def analyse(results: Results, watch: WatchConfig) -> None:
    """Writes analysis/geometry.npz and geometry.csv."""
    import torch

    from cifarlab.analysis.filters import read_filters
    from cifarlab.analysis.geometry import build_mini_network, measure_geometry, respond
    from cifarlab.data.load import load_dataset
    from cifarlab.inference import load_model

    options = results.options
    run = find_runs(results)[0] if options["run"] else None
    config = run.config if run else results.base
    dataset = load_dataset(config.data, data_dir=watch.data_dir, data_url=watch.data_url, labels=config.labels,
                           image_size=config.image_size, statistics=config.statistics)  # fmt: skip
    if not 0 <= options["image"] < len(dataset.test):
        raise InputError(f"image={options['image']} cannot be used: the test set has 0 to {len(dataset.test) - 1}")
    image = np.ascontiguousarray(dataset.test.images[options["image"]])
    filters = torch.tensor(read_filters(load_model(run))) if run else None
    if filters is not None and filters.shape[1] != 3:
        filters = None
    kernel = options["kernel"] if filters is None else int(filters.shape[-1])
    found = measure_geometry(image.shape[1:], strides=options["strides"], paddings=options["paddings"], kernel=kernel)
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    normal = (torch.tensor(image).float() / 255 - shift) / scale
    arrays: dict[str, Any] = {"image": image, "kernel": np.array(kernel), "is_trained": np.array(filters is not None)}
    names = ("stride", "padding", "field", "jump", "macs", "padded_share", "unread_share", "lost_share", "weak_share")
    arrays |= {name: np.array([getattr(each, name) for each in found]) for name in names}
    arrays |= {name: np.array([getattr(each, name) for each in found]) for name in ("sizes", "formula", "counts", "paths")}
    for k, each in enumerate(found):
        network = build_mini_network(kernel, each.stride, each.padding, filters=filters)
        maps = respond(network, normal)
        arrays |= {f"maps0_{k}": maps[0], f"maps1_{k}": maps[1]}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    (results.folder / "analysis").mkdir(parents=True, exist_ok=True)
    write_atomically(results.folder / "analysis" / "geometry.npz", content.getvalue())
    _write_table(results, arrays)


def _write_table(results: Results, found: Mapping[str, Any]) -> None:
    """geometry.csv: a line a stride and padding."""
    columns = ["stride", "padding", "size1_formula", "size1_run", "size2_formula", "size2_run", "receptive_field", "jump", "macs",
               "unread_share", "lost_share", "weak_share", "padded_share"]  # fmt: skip
    lines = [",".join(columns)]
    for k in range(len(found["stride"])):
        sizes = [f"{h}x{w}" for layer in range(2) for h, w in (found["formula"][k, layer], found["sizes"][k, layer])]
        shares = [f"{found[name][k]:.6g}" for name in ("unread_share", "lost_share", "weak_share", "padded_share")]
        numbers = [found[name][k] for name in ("field", "jump", "macs")]
        lines.append(",".join(map(str, [found["stride"][k], found["padding"][k], *sizes, *numbers, *shares])))
    write_atomically(results.folder / "geometry.csv", ("\n".join(lines) + "\n").encode())


def _load(results: Results) -> dict[str, Any]:
    return dict(read_arrays(results.folder / "analysis" / "geometry.npz", remedy="remove it, and the same study makes it anew"))


def draw(results: Results) -> dict[str, Any]:
    found = _load(results)
    strides, paddings = (list(dict.fromkeys(found[name].tolist())) for name in ("stride", "padding"))

    def table(cells: list[Any]) -> list[list[Any]]:
        return [cells[i * len(paddings) : (i + 1) * len(paddings)] for i in range(len(strides))]

    num = len(found["stride"])
    sizes = [" → ".join(f"{h}×{w}" for h, w in found["sizes"][k]) for k in range(num)]
    kernel = int(found["kernel"])
    usage = [f"{sizes[k]}, sees {found['field'][k]}×{found['field'][k]}\n{100 * found['lost_share'][k]:.1f} % of pixels lost\n"
             f"{100 * found['weak_share'][k]:.0f} % count less" for k in range(num)]  # fmt: skip
    # one channel for all, or they could not be compared: the one that varies most at stride 1 without padding
    channel = [int(found[f"maps{layer}_0"].std((1, 2)).argmax()) for layer in range(2)]
    maps = [[found[f"maps{layer}_{k}"][channel[layer]] for k in range(num)] for layer in range(2)]
    of = "a trained network's first filters, then random ones" if found["is_trained"] else "random filters, the same everywhere"
    what = f"two convolutions {kernel}×{kernel}"
    return {
        "geometry_usage": draw_geometry(
            strides, paddings, table(list(found["paths"])), table(usage), title="How often each pixel is used",
            subtitle=f"{what}; bright: reaches the output by many ways; black: by none",
        ),
        "geometry_first": draw_geometry(
            strides, paddings, table(maps[0]), table([s.partition(" → ")[0] for s in sizes]), image=found["image"],
            true_size=True, title="Features after the first convolution",
            subtitle=f"channel {channel[0]}, sizes in proportion; {of}",
        ),
        "geometry_second": draw_geometry(
            strides, paddings, table(maps[1]), table(sizes), image=found["image"],
            title="Features after the second convolution", subtitle=f"channel {channel[1]}, each filling its place; {of}",
        ),
    }  # fmt: skip


def conclude(results: Results) -> str:
    """Sentences by rules from the numbers."""
    found = _load(results)
    kernel, num = int(found["kernel"]), len(found["stride"])
    pairs = [f"stride {found['stride'][k]}, padding {found['padding'][k]}" for k in range(num)]
    agree = (found["formula"] == found["sizes"]).all()
    height, width = found["image"].shape[1:]
    verdict = "agree in all" if agree else "DISAGREE in some of the"
    what = f"Two convolutions {kernel}×{kernel} on {height}×{width} pixels"
    told = [f"{what}: sizes by formula and by running {verdict} {num} cases."]
    keeps = [pairs[k] for k in range(num) if tuple(found["sizes"][k, -1]) == found["image"].shape[1:]]
    told.append(f"The size is kept by {', '.join(keeps) or 'none'}.")
    lost = [k for k in range(num) if found["lost_share"][k] > 0]
    if lost:
        worst = max(lost, key=lambda k: found["lost_share"][k])
        told.append(f"Pixels that reach no output: in {len(lost)} of {num} cases, most with {pairs[worst]}: "
                    f"{100 * found['lost_share'][worst]:.1f} % (windows that would stick out are left out).")  # fmt: skip
    else:
        told.append("No pixel is lost in any case.")
    even = [pairs[k] for k in range(num) if found["weak_share"][k] == 0]
    most = int(found["weak_share"].argmax())
    low, high = 100 * found["weak_share"].min(), 100 * found["weak_share"][most]
    told.append(f"Pixels near the border that count less than others: {low:.0f} % to {high:.0f} %, most with {pairs[most]}; "
                f"none with {', nor '.join(even) or 'any'}.")  # fmt: skip
    zeros = int(found["padded_share"].argmax())
    told.append(f"The price of padding: with {pairs[zeros]}, {100 * found['padded_share'][zeros]:.0f} % of what the first "
                "layer's windows look at is zeros.")  # fmt: skip
    dear, cheap = int(found["macs"].argmax()), int(found["macs"].argmin())
    times = found["macs"][dear] / found["macs"][cheap]
    told.append(f"Receptive field {found['field'].min()} to {found['field'].max()} pixels, growing with the stride; "
                f"{times:.0f} times as many multiply-adds with {pairs[dear]} as with {pairs[cheap]}.")  # fmt: skip
    return "\n".join(f"- {line}" for line in told)


STUDY = Study(
    name="stride-padding",
    question="What do stride and padding make of an image: sizes, features, borders, field of view?",
    source="Dumoulin & Visin 2016, arXiv:1603.07285; Araujo et al., Distill 2019",
    answer="Sizes by formula and by running, pixels lost or neglected at the borders, receptive field and cost, for every "
    "stride and padding.",
    plan=plan,
    options={"run": "", "image": 0, "kernel": 3, "strides": (1, 2, 3), "paddings": (0, 1, 2)},
    analyse=analyse,
    draw=draw,
    conclude=conclude,
    needs_validation=False,
    seeds=(0,),
)
