"""Layers that a network's type would round too much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Unrounded(nn.Sequential):
    """Layers that stay float32 in a bfloat16 network; what comes in and goes out has the network's type.

    bfloat16 has 8 significant bits. Where a layer takes small differences of large values, as the first convolutions of
    a network for mobile devices do, what is left is mostly rounding. float16 has 11 bits, and is let through.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Compute (B, C, H, W) to (B, C', H', W')."""
        return super().forward(x.to(next(self.parameters()).dtype)).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype != torch.bfloat16:
                return result
            return torch.empty_like(result, dtype=tensor.dtype).copy_(tensor)

        return super()._apply(moved, recurse)
