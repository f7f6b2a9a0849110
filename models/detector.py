"""The one shape of every detector.

Training, calibration, engine, registry and evaluation go through this interface and know no detector by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from models.teachers import Features, Teacher


class Detector(BaseModel, ABC):
    """A teacher-student method. Its fields are its options, so a version records it as a name and a dict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]

    @abstractmethod
    def build_student(self, teacher: Teacher) -> nn.Module:
        """Return an untrained student: (B, 3, H, W) normalised images -> features like the teacher's."""

    @abstractmethod
    def loss(self, teacher_features: Features, student_features: Features) -> Tensor:
        """Return what training minimises, a float32 scalar."""

    @abstractmethod
    def scale_maps(self, teacher_features: Features, student_features: Features) -> tuple[Tensor, ...]:
        """Return one (B, h, w) float32 map of distances, >= 0, for each scale at its own resolution."""

    @abstractmethod
    def fuse(self, maps: tuple[Tensor, ...], size: int) -> Tensor:
        """Join the scales' maps into the (B, size, size) float32 anomaly map."""

    @abstractmethod
    def score(self, fused: Tensor) -> Tensor:
        """Return each image's (B,) float32 score from its (B, H, W) anomaly map."""
