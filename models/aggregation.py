"""Local aggregation: each position's values summed over its 3 x 3 neighbourhood by weights of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

KERNEL = 3


def local_aggregation(values: Tensor, weights: Tensor) -> Tensor:
    """Return out[b, c, y, x] = sum over (i, j) of weights[b, g(c), i, j, y, x] * values[b, c, y + i - 1, x + j - 1].

    Args:
        values: (B, C, h, w) float.
        weights: (B, G * 9, h, w) float; group g, of C / G neighbouring channels, has rows 9 g to 9 g + 8, a 3 x 3
            kernel row by row.

    Returns:
        (B, C, h, w); outside of the image values are 0.
    """
    out = _LocalAggregation.apply(values, weights)
    # The shifts run along rows of one channel; the layers around them work on channels of one position.
    return out.contiguous(memory_format=torch.channels_last)


class _LocalAggregation(torch.autograd.Function):
    """Keeps values and weights for the backward pass; unfolding would keep nine copies of the values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(values, weights)
        return aggregate(values, weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        values, weights = ctx.saved_tensors
        return aggregate_backward(gradient, values, weights)


def aggregate(values: Tensor, weights: Tensor) -> Tensor:
    """The forward pass, shift by shift: one multiplication and addition over the whole map for each neighbour."""
    grouped, kernels, padded = _parts(values, weights)
    out = torch.zeros_like(grouped)
    for index, shifted in enumerate(_shifts(padded, values.shape)):
        out.addcmul_(shifted, kernels[:, :, index].unsqueeze(2))
    return out.flatten(1, 2)


def aggregate_backward(gradient: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to values and weights."""
    grouped, kernels, padded = _parts(values, weights)
    gradient = gradient.contiguous().view(grouped.shape)
    to_padded = torch.zeros_like(padded)
    to_kernels = torch.empty_like(kernels)
    windows = zip(_shifts(padded, values.shape), _shifts(to_padded, values.shape), strict=True)
    for index, (shifted, target) in enumerate(windows):
        to_kernels[:, :, index] = (gradient * shifted).sum(dim=2)
        target.addcmul_(gradient, kernels[:, :, index].unsqueeze(2))
    edge = KERNEL // 2
    to_values = to_padded[..., edge:-edge, edge:-edge].flatten(1, 2)
    return to_values, to_kernels.flatten(1, 2)


def _parts(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values (B, G, C/G, h, w), kernels (B, G, 9, h, w) and the padded values."""
    groups = weights.shape[1] // KERNEL**2
    grouped = values.contiguous().unflatten(1, (groups, -1))
    kernels = weights.to(values.dtype).contiguous().unflatten(1, (groups, KERNEL**2))
    return grouped, kernels, F.pad(grouped, (KERNEL // 2,) * 4)


def _shifts(padded: Tensor, shape: torch.Size) -> list[Tensor]:
    """Return the nine views of the padded values, in the order of a kernel's rows."""
    height, width = shape[2:]
    return [padded[..., i : i + height, j : j + width] for i in range(KERNEL) for j in range(KERNEL)]
