"""The executor of a GPU: any mix of products is one batch, by a few graphs that were captured beforehand.

A batch's way: frames into pinned memory, on their own stream to the device, one teacher pass for all, for each
structure of students one graph, results on their own stream back. Nothing is captured or compiled anew when the mix
changes, a version is swapped or a product is added, as long as its students are built like others that are here.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import Empty

import numpy as np
import torch
from torch import Tensor

from models.cards import ModelCard
from models.detector import Detector, Student
from models.device_resize import fit_on_device
from models.inference import prepare
from models.preprocess import fit_to_input
from models.slotted_conv import try_kernel
from models.teachers import Teacher
from workers.banks import Banks
from workers.device_faults import is_fault, is_out_of_memory
from workers.errors import DeviceFault
from workers.executor import Budget, Executor, Request, Resident
from workers.graphs import capturing
from workers.lane import Lane, Stage
from workers.streams import Mark, finish
from workers.student_bank import Held, StudentBank

logger = logging.getLogger(__name__)

# Values of images that are resized at once, four bytes each meanwhile.
_FITTED_VALUES = 1 << 24


@dataclass(frozen=True, eq=False)
class CudaResident(Resident):
    """A version whose student lies on the host and has a slot on the device when it is needed."""

    held: Held


@dataclass(eq=False)
class _Batch:
    """A batch under way: its results when `done` is done, and the stage that it gives back then."""

    maps: Tensor
    scores: Tensor
    stage: Stage
    done: Mark


class CudaExecutor(Executor):
    """Judges on one device; on one without CUDA it takes the same way without graphs, for tests.

    Args:
        device: where to compute.
        dtype: of networks and features.
        budget: what it may use.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, budget: Budget) -> None:
        self.device, self.dtype = device, dtype
        self._banks = Banks(device, dtype, budget)
        self._streams = self._banks.streams
        self._fault: str | None = None
        if device.type == "cuda":
            with capturing:
                try_kernel(device)

    @property
    def max_batch(self) -> int:
        """Largest batch that is computed at once, as far as is known of the memory."""
        return self._banks.max_batch

    # --- versions

    def teacher(self, teacher: Teacher) -> Teacher:
        """See `Executor.teacher`."""
        with self._guarded():
            return prepare(teacher, self.device, self.dtype)

    def resident(self, card: ModelCard, detector: Detector, student: Student, teacher: Teacher) -> Resident:
        """See `Executor.resident`; a structure that is new here is captured first, which takes seconds."""
        prepared = prepare(student, torch.device("cpu"), self.dtype)
        with self._guarded():
            held = self._banks.hold(detector, prepared, teacher, card.input_size)
        return CudaResident(card, detector, prepared, teacher, held.bank.layout.nbytes, held)

    # --- batches

    def run(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """See `Executor.run`.

        There is one frame at least. Frames beyond the largest batch, or of more versions than there are slots, are
        computed in parts that overlap.
        Several threads may run batches at once: one's copies then overlap with another's computation.
        """
        done: list[_Batch] = []
        pending: deque[_Batch] = deque()
        start = 0
        with self._guarded():
            lane = _held(requests[0]).bank.lane
            try:
                while start < len(requests) or pending:
                    stage = self._stage(lane, wait=not pending) if start < len(requests) else None
                    if stage is None:
                        self._collect(lane, pending[0])
                        done.append(pending.popleft())
                        continue
                    part = self._part(requests[start:])
                    batch = self._attempt(lane, stage, part)
                    if batch is not None:
                        pending.append(batch)
                        start += len(part)
            finally:
                for batch in pending:
                    self._release(lane, batch.stage)
        maps, scores = ([getattr(batch, name).numpy() for batch in done] for name in ("maps", "scores"))
        return (maps[0] if len(maps) == 1 else np.concatenate(maps)), np.concatenate(scores).astype(np.float64)

    def _part(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Return as many as can be judged at once: not too many, nor of too many versions of a structure."""
        versions: dict[StudentBank, set[Held]] = {}
        for count, held in enumerate(map(_held, requests[: self.max_batch])):
            seen = versions.setdefault(held.bank, set())
            seen.add(held)
            if len(seen) > held.bank.table.slots:
                return requests[:count]
        return requests[: self.max_batch]

    def _attempt(self, lane: Lane, stage: Stage, requests: Sequence[Request]) -> _Batch | None:
        """Send a batch on its way; None if it does not fit the memory and smaller ones shall be tried."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._launch(lane, stage, requests)
        except BaseException as error:
            self._release(lane, stage)
            if not is_out_of_memory(error) or len(requests) == 1:
                raise
        if len(requests) <= self.max_batch:  # else another thread has found it out meanwhile
            self._banks.shrink(len(requests))
        return None

    def _launch(self, lane: Lane, stage: Stage, requests: Sequence[Request]) -> _Batch:
        count, buffers = len(requests), lane.buffers
        self._bring_frames(lane, stage, requests)
        arrived = self._streams.frames.mark()
        host = partial(torch.empty, pin_memory=self.device.type == "cuda")
        maps, scores = host((count, lane.size, lane.size)), host((count,))
        with self._banks.queueing, self._streams.compute.use():
            if count > self.max_batch:
                raise torch.OutOfMemoryError(f"{count} frames at once were found to be too many meanwhile")
            self._streams.compute.wait(arrived)
            buffers.frames[:count].copy_(stage.arrived[:count])
            self._queue(lane, stage, requests)
            # The next batch may overwrite the buffers before this one's results have left the device.
            stage.maps[:count].copy_(buffers.maps[:count])
            stage.scores[:count].copy_(buffers.scores[:count])
            computed = self._streams.compute.mark()
        self._streams.results.wait(computed)
        with self._streams.results.use():
            maps.copy_(stage.maps[:count], non_blocking=True)
            scores.copy_(stage.scores[:count], non_blocking=True)
        return _Batch(maps, scores, stage, self._streams.results.mark())

    def _bring_frames(self, lane: Lane, stage: Stage, requests: Sequence[Request]) -> None:
        """Fit images to the input, those on the host there and those on the device there."""
        images = [request.image for request in requests]
        frames = stage.frames.numpy()
        for row, image in enumerate(images):
            if isinstance(image, np.ndarray):
                frames[row] = fit_to_input(image, lane.size)
        with self._streams.frames.use():
            if any(isinstance(image, np.ndarray) for image in images):
                stage.arrived[: len(images)].copy_(stage.frames[: len(images)], non_blocking=True)
            for start, alike in _runs(images):
                fitted = fit_on_device(torch.stack(alike), lane.size)
                stage.arrived[start : start + len(alike)].copy_(fitted)
                for image in alike:
                    self._streams.frames.borrow(image)

    def _queue(self, lane: Lane, stage: Stage, requests: Sequence[Request]) -> None:
        """Queue one teacher pass for all, and each structure's students on their rows."""
        lane.looks(lane.looks.capacity(len(requests)))
        rows_of: dict[StudentBank, list[int]] = {}
        for row, request in enumerate(requests):
            rows_of.setdefault(_held(request).bank, []).append(row)
        staged = stage.index
        for bank, rows in rows_of.items():
            versions = [_held(requests[row]) for row in rows]
            bank.bring(versions)
            staged = bank.queue(rows, versions, staged)

    # --- stages

    def _stage(self, lane: Lane, wait: bool) -> Stage | None:
        """Return a free stage; without waiting None if there is none, for who waits holding one waits for ever."""
        try:
            return lane.stages.get(block=wait)
        except Empty:
            return None

    def _collect(self, lane: Lane, batch: _Batch) -> None:
        finish(batch.done)
        lane.stages.put(batch.stage)

    def _release(self, lane: Lane, stage: Stage) -> None:
        """Give back the stage of a batch that failed, once nothing queued uses it any more."""
        try:
            self._streams.finish()
        except RuntimeError as error:
            logger.debug("%s: %s", self.device, error)  # the error that led here says it already
        finally:
            lane.stages.put(stage)

    # --- trouble

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Tell a broken device from other errors, and stay with it: what it computes from then on is worth nothing."""
        if self._fault is not None:
            raise DeviceFault(self._fault)
        try:
            yield
        except RuntimeError as error:
            if not is_fault(error):
                raise
            self._fault = f"{self.device} is broken: {str(error).splitlines()[0]}"
            logger.error("%s", self._fault)
            raise DeviceFault(self._fault) from error

    def ready(self, timeout_s: float) -> bool:
        """See `Executor.ready`."""
        return self._banks.ready(timeout_s)

    def close(self) -> None:
        """See `Executor.close`."""
        self._banks.close()


def _runs(images: Sequence[np.ndarray | Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield neighbours on the device that are alike, and the first one's row; not too many of large ones at once."""
    start = 0
    while start < len(images):
        first = images[start]
        if not isinstance(first, Tensor):
            start += 1
            continue
        alike = [first]
        most = max(1, _FITTED_VALUES // max(1, first.numel()))
        for other in images[start + 1 : start + most]:
            if not isinstance(other, Tensor) or (other.shape, other.dtype) != (first.shape, first.dtype):
                break
            alike.append(other)
        yield start, alike
        start += len(alike)


def _held(request: Request) -> Held:
    if not isinstance(request.resident, CudaResident):
        raise TypeError(f"{request.resident.card.product}: this version was brought here by another executor")
    return request.resident.held
