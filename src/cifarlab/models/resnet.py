"""ResNet-18 and ResNet-34 of basic blocks, with a stem for 32×32 images or, as a contrast, ImageNet's.

Source: He et al. 2015, arXiv:1512.03385. Ours differs from the paper's CIFAR nets (which are thinner, with 6n+2 layers): these
are its ImageNet nets with the stem changed, as most CIFAR results called "ResNet-18" mean. Submodules are named as in
torchvision, so that its weights load. Initialisation is torchvision's: He normal (fan-out) for convolutions, batch norm 1 and
0, PyTorch's default for the linear layer; the last batch norm of a block is not zeroed.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """ReLU(BN(conv3×3(ReLU(BN(conv3×3(x))))) + shortcut(x))

    The shortcut is x itself, or a strided conv1×1 → BN where the shape changes.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        # No in-place ReLU, here and in the other models: hooks that look at batch norm's output must find it unchanged.
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class ResNet(nn.Module):
    """Stem, four stages of basic blocks (64, 128, 256, 512 channels; the last three halve the image), global average, linear."""

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, stem: Literal["cifar", "imagenet"] = "cifar") -> None:
        super().__init__()
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(64, 128, blocks[1], stride=2)
        self.layer3 = _stage(128, 256, blocks[2], stride=2)
        self.layer4 = _stage(256, 512, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


def _stage(in_channels: int, channels: int, num_blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, stride=1) for _ in range(num_blocks - 1)))


def resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 for 32×32 images: 11,173,962 parameters with 10 classes, 0.5554 GMAC at 3×32×32."""
    return ResNet((2, 2, 2, 2), num_classes)


def resnet34(num_classes: int) -> nn.Module:
    """ResNet-34 for 32×32 images: 21,328,292 parameters with 100 classes, 1.1594 GMAC at 3×32×32."""
    return ResNet((3, 4, 6, 3), num_classes)


def resnet18_imagenet_stem(num_classes: int) -> nn.Module:
    """ResNet-18 as made for 224×224 images: conv 7×7 stride 2, max-pool; 11,181,642 parameters, 0.0370 GMAC at 3×32×32.

    For contrast, not for use: the stem leaves 8×8 of a 32×32 image before the first block, which costs about 20 points of
    accuracy. Its 1.8 GMAC at 3×224×224 is the figure often quoted as "1.8 GFLOPs of ResNet-18".
    """
    return ResNet((2, 2, 2, 2), num_classes, stem="imagenet")
