"""The thread that sends what is in a spool, oldest first, for as long as it takes."""

import threading
import time
from collections.abc import Callable

import redis

from producers.errors import FrameError, ServerUnavailable
from producers.frame import Frame, Picture
from producers.publisher import NEVER, Published, Publisher
from producers.spool import Spool
from producers.spooled import Lost, Record

_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_LOOK_S = 0.05
_NO_PICTURE = Picture("raw", (0, 0, 0), b"")


class Replayer:
    """Publishes one camera's spooled frames and counts what was shed or lost of them, until `close`.

    An entry leaves the spool only when the ledger knows it; a process that ends in between sends it again, which counts
    nothing twice.

    Args:
        product: the product.
        camera: the camera.
        publisher: publishes them; nobody else uses it for this camera while the spool is not empty.
        spool: the camera's spool.
        say: told in a line when Redis goes and comes back.

    Attributes:
        replayed: frames that went into the stream.
        shed: frames that were counted as shed.
        lost: frames that were counted as lost.
        failure: what ended the thread, None while it runs.
        find_server: while Redis is away, asked for a client of its new address; None says that there is none.
    """

    def __init__(
        self, product: str, camera: str, publisher: Publisher, spool: Spool, say: Callable[[str], None]
    ) -> None:
        self._product, self._camera, self._publisher, self._spool, self._say = product, camera, publisher, spool, say
        self.replayed = self.shed = self.lost = 0
        self.failure: Exception | None = None
        self.find_server: Callable[[], redis.Redis | None] = lambda: None
        self._away_since: float | None = None
        self._known: int | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"spool {product}/{camera}", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closing.is_set()

    @property
    def away_s(self) -> float:
        """For how long Redis has been away, 0 while it answers."""
        since = self._away_since
        return 0.0 if since is None else time.monotonic() - since

    def note_away(self, error: ServerUnavailable) -> None:
        """Say once that Redis is away."""
        if self._away_since is None:
            self._away_since = time.monotonic()
            self._say(f"{error}; frames go to the spool {self._spool.path} meanwhile")

    def raise_failure(self) -> None:
        """Raise what ended the thread, if it has ended so."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """End the thread; what it has in hand stays in the spool."""
        self._closing.set()
        self._thread.join()

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
                    self.note_away(error)
                    self._closing.wait(pause_s)
                    pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
                    self._follow()
        except FrameError as error:
            self.failure = FrameError(f"{error}; to give up the frames in {self._spool.path}, remove that folder")
        except Exception as error:  # the thread's outer edge: raised again to whoever publishes or drains
            self.failure = error

    def _follow(self) -> None:
        moved = self.find_server()
        if moved is not None:
            self._publisher.move_to(moved)

    def _send(self, oldest: Record | Lost) -> None:
        """Publish or count the spool's oldest entry, then forget it: only now does the ledger know it."""
        self._publisher.begin_run(self._product, self._camera, oldest.first)
        picture = oldest.picture if isinstance(oldest, Record) else None
        frame = Frame(self._product, self._camera, oldest.seq, oldest.captured_at_ns, picture or _NO_PICTURE)
        if isinstance(oldest, Lost):
            self._publisher.lose(frame, oldest.from_seq, self._closing)
            self.lost += oldest.seq - oldest.from_seq + 1
        elif picture is None:
            self._publisher.shed(frame, oldest.reason, self._closing)
            self.shed += 1
        else:
            published = self._publisher.resend(frame, self._known_number(), self._closing)
            if published is Published.SPOOLED:  # closing
                return
            self.replayed += published is Published.ADDED
            self.shed += published is Published.SHED
        self._spool.taken(oldest.seq)
        self._note_back()

    def _known_number(self) -> int:
        """The ledger's last number if it is one of this spool, as the first look at the server finds it."""
        if self._known is None:
            last = self._publisher.last_seq(self._product, self._camera)
            self._known = last if self._spool.holds(last) else NEVER
        return self._known

    def _note_back(self) -> None:
        if self._away_since is not None:
            self._away_since = None
            waiting, _ = self._spool.waiting()
            self._say(f"Redis answers again; {waiting + 1} frames follow from the spool")
