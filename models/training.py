"""Training a student: by steps, from a seed, against the cached features of a frozen teacher."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from models.augmentation import CameraAugmentation
from models.calibration import Calibration, calibrate
from models.detector import Detector, Student
from models.detectors import make_detector
from models.errors import ModelError, TrainingDataError
from models.features import TeacherFeatures
from models.fitting import Fit, Progress, ShouldStop, training_dtype
from models.holdout import split_holdout
from models.inference import best_dtype, infer, pick_device, prepare, torch_threads
from models.preprocess import fit_to_input
from models.settings import TrainingSettings
from models.teachers import Teacher, load_teacher


@dataclass(frozen=True)
class TrainedStudent:
    """What a training yields.

    Attributes:
        detector: The method, with its options.
        teacher: float32, on the CPU.
        student: float32, on the CPU, in evaluation mode.
        calibration: Threshold and scores of the held-out normals.
        settings: How it was trained.
        history: Loss of each step.
        seconds: Duration, teacher's features and calibration included.
    """

    detector: Detector
    teacher: Teacher
    student: Student
    calibration: Calibration
    settings: TrainingSettings
    history: list[float] = field(repr=False)
    seconds: float


def train(
    images: Sequence[np.ndarray] | np.ndarray,
    settings: TrainingSettings,
    *,
    start_from: Mapping[str, Tensor] | None = None,
    teacher: Teacher | None = None,
    progress: Progress | None = None,
    should_stop: ShouldStop | None = None,
) -> TrainedStudent:
    """Train and calibrate a student on normal images.

    The same call on the same machine yields the same student; on a GPU up to the order in which it adds.

    Args:
        images: Each (H, W, 3) uint8 RGB, of any size; at least one.
        settings: How to train.
        start_from: State dict of a student to train further; None starts from random weights.
        teacher: The settings' teacher, where the caller has it loaded.
        progress: Called now and then with step, steps and loss.
        should_stop: Asked now and then; True ends the training.

    Raises:
        TrainingDataError: No images.
        TeacherError: The teacher's weights cannot be had.
        TrainingStoppedError: `should_stop` said so.
        ModelError: A setting is wrong, `start_from` is another network, or the loss is no finite number.
    """
    started = time.perf_counter()
    if len(images) == 0:
        raise TrainingDataError("training: no images")
    device = pick_device(settings.device)
    detector = make_detector(settings.detector, settings.detector_options)
    teacher = teacher or load_teacher(settings.teacher, settings.weights)
    fitted = np.stack([fit_to_input(image, settings.input_size) for image in images])
    trained_on, held_out = split_holdout(fitted, settings.holdout)

    with torch_threads(settings.threads or max(1, (os.cpu_count() or 1) // 2)):
        ready = prepare(teacher, device, training_dtype(device))
        fit = Fit(
            settings=settings,
            detector=detector,
            student=_new_student(detector, teacher, settings.seed, start_from).to(device),
            normals=TeacherFeatures(ready, fitted[trained_on], settings.cache_bytes, _augmentation(settings)),
            held_out=TeacherFeatures(ready, fitted[held_out], settings.cache_bytes),
            device=device,
        )
        history = fit.run(progress, should_stop)
        student = fit.student.cpu().eval().requires_grad_(False)
        measure_maps(detector, teacher, student, fitted[held_out], device)
        scores = score_images(detector, teacher, student, fitted[held_out], device)
    return TrainedStudent(
        detector=detector,
        teacher=teacher,
        student=student,
        calibration=calibrate(scores.tolist(), settings.false_reject_rate),
        settings=settings,
        history=history,
        seconds=time.perf_counter() - started,
    )


@torch.inference_mode()
def measure_maps(
    detector: Detector, teacher: Teacher, student: Student, images: np.ndarray, device: torch.device
) -> None:
    """Give the student the statistics of its maps on (N, S, S, 3) uint8 RGB validation normals."""
    dtype = best_dtype(device)
    source = TeacherFeatures(prepare(teacher, device, dtype), images, cache_bytes=0)
    ready = prepare(student, device, dtype)
    maps = [detector.scale_maps(ready(*source.batch(chunk))) for chunk in source.chunks()]
    student.statistics.measure([tuple(each.cpu() for each in batch) for batch in maps])


def score_images(
    detector: Detector, teacher: Teacher, student: Student, images: np.ndarray, device: torch.device
) -> np.ndarray:
    """Score images as they would be in serving.

    Args:
        detector: The student's method.
        teacher: float32, on the CPU.
        student: Likewise.
        images: (N, S, S, 3) uint8 RGB.
        device: Where to compute.

    Returns:
        (N,) float32 scores.
    """
    dtype = best_dtype(device)
    source = TeacherFeatures(prepare(teacher, device, dtype), images, cache_bytes=0)
    ready = prepare(student, device, dtype)
    scores = [infer(detector, ready, *source.batch(chunk))[1].cpu() for chunk in source.chunks()]
    return torch.cat(scores).numpy()


def _augmentation(settings: TrainingSettings) -> CameraAugmentation | None:
    return CameraAugmentation(settings.seed) if settings.augment == "camera" else None


def _new_student(detector: Detector, teacher: Teacher, seed: int, start_from: Mapping[str, Tensor] | None) -> Student:
    """Build a student from its seed without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        student = detector.build_student(teacher)
    detector.fusion.check(len(student.statistics.scale))
    if start_from is not None:
        try:
            student.load_state_dict(start_from)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise ModelError(f"training cannot start from another network's weights: {reason}") from None
    return student
