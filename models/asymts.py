"""AsymTS: asymmetric teacher-student feature pyramid matching (Kong et al., 2024), reconstructed from its abstract.

Public are its three parts: a student of Contextual Transformer blocks, moving-average normalisation in the
teacher, and multi-scale map fusion. How they are joined here is described in docs/detectors.md.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from models.backbones import ResNetBackbone, basic_block
from models.contextual import ContextualBlock
from models.detector import Student
from models.fusion import MapFusion
from models.matching import FeatureMatching
from models.students import ForwardStudent
from models.teachers import Teacher


class AsymTS(FeatureMatching):
    """A student of another kind than its teacher: where it cannot generalise like it, defects show.

    Attributes:
        width: The student's width as a fraction of ResNet-18's.
        blocks: 'contextual' builds the student of Contextual Transformer blocks, 'plain' of ResNet's.
        momentum: Of the moving-average normalisation; None matches the teacher's features as they are.
    """

    name: ClassVar[str] = "asymts"
    revision: ClassVar[int] = 2
    width: float = Field(default=1.0, gt=0, le=2)
    blocks: Literal["contextual", "plain"] = "contextual"
    momentum: float | None = Field(default=0.05, gt=0, le=1)
    fusion: MapFusion = MapFusion(kind="geometric")

    def build_student(self, teacher: Teacher) -> Student:
        """Return an untrained student, see the interface."""
        block = ContextualBlock if self.blocks == "contextual" else basic_block
        return ForwardStudent(teacher.channels, ResNetBackbone(teacher.channels, self.width, block), self.momentum)
