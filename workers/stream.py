"""The stream as the loop sees it. The real one is in `redis_stream`; tests have a twin in memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    """One delivered stream entry.

    Attributes:
        product: whose stream it came from.
        id: the entry's id in that stream.
        fields: the wire form, see `producers.frame`.
    """

    product: str
    id: bytes
    fields: dict[bytes, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Settlement:
    """An entry whose row is durable, ready to be acknowledged.

    Attributes:
        product: whose stream it is in.
        id: the entry's id there.
        camera: of the frame.
        seq: of the frame.
        verdict: of its row.
        size: bytes of the entry's data.
        captured_at_ns: of the frame.
    """

    product: str
    id: bytes
    camera: str
    seq: int
    verdict: str
    size: int
    captured_at_ns: int


@dataclass(frozen=True, slots=True)
class VerdictMessage:
    """What goes out on `verdicts:{product}` the moment a frame is judged; `id` is that of the frame's
    entry, empty for one that is surely in the stream.
    """

    product: str
    camera: str
    seq: int
    verdict: str
    score: float
    threshold: float
    model_version: str
    reason: str
    total_ms: float
    id: bytes = b""

    @property
    def frame_id(self) -> str:
        """`product/camera/seq`."""
        return f"{self.product}/{self.camera}/{self.seq}"


class FrameStream(Protocol):
    """Delivers entries at least once. Every method may raise StreamUnavailable; calling again is then safe."""

    def read(self, count: int, block_ms: int) -> list[Entry]:
        """New entries of any product, at most about `count`; waits up to `block_ms` for the first."""
        ...

    def recover(self, held: Sequence[Entry], count: int) -> list[Entry]:
        """Keep what is `held` from being taken over; take over at most `count` that a dead consumer left behind."""
        ...

    def send_verdicts(self, verdicts: Sequence[VerdictMessage]) -> set[str]:
        """Publish verdicts, one for each frame: a frame that was answered before is not answered again.

        Returns:
            Ids of the frames that were answered by `unknown` when their deadline passed.
        """
        ...

    def settle(self, settlements: Sequence[Settlement]) -> None:
        """Acknowledge entries and count them as judged, once each."""
        ...

    def dead_letter(self, entry: Entry, camera: str, reason: str) -> None:
        """Move an entry to the dead-letter stream and count it."""
        ...

    def close(self) -> None:
        """Leave the consumer group if nothing is held."""
        ...
