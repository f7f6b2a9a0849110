"""Publishing one camera's frames through its spool, so that neither a lost server nor a killed producer loses any."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import redis

from producers.errors import FrameError, ServerUnavailable, SpoolFull, SpoolUnwritable
from producers.frame import Frame
from producers.publisher import Published, Publisher
from producers.replaying import Replayer
from producers.settings import PublisherSettings
from producers.spool import Spool
from producers.spooled import Record

_LOOK_S = 0.05

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpoolCounts:
    """What a `SpooledPublisher` did, and what waits.

    Attributes:
        published: frames in the stream, replayed ones among them.
        spooled: frames that went to the spool.
        replayed: frames that went from the spool into the stream, those of an earlier producer too.
        shed: frames given up, wherever; their notes may still wait.
        lost: frames whose record was damaged.
        waiting: frames in the spool.
        notes: notes of shed frames in the spool.
        gave_way: older frames in the stream that were shed for these by `drop_oldest`.
    """

    published: int = 0
    spooled: int = 0
    replayed: int = 0
    shed: int = 0
    lost: int = 0
    waiting: int = 0
    notes: int = 0
    gave_way: int = 0


class SpooledPublisher:
    """Publishes one camera's frames, in order, each once: directly, or through the spool while Redis is away.

    Promise: a frame that `publish` returned for is in the stream, counted as shed, or in the spool, from where it
    follows as soon as Redis answers; a spool that an earlier producer left goes first. While anything is in the spool,
    new frames go behind it. A thread of its own replays; `close` ends it, and what is left waits for the next one.

    Args:
        product: the product.
        camera: the camera.
        server: a client that returns bytes; one that fails fast, since `publish` waits for it.
        spool: the camera's spool, closed by `close`.
        settings: bounds, policy and patience.
        say: told in a line when Redis goes and comes back, when a full stream makes the camera wait, or when the disk
            takes nothing.
    """

    def __init__(
        self,
        product: str,
        camera: str,
        server: redis.Redis,
        spool: Spool,
        settings: PublisherSettings,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self._product, self._camera, self._spool, self._say = product, camera, spool, say
        self._settings = settings
        self._publisher = Publisher(server, settings.model_copy(update={"retry_s": settings.spool_after_s}), say)
        self._replayer = Replayer(product, camera, self._publisher, spool, say)
        self._first: int | None = None
        self._order = threading.Lock()
        self._disk_failed = False
        self._direct = self._direct_shed = self._spooled = 0

    def follow(self, find_server: Callable[[], redis.Redis | None]) -> None:
        """While Redis is away, ask for a client of its new address; None says that there is none."""
        self._replayer.find_server = find_server

    def last_seq(self) -> int:
        """The camera's last used number, of ledger and spool; while Redis is away, of the spool."""
        try:
            return max(self._spool.last_seq, self._publisher.last_seq(self._product, self._camera))
        except ServerUnavailable:
            return self._spool.last_seq

    def publish(self, frame: Frame, stop: threading.Event | None = None) -> Published:
        """Publish one frame or put it into the spool; a bound that is reached is the policy's.

        Args:
            frame: the frame, of this camera.
            stop: when set while stream or spool is full, the frame is given up and counted as shed.

        Raises:
            FrameError: the camera's numbers went back, as they do when two producers use one camera's name, or the
                frame is another camera's.
            SpoolError: the spool cannot be read.
        """
        if (frame.product, frame.camera) != (self._product, self._camera):
            raise FrameError(f"{frame.frame_id} is no frame of {self._product}/{self._camera}, whose spool this is")
        with self._order:
            self._replayer.raise_failure()
            if self._first is None:
                self._first = frame.seq
            if self._spool.empty:
                published = self._publish_directly(frame, stop or threading.Event())
                if published is not None:
                    return published
            last = self._spool.last_seq
            if frame.seq <= last:
                raise FrameError(f"{frame.frame_id} is not above seq {last}, the last in the spool {self._spool.path}")
            record = Record(frame.seq, self._first, frame.captured_at_ns, frame.picture)
            return self._append(record, stop or threading.Event())

    def counts(self) -> SpoolCounts:
        """What was done so far."""
        waiting, notes = self._spool.waiting()
        return SpoolCounts(
            published=self._direct + self._replayer.replayed,
            spooled=self._spooled,
            replayed=self._replayer.replayed,
            shed=self._direct_shed + self._replayer.shed + notes,
            lost=self._replayer.lost,
            waiting=waiting,
            notes=notes,
            gave_way=self._publisher.gave_way,
        )

    def drain(self, stop: threading.Event) -> bool:
        """Wait until the spool is empty, until `stop`, or until Redis has been away for `retry_s`; whether it is empty.

        Raises:
            FrameError, SpoolError: as `publish`.
        """
        while not self._spool.wait_empty(_LOOK_S):
            self._replayer.raise_failure()
            if stop.is_set() or self._replayer.away_s > self._settings.retry_s:
                return False
        return True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._replayer.closed

    def close(self) -> None:
        """End the replaying and close the spool; what is in it stays."""
        self._replayer.close()
        self._spool.close()

    def __enter__(self) -> "SpooledPublisher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _publish_directly(self, frame: Frame, stop: threading.Event) -> Published | None:
        """None if the server is away, and the frame may be in the stream or not: its replay finds out."""
        assert self._first is not None
        self._publisher.begin_run(self._product, self._camera, self._first)
        try:
            published = self._publisher.publish(frame, stop)
        except ServerUnavailable as error:
            self._replayer.note_away(error)
            return None
        self._direct += published is Published.ADDED
        self._direct_shed += published is Published.SHED
        return published

    def _append(self, record: Record, stop: threading.Event) -> Published:
        policy = self._settings.policy
        while True:
            try:
                self._spool.append(record)
                self._spooled += 1
                self._disk_failed = False
                return Published.SPOOLED
            except SpoolFull:
                bound = "spool"
            except SpoolUnwritable as error:
                bound = "disk"
                self._note_disk(error)
            if not self._spool.could_take(record):
                return self._shed(record, f"{policy} spool")  # larger than all of it
            if policy == "drop_oldest" and bound == "spool" and self._made_room():
                continue
            if policy != "block":
                return self._shed(record, f"{policy} {bound}")
            if stop.wait(_LOOK_S):
                return self._shed(record, "stopped while full")
            self._replayer.raise_failure()

    def _made_room(self) -> bool:
        try:
            return self._spool.shed_oldest("drop_oldest spool")
        except SpoolUnwritable as error:
            self._note_disk(error)
            return False

    def _shed(self, record: Record, reason: str) -> Published:
        self._spool.note(record.shed(reason))
        return Published.SHED

    def _note_disk(self, error: SpoolUnwritable) -> None:
        if not self._disk_failed:
            kept = "the camera waits" if self._settings.policy == "block" else "frames are shed and counted"
            self._say(f"{error}; {kept} until it can")
        self._disk_failed = True
