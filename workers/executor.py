"""Where an engine computes: one device's way from frames to maps and scores."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.cards import ModelCard
from models.detector import Detector, Student
from models.teachers import Teacher


@dataclass(frozen=True)
class Budget:
    """What an engine may use.

    Attributes:
        max_batch: frames in one batch.
        threads: CPU cores.
        memory_mb: of a GPU, for students; those used longest ago give way to others.
        compiled: whether networks are compiled in the background.
    """

    max_batch: int = 1
    threads: int = 1
    memory_mb: float = 4096
    compiled: bool = False


@dataclass(frozen=True, eq=False)
class Resident:
    """A version in memory, ready to judge; executors add what they need to find it again.

    Attributes:
        card: its description: product, version, threshold, input size.
        detector: the method.
        student: its networks and statistics, in the form that its executor computes in.
        teacher: shared between residents.
        nbytes: memory that this version alone takes on the device.
    """

    card: ModelCard
    detector: Detector
    student: Student
    teacher: Teacher
    nbytes: int


@dataclass(frozen=True)
class Request:
    """A frame for the engine, and the resident that shall judge it.

    Attributes:
        resident: of the frame's product.
        image: (H, W, 3) uint8 RGB of any size; it may lie on the engine's device, complete for every stream.
    """

    resident: Resident
    image: np.ndarray | Tensor


class Executor(ABC):
    """Holds teachers and students on one device and judges frames there.

    Attributes:
        device: of the computation.
        dtype: its precision.
    """

    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def teacher(self, teacher: Teacher) -> Teacher:
        """Return a float32 teacher in the form that this executor computes in."""

    @abstractmethod
    def resident(self, card: ModelCard, detector: Detector, student: Student, teacher: Teacher) -> Resident:
        """Bring a float32 student beside those that are here, ready to judge; `run` may go on meanwhile.

        Args:
            card: the version's description.
            detector: its method.
            student: float32, on the CPU.
            teacher: as `teacher` returned it.
        """

    @abstractmethod
    def run(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """Judge frames of one teacher and input size; a resident's frames are neighbours.

        Returns:
            (B, S, S) float32 anomaly maps and (B,) float64 scores, in order. Where a map holds one value that is not
            a finite number, it is worth nothing, and neither is its score.

        Raises:
            DeviceFault: the device is broken and no further batch can be judged.
        """

    @abstractmethod
    def ready(self, timeout_s: float) -> bool:
        """Wait until nothing is left to compile; False if that takes longer."""

    @abstractmethod
    def close(self) -> None:
        """End threads; nothing is judged afterwards."""
