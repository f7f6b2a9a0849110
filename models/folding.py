"""Batch normalisation folded into the convolution before it, and pooling moved before what it need not wait for.

Both save passes over memory. Running statistics cast to bfloat16 lose three digits; folded in float32 first, only the
weights are rounded.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Network = TypeVar("Network", bound=nn.Module)


def fold_batchnorm(network: Network, probe: tuple[Any, ...]) -> Network:
    """Return a copy of a network in evaluation mode with its batch normalisations folded.

    A normalisation is folded when its parent lists it directly behind a convolution of as many channels. That
    is how torchvision and timm write post-normalised blocks; a network where order and computation differ is
    found by comparing outputs, and then returned unfolded.

    Args:
        network: float32 network on the CPU.
        probe: Arguments to call it with; it returns a tensor, or tuples of them.
    """
    plain = copy.deepcopy(network).eval()
    folded = copy.deepcopy(plain)
    for parent in list(folded.modules()):
        _fold_children(parent)
    return folded if same_outputs(plain, folded, probe) else plain


class Shift(nn.Module):
    """A value for each channel, added.

    Args:
        bias: (C,).
    """

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same."""
        return x + self.bias[:, None, None]


def pool_first(network: Network, probe: tuple[Any, ...]) -> Network:
    """Return a copy of a folded network that adds a convolution's bias and rectifies after max pooling, not before.

    The numbers are the same, since both, rounding included, keep the order of values; but they are done on the pooled
    values, of which a ResNet's stem has a quarter. Where order and computation differ, which is found by comparing
    outputs, the network is returned as it is.

    Args:
        network: In evaluation mode, float32, on the CPU.
        probe: Arguments to call it with.
    """
    moved = copy.deepcopy(network)
    for parent in list(moved.modules()):
        children = list(parent.named_children())
        for start in range(len(children) - 3):
            _move_pooling(parent, *children[start : start + 4])
    try:
        return moved if same_outputs(network, moved, probe) else network
    except (RuntimeError, TypeError):  # in another order the layers do not even fit each other
        return network


def _move_pooling(parent: nn.Module, *four: tuple[str, nn.Module]) -> None:
    (_, conv), (after_conv, nothing), (after_nothing, relu), (last, pool) = four
    if not isinstance(conv, nn.Conv2d) or not isinstance(nothing, nn.Identity):
        return
    if isinstance(relu, nn.ReLU) and isinstance(pool, nn.MaxPool2d) and conv.bias is not None:
        shift = Shift(conv.bias.detach())
        conv.register_parameter("bias", None)
        for name, module in ((after_conv, pool), (after_nothing, shift), (last, relu)):
            setattr(parent, name, module)


@torch.inference_mode()
def same_outputs(one: nn.Module, other: nn.Module, probe: tuple[Any, ...]) -> bool:
    """Whether two float32 networks compute the same of the arguments `probe`, but for rounding."""
    return all(_close(a, b) for a, b in zip(_tensors(one(*probe)), _tensors(other(*probe)), strict=True))


def _tensors(output: torch.Tensor | tuple) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [tensor for part in output for tensor in _tensors(part)]


def _close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    scale = float(expected.abs().max())  # no number where a weight is none; then nothing is close
    return math.isfinite(scale) and torch.allclose(expected, found, rtol=1e-3, atol=1e-4 * scale)


def _fold_children(parent: nn.Module) -> None:
    children = list(parent.named_children())
    for (conv_name, conv), (norm_name, norm) in pairwise(children):
        if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d):
            continue
        if norm.num_features == conv.out_channels and norm.track_running_stats:
            setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
            # timm's normalisation layers carry their activation inside.
            setattr(parent, norm_name, getattr(norm, "act", None) or nn.Identity())
