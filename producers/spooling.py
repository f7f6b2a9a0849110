"""Publishing one camera's frames through its spool, so that neither a lost server nor a killed producer loses any."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import redis

from producers.errors import FrameError, ServerUnavailable, SpoolFull, SpoolUnwritable
from producers.frame import Frame, Picture
from producers.publisher import NEVER, Published, Publisher
from producers.settings import PublisherSettings
from producers.spool import Spool
from producers.spooled import Lost, Record

_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_LOOK_S = 0.05
_NO_PICTURE = Picture("raw", (0, 0, 0), b"")

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
    """

    published: int = 0
    spooled: int = 0
    replayed: int = 0
    shed: int = 0
    lost: int = 0
    waiting: int = 0
    notes: int = 0


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
        say: told in a line when Redis goes and comes back, or when the disk takes nothing.
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
        self._publisher = Publisher(server, settings.model_copy(update={"retry_s": settings.spool_after_s}))
        self._first: int | None = None
        self._known: int | None = None
        self._order = threading.Lock()
        self._closing = threading.Event()
        self._failure: Exception | None = None
        self._away_since: float | None = None
        self._find_server: Callable[[], redis.Redis | None] = lambda: None
        self._disk_failed = False
        self._direct = self._direct_shed = self._spooled = 0
        self._replayed = self._replayed_shed = self._lost = 0
        self._replayer = threading.Thread(target=self._run, name=f"spool {product}/{camera}", daemon=True)
        self._replayer.start()

    def follow(self, find_server: Callable[[], redis.Redis | None]) -> None:
        """While Redis is away, ask for a client of its new address; None says that there is none."""
        self._find_server = find_server

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
            self._raise_failure()
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
            published=self._direct + self._replayed,
            spooled=self._spooled,
            replayed=self._replayed,
            shed=self._direct_shed + self._replayed_shed + notes,
            lost=self._lost,
            waiting=waiting,
            notes=notes,
        )

    def drain(self, stop: threading.Event) -> bool:
        """Wait until the spool is empty, until `stop`, or until Redis has been away for `retry_s`; whether it is empty.

        Raises:
            FrameError, SpoolError: as `publish`.
        """
        while not self._spool.wait_empty(_LOOK_S):
            self._raise_failure()
            away_since = self._away_since
            away_s = time.monotonic() - away_since if away_since else 0.0
            if stop.is_set() or away_s > self._settings.retry_s:
                return False
        return True

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    def close(self) -> None:
        """End the replaying and close the spool; what is in it stays."""
        self._closing.set()
        self._replayer.join()
        self._spool.close()

    def __enter__(self) -> "SpooledPublisher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the camera's side

    def _publish_directly(self, frame: Frame, stop: threading.Event) -> Published | None:
        """None if the server is away, and the frame may be in the stream or not: its replay finds out."""
        assert self._first is not None
        self._publisher.begin_run(self._product, self._camera, self._first)
        try:
            published = self._publisher.publish(frame, stop)
        except ServerUnavailable as error:
            self._note_away(error)
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
            self._raise_failure()

    def _made_room(self) -> bool:
        try:
            return self._spool.shed_oldest("drop_oldest spool")
        except SpoolUnwritable as error:
            self._note_disk(error)
            return False

    def _shed(self, record: Record, reason: str) -> Published:
        self._spool.note(record.shed(reason))
        return Published.SHED

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _note_disk(self, error: SpoolUnwritable) -> None:
        if not self._disk_failed:
            kept = "the camera waits" if self._settings.policy == "block" else "frames are shed and counted"
            self._say(f"{error}; {kept} until it can")
        self._disk_failed = True

    # --- the replayer's side

    def _run(self) -> None:
        pause_s = _PAUSE_S
        try:
            while not self._closing.is_set():
                self._spool.sync()
                oldest = self._spool.peek(timeout_s=_LOOK_S)
                if oldest is None:
                    continue
                try:
                    self._send(oldest)
                    pause_s = _PAUSE_S
                except ServerUnavailable as error:
                    self._note_away(error)
                    self._closing.wait(pause_s)
                    pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                    moved = self._find_server()
                    if moved is not None:  # the spool is not empty, so only this thread publishes now
                        self._publisher.move_to(moved)
        except FrameError as error:
            self._failure = FrameError(f"{error}; to give up the frames in {self._spool.path}, remove that folder")
        except Exception as error:  # the thread's outer edge: raised again in `publish` and `drain`
            self._failure = error

    def _send(self, oldest: Record | Lost) -> None:
        """Publish or count the spool's oldest entry, then forget it: only now does the ledger know it."""
        self._publisher.begin_run(self._product, self._camera, oldest.first)
        picture = oldest.picture if isinstance(oldest, Record) else None
        frame = Frame(self._product, self._camera, oldest.seq, oldest.captured_at_ns, picture or _NO_PICTURE)
        if isinstance(oldest, Lost):
            self._publisher.lose(frame, oldest.from_seq, self._closing)
            self._lost += oldest.seq - oldest.from_seq + 1
        elif picture is None:
            self._publisher.shed(frame, oldest.reason, self._closing)
            self._replayed_shed += 1
        else:
            published = self._publisher.resend(frame, self._known_number(), self._closing)
            if published is Published.SPOOLED:  # closing
                return
            self._replayed += published is Published.ADDED
            self._replayed_shed += published is Published.SHED
        self._spool.taken(oldest.seq)
        self._note_back()

    def _known_number(self) -> int:
        """The ledger's last number if it is one of this spool, as the first look at the server finds it."""
        if self._known is None:
            last = self._publisher.last_seq(self._product, self._camera)
            self._known = last if self._spool.holds(last) else NEVER
        return self._known

    def _note_away(self, error: ServerUnavailable) -> None:
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._say(f"{error}; frames go to the spool {self._spool.path} meanwhile")

    def _note_back(self) -> None:
        if self._away_since is not None:
            self._away_since = None
            waiting, _ = self._spool.waiting()
            self._say(f"Redis answers again; {waiting + 1} frames follow from the spool")
