"""Student networks, trained per product to reproduce a teacher's features."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from models.teachers import Features


class ResNetStudent(nn.Module):
    """ResNet-18 up to conv4_x at a fraction of its width, its features projected to the teacher's channels.

    At width 1 beside a ResNet-18 teacher there is nothing to project and the layers, with their names, are
    exactly torchvision's `resnet18` from `conv1` to `layer3` (He et al., CVPR 2016).

    Args:
        channels: The teacher's channels at strides 4, 8 and 16.
        width: Fraction of ResNet-18's width; channels are rounded to a multiple of 8.
    """

    def __init__(self, channels: tuple[int, int, int], width: float) -> None:
        super().__init__()
        base = max(8, round(64 * width / 8) * 8)
        self.conv1 = nn.Conv2d(3, base, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _layer(base, base, stride=1)
        self.layer2 = _layer(base, 2 * base, stride=2)
        self.layer3 = _layer(2 * base, 4 * base, stride=2)
        self.project = nn.ModuleList(
            nn.Identity() if own == wanted else nn.Conv2d(own, wanted, kernel_size=1)
            for own, wanted in zip((base, 2 * base, 4 * base), channels, strict=True)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Features:
        """Map (B, 3, H, W) normalised images to three (B, C, H/s, W/s) features, s = 4, 8, 16."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        low = self.layer1(stem)
        middle = self.layer2(low)
        high = self.layer3(middle)
        return tuple(project(x) for project, x in zip(self.project, (low, middle, high), strict=True))


def _layer(channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return two basic blocks; the first changes resolution and channels."""
    shortcut = None
    if stride != 1 or channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    return nn.Sequential(
        BasicBlock(channels, out_channels, stride, shortcut),
        BasicBlock(out_channels, out_channels),
    )
