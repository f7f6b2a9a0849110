"""The versions that speed is measured with, published into a registry of their own, and the engine that serves them.

A student's weights do not change its speed, so each is trained for one step and published for as many products as a
measurement needs. A memory of scenes does: it holds those of `NORMALS` pictures.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file

from benchmarks.document import say
from benchmarks.pictures import textures
from models.detectors import DETECTORS, make_detector
from models.errors import TeacherError
from models.images import TrainingImage
from models.registry import Registry
from models.settings import RECIPES, TrainingSettings
from models.teachers import Teacher, load_teacher
from models.training import TrainedStudent, train
from models.versions import draft_card
from workers.compiling import take_short_turns
from workers.engine import Budget, Engine, Resident

NORMALS = 64
_READY_S, _SAID_EVERY_S = 1200.0, 20.0


@dataclass(frozen=True)
class Network:
    """A detector beside a teacher.

    Attributes:
        name: its name in documents.
        teacher: key in `models.teachers.TEACHERS`.
        detector: key in `models.detectors.DETECTORS`.
        options: the detector's own.
        size: side of the input, pixels.
    """

    name: str
    teacher: str
    detector: str
    options: Mapping[str, Any] = field(default_factory=dict)
    size: int = 256


# ResNet-18 up to its fourth stage as teacher and as student, the published STFPM: 7.33 GFLOP a frame.
PAIR = Network("pair", "resnet18", "stfpm", {"width": 1.0})
_FAST = RECIPES["fast"]
DEFAULT = Network("default", _FAST.teacher, _FAST.detector, _FAST.detector_options, _FAST.input_size)
OTHERS = tuple(Network(name, "resnet18", name) for name in DETECTORS if name != PAIR.detector)
NETWORKS = {each.name: each for each in (PAIR, DEFAULT, *OTHERS)}


class Weights:
    """Weights files of the teachers; what is not here is made or reported as missing.

    Args:
        resnet18: a local file; without one, random weights, which are as fast, are written to `folder`.
        folder: for the file of random weights.
    """

    def __init__(self, resnet18: Path | None, folder: Path) -> None:
        self.random = resnet18 is None
        if resnet18 is None:
            resnet18 = folder / "random-resnet18.safetensors"
            torch.manual_seed(0)
            save_file(torchvision.models.resnet18(weights=None).state_dict(), resnet18)
        self.files = {"resnet18": str(resnet18)}
        self._teachers: dict[str, Teacher] = {}

    def teacher(self, name: str) -> Teacher:
        """Return a teacher, float32 on the CPU.

        Raises:
            TeacherError: its weights are not on this machine, or are those of another network.
        """
        if name not in self._teachers:
            self._teachers[name] = load_teacher(name, self.files.get(name))
        return self._teachers[name]

    def missing(self, name: str) -> str | None:
        """Return why a teacher cannot be had, None if it can."""
        try:
            self.teacher(name)
        except TeacherError as error:
            return str(error)
        return None


def trained(network: Network, weights: Weights, normals: int = NORMALS) -> TrainedStudent:
    """Train a network's student for one step on textures."""
    settings = TrainingSettings(
        detector=network.detector,
        detector_options=make_detector(network.detector, dict(network.options)).model_dump(mode="json"),
        teacher=network.teacher,
        input_size=network.size,
        steps=1,
        batch_size=2,
    )
    return train(textures(normals, network.size), settings, teacher=weights.teacher(network.teacher))


def publish(registry: Registry, student: TrainedStudent, product: str, threshold: float | None = None) -> str:
    """Publish a student for a product; return the version. A `threshold` replaces the calibrated one."""
    draft = draft_card(student, product, [TrainingImage(id="texture", sha256="0" * 64)])
    if threshold is not None:
        draft = draft.model_copy(update={"threshold": threshold})
    return registry.publish(draft, student.student).version


def make_engine(
    registry: Registry, weights: Weights, budget: Budget, dtype: torch.dtype | None = None, device: str = "auto"
) -> Engine:
    """Return an engine, on the device that there is unless another is named, in a process that is as a replica's."""
    take_short_turns()
    return Engine(registry, device, weights.files, dtype, budget)


@contextlib.contextmanager
def serving(engine: Engine, registry: Registry, student: TrainedStudent, products: int) -> Iterator[list[Resident]]:
    """Publish a student for products p0, p1, ..., take them into service, and wait until all is compiled; close the
    engine behind the block.
    """
    for number in range(products):
        product = f"p{number}"
        engine.install(engine.build(product, publish(registry, student, product)))
    await_ready(engine)
    found = [engine.resident(f"p{number}") for number in range(products)]
    try:
        yield [each for each in found if each is not None]
    finally:
        engine.close()


def await_ready(engine: Engine) -> None:
    """Wait for what the engine compiles in the background, so that no figure has a part of it.

    Raises:
        RuntimeError: it was not done in time.
    """
    started = time.monotonic()
    while not engine.ready(_SAID_EVERY_S):
        waited_s = time.monotonic() - started
        if waited_s > _READY_S:
            raise RuntimeError(f"the engine was not ready within {_READY_S:g} s")
        say(f"compiling for {waited_s:.0f} s")
