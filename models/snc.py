"""SNC: spatial neighbouring coding, a plug-in that encodes each feature element by its neighbourhood.

Li and Hu (IEEE TIM 2024, DOI 10.1109/TIM.2024.3522399) publish in the abstract that SNC encodes "the contextual
information of the neighborhood of each element in feature space" and plugs into teacher-student detectors; the
forms below are reconstructions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.detector import Pair, Pairs
from models.matching import unit


class SNC(BaseModel):
    """How neighbours are coded, and where the code counts.

    Attributes:
        form: 'none'; 'softmax' adds to each element the mean of its neighbours weighted by their cosine to it,
            'uniform' the plain mean of its whole square; 'relation' compares the cosines to the neighbours as
            distributions; 'masked' predicts the teacher's element from the student's neighbours, without the element
            itself.
        radius: Neighbours lie in a square of side 2 * radius + 1.
        place: Whether the code enters the training's 'loss', the 'map', or 'both'.
        temperature: Of the softmax over cosines.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["none", "softmax", "uniform", "relation", "masked"] = "softmax"
    radius: int = Field(default=1, ge=1, le=3)
    place: Literal["loss", "map", "both"] = "both"
    temperature: float = Field(default=0.1, gt=0)

    @property
    def in_loss(self) -> bool:
        """Whether a training sees the code."""
        return self.form != "none" and self.place in ("loss", "both")

    @property
    def in_map(self) -> bool:
        """Whether the anomaly map is made of the code."""
        return self.form != "none" and self.place in ("map", "both")

    @property
    def aggregates(self) -> bool:
        """Whether the code takes the features' place; the other forms add maps of their own."""
        return self.form in ("softmax", "uniform")

    def aggregated(self, pairs: Pairs) -> Pairs:
        """Return the pairs with each element joined by its neighbours, (B, C, h, w) float32."""
        return tuple(Pair(self._joined(pair.target), self._joined(pair.prediction)) for pair in pairs)

    def relation_map(self, pair: Pair) -> Tensor:
        """Return the Kullback-Leibler divergence of the student's code from the teacher's, (B, h, w) >= 0."""
        theirs, own = (self._cosines(features).div(self.temperature).log_softmax(dim=1) for features in pair)
        return F.kl_div(own, theirs, reduction="none", log_target=True).sum(dim=1).clamp_min(0)

    def _joined(self, features: Tensor) -> Tensor:
        elements = unit(features)
        if self.form == "uniform":
            side = 2 * self.radius + 1
            around = F.avg_pool2d(elements, side, stride=1, padding=self.radius, count_include_pad=False)
            return elements + around
        shares = self._cosines(features).div(self.temperature).softmax(dim=1)
        around = torch.zeros_like(elements)
        for index, neighbour in enumerate(self._neighbours(elements)):
            around = around + shares[:, index : index + 1] * neighbour
        return elements + around

    def _cosines(self, features: Tensor) -> Tensor:
        """Return the cosine of each element to each neighbour, (B, neighbours, h, w)."""
        elements = unit(features)
        return torch.stack([(elements * each).sum(dim=1) for each in self._neighbours(elements)], dim=1)

    def _neighbours(self, features: Tensor) -> Iterator[Tensor]:
        """Yield (B, C, h, w) views of the neighbours, without the element itself; borders repeat their element."""
        height, width = features.shape[2:]
        side = 2 * self.radius + 1
        padded = F.pad(features, (self.radius,) * 4, mode="replicate")
        for index in range(side**2):
            if index != side**2 // 2:
                row, column = divmod(index, side)
                yield padded[:, :, row : row + height, column : column + width]


class MaskedCentre(nn.Module):
    """Predicts each element from its neighbours: a convolution whose centre is not there.

    Args:
        channels: Of the features, in and out.
        radius: Of the neighbourhood.
    """

    mask: Tensor

    def __init__(self, channels: int, radius: int) -> None:
        super().__init__()
        side = 2 * radius + 1
        self.weight = nn.Parameter(torch.empty(channels, channels, side, side))
        self.bias = nn.Parameter(torch.zeros(channels))
        nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="linear")
        mask = torch.ones(1, 1, side, side)
        mask[..., radius, radius] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.radius = radius

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, C, h, w) features to predictions of the same shape."""
        padded = F.pad(features, (self.radius,) * 4, mode="replicate")
        return F.conv2d(padded, (self.weight * self.mask).to(features.dtype), self.bias.to(features.dtype))
