"""Students of one structure on the device: slots for many versions, and the graphs that judge with them."""

import copy
import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from models.detector import Detector, Student
from models.slot_layout import SlotLayout, bind
from models.slotted import Slotted
from models.teachers import Features
from workers.graphs import Captures, Compute, capacities_up_to
from workers.lane import Lane
from workers.slot_table import SlotTable
from workers.streams import Mark, Streams

_serials = itertools.count()


class Held:
    """A version's bytes on the host, from where they can be brought to the device at any time.

    Args:
        bank: where it has its slot.
        student: prepared, on the CPU; its tensors become views of the bytes.

    Attributes:
        serial: names it; never used again.
        row: (layout.nbytes,) uint8, pinned where the device is CUDA.
    """

    def __init__(self, bank: "StudentBank", student: Student) -> None:
        self.serial, self.bank = next(_serials), bank
        self.row = torch.zeros(bank.layout.nbytes, dtype=torch.uint8, pin_memory=bank.device.type == "cuda")
        bank.layout.pack(student, self.row)
        bind(student, bank.layout.views(self.row))
        bank.held.add(self)
        weakref.finalize(self, bank.table.forget, self.serial)


class StudentBank:
    """Slots on the device, and two ways to judge: any mix by slots, or one version by plain convolutions.

    No frame meets half-written weights: a slot is written when the last batch that used it is done, and used when it
    is written. Both are orders between streams, so neither makes the host wait.

    Args:
        lane: of the frames.
        template: a prepared student on the CPU.
        detector: its method.
        slots: how many versions fit beside each other.
        most: largest batch, at most the lane's.
        streams: of the device.

    Attributes:
        held: the versions that are in use somewhere.
        mixed: judges batches of several versions.
        plain: judges batches of one.
    """

    def __init__(
        self, lane: Lane, template: Student, detector: Detector, slots: int, most: int, streams: Streams
    ) -> None:
        self.lane, self.layout, self.table = lane, SlotLayout.of(template), SlotTable(slots)
        self.held: weakref.WeakSet[Held] = weakref.WeakSet()
        self.device = lane.buffers.frames.device
        self._detector, self._streams = detector, streams
        self._slots = torch.zeros(slots, self.layout.nbytes, dtype=torch.uint8, device=self.device)
        self._written: dict[int, Mark] = {}
        self._used: dict[int, Mark] = {}
        self._one = torch.zeros(self.layout.nbytes, dtype=torch.uint8, device=self.device)
        self._one_is: int | None = None
        self._student = copy.deepcopy(template)
        bind(self._student, self.layout.views(self._one))
        self._index = torch.zeros(3 * most, dtype=torch.long, device=self.device)
        capacities = capacities_up_to(most)
        if self.device.type == "cuda":
            # the zeros are there before another stream writes versions over them
            torch.cuda.current_stream(self.device).synchronize()
        self.mixed = Captures(lane.graphs, capacities, self, self.slotted())
        self.plain = Captures(lane.graphs, capacities, self, self.alone())

    @property
    def nbytes(self) -> int:
        """Memory of all slots."""
        return self._slots.nbytes + self._one.nbytes

    def slotted(self) -> Compute:
        """Return what judges by the slots; each thread that calls it needs its own."""
        return _checked(Slotted(self._student, self._detector, self.lane.size, self._slots))

    def alone(self) -> Compute:
        """Return what judges all by the one version that was last called to the front."""
        return _checked(self._alone)

    def _alone(self, images: Tensor, features: Features, slots: Tensor) -> tuple[Tensor, Tensor]:
        maps = self._detector.scale_maps(self._student(images, features))
        fused = self._detector.fuse(maps, self.lane.size, self._student.statistics)
        return fused, self._detector.score(fused)

    def bring(self, versions: Sequence[Held]) -> None:
        """Queue copies of those that have no slot, in place of others that are not among them."""
        rows = {held.serial: held.row for held in versions}
        new = self.table.assign(rows)
        try:
            for serial, slot in new.items():
                self._streams.weights.wait(self._used.pop(slot, None))
                with self._streams.weights.use():
                    self._slots[slot].copy_(rows[serial], non_blocking=True)
                self._written[slot] = self._streams.weights.mark()
        except BaseException:
            # A slot that was not written must not count as one that was.
            for serial in new:
                self.table.forget(serial)
            raise

    def queue(self, rows: list[int], versions: Sequence[Held], staged: Tensor) -> Tensor:
        """Queue the judging of some of the lane's rows; the compute stream is the current one.

        Args:
            rows: in the lane's buffers, where the results go too.
            versions: of each; they have been brought.
            staged: pinned memory for the rows' numbers, until the batch is done.

        Returns:
            What is left of `staged`.
        """
        slots = [self.table.slot(held.serial) for held in versions]
        for slot in set(slots):
            self._streams.compute.wait(self._written.pop(slot, None))
        way = self.plain if len(set(slots)) == 1 else self.mixed
        capacity = way.capacity(len(rows))
        padding = capacity - len(rows)
        # Padding repeats the first row, and what comes of it goes where nobody looks.
        numbers = [*rows, *rows[:1] * padding, *slots, *slots[:1] * padding, *rows, *[self.lane.most] * padding]
        staged[: len(numbers)].copy_(torch.tensor(numbers))
        self._index[: len(numbers)].copy_(staged[: len(numbers)], non_blocking=True)
        if way is self.plain:
            self._call_to_the_front(versions[0].serial, slots[0])
        way(capacity)
        self._used.update(dict.fromkeys(slots, self._streams.compute.mark()))
        return staged[len(numbers) :]

    def _call_to_the_front(self, serial: int, slot: int) -> None:
        if self._one_is != serial:
            self._one.copy_(self._slots[slot])
            self._one_is = serial

    def do(self, compute: Compute, capacity: int) -> None:
        """Judge the rows that the index names, see `Job`."""
        self._judge(compute, capacity, self._index, (self.lane.buffers.maps, self.lane.buffers.scores))

    def rehearse(self, compute: Compute, capacity: int) -> None:
        """Judge the first row `capacity` times for nobody, see `Job`."""
        maps, scores = self.lane.buffers.maps, self.lane.buffers.scores
        nowhere = torch.empty_like(maps[:1]), torch.empty_like(scores[:1])
        self._judge(compute, capacity, torch.zeros_like(self._index), nowhere)

    def _judge(self, compute: Compute, capacity: int, index: Tensor, out: tuple[Tensor, Tensor]) -> None:
        rows, slots, targets = index[: 3 * capacity].view(3, capacity)
        buffers = self.lane.buffers
        images, *features = (_picked(each, rows) for each in (buffers.images, *buffers.features))
        for target, found in zip(out, compute(images, tuple(features), slots), strict=True):
            target.index_copy_(0, targets, found.float())


def _checked(judge: Compute) -> Compute:
    """Return what judges likewise, but gives no number as the score of a map that holds a value that is none."""

    def checked(images: Tensor, features: Features, slots: Tensor) -> tuple[Tensor, Tensor]:
        maps, scores = judge(images, features, slots)
        return maps, scores.where(maps.isfinite().flatten(1).all(1), torch.nan)

    return checked


def _picked(values: Tensor, rows: Tensor) -> Tensor:
    """Return some rows of (B, C, h, w) channels_last values, in that format."""
    return values.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
