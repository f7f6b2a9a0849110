"""The engine's work on a CPU: one stream of computation per core, packed convolutions, compiled programs."""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from models.cards import ModelCard
from models.detector import Detector, Student
from models.folding import fold_batchnorm
from models.fusing import fuse
from models.inference import infer, to_input
from models.packing import pack
from models.preprocess import fit_to_input
from models.programs import Program, State, state_of
from models.teachers import Teacher
from workers.compiling import BackgroundCompiler
from workers.executor import Budget, Executor, Request, Resident
from workers.heap import keep_freed_memory

logger = logging.getLogger(__name__)

Network = TypeVar("Network", Teacher, Student)

# Frames computed together: as many as leave a network's activations in a core's share of the cache.
_CHUNKS, _CHUNK_PIXELS = (1, 2, 4, 8, 16), 8 * 192 * 192


@dataclass(frozen=True, eq=False)
class CpuResident(Resident):
    """A version with the programs of its build.

    Attributes:
        teaching: images to the network's input and the teacher's features.
        studying: those to maps and scores.
        packed_teacher: the teacher, laid out for this version's input size.
        teacher_state: weights for the one.
        state: weights for the other.
    """

    teaching: Program
    studying: Program
    packed_teacher: Teacher
    teacher_state: State
    state: State


