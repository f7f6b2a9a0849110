"""Statistics that a student carries beside its weights; they stay float32 whatever the network computes in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# EfficientAD, section 3.4: these quantiles of a map's values on normal images become 0 and 0.1.
LOW, HIGH = 0.9, 0.995
_TINY = 1e-12
# Share of the mean variance of all channels that is added to each.
_QUIET = 0.1


class Statistics(nn.Module):
    """A module whose buffers move between devices with the network but are never rounded to its precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in kept.items():
            moved = self._buffers[name]
            if before is not None and moved is not None and moved.dtype != before.dtype:
                self._buffers[name] = before.to(moved.device)
        return self


class MapStatistics(Statistics):
    """What a detector's maps are on validation normals.

    Attributes:
        scale: (maps,) float32, > 0, the mean of each map's values.
        quantiles: (maps, 2) float32, the 0.9 and 0.995 quantiles of each map's values, the second the larger.
    """

    scale: Tensor
    quantiles: Tensor

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(maps))
        self.register_buffer("quantiles", torch.tensor([0.0, 1.0]).repeat(maps, 1))

    def measure(self, maps: list[tuple[Tensor, ...]]) -> None:
        """Take the statistics from batches of maps, each map (B, h, w) float32, of validation normals."""
        for index, batches in enumerate(zip(*maps, strict=True)):
            values = torch.cat([batch.flatten() for batch in batches]).float()
            low, high = (_quantile(values, share) for share in (LOW, HIGH))
            self.scale[index] = values.mean().clamp_min(_TINY)
            self.quantiles[index, 0] = low
            # Identical images give maps without spread: then every deviation counts in full.
            self.quantiles[index, 1] = torch.maximum(high, low + torch.clamp_min(low.abs() * 1e-3, _TINY))


def _quantile(values: Tensor, share: float) -> Tensor:
    """Return the smallest value that at least `share` of `values` do not exceed; `torch.quantile` refuses many."""
    return values.kthvalue(max(1, round(share * values.numel()))).values


class MovingAverage(Statistics):
    """Moving-average normalisation: channel statistics as an exponential moving average over normal images.

    The statistics move by `update` alone, before the first step of a training; from then on they are frozen. The
    affine part is kept: it gives each channel its mean back, as batch normalisation's shift does, so that features
    keep their direction and cosines between them their meaning.

    Args:
        channels: Of the features.
        momentum: Weight of the new batch once the average has settled; before, all batches weigh the same.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Move the statistics towards those of (B, C, h, w) features."""
        variance, mean = torch.var_mean(features.float(), dim=(0, 2, 3), correction=0)
        self.batches += 1
        weight = max(self.momentum, 1.0 / int(self.batches))
        step = mean - self.mean
        self.mean += weight * step
        # Of the mixture of what was seen before and this batch: both variances, and that between their means.
        self.variance.mul_(1 - weight).add_(weight * variance + weight * (1 - weight) * step.square())

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C, h, w) float32 features of variance 1 over normal images, less in channels that vary little."""
        # A channel that hardly ever varies is not blown up to the others' size.
        variance = self.variance + _QUIET * self.variance.mean() + _TINY
        shape = (1, -1, 1, 1)
        return features.float() * variance.rsqrt().view(shape)
