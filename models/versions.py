"""Between a trained student and the registry: the draft on the way in, the detector on the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.cards import DetectorRecord, ModelCard, ModelDraft, TeacherRecord, TrainingRecord
from models.detector import Detector, Student
from models.detectors import DETECTORS, make_detector
from models.errors import VersionError
from models.images import TrainingImage
from models.teachers import Teacher
from models.training import TrainedStudent


def draft_card(
    trained: TrainedStudent,
    product: str,
    images: Sequence[TrainingImage],
    sources: Sequence[str] = (),
    parent: str | None = None,
    creator: str = "unknown",
) -> ModelDraft:
    """Describe a trained student for `Registry.publish`.

    Args:
        trained: The student.
        product: What it inspects.
        images: Provenance of every image given to the training.
        sources: Where they were read from.
        parent: Version the training started from.
        creator: Who or what asked for it.
    """
    return ModelDraft(
        product=product,
        detector=DetectorRecord.of(trained.detector),
        teacher=TeacherRecord(name=trained.teacher.name, weights_sha256=trained.teacher.weights_sha256),
        input_size=trained.settings.input_size,
        threshold=trained.calibration.threshold,
        false_reject_rate=trained.calibration.false_reject_rate,
        calibration_scores=trained.calibration.scores,
        training=TrainingRecord(
            images=list(images),
            sources=list(sources),
            settings=trained.settings,
            seconds=trained.seconds,
            steps=len(trained.history),
        ),
        metrics={"final_loss": trained.history[-1]},
        parent=parent,
        creator=creator,
    )


def check_revision(card: ModelCard) -> None:
    """Refuse a version that this program would judge otherwise than the one that set its threshold.

    Raises:
        VersionError: It is of another revision of its method.
    """
    record = card.detector
    own = DETECTORS[record.name].revision if record.name in DETECTORS else record.revision
    if record.revision == own:
        return
    remedy = "train the product again" if record.revision < own else "a newer program made it: upgrade this one"
    raise VersionError(
        f"version {card.product}/{card.version} is of revision {record.revision} of the detector {record.name}, this "
        f"program has revision {own} and its threshold would not hold; {remedy}"
    )


def restore(card: ModelCard, state: Mapping[str, Tensor], teacher: Teacher) -> tuple[Detector, Student]:
    """Rebuild a published version's detector and student, float32 on the CPU, in evaluation mode.

    Raises:
        VersionError: The teacher is not the version's, the weights do not fit the recorded detector, or the method
            has since come to compute something else.
        ModelError: This program does not know the recorded detector.
    """
    card.check_teacher(teacher.weights_sha256)
    check_revision(card)
    record = card.detector
    detector = make_detector(record.name, record.options)
    student = detector.build_student(teacher)
    try:
        student.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise VersionError(f"version {card.product}/{card.version}: student does not fit: {reason}") from None
    return detector, student.eval().requires_grad_(False)
