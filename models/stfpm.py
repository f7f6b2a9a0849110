"""STFPM: Student-Teacher Feature Pyramid Matching (Wang, Han, Ding, Huang; BMVC 2021, arXiv:2103.04257)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from models.backbones import ResNetBackbone
from models.detector import Student
from models.matching import FeatureMatching
from models.students import ForwardStudent
from models.teachers import Teacher


class STFPM(FeatureMatching):
    """The student matches the teacher's L2-normalised features at three scales.

    Where it cannot, the image holds something that the normal images did not. Maps are equation 2, the loss with
    `hardest` 1 is equations 3 and 4, the fusion 'product' equation 5.

    Attributes:
        width: The student's width as a fraction of ResNet-18's.
    """

    name: ClassVar[str] = "stfpm"
    revision: ClassVar[int] = 2
    width: float = Field(default=1.0, gt=0, le=2)

    def build_student(self, teacher: Teacher) -> Student:
        """Return an untrained ResNet-18 student (the paper's at width 1), see the interface."""
        return ForwardStudent(teacher.channels, ResNetBackbone(teacher.channels, self.width))
