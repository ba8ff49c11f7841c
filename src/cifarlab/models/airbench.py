"""Airbench: the whitened convolutional net of the fastest CIFAR-10 trainings.

Source: Keller Jordan 2024, arXiv:2404.00498, which goes back to David Page's ResNet-9 of 2018. Ours differs: SiLU for GELU (a
sixth of its time on a CPU), a whitening layer without bias (its first layer then needs no gradient at all), the last pooling over
whatever is left of the map, so that images of any size may be trained on, and the division of the logits folded into the head's
initial weights.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifarlab.models.resnet9 import WholeMaxPool


class Airbench(nn.Module):
    """Whitening conv 2×2, three groups (conv → max-pool → BN → SiLU → conv 3×3 → BN → SiLU), max-pool, linear.

    `whiten(batches)` sets the first layer from training images; its weights, and batch norm's scales of 1, stay as they are. The
    other convolutions begin as the identity on as many channels as there are inputs, and PyTorch's default beyond.

    widths: channels of the groups. kernels: side of the first convolution of each. One of 3 is padded, and at 32×32 the pooling
    behind it drops the last row of 31, 15 or 7; one of 2 is not, and comes to 6 of 7, of which none is dropped: a third of the
    multiply-adds in the third group. pairs: of each group the channels between, and the sides, of two convolutions that make a
    residual branch in place of its second one; the last of them begins as PyTorch's default.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (64, 256, 256), kernels: tuple[int, ...] = (3, 3, 2),
                 pairs: tuple[tuple[int, int, int], ...] = ()) -> None:  # fmt: skip
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2, bias=False).requires_grad_(False)
        inputs = (24, *widths[:-1])
        sizes = (inputs, widths, kernels, pairs) if pairs else (inputs, widths, kernels)
        group = ResidualGroup if pairs else Group
        self.groups = nn.Sequential(*(group(*each) for each in zip(*sizes, strict=True)))
        self.pool = WholeMaxPool()
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / widths[-1])
        self.frozen_by_design = tuple(name for name, weight in self.named_parameters() if not weight.requires_grad)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.groups(F.silu(self.whitening(images))))
        return self.head(x.flatten(1))  # type: ignore[no-any-return]

    @torch.no_grad()
    def whiten(self, batches: Iterable[Tensor]) -> None:
        """Sets the first layer so that its outputs on 2×2 patches of these images are uncorrelated, each with its negative.

        batches: normalised images, N×3×H×W; 2,000 are plenty. Filters are the eigenvectors of the patches' second moments,
        divided by √(eigenvalue + 5e-4): that keeps the noise of the smallest ones down.
        """
        size = self.whitening.kernel_size
        moments, num_patches = torch.zeros(12, 12, dtype=torch.float64), 0
        for images in batches:
            patches = F.unfold(images.cpu().double().contiguous(), size).transpose(1, 2).flatten(0, 1)
            moments += patches.T @ patches
            num_patches += len(patches)
        values, vectors = torch.linalg.eigh(moments / num_patches)
        # An eigenvector's sign is the library's whim. Both are used; that with the positive sum comes first.
        vectors = vectors * torch.where(vectors.sum(0) < 0, -1, 1)
        filters = (vectors / (values + 5e-4).sqrt()).T.unflatten(1, (3, *size))
        self.whitening.weight.copy_(torch.cat([filters, -filters]))


class GroupStart(nn.Module):
    """conv → max-pool 2×2 → BN → SiLU: what both kinds of group begin with"""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, kernel)
        self.norm1 = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm1(F.max_pool2d(self.conv1(x), 2)))


class Group(GroupStart):
    """conv → max-pool 2×2 → BN → SiLU → conv 3×3 → BN → SiLU"""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__(in_channels, channels, kernel)
        self.conv2 = _conv(channels, channels, 3)
        self.norm2 = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm2(self.conv2(super().forward(x))))


class ResidualGroup(GroupStart):
    """conv → max-pool 2×2 → BN → SiLU, then x + (conv → BN → SiLU → conv → BN), SiLU"""

    def __init__(self, in_channels: int, channels: int, kernel: int, pair: tuple[int, int, int]) -> None:
        super().__init__(in_channels, channels, kernel)
        between, first, second = pair
        self.conv2 = _conv(channels, between, first)
        self.norm2 = _norm(between)
        self.conv3 = nn.Conv2d(between, channels, second, padding=second // 2, bias=False)
        self.norm3 = _norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return F.silu(x + self.norm3(self.conv3(F.silu(self.norm2(self.conv2(x))))))


def _conv(in_channels: int, channels: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2 if kernel % 2 else 0, bias=False)
    nn.init.dirac_(conv.weight.data[:in_channels])  # the rest of the rows stays as drawn
    return conv


def _norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm without a trained scale."""
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad_(False)
    return norm


def airbench(num_classes: int) -> nn.Module:
    """Airbench of widths 64, 256, 256: 1,645,088 parameters with 10 classes, 0.0987 GMAC at 3×32×32."""
    return Airbench(num_classes)


def airbench_residual(num_classes: int) -> nn.Module:
    """Airbench of widths 64, 192, 384 with residual pairs: 2,481,088 parameters with 10 classes, 0.0804 GMAC at 3×32×32.

    Cheap where the map is large (1×1 pair), deep where it is small, which is where a CPU's time buys most.
    Source: the shape is that of a CIFAR-100 speedrun, NAVIER-STOKED 2026 (AIDDA-Institute/CIFAR-100-speedrun). Ours differs:
    it is narrower (there 64, 256, 768, and 64, 192, 512 between), the sum is inside the SiLU (there x + SiLU(…)), the 2×2
    convolution is not padded, and the last pooling is a maximum (there with the mean).
    """
    return Airbench(num_classes, (64, 192, 384), (3, 3, 2), ((64, 1, 1), (144, 3, 1), (256, 3, 3)))


def airbench_large(num_classes: int) -> nn.Module:
    """Airbench-residual at one and a half times its widths: 5,566,224 parameters with 10 classes, 0.1705 GMAC at 3×32×32."""
    return Airbench(num_classes, (96, 288, 576), (3, 3, 2), ((96, 1, 1), (216, 3, 1), (384, 3, 3)))
