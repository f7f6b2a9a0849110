"""The engine: the versions in service, and mixed batches of their products' frames."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.cards import ModelCard
from models.errors import VersionError
from models.inference import best_dtype, pick_device
from models.registry import Registry
from models.teachers import Teacher, load_teacher
from models.versions import restore
from workers.cpu_executor import CpuExecutor
from workers.executor import Budget, Executor, Request, Resident

__all__ = ["Budget", "Engine", "Judgement", "Request", "Resident"]

logger = logging.getLogger(__name__)


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


class Engine:
    """Holds the residents of a device and judges mixed batches.

    All of it may be called from several threads. A request names its resident, so `install` waits for nothing: what
    is under way is judged by the version that it was put together for.

    Args:
        registry: where versions come from.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        teacher_weights: local weights file by teacher name; others come from their packages.
        dtype: precision; None takes the best that the device computes natively.
        budget: what it may use.
    """

    def __init__(
        self,
        registry: Registry,
        device: str = "auto",
        teacher_weights: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._registry = registry
        self._teacher_weights = dict(teacher_weights or {})
        self._executor = _executor(pick_device(device), dtype, budget or Budget())
        self._teachers: dict[str, Teacher] = {}
        self._residents: dict[str, Resident] = {}
        self._loading = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._executor.device

    @property
    def dtype(self) -> torch.dtype:
        """Its precision."""
        return self._executor.dtype

    def resident(self, product: str) -> Resident | None:
        """The version in service for a product."""
        return self._residents.get(product)

    def residents(self) -> dict[str, str]:
        """Version in service by product."""
        return {product: resident.card.version for product, resident in self._residents.items()}

    def nbytes(self) -> dict[str, int]:
        """Memory by product that its version in service takes on the device."""
        return {product: resident.nbytes for product, resident in self._residents.items()}

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
        return self._executor.resident(card, detector, student, teacher)

    def install(self, resident: Resident) -> None:
        """Put a built resident into service; a batch that was put together before finishes with the old one."""
        self._residents[resident.card.product] = resident
        logger.info("%s: version %s in service", resident.card.product, resident.card.version)

    def judge(self, requests: Sequence[Request]) -> list[Judgement]:
        """Judge a mixed batch: one teacher pass per teacher and input size, each student on its own part.

        Returns:
            One judgement per request, in order.

        Raises:
            DeviceFault: the device is broken and no further batch can be judged.
        """
        started = time.perf_counter()
        results: dict[int, tuple[np.ndarray, float]] = {}
        for rows in _groups(requests).values():
            maps, scores = self._executor.run([requests[row] for row in rows])
            results.update(zip(rows, zip(maps, scores.tolist(), strict=True), strict=True))
        infer_ms = (time.perf_counter() - started) * 1e3
        if len(results) != len(requests):
            raise RuntimeError(f"{len(requests)} frames in, {len(results)} judgements out")
        return [
            Judgement(*results[row], card=request.resident.card, infer_ms=infer_ms)
            for row, request in enumerate(requests)
        ]

    def ready(self, timeout_s: float) -> bool:
        """Wait until nothing is left to compile; False if that takes longer."""
        return self._executor.ready(timeout_s)

    def close(self) -> None:
        """End threads; nothing is judged afterwards."""
        self._executor.close()

    def _teacher(self, name: str) -> Teacher:
        if name not in self._teachers:
            teacher = load_teacher(name, self._teacher_weights.get(name))
            self._teachers[name] = self._executor.teacher(teacher)
        return self._teachers[name]


def _executor(device: torch.device, dtype: torch.dtype | None, budget: Budget) -> Executor:
    dtype = dtype or best_dtype(device)
    if device.type == "cpu":
        return CpuExecutor(dtype, budget)
    # Brings the compiler of GPU kernels along, which a machine without a GPU need not have.
    from workers.cuda_executor import CudaExecutor

    return CudaExecutor(device, dtype, budget)


def _groups(requests: Sequence[Request]) -> dict[tuple[int, int], list[int]]:
    """Row numbers by (teacher, input size), within a group sorted so that a resident's rows are neighbours."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, request in enumerate(requests):
        key = (id(request.resident.teacher), request.resident.card.input_size)
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: id(requests[row].resident))
    return groups
