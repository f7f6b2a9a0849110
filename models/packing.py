"""Convolutions as a CPU computes them fastest: with what follows them, and with weights laid out beforehand.

PyTorch brings a convolution's weights into oneDNN's layout anew at every call, and takes another pass over memory for
each activation; here the one is done once and the other while the result is written. Where Winograd's way is faster
than oneDNN's, the weights are transformed for it instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import winograd
from models.geometry import Geometry

# Operators of our own around oneDNN's, which have no rule for shapes where the weights' layout is opaque. `geometry`
# is `Geometry.numbers`.
_OPERATORS = torch.library.Library("proctor", "FRAGMENT")
_OPERATORS.define("convolution(Tensor x, Tensor weight, Tensor? bias, SymInt[] geometry, str activation) -> Tensor")
_OPERATORS.define("convolution_add(Tensor x, Tensor added, Tensor weight, Tensor? bias, SymInt[] geometry) -> Tensor")

# Activations that oneDNN applies while it writes a convolution's result, with their bounds.
ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.ReLU6: "hardtanh", nn.SiLU: "swish"}
_BOUNDS = {"hardtanh": [0.0, 6.0]}


def _parted(numbers: Sequence[int]) -> tuple[list[int], list[int], list[int], int]:
    """Return padding, stride, dilation and groups, in the order of oneDNN's operators."""
    geometry = Geometry.from_numbers(numbers)
    return list(geometry.padding), list(geometry.stride), list(geometry.dilation), geometry.groups


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], activation: str) -> Tensor:
    operator = torch.ops.mkldnn._convolution_pointwise
    return operator(x, weight, bias, *_parted(geometry), activation, _BOUNDS.get(activation, []), "")


def _convolution_add(x: Tensor, added: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]) -> Tensor:
    operator = torch.ops.mkldnn._convolution_pointwise.binary
    return operator(x, added, weight, bias, *_parted(geometry), "add", 1.0, "relu", [], None)


def _convolution_shape(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], activation: str) -> Tensor:
    shape = Geometry.from_numbers(geometry).result(x, weight.shape[2:], weight.shape[0])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _convolution_add_shape(
    x: Tensor, added: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int]
) -> Tensor:
    return torch.empty_like(added, memory_format=torch.channels_last)


for _key in ("CPU", "MkldnnCPU"):
    _OPERATORS.impl("convolution", _convolution, _key)
    _OPERATORS.impl("convolution_add", _convolution_add, _key)
torch.library.register_fake("proctor::convolution", _convolution_shape, lib=_OPERATORS)
torch.library.register_fake("proctor::convolution_add", _convolution_add_shape, lib=_OPERATORS)


class FusedConvolution(nn.Module):
    """A convolution with what follows it: an activation, or the addition of a shortcut and ReLU.

    Args:
        convolution: Gives weights and geometry; zero padding in numbers.
        activation: oneDNN's name of it, or 'none'.
    """

    def __init__(self, convolution: nn.Conv2d, activation: str = "none") -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.geometry = Geometry.of(convolution).numbers
        self.activation = activation
        self.packed = self.transformed = False

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W'); `added`, of the result's shape, is added before a ReLU."""
        if self.transformed:
            return winograd.convolve(x, self.weight, self.bias, self._finish, added)
        if self.packed and added is None:
            return torch.ops.proctor.convolution(x, self.weight, self.bias, self.geometry, self.activation)
        if self.packed:
            return torch.ops.proctor.convolution_add(x, added, self.weight, self.bias, self.geometry)
        padding, stride, dilation, groups = _parted(self.geometry)
        y = F.conv2d(x, self.weight, self.bias, stride, padding, dilation, groups)
        return self._finish(y, added)

    def pack(self, shape: Sequence[int], compiled: bool = False) -> None:
        """Lay the weights out, once, for inputs of (B, C, H, W) `shape`; other shapes stay possible, only slower."""
        self.packed = True
        if compiled and winograd.pays(self.weight, self.geometry, shape):
            self.weight = nn.Parameter(winograd.transform(self.weight.detach()), requires_grad=False)
            self.transformed = True
            return
        padding, stride, dilation, groups = _parted(self.geometry)
        weight = self.weight.detach().contiguous().to_mkldnn()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        packed = reorder(weight, padding, stride, dilation, groups, list(shape))
        self.weight = nn.Parameter(packed, requires_grad=False)

    def _finish(self, y: Tensor, added: Tensor | None) -> Tensor:
        return _activated(y, self.activation) if added is None else F.relu(y + added)


class ByOperator:
    """A part of a module that has an operator for its work, which the compiler then calls and does not look into.

    What the compiler makes of gathers is slower than what it replaces, and would spoil the rest of a program too.

    Attributes:
        by_operator: Whether the operator is called.
    """

    by_operator = False


def pack(network: nn.Module, inputs: tuple[Any, ...], compiled: bool = False) -> None:
    """Lay out the weights of all fused convolutions, in place, for the shapes that a call with `inputs` shows, and
    have operators called where there are some.

    Args:
        network: Fused, and not packed before.
        inputs: Of a call.
        compiled: Whether the network will be compiled; then Winograd's way is taken where it pays.
    """
    shapes: dict[FusedConvolution, torch.Size] = {}
    convolutions = [module for module in network.modules() if isinstance(module, FusedConvolution)]
    hooks = [
        module.register_forward_pre_hook(lambda own, given: shapes.__setitem__(own, given[0].shape))
        for module in convolutions
    ]
    with torch.inference_mode():
        network(*inputs)
    for hook in hooks:
        hook.remove()
    for module, shape in shapes.items():
        module.pack(shape, compiled)
    for each in network.modules():
        if isinstance(each, ByOperator):
            each.by_operator = True


def _activated(x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return F.relu(x)
    if activation == "hardtanh":
        return F.relu6(x)
    return F.silu(x) if activation == "swish" else x
