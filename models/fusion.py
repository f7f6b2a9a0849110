"""From a detector's maps at several scales to one anomaly map and one score per image."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from models.errors import ModelError
from models.statistics import MapStatistics

_SMALLEST = 1e-12


class MapFusion(BaseModel):
    """How maps become an anomaly map, and an anomaly map a score.

    Attributes:
        kind: 'product' multiplies the maps (STFPM, equation 5); 'sum' adds them; 'weighted' adds them by `weights`;
            'normalised' adds them after each was divided by its scale on validation normals; 'quantile' adds them
            after each was scaled so that the 0.9 and 0.995 quantiles of its values on validation normals lie 0.1
            apart (EfficientAD, section 3.4; its offset is the same for every pixel and left out); 'geometric' is
            the geometric mean of the 'normalised' maps, each counted `weights` times.
        weights: One for each map, for 'weighted' and 'geometric'; none counts all alike.
        smoothing: Standard deviation of the Gaussian that smooths the anomaly map, in pixels of the network's
            input; 0 leaves it as it is.
        score: 'max' takes an anomaly map's largest value, 'top' the mean of its largest.
        top: Share of the pixels that 'top' takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["product", "sum", "weighted", "normalised", "quantile", "geometric"] = "product"
    weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    smoothing: float = Field(default=0.0, ge=0, le=32)
    score: Literal["max", "top"] = "max"
    top: float = Field(default=0.01, gt=0, le=1)

    def check(self, maps: int) -> None:
        """Refuse weights for another number of maps, or that are all 0.

        Raises:
            ModelError: As said.
        """
        if self.weights and (len(self.weights) != maps or not any(self.weights)):
            raise ModelError(f"fusion.weights: {maps} maps need as many weights, not all 0; found {self.weights}")

    def fuse(self, maps: tuple[Tensor, ...], size: int, statistics: MapStatistics) -> Tensor:
        """Join the maps.

        Args:
            maps: Each (B, h, w) float32, >= 0, at its own resolution.
            size: Side of the result in pixels.
            statistics: Of the maps on validation normals.

        Returns:
            (B, size, size) float32 anomaly maps, >= 0.

        Raises:
            ModelError: There are weights, but not one for each map.
        """
        self.check(len(maps))
        # Each map is scaled at its own resolution, where it is smallest; upsampling is linear, so the order is free.
        scaled = [_upsampled(self._scaled(index, each, statistics), size) for index, each in enumerate(maps)]
        fused = self._geometric(scaled) if self.kind == "geometric" else scaled[0]
        for each in scaled[1:] if self.kind != "geometric" else ():
            fused = fused * each if self.kind == "product" else fused + each
        return smoothed(fused, self.smoothing) if self.smoothing else fused

    def _geometric(self, maps: list[Tensor]) -> Tensor:
        weights = self.weights or (1.0,) * len(maps)
        # Weights may be 0, so maps are kept from it: their logarithm times 0 must be 0.
        logs = [weight * each.clamp_min(_SMALLEST).log() for weight, each in zip(weights, maps, strict=True)]
        return torch.stack(logs).sum(0).div(sum(weights)).exp()

    def _scaled(self, index: int, each: Tensor, statistics: MapStatistics) -> Tensor:
        if self.kind == "weighted" and self.weights:
            return each * self.weights[index]
        if self.kind in ("normalised", "geometric"):
            return each / statistics.scale[index]
        if self.kind == "quantile":
            low, high = statistics.quantiles[index]
            return each * (0.1 / (high - low))
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
