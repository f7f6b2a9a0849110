"""A student after EfficientAD (Batzner, Heckler, König; WACV 2024, arXiv:2303.14535) on the shared teachers.

From the paper: channel-normalised targets, the hard feature loss, a second branch that sees the image through a
bottleneck and whose behaviour the student learns too, and maps normalised by quantiles. Other than there: teachers
are the shared ones instead of a distilled patch network, the bottlenecked branch reads the teacher's features
instead of the image, there are two scales, the student's imitation does not teach the autoencoder, and no images from
outside penalise the student, since a plant has none.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from models.backbones import ResNetBackbone, base_channels
from models.decoders import Decoder, DenseBottleneck
from models.detector import Detector, NormalBatches, Pair, Pairs, Student
from models.fusion import MapFusion
from models.statistics import MovingAverage
from models.students import settle
from models.teachers import Features, Teacher

_SCALES = 2  # strides 8 and 16


class EfficientAD(Detector):
    """A student network beside an autoencoder: one sees details, the other the image as a whole.

    Attributes:
        width: The networks' width as a fraction of ResNet-18's.
        embedding: Length of the autoencoder's bottleneck vector.
        hard: Fraction of a batch's squared differences, the largest, over which the student's loss is the mean;
            the paper's quantile 0.999 leaves 0.001.
        momentum: Of the moving average behind the channels' normalisation.
    """

    name: ClassVar[str] = "efficientad"
    revision: ClassVar[int] = 2
    width: float = Field(default=0.5, gt=0, le=2)
    embedding: int = Field(default=256, ge=8, le=4096)
    hard: float = Field(default=0.001, gt=0, le=1)
    momentum: float = Field(default=0.05, gt=0, le=1)
    fusion: MapFusion = MapFusion(kind="quantile")

    def build_student(self, teacher: Teacher) -> Student:
        """Return the untrained networks, see the interface."""
        return EfficientADStudent(teacher.channels, self)

    def loss(self, pairs: Pairs) -> Tensor:
        """Return the hard feature loss of the student, and both plain losses of the autoencoder, summed."""
        matched, decoded, imitated = _parted(pairs)
        total = pairs[0].prediction.new_zeros((), dtype=matched[0].target.dtype)
        for pair in matched:
            squares = _squares(pair).flatten()
            total = total + squares.topk(math.ceil(self.hard * squares.numel()), sorted=False).values.mean()
        for pair in (*decoded, *imitated):
            total = total + _squares(pair).mean()
        return total

    def scale_maps(self, pairs: Pairs) -> tuple[Tensor, ...]:
        """Return the mean squared differences of teacher and student, then those of autoencoder and student."""
        matched, _, imitated = _parted(pairs)
        return tuple(_squares(pair).mean(dim=1) for pair in (*matched, *imitated))


class EfficientADStudent(Student):
    """Student network with two heads, and autoencoder.

    Args:
        channels: The teacher's channels.
        options: Of the detector.
    """

    def __init__(self, channels: tuple[int, ...], options: EfficientAD) -> None:
        super().__init__(channels, maps=2 * _SCALES)
        base = base_channels(options.width)
        # The first head is never compared with stride 4's features, so it needs no projection there.
        heads = (base, *(2 * count for count in channels[-_SCALES:]))
        self.network = ResNetBackbone(heads, options.width)
        self.normalise = nn.ModuleList(MovingAverage(count, options.momentum) for count in channels[-_SCALES:])
        self.bottleneck = DenseBottleneck(channels, base, options.embedding)
        self.decoder = Decoder(channels[-_SCALES:], base, self.bottleneck.out_channels)

    def begin(self, source: NormalBatches) -> None:
        """Let the channels' statistics settle on the normal images."""
        settle(self.normalise, source)

    def forward(self, images: Tensor, features: Features) -> Pairs:
        """Return three pairs for each scale: teacher and student, teacher and autoencoder, autoencoder and student."""
        targets = tuple(average(each) for average, each in zip(self.normalise, features[-_SCALES:], strict=True))
        heads = [head.chunk(2, dim=1) for head in self.network(images)[-_SCALES:]]
        decoded = self.decoder(self.bottleneck(features), targets)
        return (
            *(Pair(target, first) for target, (first, _) in zip(targets, heads, strict=True)),
            *(Pair(target, own) for target, own in zip(targets, decoded, strict=True)),
            *(Pair(own.detach(), second) for own, (_, second) in zip(decoded, heads, strict=True)),
        )


def _parted(pairs: Pairs) -> tuple[Pairs, Pairs, Pairs]:
    return pairs[:_SCALES], pairs[_SCALES : 2 * _SCALES], pairs[2 * _SCALES :]


def _squares(pair: Pair) -> Tensor:
    """Return the squared differences, (B, C, h, w) float32."""
    return (pair.target.float() - pair.prediction.float()).square()
