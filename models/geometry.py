"""How a convolution's kernel moves over an image, and what size of result that gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Geometry(NamedTuple):
    """Movement of a kernel; pairs are (vertical, horizontal)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> Geometry:
        """Return that of a convolution whose padding is in numbers."""
        stride, padding, dilation = map(_pair, (convolution.stride, convolution.padding, convolution.dilation))
        return cls(stride, padding, dilation, convolution.groups)

    @classmethod
    def from_numbers(cls, numbers: Sequence[int]) -> Geometry:
        """Return what has these `numbers`."""
        return cls(_pair(numbers[0:2]), _pair(numbers[2:4]), _pair(numbers[4:6]), numbers[6])

    @property
    def numbers(self) -> list[int]:
        """The seven numbers in order, as operators take them."""
        return [*self.stride, *self.padding, *self.dilation, self.groups]

    def result(self, x: Tensor, kernel: Sequence[int], channels: int) -> tuple[int, ...]:
        """Return the shape of (B, C, H, W) `x` convolved with a (height, width) kernel to so many channels."""
        sides = (
            (x.shape[2 + axis] + 2 * self.padding[axis] - self.dilation[axis] * (kernel[axis] - 1) - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        return (x.shape[0], channels, *sides)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a convolution as `Geometry` describes it, and no more than that."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _pair(values: Any) -> tuple[int, int]:
    vertical, horizontal = values
    return vertical, horizontal
