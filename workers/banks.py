"""What an executor keeps on a device: a lane for each teacher and input size, a bank for each structure of students."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch

from models.detector import Detector, Student
from models.slotted import Signature, signature
from models.slotted_kernel import tuning
from models.teachers import Teacher
from workers.compiling import BackgroundCompiler
from workers.device_faults import is_out_of_memory
from workers.executor import Budget
from workers.graphs import Captures, Compute, Graphs, Pause, capturing
from workers.lane import Lane
from workers.streams import Streams
from workers.student_bank import Held, StudentBank

logger = logging.getLogger(__name__)

Made = TypeVar("Made")
Owner = TypeVar("Owner")

# The old and the new version of a product lie beside each other, whatever the budget says.
_FEWEST_SLOTS = 2
# Of one structure: what small students do not need of the budget stays free for others.
_MOST_SLOTS = 256
# Each capacity of each structure is compiled for itself; beyond the limit the compiler would give up without a word.
_RECOMPILATIONS = 4096
# No table of what was timed in the replicas' logs.
_TUNED = {"max_autotune": True, "autotune_num_choices_displayed": 0}


class Banks:
    """Builds lanes and banks as versions need them, within a budget of memory.

    Args:
        device: where to compute.
        dtype: of networks and features.
        budget: what may be used.

    Attributes:
        max_batch: largest batch that fits, as far as is known.
        streams: of the device.
        queueing: held by who queues work that reads or writes lanes' buffers or banks' slots.
        by_structure: all banks.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, budget: Budget) -> None:
        self.max_batch, self.streams, self.queueing = budget.max_batch, Streams.of(device), threading.Lock()
        self.by_structure: dict[tuple[int, Signature], StudentBank] = {}
        self._lanes: dict[tuple[int, int], Lane] = {}
        self._device, self._dtype, self._budget = device, dtype, budget
        self._graphs, self._building = Graphs(device, patient=not budget.compiled), threading.Lock()
        self._compiler = BackgroundCompiler() if budget.compiled else None
        self._improved: set[Lane] = set()

    def hold(self, detector: Detector, student: Student, teacher: Teacher, size: int) -> Held:
        """Take a prepared student from the CPU, and bring it to the device if nobody must make room for it."""
        with self._building:
            held = Held(self._bank(self._lane(teacher, size), detector, student), student)
        with self.queueing:
            if held.bank.table.free():
                held.bank.bring([held])
        return held

    def _lane(self, teacher: Teacher, size: int) -> Lane:
        key = (id(teacher), size)
        if key not in self._lanes:
            lane = self._smaller(lambda _: Lane(teacher, size, self.max_batch, self._dtype, self._graphs))
            self._lanes[key] = lane
        return self._lanes[key]

    def _bank(self, lane: Lane, detector: Detector, student: Student) -> StudentBank:
        key = (id(lane), signature(student, detector, lane.size))
        if key not in self.by_structure:
            self._drop_deserted()
            free = self._budget.memory_mb * 1e6 - sum(bank.nbytes for bank in self.by_structure.values())
            # Half of what is left, so that other structures find room too.
            slots = max(_FEWEST_SLOTS, min(_MOST_SLOTS, int(free / 2 / key[1][3].nbytes)))
            bank = self._smaller(
                lambda tries: StudentBank(
                    lane, student, detector, max(_FEWEST_SLOTS, slots >> tries), self.max_batch, self.streams
                )
            )
            self.by_structure[key] = bank
            # Not before the bank is there: compiling would keep it from being captured.
            if lane not in self._improved:
                self._improved.add(lane)
                self._improve(lane, lambda lane: (lane.looks, lane.look))
            self._improve(bank, lambda bank: (bank.plain, bank.alone()))
            self._improve(bank, lambda bank: (bank.mixed, bank.slotted()))
        return self.by_structure[key]

    def _improve(self, owner: Owner, way: Callable[[Owner], tuple[Captures, Compute]]) -> None:
        """Let faster forms of a way take the place of what is captured, one by one; not if its owner is gone."""
        if self._compiler is None:
            return
        known = weakref.ref(owner)

        def adopt(form: Callable[[Captures, Compute, Pause], None]) -> None:
            if (owner := known()) is not None:
                form(*way(owner), self.pause)

        for rank, form in enumerate((_adopt_graphs, _adopt_compiled, _adopt_tuned)):
            self._compiler.add(None, partial(adopt, form), rank)

    def _drop_deserted(self) -> None:
        """Give the memory of structures back that no version in use has."""
        with self.pause():
            for key in [key for key, bank in self.by_structure.items() if not len(bank.held)]:
                del self.by_structure[key]

    def _smaller(self, make: Callable[[int], Made]) -> Made:
        """Make something that takes memory, with smaller batches if need be; it is told how often it was tried."""
        tries = 0
        while True:
            # Where nothing is compiled later, this is the time to tune what is captured.
            tuned = nullcontext() if self._compiler else tuning()
            try:
                with torch.inference_mode(False), torch.no_grad(), tuned:
                    return make(tries)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.max_batch == 1:
                    raise
            self.shrink(self.max_batch)
            tries += 1

    def shrink(self, count: int) -> None:
        """Remember that `count` rows are too many."""
        if self.max_batch == self._budget.max_batch:
            logger.warning("%s: out of memory with %d frames at once; smaller batches from now on", self._device, count)
        with self.pause():
            # A power of two, since those are captured.
            self.max_batch = min(self.max_batch, 1 << (max(1, count // 2).bit_length() - 1))
            for lane in list(self._lanes.values()):
                lane.looks.drop_above(self.max_batch)
            for bank in list(self.by_structure.values()):
                bank.mixed.drop_above(self.max_batch)
                bank.plain.drop_above(self.max_batch)
        # While a graph is captured nothing may be freed; what is captured then frees the cache itself.
        if self._device.type == "cuda" and capturing.acquire(blocking=False):
            try:
                torch.cuda.empty_cache()
            finally:
                capturing.release()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Let no batch be queued nor under way."""
        with self.queueing:
            self.streams.finish()
            yield

    def ready(self, timeout_s: float) -> bool:
        """Wait until everything is compiled; False if that takes longer."""
        return self._compiler is None or self._compiler.wait(timeout_s)

    def close(self) -> None:
        """End the compiling."""
        if self._compiler:
            self._compiler.close()


def _adopt_graphs(captures: Captures, compute: Compute, pause: Pause) -> None:
    """Capture what was made while others were compiled."""
    if captures.lacks_graphs:
        with torch.no_grad():
            captures.adopt(compute, pause)


def _adopt_compiled(captures: Captures, compute: Compute, pause: Pause) -> None:
    with torch.no_grad(), tuning():
        captures.adopt(_compiled(compute), pause)


def _adopt_tuned(captures: Captures, compute: Compute, pause: Pause) -> None:
    """Of every convolution time several forms, which takes minutes and is worth it for full batches and for
    the time of a single frame.
    """
    with torch.no_grad(), tuning():
        captures.adopt(_compiled(compute, _TUNED), pause, ends_only=True)


def _compiled(compute: Compute, options: dict[str, Any] | None = None) -> Compute:
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = _RECOMPILATIONS
    return torch.compile(compute, dynamic=False, options=options)
