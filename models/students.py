"""Students that predict the teacher's features from the image itself."""

from __future__ import annotations

from torch import Tensor, nn

from models.detector import NormalBatches, Pair, Pairs, Student
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
        targets = features
        if len(self.normalise):
            targets = tuple(average(each) for average, each in zip(self.normalise, features, strict=True))
        return tuple(map(Pair, targets, self.network(images)))

    def begin(self, source: NormalBatches) -> None:
        """Let the moving averages settle on the normal images."""
        settle(self.normalise, source)


def settle(averages: nn.ModuleList, source: NormalBatches) -> None:
    """Move channel statistics over all normal images once.

    Args:
        averages: One `MovingAverage` for each of the teacher's features, counted from the coarsest, or none.
        source: The images.
    """
    for chunk in source.chunks() if len(averages) else ():
        _, features = source.batch(chunk)
        for average, feature in zip(averages, features[-len(averages) :], strict=True):
            average.update(feature)  # type: ignore[operator]
