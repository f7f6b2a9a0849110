"""Reverse distillation (RD4AD: Deng and Li, CVPR 2022, arXiv:2201.10703): decoding the teacher's features."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from models.backbones import base_channels
from models.decoders import ConvolutionalBottleneck, Decoder, DenseBottleneck
from models.detector import Pair, Pairs, Student
from models.fusion import MapFusion
from models.matching import FeatureMatching
from models.teachers import Features, Teacher


class Reverse(FeatureMatching):
    """The student sees the image only through a bottleneck behind the teacher, and decodes what it can.

    Attributes:
        width: The student's width as a fraction of ResNet-18's.
        bottleneck: 'convolutional' is the paper's; 'dense' leaves one vector for the whole image.
        embedding: Length of that vector.
        scales: How many of the teacher's scales are decoded, counted from the coarsest; the paper's are 3.
        fusion: The paper's adds the maps and smooths the sum.
    """

    name: ClassVar[str] = "reverse"
    revision: ClassVar[int] = 2
    width: float = Field(default=1.0, gt=0, le=2)
    bottleneck: Literal["convolutional", "dense"] = "convolutional"
    embedding: int = Field(default=512, ge=8, le=4096)
    scales: int = Field(default=3, ge=1, le=3)
    fusion: MapFusion = MapFusion(kind="sum", smoothing=4.0)

    def build_student(self, teacher: Teacher) -> Student:
        """Return an untrained student, see the interface."""
        return ReverseStudent(teacher.channels, self)


class ReverseStudent(Student):
    """Bottleneck and decoder.

    Args:
        channels: The teacher's channels.
        options: Of the detector.
    """

    def __init__(self, channels: tuple[int, ...], options: Reverse) -> None:
        super().__init__(channels, maps=options.scales)
        base = base_channels(options.width)
        self.scales = options.scales
        self.bottleneck: ConvolutionalBottleneck | DenseBottleneck
        if options.bottleneck == "dense":
            self.bottleneck = DenseBottleneck(channels, base, options.embedding)
        else:
            self.bottleneck = ConvolutionalBottleneck(channels, base)
        self.decoder = Decoder(channels[-options.scales :], base, self.bottleneck.out_channels)

    def forward(self, images: Tensor, features: Features) -> Pairs:
        """Return a pair for each decoded scale; the images are not looked at."""
        wanted = features[-self.scales :]
        return tuple(map(Pair, wanted, self.decoder(self.bottleneck(features), wanted)))
