"""What is recorded about a version: the contents of its `model.json`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from models.detector import Detector
from models.errors import VersionError
from models.images import TrainingImage
from models.settings import TrainingSettings

ProductName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
VersionId = Annotated[str, StringConstraints(pattern=r"^[0-9]{8}T[0-9]{6}-[0-9a-f]{4}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _proctor_version() -> str:
    try:
        return version("proctor")
    except PackageNotFoundError:
        return "unknown"  # run from a checkout that was never installed


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DetectorRecord(_Record):
    """A detector as `models.detectors.make_detector` takes it.

    Attributes:
        name: Of the method.
        options: All of them, as they were at the training.
        revision: Of the method, as it was then.
    """

    name: str
    options: dict[str, Any]
    revision: int = 1

    @classmethod
    def of(cls, detector: Detector) -> DetectorRecord:
        """Describe a detector."""
        return cls(name=detector.name, options=detector.model_dump(mode="json"), revision=detector.revision)


class TeacherRecord(_Record):
    """The teacher that a student was trained with, and only fits."""

    name: str
    weights_sha256: Sha256


class TrainingRecord(_Record):
    """Where a student came from.

    Attributes:
        images: Every normal image used, for training or calibration.
        sources: Where they were read from, for people.
        settings: How it was trained.
        seconds: Duration.
        steps: Gradient steps taken.
    """

    images: list[TrainingImage]
    sources: list[str] = []
    settings: TrainingSettings
    seconds: float
    steps: int


class ModelDraft(_Record):
    """A trained student before it is published.

    Attributes:
        product: What it inspects.
        detector: Method and options.
        teacher: Teacher and hash of its weights.
        input_size: Side of the square input, pixels.
        threshold: A score above it fails.
        false_reject_rate: Share of normal images the threshold is meant to fail.
        calibration_scores: Scores of the held-out normals behind the threshold.
        training: Where the student came from.
        metrics: Measured figures, by name.
        parent: Version whose student the training started from.
        creator: Who or what asked for it.
    """

    product: ProductName
    detector: DetectorRecord
    teacher: TeacherRecord
    input_size: int = Field(gt=0)
    threshold: float = Field(allow_inf_nan=False)
    false_reject_rate: float = Field(gt=0, lt=1)
    calibration_scores: list[float]
    training: TrainingRecord
    metrics: dict[str, float] = {}
    parent: VersionId | None = None
    creator: str = "unknown"


class ModelCard(ModelDraft):
    """A published version. Immutable.

    Attributes:
        version: UTC time of publishing and four random hexadecimal digits.
        student_sha256: SHA-256 of `student.safetensors`.
        created_at: UTC.
        proctor_version: Of the program that trained it.
        torch_version: Likewise.
    """

    version: VersionId
    student_sha256: Sha256
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    proctor_version: str = Field(default_factory=_proctor_version)
    torch_version: str = Field(default_factory=lambda: str(torch.__version__))

    def check_teacher(self, weights_sha256: str) -> None:
        """Refuse teacher weights that the student was not trained with.

        Raises:
            VersionError: The hashes differ.
        """
        if self.teacher.weights_sha256 != weights_sha256:
            raise VersionError(
                f"version {self.product}/{self.version} was trained with other weights of teacher "
                f"{self.teacher.name}: sha256 {self.teacher.weights_sha256[:12]}..., found {weights_sha256[:12]}..."
            )

    def to_json(self) -> str:
        """Return the text of `model.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"
