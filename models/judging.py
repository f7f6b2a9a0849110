"""Judging labelled images as serving would, and how fast that is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from models.detector import Student
from models.features import TeacherFeatures
from models.inference import best_dtype, infer, pick_device, prepare
from models.training import TrainedStudent

_TIMED_S, _TIMED_BATCHES, _WARM_UP_BATCHES = 1.0, 5, 2


def judge(
    trained: TrainedStudent, images: np.ndarray, progress: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Judge images as serving would.

    Args:
        trained: The student.
        images: (N, S, S, 3) uint8 RGB.
        progress: Called with the number of images judged so far.

    Returns:
        (N, S, S) float32 anomaly maps, (N,) float32 scores, and the seconds it took.
    """
    source, student = _serving(trained, images)
    maps, scores = np.empty(images.shape[:3], np.float32), np.empty(len(images), np.float32)
    started = time.perf_counter()
    for chunk in source.chunks():
        fused, score = infer(trained.detector, student, *source.batch(chunk))
        maps[chunk], scores[chunk] = fused.cpu().numpy(), score.cpu().numpy()
        if progress is not None:
            progress(int(chunk[-1]) + 1)
    return maps, scores, time.perf_counter() - started


def speed(trained: TrainedStudent, images: np.ndarray, batch: int) -> float:
    """Return the frames judged a second, from the median batch; batches before the timed ones warm up.

    Args:
        trained: The student.
        images: (N, S, S, 3) uint8 RGB, repeated where they are fewer than a batch.
        batch: Frames judged at once.
    """
    source, student = _serving(trained, images[:batch])
    indices = torch.arange(batch) % len(images)
    seconds: list[float] = []
    while len(seconds) < _WARM_UP_BATCHES + _TIMED_BATCHES or sum(seconds[_WARM_UP_BATCHES:]) < _TIMED_S:
        started = time.perf_counter()
        fused, score = infer(trained.detector, student, *source.batch(indices))
        fused.cpu(), score.cpu()
        seconds.append(time.perf_counter() - started)
    return batch / statistics.median(seconds[_WARM_UP_BATCHES:])


def _serving(trained: TrainedStudent, images: np.ndarray) -> tuple[TeacherFeatures, Student]:
    device = pick_device(trained.settings.device)
    dtype = best_dtype(device)
    source = TeacherFeatures(prepare(trained.teacher, device, dtype), images, cache_bytes=0)
    return source, prepare(trained.student, device, dtype)
