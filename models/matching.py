"""Distances between features, and the mean over the hardest positions: what most detectors' maps and losses are."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from models.detector import Detector, Pair, Pairs


class FeatureMatching(Detector):
    """A detector whose loss is the mean of its maps of distances.

    Attributes:
        hardest: Fraction of a batch's positions, per scale, with the largest distance, over which the loss is
            the mean. 1 takes all; less spends the training on what the student still gets wrong.
    """

    hardest: float = Field(default=1.0, gt=0, le=1)

    def loss(self, pairs: Pairs) -> Tensor:
        """Return each map's mean over positions, summed over maps."""
        return sum_of_means(self.scale_maps(pairs), self.hardest)

    def scale_maps(self, pairs: Pairs) -> tuple[Tensor, ...]:
        """Return for each pair half the squared distance of the normalised features, 0..2."""
        return tuple(cosine_distance(pair) for pair in pairs)


def sum_of_means(maps: tuple[Tensor, ...], hardest: float) -> Tensor:
    """Return the sum of each (B, h, w) map's mean over its `hardest` fraction of positions, a scalar."""
    total = maps[0].new_zeros(())
    for each in maps:
        flat = each.flatten()
        if hardest < 1:
            flat = flat.topk(math.ceil(hardest * flat.numel()), sorted=False).values
        total = total + flat.mean()
    return total


def cosine_distance(pair: Pair) -> Tensor:
    """Return half the squared distance of a pair's features, normalised at each position: 1 - cosine, (B, h, w)."""
    return (unit(pair.target) - unit(pair.prediction)).square().sum(dim=1).mul(0.5)


def unit(features: Tensor) -> Tensor:
    """Normalise each position's channels to length 1, in float32: half would lose the small distances."""
    return F.normalize(features.float(), dim=1)
