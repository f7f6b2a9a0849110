"""Contextual Transformer blocks (Li, Yao, Pan, Mei; arXiv:2107.12292): attention whose weights see the context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from models.aggregation import KERNEL, local_aggregation

# Channels of a position that share their aggregation weights.
SHARED = 8
_KEY_GROUPS = 4


class ContextualTransformer(nn.Module):
    """A 3 x 3 layer that joins static and dynamic context.

    Static context is a 3 x 3 group convolution of the keys. From [input, static context] two 1 x 1 convolutions
    predict a 3 x 3 kernel for each position and each 8 channels, group-normalised, without softmax; it aggregates
    the values into the dynamic context. A softmax gate over pooled features weighs the two.

    Args:
        channels: In and out, a multiple of 8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        groups = channels // SHARED
        self.static = nn.Sequential(
            nn.Conv2d(channels, channels, KERNEL, padding=KERNEL // 2, groups=_KEY_GROUPS, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.value = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.attention = nn.Sequential(
            nn.Conv2d(2 * channels, channels // 2, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels // 2, groups * KERNEL**2, 1),
            nn.GroupNorm(groups, groups * KERNEL**2),
        )
        self.settle = nn.Sequential(nn.BatchNorm2d(channels), nn.SiLU(inplace=True))
        hidden = max(32, channels // 2)
        self.gate = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, 2 * channels, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) features to features of the same shape."""
        static = self.static(features)
        weights = self.attention(torch.cat([features, static], dim=1))
        dynamic = self.settle(local_aggregation(self.value(features), weights))
        pooled = (static + dynamic).mean(dim=(2, 3), keepdim=True)
        logits = self.gate(pooled).unflatten(1, (2, features.shape[1]))
        # Of two shares that sum to 1 one is enough: static * (1 - share) + dynamic * share.
        return torch.lerp(static, dynamic, logits.softmax(dim=1)[:, 1].to(static.dtype))


class ContextualBlock(BasicBlock):
    """ResNet's basic block with a Contextual Transformer in place of its second 3 x 3 convolution."""

    def __init__(self, channels: int, out_channels: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__(channels, out_channels, stride, shortcut)
        self.conv2 = ContextualTransformer(out_channels)
