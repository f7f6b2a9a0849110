"""Convolutions joined with the activation, or in residual blocks the addition, that follows them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from models.folding import same_outputs
from models.geometry import is_plain
from models.packing import ACTIVATIONS, FusedConvolution

Network = TypeVar("Network", bound=nn.Module)


class FusedBlock(nn.Module):
    """ResNet's basic block of two convolutions, each with what follows it."""

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.first = FusedConvolution(block.conv1, "relu")
        self.second = FusedConvolution(block.conv2)
        self.shortcut = FusedConvolution(cast(nn.Conv2d, block.downsample[0])) if block.downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.second(self.first(x), self.shortcut(x))


def fuse(network: Network, probe: tuple[Any, ...]) -> Network:
    """Return a copy of a folded float32 network whose convolutions do what follows them too.

    Which activation follows which convolution is seen by watching one call; where the copy does not compute the same,
    because something else used the convolution's result, the network is returned as it is.

    Args:
        network: In evaluation mode.
        probe: Arguments to call it with.
    """
    fused = copy.deepcopy(network)
    _fuse_blocks(fused)
    follows = _following(fused, probe)
    for parent in list(fused.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and is_plain(child):
                follower = follows.get(child)
                setattr(parent, name, FusedConvolution(child, ACTIVATIONS[type(follower)] if follower else "none"))
    _replace_by_identity(fused, set(follows.values()))
    return fused if same_outputs(network, fused, probe) else network


def _fuse_blocks(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BasicBlock) and all(map(_is_folded, _parts(child))):
                setattr(parent, name, FusedBlock(child))


def _parts(block: BasicBlock) -> list[tuple[nn.Module, nn.Module]]:
    parts: list[tuple[nn.Module, nn.Module]] = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    return parts + ([(block.downsample[0], block.downsample[1])] if block.downsample else [])


def _is_folded(part: tuple[nn.Module, nn.Module]) -> bool:
    convolution, normalisation = part
    return isinstance(convolution, nn.Conv2d) and is_plain(convolution) and isinstance(normalisation, nn.Identity)


def _following(network: nn.Module, probe: tuple[Any, ...]) -> dict[nn.Module, nn.Module]:
    """Return the activation that takes each convolution's result, where both are called once."""
    calls: Counter[nn.Module] = Counter()
    results: list[tuple[nn.Module, Tensor]] = []
    follows: dict[nn.Module, nn.Module] = {}

    def convolved(module: nn.Module, given: tuple, result: Tensor) -> None:
        calls[module] += 1
        results.append((module, result))

    def activated(module: nn.Module, given: tuple) -> None:
        calls[module] += 1
        follows.update({source: module for source, result in results if result is given[0]})

    plain = [module for module in network.modules() if isinstance(module, nn.Conv2d) and is_plain(module)]
    hooks = [module.register_forward_hook(convolved) for module in plain]
    hooks += [
        module.register_forward_pre_hook(activated) for module in network.modules() if type(module) in ACTIVATIONS
    ]
    with torch.inference_mode():
        network(*probe)
    for hook in hooks:
        hook.remove()
    return {
        convolution: activation
        for convolution, activation in follows.items()
        if calls[convolution] == calls[activation] == 1
    }


def _replace_by_identity(network: nn.Module, activations: set[nn.Module]) -> None:
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if child in activations:
                setattr(parent, name, nn.Identity())