class CpuExecutor(Executor):
    """Judges in as many streams as it has cores, each with a thread of its own and no more.

    Two streams of one thread do more than one of two threads: nothing is split within a layer, so nothing is waited
    for at its end.

    Args:
        dtype: precision.
        budget: cores, largest batch, whether programs are compiled.
    """

    def __init__(self, dtype: torch.dtype, budget: Budget) -> None:
        self.device, self.dtype = torch.device("cpu"), dtype
        keep_freed_memory()
        self._threads, self._max_batch = max(1, budget.threads), budget.max_batch
        if self._threads > (cores := os.cpu_count() or 1):
            logger.warning(
                "%d threads take turns on %d cores; as many threads as cores judge as fast, or faster",
                self._threads,
                cores,
            )
        self._streams = ThreadPoolExecutor(self._threads, "stream", initializer=_one_thread)
        self._compiler = BackgroundCompiler(keeps=True) if budget.compiled else None
        self._programs: dict[tuple, Program] = {}
        self._teachers: dict[tuple[Teacher, int], Teacher] = {}

    def teacher(self, teacher: Teacher) -> Teacher:
        """See Executor."""
        return self._prepare(teacher)

    def resident(self, card: ModelCard, detector: Detector, student: Student, teacher: Teacher) -> Resident:
        """See Executor."""
        ready = self._prepare(student)
        packed = self._packed(teacher, card.input_size)
        with torch.inference_mode():
            images = torch.zeros(self._sizes(card.input_size)[-1], card.input_size, card.input_size, 3).byte()
            inputs = _taught(packed, self.dtype, images)
            pack(ready, (inputs[0], inputs[1:]), compiled=self._compiler is not None)
        state = state_of(ready)
        teacher_state = state_of(packed)
        dtype = self.dtype  # a program that held the executor would live as long as what is never collected
        # How a layer is laid out depends on the input size, so two sizes need not be one build of a teacher either.
        teaching = (teacher.name, *_described(teacher_state))
        build = (detector.model_dump_json(), teacher.name, card.input_size, *_described(state))
        resident = CpuResident(
            card=card,
            detector=detector,
            student=ready,
            teacher=teacher,
            nbytes=sum(_nbytes(each) for each in state.values()),
            teaching=self._program(teaching, packed, lambda net, images: _taught(net, dtype, images)),
            studying=self._program(build, ready, lambda net, images, *features: infer(detector, net, images, features)),
            packed_teacher=packed,
            teacher_state=teacher_state,
            state=state,
        )
        self._warm_up(resident)
        return resident

    def run(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """See Executor."""
        size = requests[0].resident.card.input_size
        maps = np.empty((len(requests), size, size), np.float32)
        scores = np.empty(len(requests), np.float64)
        futures, start = [], 0
        for count in cut(len(requests), self._threads, self._sizes(size)):
            part = slice(start, start + count)
            futures.append(self._streams.submit(_judge, requests[part], maps[part], scores[part]))
            start += count
        for future in futures:
            future.result()
        # The largest and the smallest value are finite exactly if all are.
        finite = np.isfinite(maps.max(axis=(1, 2))) & np.isfinite(maps.min(axis=(1, 2)))
        return maps, np.where(finite, scores, np.nan)

    def ready(self, timeout_s: float) -> bool:
        """Wait until everything is compiled; False if that takes longer."""
        return self._compiler is None or self._compiler.wait(timeout_s)

    def close(self) -> None:
        """See Executor."""
        self._streams.shutdown()
        if self._compiler is not None:
            self._compiler.close()

    def _prepare(self, network: Network) -> Network:
        ready = fuse(fold_batchnorm(network, network.probe()), network.probe()).requires_grad_(False)
        if isinstance(ready, Student):
            ready.round_up()
        return ready.to(dtype=self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _packed(self, teacher: Teacher, size: int) -> Teacher:
        """Return the teacher with weights laid out for one input size: for another each call would do that anew."""
        if (teacher, size) not in self._teachers:
            packed = copy.deepcopy(teacher)
            probe = torch.zeros(1, 3, size, size, dtype=self.dtype).to(memory_format=torch.channels_last)
            pack(packed, (probe,), compiled=self._compiler is not None)
            self._teachers[teacher, size] = packed
        return self._teachers[teacher, size]

    def _sizes(self, input_size: int) -> list[int]:
        """The numbers of frames that are computed together, ascending."""
        largest = min(self._max_batch, max(1, _CHUNK_PIXELS // input_size**2))
        return [count for count in _CHUNKS if count <= largest]

    def _program(self, build: tuple, network: nn.Module, compute: Callable[..., tuple[Tensor, ...]]) -> Program:
        # The first network of a build stays in memory with it: its Python is what the others run too.
        return self._programs.setdefault(build, Program(network, compute))

    def _warm_up(self, resident: CpuResident) -> None:
        """Compute every size once, since kernels are chosen at their first use, and have it compiled."""
        side = resident.card.input_size
        for count in self._sizes(side):
            images = torch.zeros(count, side, side, 3, dtype=torch.uint8)
            taught = self._streams.submit(_warmed, resident, images).result()
            if self._compiler is not None:
                teaching, studying = resident.teaching, resident.studying
                self._compiler.add(
                    (teaching, count, side), partial(teaching.compile, resident.teacher_state, (images,))
                )
                self._compiler.add((studying, count, side), partial(studying.compile, resident.state, taught))


def cut(frames: int, streams: int, sizes: Sequence[int]) -> list[int]:
    """Return how many frames are computed together: an equal share for each stream, in few parts, the largest first.

    Args:
        frames: How many there are.
        streams: How many compute at a time.
        sizes: The numbers of frames that can be computed together, 1 among them.
    """
    parts = []
    for stream in range(streams):
        rest = (frames + stream) // streams
        while rest:
            parts.append(max(size for size in sizes if size <= rest))
            rest -= parts[-1]
    return sorted(parts, reverse=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _taught(teacher: Teacher, dtype: torch.dtype, images: Tensor) -> tuple[Tensor, ...]:
    """Return the network's input and the teacher's features of (B, S, S, 3) uint8 RGB images."""
    inputs = to_input(images, teacher, dtype)
    return (inputs, *teacher(inputs))


@torch.no_grad()
def _warmed(resident: CpuResident, images: Tensor) -> tuple[Tensor, ...]:
    """Judge images of one resident; return what its student was given."""
    taught = resident.teaching(resident.packed_teacher, resident.teacher_state, (images,))
    resident.studying(resident.student, resident.state, taught)
    return taught


@torch.inference_mode()
def _judge(requests: Sequence[Request], maps: np.ndarray, scores: np.ndarray) -> None:
    """Judge what is computed together, into `maps` and `scores`."""
    first = requests[0].resident
    assert isinstance(first, CpuResident)
    images = np.stack([fit_to_input(np.asarray(request.image), first.card.input_size) for request in requests])
    taught = first.teaching(first.packed_teacher, first.teacher_state, (torch.from_numpy(images),))
    start = 0
    while start < len(requests):
        resident = requests[start].resident
        assert isinstance(resident, CpuResident)
        same = next((row for row in range(start, len(requests)) if requests[row].resident is not resident), None)
        stop = start + _largest((same or len(requests)) - start)
        part = tuple(each[start:stop] for each in taught)
        found, score = resident.studying(resident.student, resident.state, part)
        maps[start:stop], scores[start:stop] = found.numpy(), score.numpy()
        start = stop


def _largest(count: int) -> int:
    """The largest size that is computed together and not larger than `count`."""
    return max(size for size in _CHUNKS if size <= count)


def _described(state: State) -> list[tuple]:
    return [(name, tuple(each.shape), each.dtype, each.layout) for name, each in state.items()]


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
