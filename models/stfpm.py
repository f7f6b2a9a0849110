"""STFPM: Student-Teacher Feature Pyramid Matching (Wang, Han, Ding, Huang; BMVC 2021, arXiv:2103.04257)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from models.detector import Detector
from models.students import ResNetStudent
from models.teachers import Features, Teacher


class STFPM(Detector):
    """The student matches the teacher's L2-normalised features at three scales.

    Where it cannot, the image holds something that the normal images did not.

    Attributes:
        width: The student's width as a fraction of ResNet-18's.
        hardest: Fraction of a batch's positions, per scale, with the largest distance, over which the loss is
            the mean. 1 is the paper's loss; less spends the training on what the student still gets wrong.
    """

    name: ClassVar[str] = "stfpm"
    width: float = Field(default=1.0, gt=0, le=2)
    hardest: float = Field(default=1.0, gt=0, le=1)

    def build_student(self, teacher: Teacher) -> nn.Module:
        """Return an untrained ResNet-18 student (the paper's at width 1), see the interface."""
        return ResNetStudent(teacher.channels, self.width)

    def loss(self, teacher_features: Features, student_features: Features) -> Tensor:
        """Return the paper's loss (equations 2 to 4): each scale's mean over positions, summed."""
        total = teacher_features[0].new_zeros((), dtype=torch.float32)
        for distances in self.scale_maps(teacher_features, student_features):
            flat = distances.flatten()
            if self.hardest < 1:
                flat = flat.topk(math.ceil(self.hardest * flat.numel()), sorted=False).values
            total = total + flat.mean()
        return total

    def scale_maps(self, teacher_features: Features, student_features: Features) -> tuple[Tensor, ...]:
        """Return for each scale half the squared distance of the normalised features (equation 2), 0..2."""
        return tuple(
            (_unit(theirs) - _unit(own)).square().sum(dim=1).mul(0.5)
            for theirs, own in zip(teacher_features, student_features, strict=True)
        )

    def fuse(self, maps: tuple[Tensor, ...], size: int) -> Tensor:
        """Return the product over scales of the bilinearly upsampled maps (equation 5)."""
        fused = torch.ones((), device=maps[0].device)
        for scale in maps:
            upsampled = F.interpolate(scale.unsqueeze(1), (size, size), mode="bilinear", align_corners=False)
            fused = fused * upsampled.squeeze(1)
        return fused

    def score(self, fused: Tensor) -> Tensor:
        """Return the maximum of each map, as the paper does."""
        return fused.amax(dim=(1, 2))


def _unit(features: Tensor) -> Tensor:
    """Normalise each position's channels to length 1, in float32: half would lose the small distances."""
    return F.normalize(features.float(), dim=1)
