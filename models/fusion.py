"""From a detector's maps at several scales to one anomaly map and one score per image."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from models.statistics import MapStatistics


class MapFusion(BaseModel):
    """How maps become an anomaly map, and an anomaly map a score.

    Attributes:
        kind: 'product' multiplies the maps (STFPM, equation 5); 'sum' adds them; 'weighted' adds them by `weights`;
            'normalised' adds them after each was divided by its scale on validation normals; 'quantile' adds them
            after each was mapped so that the 0.9 and 0.995 quantiles of its values on validation normals become 0
            and 0.1 (EfficientAD, section 3.4), values below count as 0.
        weights: One for each map, for 'weighted'.
        smoothing: Standard deviation of the Gaussian that smooths the anomaly map, in pixels of the network's
            input; 0 leaves it as it is.
        score: 'max' takes an anomaly map's largest value, 'top' the mean of its largest.
        top: Share of the pixels that 'top' takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["product", "sum", "weighted", "normalised", "quantile"] = "product"
    weights: tuple[float, ...] = ()
    smoothing: float = Field(default=0.0, ge=0, le=32)
    score: Literal["max", "top"] = "max"
    top: float = Field(default=0.01, gt=0, le=1)

    def fuse(self, maps: tuple[Tensor, ...], size: int, statistics: MapStatistics) -> Tensor:
        """Join the maps.

        Args:
            maps: Each (B, h, w) float32, >= 0, at its own resolution.
            size: Side of the result in pixels.
            statistics: Of the maps on validation normals.

        Returns:
            (B, size, size) float32 anomaly maps, >= 0.

        Raises:
            ValueError: 'weighted' has not one weight for each map.
        """
        if self.kind == "weighted" and len(self.weights) != len(maps):
            raise ValueError(f"fusion.weights: {len(maps)} maps need as many weights, found {len(self.weights)}")
        # Each map is scaled at its own resolution, where it is smallest; upsampling is linear, so the order is free.
        scaled = [self._scaled(index, each, statistics) for index, each in enumerate(maps)]
        fused = _upsampled(scaled[0], size)
        for each in scaled[1:]:
            upsampled = _upsampled(each, size)
            fused = fused * upsampled if self.kind == "product" else fused + upsampled
        return smoothed(fused, self.smoothing) if self.smoothing else fused

    def _scaled(self, index: int, each: Tensor, statistics: MapStatistics) -> Tensor:
        if self.kind == "weighted":
            return each * self.weights[index]
        if self.kind == "normalised":
            return each / statistics.scale[index]
        if self.kind == "quantile":
            low, high = statistics.quantiles[index]
            return (each - low).clamp_min(0) * (0.1 / (high - low))
        return each

    def score_of(self, fused: Tensor) -> Tensor:
        """Return each image's score, (B,) float32, from its (B, H, W) anomaly map."""
        if self.score == "max":
            return fused.amax(dim=(1, 2))
        flat = fused.flatten(1)
        return flat.topk(max(1, round(self.top * flat.shape[1])), dim=1, sorted=False).values.mean(1)


def _upsampled(each: Tensor, size: int) -> Tensor:
    return F.interpolate(each.unsqueeze(1), (size, size), mode="bilinear", align_corners=False).squeeze(1)


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """Smooth (B, H, W) float maps with a Gaussian of `sigma` pixels, cut at 4 sigma; borders are mirrored."""
    size = min(maps.shape[1:])
    radius = min(round(4 * sigma), size - 1)
    offsets = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps.unsqueeze(1), (radius,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1))
    return F.conv2d(rows, kernel.view(1, 1, 1, -1)).squeeze(1)
