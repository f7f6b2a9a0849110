"""Students that predict the teacher's features from the image itself."""

from __future__ import annotations

from torch import Tensor, nn

from models.detector import Pair, Pairs, Student
from models.statistics import MovingAverage
from models.teachers import Features


class ForwardStudent(Student):
    """One network from images to predictions of the teacher's features, scale by scale.

    Args:
        channels: The teacher's channels.
        network: (B, 3, S, S) images -> features of the teacher's shapes.
        momentum: Of the moving-average normalisation of the teacher's features; None matches them as they are.
    """

    def __init__(self, channels: tuple[int, ...], network: nn.Module, momentum: float | None = None) -> None:
        super().__init__(channels, maps=len(channels))
        self.network = network
        averages = [] if momentum is None else [MovingAverage(count, momentum) for count in channels]
        self.normalise = nn.ModuleList(averages)

    def forward(self, images: Tensor, features: Features) -> Pairs:
        """Return one pair for each of the teacher's taps."""
        return tuple(map(Pair, normalised(self.normalise, features, self.training), self.network(images)))


def normalised(averages: nn.ModuleList, features: Features, training: bool) -> Features:
    """Return the features after moving-average normalisation, as they are where there is none.

    Args:
        averages: One `MovingAverage` for each feature, or none.
        features: Each (B, C, h, w).
        training: Whether the batch moves the statistics.
    """
    if not len(averages):
        return features
    if training:
        for average, feature in zip(averages, features, strict=True):
            average.update(feature)  # type: ignore[operator]
    return tuple(average(feature) for average, feature in zip(averages, features, strict=True))
