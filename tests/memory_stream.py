"""The stream's twin in memory: the same promises as `workers.redis_stream`, and faults at a chosen call."""

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from conftest import wire

from producers.frame import Frame
from workers.errors import StreamUnavailable
from workers.stream import Entry, Settlement, VerdictMessage

T = TypeVar("T")


class MemoryServer:
    """What Redis holds: streams, deliveries and the ledger. Several `MemoryStream`s may share it.

    Attributes:
        entries: what is in the streams, by id, in order.
        owners: consumer of each delivered entry, by id.
        deliveries: how often each entry was delivered, by id.
        gone: names of consumers that died.
        captured: frames by camera that were added.
        judged: likewise settled.
        dead: likewise dead-lettered.
        reasons: of the dead letters.
        verdicts: everything that was sent.
        answered: ids of the frames that have a verdict.
        late: ids of the frames that a deadline answered.
        journal: what happened, in order: (`verdict` or `settle`, sequence number).
    """

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.owners: dict[bytes, str] = {}
        self.deliveries = Counter[bytes]()
        self.gone: set[str] = set()
        self.captured, self.judged, self.dead = Counter[str](), Counter[str](), Counter[str]()
        self.reasons: list[str] = []
        self.verdicts: list[VerdictMessage] = []
        self.journal: list[tuple[str, int]] = []
        self.answered: set[str] = set()
        self.late: set[str] = set()
        self.changed = threading.Condition()
        self._ids = itertools.count(1)

    def add(self, frames: Iterable[Frame]) -> None:
        """Publish frames."""
        for frame in frames:
            self.add_fields(frame.product, wire(frame), frame.camera)

    def add_fields(self, product: str, fields: dict[bytes, bytes], camera: str = "?") -> None:
        """Publish anything."""
        with self.changed:
            entry = Entry(product, b"%d-0" % next(self._ids), fields)
            self.entries[entry.id] = entry
            self.captured[camera] += 1
            self.changed.notify_all()

    @property
    def balanced(self) -> bool:
        """Whether every captured frame is judged, dead or still there."""
        return self.captured.total() == self.judged.total() + self.dead.total() + len(self.entries)


class MemoryStream:
    """A consumer; see `workers.stream.FrameStream`.

    Attributes:
        calls: how many calls of each method there were, reads that found nothing left out.
        fail_at: the method and the number of its call that loses the connection, the first is 1.
        executed: whether the server has carried that call out before the connection is lost.
        away: every call fails.
        closed: whether the consumer left.
    """

    def __init__(self, server: MemoryServer, consumer: str = "me") -> None:
        self._server, self._consumer = server, consumer
        self.calls = Counter[str]()
        self.fail_at: tuple[str, int] | None = None
        self.executed = False
        self.away = self.closed = False

    def read(self, count: int, block_ms: int) -> list[Entry]:
        """See FrameStream."""

        def take() -> list[Entry]:
            return self._deliver(self._new(count))

        def wait_and_take() -> list[Entry]:
            found = take()
            if not found and block_ms:
                self._server.changed.wait(block_ms / 1e3)
                found = take()
            return found

        return self._call("read", wait_and_take, counts=bool(self._new(1)))

    def recover(self, held: Sequence[Entry], count: int) -> list[Entry]:
        """See FrameStream. Idle is here whatever a dead consumer had, and what got lost on the way to this one."""

        def take_over() -> list[Entry]:
            owners, kept = self._server.owners, {entry.id for entry in held}
            owners |= {entry.id: self._consumer for entry in held if entry.id in owners}
            lost = [
                entry_id
                for entry_id, owner in owners.items()
                if owner in self._server.gone or (owner == self._consumer and entry_id not in kept)
            ]
            return self._deliver([self._server.entries[entry_id] for entry_id in lost[:count]])

        return self._call("recover", take_over)

    def send_verdicts(self, verdicts: Sequence[VerdictMessage]) -> set[str]:
        """See FrameStream."""

        def send() -> set[str]:
            new = [each for each in verdicts if each.frame_id not in self._server.answered | self._server.late]
            self._server.verdicts += new
            self._server.answered |= {each.frame_id for each in new}
            self._server.journal += [("verdict", verdict.seq) for verdict in new]
            return {each.frame_id for each in verdicts} & self._server.late

        return self._call("send_verdicts", send)

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """See FrameStream."""

        def acknowledge() -> None:
            for item in settlements:
                if self._remove(item.id):
                    self._server.judged[item.camera] += 1
                    self._server.journal.append(("settle", item.seq))

        self._call("settle", acknowledge)

    def dead_letter(self, entry: Entry, camera: str, reason: str) -> None:
        """See FrameStream."""

        def move() -> None:
            if self._remove(entry.id):
                self._server.dead[camera] += 1
                self._server.reasons.append(reason)

        self._call("dead_letter", move)

    def close(self) -> None:
        """See FrameStream."""

        def leave() -> None:
            self.closed = self._consumer not in self._server.owners.values()

        self._call("close", leave)

    def _new(self, count: int) -> list[Entry]:
        with self._server.changed:
            return [entry for entry in self._server.entries.values() if entry.id not in self._server.owners][:count]

    def _deliver(self, entries: list[Entry]) -> list[Entry]:
        ids = [entry.id for entry in entries]
        self._server.owners |= dict.fromkeys(ids, self._consumer)
        self._server.deliveries.update(ids)
        return entries

    def _remove(self, entry_id: bytes) -> bool:
        self._server.owners.pop(entry_id, None)
        removed = self._server.entries.pop(entry_id, None) is not None
        self._server.changed.notify_all()
        return removed

    def _call(self, method: str, action: Callable[[], T], counts: bool = True) -> T:
        with self._server.changed:
            self.calls[method] += counts
            fails = counts and (method, self.calls[method]) == self.fail_at
            if self.away or (fails and not self.executed):
                raise StreamUnavailable("Redis did not answer: connection lost")
            result = action()
            if fails:
                raise StreamUnavailable("Redis did not answer: connection lost")
            return result
