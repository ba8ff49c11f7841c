"""A network's filters, what they make of images, what excites them, and the pixels that a decision hangs on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cifarlab.config import InputError
from cifarlab.figures.page import LETTER, TOP, Page, finite, signed_range
from cifarlab.figures.style import ORANGE, plain_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_FILTERS, MOST_INPUTS = 16, 16  # of a deep layer


def draw_filters(filters: ArrayLike, *, columns: int = 8, title: str = "Filters") -> "Figure":
    """The weights of a convolution: in colour where it reads three channels, else a row of slices for each filter.

    filters: out×in×h×w. In colour, grey is 0 and each filter is scaled by its own largest weight; below it, its number and its
    norm relative to the strongest. Else up to 16 filters by 16 input channels, blue negative, red positive, one scale for all.

    How to read: the first layer of a trained network has edges, bars and blobs of colour: smooth, and different from each other.
    Filters that look like noise have learned little: too short a training, too high a learning rate or too little weight
    decay. Several with a norm near 0 are dead, and the layer is wider than it needs to be; copies of one pattern say the same.
    With 3×3 pixels patterns are coarse, and colour tells more than shape. Slices of deeper layers seldom mean anything to the
    eye; look at what excites them instead.

    Source: Zeiler & Fergus 2013, arXiv:1311.2901, section 4.1. Raises InputError for other shapes.
    """
    weights = finite(filters)
    if weights.ndim != 4 or not weights.size:
        raise InputError(f"filters of shape {weights.shape} do not fit: give out×in×h×w")
    num, num_in, h, w = weights.shape
    norms = np.sqrt((weights**2).sum((1, 2, 3)))
    strongest = float(norms.max()) or 1.0
    lost = int((~np.isfinite(np.asarray(filters, dtype=float))).any(axis=(1, 2, 3)).sum())
    told = f"{num} filters of {num_in}×{h}×{w}; " + (
        "grey is 0; below each its number and its norm, the strongest 1" if num_in == 3 else
        f"red above zero, blue below; norms {norms.min() / strongest:.2f} to 1")  # fmt: skip
    told += f"; {lost} with weights that are not finite" if lost else ""
    if num_in == 3:
        columns = max(1, min(columns, num))
        rows = -(-num // columns)
        page = Page(0.3 + 0.86 * columns, TOP + 1.02 * rows + 0.1, title, told)
        for k in range(num):
            row, column = divmod(k, columns)
            largest = float(np.abs(weights[k]).max()) or 1.0
            left, top = 0.15 + 0.86 * column, TOP + 1.02 * row
            page.picture(left, top, 0.76, 0.76, 0.5 + 0.5 * weights[k].transpose(1, 2, 0) / largest)
            page.write(left, top + 0.79, f"{k} · {norms[k] / strongest:.2f}", size=8)
        return page.figure
    shown = weights[:MOST_FILTERS, :MOST_INPUTS]
    if shown.shape[:2] != (num, num_in):
        told += f"; the first {shown.shape[0]} with their first {shown.shape[1]} inputs"
    page = Page(0.75 + 0.5 * shown.shape[1], TOP + 0.2 + 0.5 * shown.shape[0] + 0.1, title, told)
    style: dict[str, Any] = signed_range(np.abs(shown)) | {"cmap": "RdBu_r"}
    style["vmin"] = -style["vmax"]
    page.write(0.65, TOP - 0.04, "input channel →", size=8)
    for k, filter_ in enumerate(shown):
        page.write(0.15, TOP + 0.3 + 0.5 * k, str(k), size=8)
        for c, slice_ in enumerate(filter_):
            page.picture(0.65 + 0.5 * c, TOP + 0.18 + 0.5 * k, 0.44, 0.44, slice_, **style)
    return page.figure


def draw_feature_maps(images: NDArray[np.uint8], maps: ArrayLike, names: Sequence[str], *,
                      title: str = "Images before and after single filters") -> "Figure":  # fmt: skip
    """Each image beside what single filters, or the channels of a layer, make of it.

    images: uint8 N×3×H×W, up to about 8; maps: (N, K, h, w), up to about 12 of them; names: of the K columns. Grey from black = 0
    where no value of a column is negative; else blue negative, white 0, red positive; a scale for each column, the same for
    all images.

    How to read: look along a column for what its bright places have in common: edges of one direction, one colour, a texture.
    A column that is the same everywhere is a dead or a useless filter; one that shows the image itself has learned to pass it
    on, which is usual in the first layer. Deeper maps are small and sparse: few bright places on dark ground are a healthy
    sign, for they have become detectors. A bright frame at the border is padding, not image.

    Raises InputError when the shapes do not fit.
    """
    values = np.asarray(maps, dtype=float)
    if images.ndim != 4 or images.shape[1] != 3 or values.ndim != 4 or values.shape[:2] != (len(images), len(names)):
        raise InputError(f"maps {values.shape} do not fit images {images.shape} and {len(names)} names: give (N, K, h, w)")
    lost = int((~np.isfinite(values)).sum())
    signs = ["red above zero, blue below"] if (finite(values) < 0).any() else []
    told = "; ".join(["each column on its own scale", *signs, f"maps of {values.shape[2]}×{values.shape[3]}"])
    told += f"; {lost} values not finite" if lost else ""
    side = 1.05
    page = Page(0.3 + (side + 0.1) * (1 + len(names)), TOP + 0.25 + (side + 0.1) * len(images) + 0.1, title, told)
    page.write(0.15, TOP, "image", size=8.5)
    for k, name in enumerate(names):
        page.write(0.15 + (side + 0.1) * (k + 1), TOP, plain_text(name, int(side / LETTER)), size=8.5)
    for n, image in enumerate(images):
        top = TOP + 0.22 + (side + 0.1) * n
        page.picture(0.15, top, side, side, image.transpose(1, 2, 0))
        for k in range(len(names)):
            page.picture(0.15 + (side + 0.1) * (k + 1), top, side, side, finite(values[n, k]), **signed_range(values[:, k]))
    return page.figure


def draw_exciting(made: ArrayLike, images: NDArray[np.uint8], values: ArrayLike, names: Sequence[str], *,
                  boxes: ArrayLike | None = None, title: str = "What excites a channel") -> "Figure":  # fmt: skip
    """A row for each channel: the image made by gradient ascent, then the images of the data set that excite it most.

    made: (K, 3, H, W) in 0…1; images: uint8 (K, top, 3, H, W), strongest first; values: (K, top), the channel's output there;
    names: of the K channels; boxes: (K, top, 4), top, left, bottom, right of the pixels that this output sees, drawn in orange.

    How to read: what the boxes of a row have in common is what the channel looks for; the made image shows it purely, often as a
    texture that no photograph has. Images of one class only belong to a channel near the decision; of all classes, to a
    general one, and both are usual, the first deeper down. A row of unlike images with nearly equal values is a channel that
    means nothing for itself; zeros all along, a dead one. Beware of names: nine images always seem to have something in common.

    Source: Zeiler & Fergus 2013, arXiv:1311.2901; Erhan et al. 2009. Raises InputError when the shapes do not fit.
    """
    pictures, amounts = finite(made), np.asarray(values, dtype=float)
    if (
        images.ndim != 5
        or pictures.shape[:2] != (len(names), 3)
        or amounts.shape != images.shape[:2]
        or len(images) != len(names)
    ):
        raise InputError(f"made {pictures.shape}, images {images.shape}, values {amounts.shape} do not fit {len(names)} names: "
                         "give (K, 3, H, W), (K, top, 3, H, W) and (K, top)")  # fmt: skip
    places = None if boxes is None else np.asarray(boxes)
    if places is not None and places.shape != (*amounts.shape, 4):
        raise InputError(f"boxes {places.shape} do not fit {amounts.shape} images: give (K, top, 4)")
    top_n, side = images.shape[1], 1.0
    page = Page(1.35 + (side + 0.1) * (1 + top_n), TOP + 0.25 + (side + 0.26) * len(names) + 0.05, title,
                "number: the channel's largest output on the image; orange: the pixels that this output sees")  # fmt: skip
    page.write(1.2, TOP, "made by ascent", size=8.5)
    if top_n:
        page.write(1.2 + side + 0.1, TOP, "most exciting images →", size=8.5)
    for k, name in enumerate(names):
        top = TOP + 0.22 + (side + 0.26) * k
        page.write(0.15, top + 0.4, plain_text(name, 14), size=9)
        page.picture(1.2, top, side, side, np.clip(pictures[k].transpose(1, 2, 0), 0, 1))
        for n in range(top_n):
            left = 1.2 + (side + 0.1) * (n + 1)
            axes = page.picture(left, top, side, side, images[k, n].transpose(1, 2, 0))
            page.write(left, top + side + 0.03, f"{amounts[k, n]:.3g}", size=8)
            if places is not None:
                y0, x0, y1, x1 = (float(edge) for edge in places[k, n])
                height, width = images.shape[-2:]
                if (y1 - y0, x1 - x0) != (height, width):  # a frame around everything says nothing
                    axes.plot(
                        [x0 - 0.5, x1 - 0.5, x1 - 0.5, x0 - 0.5, x0 - 0.5],
                        [y0 - 0.5, y0 - 0.5, y1 - 0.5, y1 - 0.5, y0 - 0.5],
                        color=ORANGE,
                        linewidth=1.4,
                    )
                    axes.set_xlim(-0.5, width - 0.5)
                    axes.set_ylim(height - 0.5, -0.5)
    return page.figure


def draw_saliency(images: NDArray[np.uint8], slopes: ArrayLike, cams: ArrayLike, names: Sequence[str], *,
                  title: str = "Which pixels the decision hangs on") -> "Figure":  # fmt: skip
    """Below each image its saliency, |∂ score / ∂ pixel|, and its Grad-CAM laid over the grey image.

    images: uint8 N×3×H×W, up to about 8; slopes: (N, H, W) from 0; cams: (N, h, w) from 0, in any size; names: of the N columns,
    such as the class asked about. Every map has its own scale, from 0 to its largest value (saliency: to its 99th percentile).

    How to read: both should lie on the object, not on the background that it is usually seen before: grass below the horse,
    sky around the airplane. Saliency is fine and noisy, Grad-CAM coarse, since it has the size of the layer's maps; where they
    disagree, believe neither. It tells where the score is sensitive, not why, and a map that an untrained network would draw
    alike tells nothing about training: compare the two. An empty Grad-CAM says that nothing in the layer speaks for the class.

    Source: Simonyan et al. 2013, arXiv:1312.6034; Selvaraju et al. 2016, arXiv:1610.02391; the warning: Adebayo et al. 2018,
    arXiv:1810.03292. Raises InputError when the shapes do not fit.
    """
    steep, cam = finite(slopes), finite(cams)
    n = len(images)
    fit = steep.shape == (n, *images.shape[2:]) and cam.ndim == 3 and len(cam) == len(names) == n
    if images.ndim != 4 or images.shape[1] != 3 or not fit:
        raise InputError(f"slopes {steep.shape}, cams {cam.shape} and {len(names)} names do not fit images {images.shape}: "
                         "give (N, H, W), (N, h, w) and N of them")  # fmt: skip
    side = 1.25
    page = Page(0.95 + (side + 0.1) * n, TOP + 0.25 + (side + 0.1) * 3 + 0.1, title,
                "one scale for each map; Grad-CAM: red is most for the class" if n else "no images")  # fmt: skip
    for row, name in enumerate(("image", "saliency", "Grad-CAM")):
        page.write(0.15, TOP + 0.22 + (side + 0.1) * row + side / 2 - 0.08, name, size=9)
    extent = (-0.5, images.shape[3] - 0.5, images.shape[2] - 0.5, -0.5)
    for k in range(n):
        left = 0.9 + (side + 0.1) * k
        page.write(left, TOP, plain_text(names[k], int(side / LETTER)), size=8.5)
        image = images[k].transpose(1, 2, 0)
        page.picture(left, TOP + 0.22, side, side, image)
        top = float(np.quantile(steep[k], 0.99)) or float(steep[k].max()) or 1.0
        page.picture(left, TOP + 0.22 + side + 0.1, side, side, steep[k], cmap="magma", vmin=0, vmax=top)
        grey = image.mean(axis=2)
        axes = page.picture(left, TOP + 0.22 + 2 * (side + 0.1), side, side, grey, cmap="gray", vmin=0, vmax=255)
        if cam[k].max() > 0:
            share = np.clip(cam[k] / cam[k].max(), 0, 1)
            axes.imshow(
                share,
                cmap="jet",
                vmin=0,
                vmax=1,
                alpha=0.15 + 0.4 * share,
                extent=extent,
                interpolation="bilinear",
                aspect="auto",
            )
            axes.set_xlim(extent[0], extent[1])
            axes.set_ylim(extent[2], extent[3])
        else:
            axes.text(0.5, 0.5, "nothing", transform=axes.transAxes, ha="center", va="center", fontsize=9, color=ORANGE)
    return page.figure
