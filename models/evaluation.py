"""How well a way of training detects defects, measured on labelled sets."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from models.calibration import is_fail
from models.datasets import InspectionSet, find_sets, read_mask
from models.errors import TrainingDataError
from models.features import TeacherFeatures
from models.images import read_training_images
from models.inference import best_dtype, infer, pick_device, prepare
from models.metrics import image_auroc, pixel_auroc
from models.settings import TrainingSettings
from models.teachers import Teacher, load_teacher
from models.training import TrainedStudent, train

EvaluationProgress = Callable[[str, int, int, float], None]


class SetResult(BaseModel):
    """One student's figures on one set.

    Attributes:
        name: The set's.
        seed: The training's.
        train_images: Normal images given to the training.
        test_good: Normal test images.
        test_defects: Defective test images.
        image_auroc: 0..1.
        pixel_auroc: 0..1, None where masks are missing.
        threshold: From the training's own held-out normals.
        false_reject_rate: Share of normal test images above the threshold.
        detection_rate: Share of defective test images above the threshold.
        train_seconds: Duration of the training.
        frames_per_s: Test images judged a second, teacher and student, batches of 16.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    seed: int
    train_images: int
    test_good: int
    test_defects: int
    image_auroc: float
    pixel_auroc: float | None
    threshold: float
    false_reject_rate: float
    detection_rate: float
    train_seconds: float
    frames_per_s: float


class Evaluation(BaseModel):
    """Figures of one way of training, over sets and seeds.

    Attributes:
        settings: How the students were trained; each result names its seed.
        teacher_sha256: Of the teacher's weights file.
        device: Where it was computed.
        results: One for each set and seed.
    """

    model_config = ConfigDict(frozen=True)

    settings: TrainingSettings
    teacher_sha256: str
    device: str
    results: list[SetResult]


def evaluate(
    data_dir: str | Path,
    settings: TrainingSettings,
    out_dir: str | Path | None = None,
    progress: EvaluationProgress | None = None,
    seeds: Sequence[int] | None = None,
) -> Evaluation:
    """Train on each set's normal images and judge its test images.

    Args:
        data_dir: A folder in MVTec AD's layout, or a folder of such folders.
        settings: How to train.
        out_dir: Receives `evaluation.json` and one `<set>-seed<n>.csv` of scores for each training.
        progress: Called with the set's name, step, steps and loss.
        seeds: One training for each; None takes the settings' own.

    Raises:
        TrainingDataError: The folder is no labelled set, an image is unreadable or a kind of test image is
            missing.
        ModelError: As for `models.training.train`.
    """
    sets = find_sets(data_dir)
    for each in sets:
        if len({image.is_defect for image in each.test}) < 2:
            raise TrainingDataError(f"{each.name}: test needs good and defective images")
    out = Path(out_dir) if out_dir is not None else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(settings.teacher, settings.weights)
    results = []
    for each in sets:
        for seed in seeds or (settings.seed,):
            seeded = settings.model_copy(update={"seed": seed})
            results.append(_evaluate_set(each, seeded, teacher, out, progress))
    evaluation = Evaluation(
        settings=settings,
        teacher_sha256=teacher.weights_sha256,
        device=str(pick_device(settings.device)),
        results=results,
    )
    if out is not None:
        (out / "evaluation.json").write_text(evaluation.model_dump_json(indent=2) + "\n")
    return evaluation


def _evaluate_set(
    each: InspectionSet,
    settings: TrainingSettings,
    teacher: Teacher,
    out: Path | None,
    progress: EvaluationProgress | None,
) -> SetResult:
    normals, _ = read_training_images(each.train, settings.input_size)
    trained = train(
        normals,
        settings,
        teacher=teacher,
        progress=None if progress is None else lambda *state: progress(each.name, *state),
    )
    tested, _ = read_training_images([image.path for image in each.test], settings.input_size)
    maps, scores, seconds = judge(trained, tested)
    defects = np.array([image.is_defect for image in each.test])
    fails = np.array([is_fail(score, trained.calibration.threshold) for score in scores])
    if out is not None:
        _write_scores(out / f"{each.name}-seed{settings.seed}.csv", each, scores, fails)
    auroc = image_auroc(scores, defects)
    assert auroc is not None  # both kinds of image are there
    masks = [read_mask(image, settings.input_size) for image in each.test] if each.has_masks else None
    return SetResult(
        name=each.name,
        seed=settings.seed,
        train_images=len(normals),
        test_good=int((~defects).sum()),
        test_defects=int(defects.sum()),
        image_auroc=auroc,
        pixel_auroc=None if masks is None else pixel_auroc(list(maps), masks),
        threshold=trained.calibration.threshold,
        false_reject_rate=float(fails[~defects].mean()),
        detection_rate=float(fails[defects].mean()),
        train_seconds=trained.seconds,
        frames_per_s=len(tested) / seconds,
    )


def judge(trained: TrainedStudent, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Judge images as serving would.

    Args:
        trained: The student.
        images: (N, S, S, 3) uint8 RGB.

    Returns:
        (N, S, S) float32 anomaly maps, (N,) float32 scores, and the seconds it took.
    """
    device = pick_device(trained.settings.device)
    dtype = best_dtype(device)
    source = TeacherFeatures(prepare(trained.teacher, device, dtype), images, cache_bytes=0)
    student = prepare(trained.student, device, dtype)
    maps, scores = np.empty(images.shape[:3], np.float32), np.empty(len(images), np.float32)
    started = time.perf_counter()
    for chunk in source.chunks():
        fused, score = infer(trained.detector, student, *source.batch(chunk))
        maps[chunk], scores[chunk] = fused.cpu().numpy(), score.cpu().numpy()
    return maps, scores, time.perf_counter() - started


def _write_scores(path: Path, each: InspectionSet, scores: np.ndarray, fails: np.ndarray) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "kind", "score", "verdict"))
        for image, score, fail in zip(each.test, scores, fails, strict=True):
            row = (image.path.name, image.kind, f"{score:.9g}", "fail" if fail else "pass")
            writer.writerow(row)
