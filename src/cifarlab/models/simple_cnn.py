"""SimpleCNN: four convolutions and two linear layers, a first network that reaches about 85 % on CIFAR-10.

Source: a course lab (VGG's pattern of 3×3 convolutions, Simonyan & Zisserman 2014, arXiv:1409.1556, with batch norm). Its
convolutions have no bias, because batch norm follows and would cancel it. Initialisation is PyTorch's default.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class SimpleCNN(nn.Module):
    """conv 32, 64, max-pool, conv 128, 128, max-pool (each 3×3 → BN → ReLU), linear 8192 → 512 → K, dropout 0.5 before the last.

    161,163,264 FLOP = 2 × 80,581,632 MAC with 10 classes at 3×32×32; 4,441,130 parameters, most of them in the first linear
    layer. That layer needs 8×8 features, which 32×32 images give; those of other sizes are averaged to 8×8 first.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv_block(3, 32),
            *_conv_block(32, 64),
            nn.MaxPool2d(2),
            *_conv_block(64, 128),
            *_conv_block(128, 128),
            nn.MaxPool2d(2),
        )
        self.fc1 = nn.Linear(128 * 8 * 8, 512)
        self.dropout = nn.Dropout(0.5)
        self.fc2 = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        if x.shape[-2:] != (8, 8):
            x = F.adaptive_avg_pool2d(x, 8)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc2(self.dropout(x))  # type: ignore[no-any-return]


def _conv_block(in_channels: int, channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
