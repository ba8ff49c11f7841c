"""What stride and padding do: output sizes by formula and by running, the receptive field, and what is lost at the borders."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifarlab.config import InputError
from cifarlab.profile.counting import count_macs
from cifarlab.profile.receptive import receptive_fields


@dataclass(frozen=True, eq=False)
class Geometry:
    """A mini-network of `depth` equal convolutions with one stride and padding, on an image of H×W.

    sizes: (height, width) behind each layer as it ran; formula: by `output_size`, which agrees (a test holds it). field: side
    of the last layer's receptive field in pixels; jump: distance between neighbouring fields. macs: multiply-adds an image with
    8 channels a layer.
    counts: int64 (H, W), how many windows of the first layer read each pixel; paths: int64 (H, W), by how many ways through
    all layers a pixel reaches an output.
    """

    stride: int
    padding: int
    kernel: int
    formula: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[int, int], ...]
    field: int
    jump: int
    macs: int
    counts: NDArray[np.int64]
    paths: NDArray[np.int64]
    padded_share: float
    """Share of the first layer's window positions that lie on padding, not on the image: zeros that are computed with."""

    @property
    def unread_share(self) -> float:
        """Share of the pixels that no window of the first layer reads."""
        return float((self.counts == 0).mean())

    @property
    def lost_share(self) -> float:
        """Share of the pixels that reach no output of the last layer."""
        return float((self.paths == 0).mean())

    @property
    def weak_share(self) -> float:
        """Share of the pixels that reach the output by fewer ways than the best connected one of their phase does.

        With a stride some pixels are read oftener than their neighbours everywhere; the phase, a pixel's place modulo the jump,
        takes that out, so that what is left is the border's doing.
        """
        best = np.zeros_like(self.paths)
        for y in range(min(self.jump, self.paths.shape[0])):
            for x in range(min(self.jump, self.paths.shape[1])):
                best[y :: self.jump, x :: self.jump] = self.paths[y :: self.jump, x :: self.jump].max()
        return float((self.paths < best).mean())


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """⌊(n + 2p − d(k − 1) − 1)/s⌋ + 1: how many windows fit along an axis of n pixels.

    Raises InputError when none fits.
    """
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    if room < 0:
        raise InputError(f"no window of {kernel} fits on {size} pixels with padding {padding}: use a smaller kernel")
    return room // stride + 1


def build_mini_network(kernel: int, stride: int, padding: int, *, depth: int = 2, channels: int = 8, seed: int = 0,
                       filters: Tensor | None = None) -> nn.Sequential:  # fmt: skip
    """`depth` × (conv kernel×kernel → ReLU), 3 → channels → … → channels, without bias; equal arguments, equal weights.

    filters: weights of the first convolution, C×3×k×k, such as those of a trained network, instead of random ones. The weights do
    not depend on stride and padding, so that these alone make the difference.
    """
    generator = torch.Generator().manual_seed(seed)
    if filters is not None:
        channels, kernel = len(filters), filters.shape[-1]
    layers: list[nn.Module] = []
    for k in range(depth):
        before = 3 if k == 0 else channels
        make: Any = nn.utils.skip_init  # leaves the random state alone
        conv = make(nn.Conv2d, before, channels, kernel, stride=stride, padding=padding, bias=False)
        drawn = torch.randn(conv.weight.shape, generator=generator) * (2 / (before * kernel**2)) ** 0.5
        with torch.no_grad():
            conv.weight.copy_(filters if k == 0 and filters is not None else drawn)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def measure_geometry(image_size: tuple[int, int] = (32, 32), *, strides: Sequence[int] = (1, 2, 3),
                     paddings: Sequence[int] = (0, 1, 2), kernel: int = 3, depth: int = 2) -> list[Geometry]:  # fmt: skip
    """A Geometry for each stride × padding, strides outermost. Costs a forward and a backward pass of one image each.

    Raises InputError when a window does not fit.
    """
    found = []
    for stride in strides:
        for padding in paddings:
            formula, size = [], image_size
            for _ in range(depth):
                size = (output_size(size[0], kernel, stride, padding), output_size(size[1], kernel, stride, padding))
                formula.append(size)
            network = build_mini_network(kernel, stride, padding, depth=depth, channels=1)
            maps, sizes = torch.zeros(1, 3, *image_size), []
            with torch.no_grad():
                for layer in network:
                    maps = layer(maps)
                    if isinstance(layer, nn.Conv2d):
                        sizes.append((int(maps.shape[2]), int(maps.shape[3])))
            seen = receptive_fields(network, (3, *image_size))[str(2 * depth - 2)]
            assert seen.size is not None  # a plain chain: always known
            wide = build_mini_network(kernel, stride, padding, depth=depth)
            counts = _count_paths(image_size, kernel, stride, padding, 1)
            windows = formula[0][0] * formula[0][1] * kernel**2
            found.append(Geometry(
                stride, padding, kernel, tuple(formula), tuple(sizes), seen.size[0], stride**depth,
                count_macs(wide, (3, *image_size)), counts, _count_paths(image_size, kernel, stride, padding, depth),
                1 - float(counts.sum()) / windows,
            ))  # fmt: skip
    return found


def _count_paths(image_size: tuple[int, int], kernel: int, stride: int, padding: int, depth: int) -> NDArray[np.int64]:
    """The gradient of the sum of all outputs of a chain of convolutions whose weights are all 1: each way counts one."""
    image = torch.zeros(1, 1, *image_size, dtype=torch.float64, requires_grad=True)
    maps = image
    for _ in range(depth):
        maps = nn.functional.conv2d(maps, torch.ones(1, 1, kernel, kernel, dtype=torch.float64), stride=stride, padding=padding)
    (gradient,) = torch.autograd.grad(maps.sum(), image)
    return gradient[0, 0].round().numpy().astype(np.int64)


@torch.no_grad()
def respond(network: nn.Module, image: Tensor) -> list[NDArray[np.float32]]:
    """The maps behind each convolution of a mini-network (after its ReLU), C×h×w each; image: float 3×H×W, normalised."""
    maps, found = image[None], []
    for layer in network.children():
        maps = layer(maps)
        if isinstance(layer, nn.ReLU):
            found.append(maps[0].numpy().copy())
    return found
