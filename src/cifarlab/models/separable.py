"""Separable: depthwise-separable and dilated convolutions, a large receptive field for under a million parameters.

Source: depthwise-separable blocks as in MobileNet (Howard et al. 2017, arXiv:1704.04861), dilation as in Yu & Koltun 2015,
arXiv:1511.07122. Ours is a lab classic for 32×32 images: one full convolution at the start, three stages, no pooling but the
last. Initialisation is PyTorch's default (its fan-in is right for depthwise kernels; the usual fan-out recipe is not).
"""

from torch import Tensor, nn


class Separable(nn.Module):
    """conv 64, eight separable blocks of 128, 256 and 512 channels, global average, linear.

    879,114 parameters with 10 classes, 0.1148 GMAC at 3×32×32.

    Receptive field in pixels after each layer, with the distance between neighbouring outputs:

        conv 3×3          3  1        dilation 1       15  2
        128 dilation 1    5  1        256 dilation 2   23  2
        128 dilation 2    9  1        512 stride 2     27  4
        256 stride 2     11  2        512 dilation 1   35  4
                                      512 dilation 2   51  4

    So the middle positions of the last map see a whole 32×32 image before the global average.

    Few multiply-adds are not few seconds: it is bound by memory, and a training step takes about as long as ResNet-9's, which has
    3.3 times its MACs (batch 64 on 2 busy CPU cores, torch 2.13: 3.4 and 2.8 s).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.prep = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.stage1 = nn.Sequential(_separable(64, 128), _separable(128, 128, dilation=2))
        self.stage2 = nn.Sequential(_separable(128, 256, stride=2), _separable(256, 256), _separable(256, 256, dilation=2))
        self.stage3 = nn.Sequential(_separable(256, 512, stride=2), _separable(512, 512), _separable(512, 512, dilation=2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.prep(images))))
        return self.linear(self.pool(x).flatten(1))  # type: ignore[no-any-return]


def _separable(in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, stride, padding=dilation, dilation=dilation, groups=in_channels, bias=False),
        nn.BatchNorm2d(in_channels),
        nn.ReLU(),
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )
