"""The one shape of every detector.

Training, calibration, engine, registry and evaluation go through this interface and know no detector by name:

    images, teacher's features --student--> pairs --scale_maps--> maps --fuse--> anomaly map --score--> score
                                                  --loss--> what training minimises
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import Tensor, nn

from models.fusion import MapFusion
from models.statistics import MapStatistics
from models.teachers import STRIDES, Features, Teacher


class Pair(NamedTuple):
    """What a student was to match, and what it gave.

    Attributes:
        target: (B, C, h, w), no gradient flows into it.
        prediction: (B, C, h, w).
    """

    target: Tensor
    prediction: Tensor


Pairs = tuple[Pair, ...]


class Student(nn.Module, ABC):
    """The networks and statistics that are one product's own.

    Args:
        channels: The teacher's channels at each of its taps.
        maps: How many maps the detector makes of its pairs.

    Attributes:
        statistics: Of the maps on validation normals; taken at the end of a training.
    """

    def __init__(self, channels: tuple[int, ...], maps: int) -> None:
        super().__init__()
        self.channels = channels
        self.statistics = MapStatistics(maps)

    @abstractmethod
    def forward(self, images: Tensor, features: Features) -> Pairs:
        """Return the pairs of a batch.

        Args:
            images: (B, 3, S, S) normalised images.
            features: The teacher's of the same images, (B, C, S/s, S/s) for each tap.
        """

    def begin(self, source: NormalBatches) -> None:
        """Look at all normal images once before the first step; most students need not."""

    def round_up(self) -> None:
        """Bring tensors whose size depends on the training images to one of few sizes; the results stay the same.

        Then students of different trainings are of one structure, for which one graph and one compiled program are
        enough. Done once, to a student that only infers; most have nothing to bring.
        """

    def probe(self) -> tuple[Tensor, Features]:
        """Return a random input, as for a 64 x 64 image, to compare two forms of the student by."""
        generator = torch.Generator().manual_seed(0)
        features = tuple(
            torch.randn(1, channels, 64 // stride, 64 // stride, generator=generator)
            for channels, stride in zip(self.channels, STRIDES, strict=True)
        )
        return torch.randn(1, 3, 64, 64, generator=generator), features


class NormalBatches(ABC):
    """Normal images with the teacher's features, batch by batch."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def batch(self, indices: Tensor) -> tuple[Tensor, Features]:
        """Return (B, 3, S, S) normalised images and the teacher's features, at (B,) int64 indices."""

    @abstractmethod
    def chunks(self) -> list[Tensor]:
        """Return all indices in order, in parts of a batch each."""


class Detector(BaseModel, ABC):
    """A teacher-student method. Its fields are its options, so a version records it as a name and a dict.

    Attributes:
        revision: Counts up when the same options and weights come to compute something else, in parts that methods
            share or in a host too: a version of another revision is refused, since its threshold would not hold.
        fusion: How its maps become an anomaly map and a score.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    revision: ClassVar[int] = 1
    fusion: MapFusion = MapFusion()

    @field_validator("fusion", mode="before")
    @classmethod
    def _rest_of_the_fusion_is_the_methods_own(cls, value: Any) -> Any:
        """Let options that name a part of the fusion change just that part."""
        return cls.model_fields["fusion"].default.model_dump() | value if isinstance(value, dict) else value

    @abstractmethod
    def build_student(self, teacher: Teacher) -> Student:
        """Return an untrained student for a teacher."""

    @abstractmethod
    def loss(self, pairs: Pairs) -> Tensor:
        """Return what training minimises, a float32 scalar."""

    @abstractmethod
    def scale_maps(self, pairs: Pairs) -> tuple[Tensor, ...]:
        """Return (B, h, w) float32 maps of distances, >= 0, each at its own resolution."""

    def fuse(self, maps: tuple[Tensor, ...], size: int, statistics: MapStatistics) -> Tensor:
        """Join the maps into the (B, size, size) float32 anomaly map."""
        return self.fusion.fuse(maps, size, statistics)

    def score(self, fused: Tensor) -> Tensor:
        """Return each image's (B,) float32 score from its (B, H, W) anomaly map."""
        return self.fusion.score_of(fused)
