"""The engine: mixed batches of several products through one shared teacher and each product's own student."""

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.cards import ModelCard
from models.detector import Detector, Student
from models.errors import VersionError
from models.inference import best_dtype, infer, pick_device, prepare, to_input
from models.preprocess import fit_to_input
from models.registry import Registry
from models.teachers import Teacher, load_teacher
from models.versions import restore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resident:
    """A version in memory, ready to judge.

    Attributes:
        card: its description: product, version, threshold, input size.
        detector: the method.
        student: prepared for the engine's device and precision.
        teacher: shared between residents.
    """

    card: ModelCard
    detector: Detector
    student: Student
    teacher: Teacher


@dataclass(frozen=True)
class Judgement:
    """What the engine says of one frame.

    Attributes:
        anomaly_map: (S, S) float32, one value per pixel of the fitted image.
        score: the image's value; not finite if the network's output was not.
        card: the version that judged it.
        infer_ms: time of the whole batch it was part of.
    """

    anomaly_map: np.ndarray
    score: float
    card: ModelCard
    infer_ms: float


@dataclass(frozen=True)
class Request:
    """A frame for the engine: (H, W, 3) uint8 RGB of any size, and the resident that shall judge it."""

    resident: Resident
    image: np.ndarray


class Engine:
    """Holds the residents of a device and judges mixed batches.

    `build` may run beside `judge`; `install` swaps between two batches.

    Args:
        registry: where versions come from.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        teacher_weights: local weights file by teacher name; others come from their packages.
        dtype: precision; None takes the best that the device computes natively.
        max_batch: largest batch that a new version is warmed up for.
    """

    def __init__(
        self,
        registry: Registry,
        device: str = "auto",
        teacher_weights: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        max_batch: int = 1,
    ) -> None:
        self.device = pick_device(device)
        self.dtype = dtype or best_dtype(self.device)
        self._registry = registry
        self._max_batch = max_batch
        self._teacher_weights = dict(teacher_weights or {})
        self._teachers: dict[str, Teacher] = {}
        self._residents: dict[str, Resident] = {}
        self._loading = threading.Lock()
        self._judging = threading.Lock()

    def resident(self, product: str) -> Resident | None:
        """The version in service for a product."""
        return self._residents.get(product)

    def residents(self) -> dict[str, str]:
        """Version in service by product."""
        return {product: resident.card.version for product, resident in self._residents.items()}

    def build(self, product: str, version: str) -> Resident:
        """Load a version beside those in service and warm it up; judging goes on meanwhile.

        Raises:
            ModelError: the version or its teacher is missing, corrupt or does not fit.
        """
        card, state = self._registry.load_student(product, version)
        if not all(bool(torch.isfinite(values).all()) for values in state.values()):
            raise VersionError(f"version {product}/{version}: its weights are not all finite numbers")
        with self._loading:
            teacher = self._teacher(card.teacher.name)
        detector, student = restore(card, state, teacher)
        resident = Resident(card, detector, prepare(student, self.device, self.dtype), teacher)
        self._warm_up(resident)
        return resident

    def _warm_up(self, resident: Resident) -> None:
        """Compute batches of doubling size, since kernels are chosen per shape at their first use.

        Without the lock: a version that is not in service yet must not hold up those that are.
        """
        blank = np.zeros((resident.card.input_size, resident.card.input_size, 3), np.uint8)
        size = 1
        while size <= self._max_batch:
            self._judge_group([Request(resident, blank)] * size)
            size *= 2

    def install(self, resident: Resident) -> None:
        """Put a built resident into service; the batch that runs finishes with the old one."""
        with self._judging:
            self._residents[resident.card.product] = resident
        logger.info("%s: version %s in service", resident.card.product, resident.card.version)

    def judge(self, requests: Sequence[Request]) -> list[Judgement]:
        """Judge a mixed batch: one teacher pass per teacher and input size, each student on its own part.

        Returns:
            One judgement per request, in order.
        """
        started = time.perf_counter()
        results: list[tuple[np.ndarray, float] | None] = [None] * len(requests)
        with self._judging:
            for group in _groups(requests).values():
                for row, result in zip(group, self._judge_group([requests[row] for row in group]), strict=True):
                    results[row] = result
        infer_ms = (time.perf_counter() - started) * 1e3
        judged = [result for result in results if result is not None]
        if len(judged) != len(requests):
            raise RuntimeError(f"{len(requests)} frames in, {len(judged)} judgements out")
        return [
            Judgement(anomaly_map, score, request.resident.card, infer_ms)
            for request, (anomaly_map, score) in zip(requests, judged, strict=True)
        ]

    @torch.inference_mode()
    def _judge_group(self, requests: Sequence[Request]) -> list[tuple[np.ndarray, float]]:
        """Requests of one teacher and input size, neighbours of one product together."""
        first = requests[0].resident
        fitted = np.stack([fit_to_input(request.image, first.card.input_size) for request in requests])
        images = to_input(torch.from_numpy(fitted).to(self.device), first.teacher, self.dtype)
        features = first.teacher(images)
        results: list[tuple[np.ndarray, float]] = []
        for start, stop in _runs(requests):
            resident = requests[start].resident
            part = tuple(feature[start:stop] for feature in features)
            maps, scores = infer(resident.detector, resident.student, images[start:stop], part)
            # a map with one value that is no number is worth nothing, whatever its maximum says
            finite = torch.isfinite(maps).flatten(1).all(1)
            scores = torch.where(finite, scores, math.nan)
            results += zip(maps.float().cpu().numpy(), scores.double().cpu().tolist(), strict=True)
        return results

    def _teacher(self, name: str) -> Teacher:
        if name not in self._teachers:
            teacher = load_teacher(name, self._teacher_weights.get(name))
            self._teachers[name] = prepare(teacher, self.device, self.dtype)
        return self._teachers[name]


def _groups(requests: Sequence[Request]) -> dict[tuple[int, int], list[int]]:
    """Row numbers by (teacher, input size), within a group sorted so that a resident's rows are neighbours."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, request in enumerate(requests):
        key = (id(request.resident.teacher), request.resident.card.input_size)
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: id(requests[row].resident))
    return groups


def _runs(requests: Sequence[Request]) -> list[tuple[int, int]]:
    """(start, stop) of each run of one resident."""
    starts = [
        row for row in range(len(requests)) if row == 0 or requests[row].resident is not requests[row - 1].resident
    ]
    return list(zip(starts, [*starts[1:], len(requests)], strict=True))
