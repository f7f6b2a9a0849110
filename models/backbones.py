"""Networks of students: a ResNet from images to features, and what is built of the same blocks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from models.teachers import Features

# A block's constructor: channels in, channels out, stride, shortcut where either changes.
Block = Callable[[int, int, int, nn.Module | None], nn.Module]


def basic_block(channels: int, out_channels: int, stride: int, shortcut: nn.Module | None) -> nn.Module:
    """Return torchvision's residual block of two 3 x 3 convolutions (He et al., CVPR 2016)."""
    return BasicBlock(channels, out_channels, stride, shortcut)


class ResNetBackbone(nn.Module):
    """ResNet-18 up to conv4_x at a fraction of its width, its features projected to the teacher's channels.

    At width 1 beside a ResNet-18 teacher there is nothing to project and the layers, with their names, are
    exactly torchvision's `resnet18` from `conv1` to `layer3` (He et al., CVPR 2016).

    Args:
        channels: The teacher's channels at strides 4, 8 and 16.
        width: Fraction of ResNet-18's width; channels are rounded to a multiple of 8.
        block: The residual blocks' constructor.
    """

    def __init__(self, channels: tuple[int, ...], width: float, block: Block = basic_block) -> None:
        super().__init__()
        base = base_channels(width)
        self.conv1 = nn.Conv2d(3, base, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = residual_stage(base, base, 1, block)
        self.layer2 = residual_stage(base, 2 * base, 2, block)
        self.layer3 = residual_stage(2 * base, 4 * base, 2, block)
        self.project = nn.ModuleList(
            nn.Identity() if own == wanted else nn.Conv2d(own, wanted, kernel_size=1)
            for own, wanted in zip((base, 2 * base, 4 * base), channels, strict=True)
        )
        initialise(self)

    def forward(self, images: Tensor) -> Features:
        """Map (B, 3, H, W) normalised images to three (B, C, H/s, W/s) features, s = 4, 8, 16."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        low = self.layer1(stem)
        middle = self.layer2(low)
        high = self.layer3(middle)
        return tuple(project(x) for project, x in zip(self.project, (low, middle, high), strict=True))


def base_channels(width: float) -> int:
    """Return the channels at stride 4 of a ResNet at a fraction of ResNet-18's width, a multiple of 8."""
    return max(8, round(64 * width / 8) * 8)


def initialise(network: nn.Module) -> None:
    """Draw every convolution's first weights as He et al. do for ResNets."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def convolution(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Return a 3 x 3 convolution with batch normalisation and ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def residual_stage(channels: int, out_channels: int, stride: int, block: Block) -> nn.Sequential:
    """Return two blocks; the first changes resolution and channels."""
    shortcut = None
    if stride != 1 or channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    return nn.Sequential(block(channels, out_channels, stride, shortcut), block(out_channels, out_channels, 1, None))
