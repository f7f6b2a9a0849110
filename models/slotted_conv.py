"""A convolution whose frames each choose their weights: frame b is convolved with the weights of slot slots[b].

On CUDA a kernel reads each frame's weights where they lie, so a batch of many products costs what a batch of one
costs. Elsewhere, and for convolutions that the kernel does not suit, each frame's weights are gathered.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from models.geometry import Geometry

logger = logging.getLogger(__name__)

# With fewer channels in a group (depthwise convolutions) matrix tiles would be mostly empty.
_SMALLEST_GROUP = 8


_kernel_works = True


def try_kernel(device: torch.device) -> None:
    """Find out whether the kernel can be compiled on a device; where it cannot, all weights are gathered from then on.

    Until it is called the kernel is trusted.
    """
    global _kernel_works  # noqa: PLW0603
    from models.slotted_kernel import trial

    try:
        trial(device)
    except Exception as error:  # whatever a compiler that is not there may raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        logger.warning("mixed batches are slower: Triton cannot compile here (a C compiler, Python.h?): %s", reason)
        _kernel_works = False
    else:
        _kernel_works = True


def slotted_conv2d(x: Tensor, weights: Tensor, bias: Tensor | None, slots: Tensor, geometry: Geometry) -> Tensor:
    """Convolve each frame with its own slot's weights.

    Args:
        x: (B, C, H, W) float.
        weights: (N, O, C / groups, kh, kw) of N slots, in x's dtype.
        bias: (N, O) or None.
        slots: (B,) int32 or int64 on x's device, each below N; the values are not looked at on the host.
        geometry: Of the convolution.

    Returns:
        (B, O, OH, OW) in x's dtype, channels_last.
    """
    if x.is_cuda and _kernel_works and (geometry.groups == 1 or weights.shape[2] >= _SMALLEST_GROUP):
        return indirect_conv2d(x, weights, bias, slots, geometry.numbers)
    return gathered_conv2d(x, weights, bias, slots, geometry)


def gathered_conv2d(x: Tensor, weights: Tensor, bias: Tensor | None, slots: Tensor, geometry: Geometry) -> Tensor:
    """As `slotted_conv2d`, by one convolution with a group for each frame over gathered weights."""
    kernels = weights.index_select(0, slots)
    shifts = None if bias is None else bias.index_select(0, slots).flatten()
    stride, padding, dilation, groups = geometry
    joined = x.contiguous().view(1, -1, *x.shape[2:])
    out = F.conv2d(joined, kernels.flatten(0, 1), shifts, stride, padding, dilation, groups * len(x))
    return out.view(len(x), -1, *out.shape[2:]).contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("proctor::indirect_conv2d", mutates_args=())
def indirect_conv2d(x: Tensor, weights: Tensor, bias: Tensor | None, slots: Tensor, numbers: list[int]) -> Tensor:
    """As `slotted_conv2d`, by the Triton kernel; an operator of its own so that compiled graphs keep it whole."""
    from models.slotted_kernel import launch  # Triton is there on CUDA only

    out = _output(x, weights, numbers)
    launch(x.contiguous(memory_format=torch.channels_last), weights, bias, slots, out, tuple(numbers))
    return out


@indirect_conv2d.register_fake
def _output(x: Tensor, weights: Tensor, *rest: Tensor | list[int] | None) -> Tensor:
    """Return an empty result of the right shape."""
    numbers = rest[-1]
    assert isinstance(numbers, list)
    shape = Geometry.from_numbers(numbers).result(x, weights.shape[3:], weights.shape[1])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
