"""Work on static buffers, captured once as CUDA graphs and replayed; where there is no CUDA it is simply done again."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from workers.device_faults import is_out_of_memory
from workers.streams import Stream

logger = logging.getLogger(__name__)

Compute = Callable[..., Any]
Pause = Callable[[], AbstractContextManager[None]]

# CUDA and its allocator take one capture at a time in a process, and no waiting for the whole device meanwhile; the
# tuning of kernels does that, so rehearsals are under the lock too.
capturing = threading.Lock()
_REHEARSALS = 2
# Somebody else's compilation may hold the lock for minutes; a version that is to serve does not wait for it.
_PATIENCE_S, _BUSY_S = 1.0, 10.0


class Job(Protocol):
    """Work of several sizes around a function that may be exchanged for a faster one."""

    def do(self, compute: Compute, capacity: int) -> None:
        """Do the work on the static buffers, for `capacity` rows."""

    def rehearse(self, compute: Compute, capacity: int) -> None:
        """Do the same on private buffers, so that everything is loaded, tuned and compiled before a capture."""


class Graphs:
    """Captures work on one device; all graphs share one pool of memory, since no two ever run at once.

    Sharing is sound because nothing outlives a replay in the pool: results are copied to buffers that lie outside.

    Args:
        device: of the work.
        patient: wait with every capture for as long as others capture.
    """

    def __init__(self, device: torch.device, *, patient: bool = True) -> None:
        self._device, self._patient = device, patient
        self._busy_until = 0.0
        # No other stream of this priority is made, so nobody else's work can fall into a capture.
        self._stream = Stream(device, priority=-1)
        # Apart from it: libraries keep a workspace for each stream. One that a capture allocates lies in the pool,
        # where nothing but replays uses it; one that a rehearsal has left would be shared with the next rehearsal.
        self._rehearsals = Stream(device)
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @property
    def exist(self) -> bool:
        """Whether the device has graphs."""
        return self._stream.cuda is not None

    def capture(self, job: Job, compute: Compute, capacity: int, *, patient: bool = False) -> Callable[[], None]:
        """Return a call that does the job for `capacity` rows, queued on the caller's stream.

        Args:
            job: the work.
            compute: what it is done with.
            capacity: rows.
            patient: wait for as long as others compile and capture, whatever is usual here; who does not wait gets a
                call that does without a graph.
        """

        def plainly() -> None:
            job.do(compute, capacity)

        if not self.exist:
            return plainly
        if not self._acquire(patient or self._patient):
            return plainly
        try:
            return self._captured(job, compute, capacity, plainly)
        finally:
            capturing.release()

    def _acquire(self, patient: bool) -> bool:
        """Take the lock; who may not wait for long does so for one capture, and not again for the next ones."""
        if patient:
            return capturing.acquire()
        if capturing.acquire(timeout=_PATIENCE_S if time.monotonic() > self._busy_until else 0.0):
            return True
        self._busy_until = time.monotonic() + _BUSY_S
        logger.info("a network runs without its graph until others are compiled")
        return False

    def _captured(self, job: Job, compute: Compute, capacity: int, plainly: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            with self._rehearsals.use():
                for _ in range(_REHEARSALS):
                    job.rehearse(compute, capacity)
            self._rehearsals.finish()
            try:
                return self._recorded(plainly)
            except RuntimeError as error:
                if is_out_of_memory(error) or "captur" not in str(error):
                    raise
                # A method that looks at values on the host cannot be replayed, but it can be computed.
                logger.warning("a network cannot be captured and runs without: %s", str(error).splitlines()[0])
                return plainly

    def _recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads copy, decode and allocate meanwhile: that is none of the capture's business. The stream is put
        # back by its own context too, since a capture that fails leaves it in place.
        with (
            self._stream.use(),
            torch.cuda.graph(graph, self._pool, self._stream.cuda, capture_error_mode="thread_local"),
        ):
            work()
        return _Recorded(graph, work)


@dataclass(frozen=True)
class _Recorded:
    """A graph, and the work whose tensors it reads: they must live as long."""

    graph: torch.cuda.CUDAGraph
    work: Callable[[], None]

    def __call__(self) -> None:
        self.graph.replay()


class Captures:
    """A job captured for each of a few capacities; a batch takes the smallest that holds it.

    Args:
        graphs: of the device.
        capacities: ascending.
        job: the work; it owns the static buffers.
        compute: the function that it is done with.
    """

    def __init__(self, graphs: Graphs, capacities: Sequence[int], job: Job, compute: Compute) -> None:
        self._graphs, self._job = graphs, job
        # The largest first: kernels are tuned at their first use, and memory of the pool is used again by smaller ones.
        self._works = {capacity: graphs.capture(job, compute, capacity) for capacity in reversed(capacities)}

    @property
    def lacks_graphs(self) -> bool:
        """Whether some of the work is done without a graph where there could be one."""
        return self._graphs.exist and not all(isinstance(work, _Recorded) for work in list(self._works.values()))

    def capacity(self, count: int) -> int:
        """Return the smallest capacity that holds `count` rows."""
        return min(capacity for capacity in self._works if capacity >= count)

    def __call__(self, capacity: int) -> None:
        """Do the job for `capacity` rows, one of the capacities."""
        self._works[capacity]()

    def adopt(self, compute: Compute, pause: Pause, *, ends_only: bool = False) -> None:
        """Do the job with another function from now on, one capacity after the other.

        Args:
            compute: gives what the one before gave.
            pause: no work is queued nor under way in its context.
            ends_only: only for full batches and for single frames; other capacities stay as they are.
        """
        capacities = sorted(self._works, reverse=True)
        for capacity in dict.fromkeys((capacities[0], capacities[-1])) if ends_only else capacities:
            work = self._graphs.capture(self._job, compute, capacity, patient=True)
            with pause():
                if capacity in self._works:
                    self._works[capacity] = work

    def drop_above(self, capacity: int) -> None:
        """Give up what is captured for more rows; no work may be under way."""
        for larger in [each for each in self._works if each > capacity]:
            del self._works[larger]


def capacities_up_to(most: int) -> tuple[int, ...]:
    """Return the capacities to capture: powers of two, and `most`."""
    return (*(2**power for power in range(most.bit_length()) if 2**power < most), most)
