"""Students that look at the teacher's features through a bottleneck and give them back: embedding and decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import basic_block, convolution, initialise, residual_stage
from models.teachers import Features

# A dense embedding sees the image as a grid of so many cells a side, or fewer where the features are smaller.
GRID = 4


class ConvolutionalBottleneck(nn.Module):
    """After RD4AD: the scales are fused at stride 16, then embedded at stride 32, by a residual stage.

    Args:
        channels: The teacher's channels at strides 4, 8 and 16.
        base: Channels at stride 4 of the network; the embedding has eight times as many.
    """

    def __init__(self, channels: tuple[int, ...], base: int) -> None:
        super().__init__()
        low, middle, high = channels
        self.low = nn.Sequential(convolution(low, 2 * base, 2), convolution(2 * base, 4 * base, 2))
        self.middle = convolution(middle, 4 * base, 2)
        self.high = convolution(high, 4 * base)
        self.fuse = nn.Sequential(
            nn.Conv2d(12 * base, 4 * base, kernel_size=1, bias=False), nn.BatchNorm2d(4 * base), nn.ReLU(inplace=True)
        )
        self.embed = residual_stage(4 * base, 8 * base, 2, basic_block)
        self.out_channels = 8 * base
        initialise(self)

    def forward(self, features: Features) -> Tensor:
        """Map the features to a (B, 8 * base, H/32, W/32) embedding."""
        low, middle, high = features
        joined = [_to_size(self.low(low), high), _to_size(self.middle(middle), high), self.high(high)]
        return self.embed(self.fuse(torch.cat(joined, dim=1)))


class DenseBottleneck(nn.Module):
    """One vector for the whole image: a scene that was never seen has no vector that decodes to it.

    Args:
        channels: The teacher's channels at strides 4, 8 and 16; the last is read.
        base: Channels at stride 4 of the network.
        embedding: Length of the vector.
    """

    def __init__(self, channels: tuple[int, ...], base: int, embedding: int) -> None:
        super().__init__()
        self.squeeze = nn.Sequential(
            nn.BatchNorm2d(channels[-1], affine=False),
            convolution(channels[-1], 2 * base, 2),
            convolution(2 * base, 2 * base, 2),
        )
        self.encode = nn.Linear(2 * base * GRID**2, embedding)
        self.out_channels = 4 * base
        self.expand = nn.Linear(embedding, self.out_channels * GRID**2)
        initialise(self)

    def forward(self, features: Features) -> Tensor:
        """Map the features to a (B, 4 * base, 4, 4) embedding."""
        grid = F.adaptive_avg_pool2d(self.squeeze(features[-1]), GRID)
        vector = self.encode(grid.flatten(1))
        return self.expand(vector).unflatten(1, (-1, GRID, GRID))


class Decoder(nn.Module):
    """From an embedding up to the teacher's scales, the mirror image of a ResNet without a skip connection.

    Args:
        channels: The teacher's channels at the scales to predict, fine to coarse; strides 4, 8 and 16 or their
            coarser end.
        base: Channels at stride 4 of the network.
        embedding: Channels of the embedding.
    """

    def __init__(self, channels: tuple[int, ...], base: int, embedding: int) -> None:
        super().__init__()
        widths = [base, 2 * base, 4 * base][-len(channels) :]
        inputs = [*widths[1:], embedding]
        self.stages = nn.ModuleList(
            nn.Sequential(convolution(before, width), convolution(width, width))
            for before, width in zip(inputs, widths, strict=True)
        )
        self.enter = convolution(embedding, embedding)
        self.project = nn.ModuleList(
            nn.Conv2d(width, count, kernel_size=1) for width, count in zip(widths, channels, strict=True)
        )
        initialise(self)

    def forward(self, embedding: Tensor, features: Features) -> Features:
        """Return predictions of the features' shapes.

        Args:
            embedding: (B, C, h, w).
            features: The teacher's at the scales to predict; only their shapes are looked at.
        """
        predictions: list[Tensor] = []
        high = features[-1]
        # Half way between the embedding's grid and the coarsest scale, where they are further than one step apart.
        middle = max(embedding.shape[-1], high.shape[-1] // 2)
        current = self.enter(F.interpolate(embedding, (middle, middle), mode="bilinear", align_corners=False))
        for stage, project, wanted in zip(
            reversed(self.stages), reversed(self.project), reversed(features), strict=True
        ):
            current = stage(_to_size(current, wanted))
            predictions.insert(0, project(current))
        return tuple(predictions)


def _to_size(features: Tensor, like: Tensor) -> Tensor:
    if features.shape[2:] == like.shape[2:]:
        return features
    return F.interpolate(features, like.shape[2:], mode="bilinear", align_corners=False)
