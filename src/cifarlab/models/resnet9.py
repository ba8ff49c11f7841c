"""ResNet-9: the small residual net of fast CIFAR-10 training, 94 % in about 24 epochs.

Source: David Page's DAWNBench entry (github.com/davidcpage/cifar10-fast, 2018). Ours follows the lab version: pooling comes
before batch norm in the pooled layers (a quarter of the normalisation work), logits are not scaled by 1/8, and batch-norm
scales are trained. Initialisation is PyTorch's default.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet9(nn.Module):
    """prep conv 64; layers of 128, 256, 512 channels, each halving the image; max-pool; linear.

    The first and the last of the three end in a residual block.

    6,573,120 parameters with 10 classes (6,568,640 of them convolution and linear weights), 0.3793 GMAC at 3×32×32.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.prep = _conv_bn(3, 64)
        self.layer1 = nn.Sequential(_conv_pool_bn(64, 128), Residual(128))
        self.layer2 = _conv_pool_bn(128, 256)
        self.layer3 = nn.Sequential(_conv_pool_bn(256, 512), Residual(512))
        self.pool = WholeMaxPool()
        self.linear = nn.Linear(512, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.layer3(self.layer2(self.layer1(self.prep(images)))))
        return self.linear(x.flatten(1))  # type: ignore[no-any-return]


class WholeMaxPool(nn.Module):
    """The largest value of each whole map: 4×4 for 32×32 images.

    Not AdaptiveMaxPool2d(1), whose gradient on CUDA is not deterministic.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, (x.shape[2], x.shape[3]))


class Residual(nn.Module):
    """x + two times (conv3×3 → BN → ReLU) of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(_conv_bn(channels, channels), _conv_bn(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)  # type: ignore[no-any-return]


def _conv_bn(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


def _conv_pool_bn(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.MaxPool2d(2), nn.BatchNorm2d(channels), nn.ReLU())
