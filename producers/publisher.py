"""Publishing frames into their product's stream, counted, without losing or doubling one."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

import redis
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError, OutOfMemoryError

from producers import keys
from producers.connecting import is_cluster
from producers.errors import FrameError, ServerUnavailable
from producers.frame import Frame, check_camera, check_product
from producers.publishing import LOST, PUBLISH, SHED
from producers.redis_errors import REDIS_ERRORS, is_refusal, may_pass, one_line, permission_line, trouble
from producers.retention import Retention
from producers.settings import PublisherSettings

_ANNOUNCE_EVERY_S = 60.0
_SAY_FULL_AFTER_S = 2.0
_SAY_ROOM_BELOW_S = 0.5

logger = logging.getLogger(__name__)


class Published(Enum):
    """What became of a frame."""

    ADDED = "added"
    SHED = "shed"
    SPOOLED = "spooled"


NEVER = -1


class Publisher:
    """Publishes the frames of any cameras; safe to share between threads, each camera's frames in order.

    Promise: a frame that `publish` returned for is in the stream or counted as shed. One that the server forgets
    again, since it came back from a power cut without its last second, is sent again from what is retained; what is
    retained no more is counted as lost, with its range. The first frame of a camera begins its run: numbers between
    that and any later one are frames.

    Args:
        server: a client that returns bytes.
        settings: codec, bounds, policy and patience.
        say: told in a line when a full stream makes a camera wait, and when it takes frames again.

    Attributes:
        gave_way: older frames, of any camera of the product, that were shed for these by `drop_oldest`.
    """

    def __init__(
        self, server: redis.Redis, settings: PublisherSettings, say: Callable[[str], None] = logger.warning
    ) -> None:
        self._settings, self._say = settings, say
        self._full: set[tuple[str, str]] = set()  # cameras that were said to wait
        self._announced: dict[str, float] = {}
        self._firsts: dict[tuple[str, str], int] = {}
        self._retention = Retention(settings.retain_s, int(settings.retain_mb * 2**20))
        self._retention_lock = threading.Lock()
        self.gave_way = 0
        self.move_to(server)

    def move_to(self, server: redis.Redis) -> None:
        """Publish to `server` from now on: the same one at another address; not while a frame is being published."""
        self._server = server
        self._publish = server.register_script(PUBLISH)
        self._shed = server.register_script(SHED)
        self._lost = server.register_script(LOST)
        self._announced.clear()
        self._memory: dict[Any, tuple[float, bool]] = {}

    def last_seq(self, product: str, camera: str) -> int:
        """The camera's last used sequence number in the ledger, 0 if it has none."""
        name = f"{check_camera(camera)}:last_seq"
        try:
            return int(self._server.hget(keys.ledger(check_product(product)), name) or 0)
        except REDIS_ERRORS as error:
            raise ServerUnavailable(trouble(error)) from None

    def begin_run(self, product: str, camera: str, first: int) -> None:
        """Say that a camera's run began with number `first`, where that is not the first frame that comes here."""
        self._firsts[product, camera] = first

    def publish(self, frame: Frame, stop: threading.Event | None = None) -> Published:
        """Publish one frame; what happens when a bound is reached is the policy's.

        Args:
            frame: the frame.
            stop: when set while the stream is full, the frame is given up and counted as shed; when set while
                Redis is away, the waiting ends.

        Raises:
            FrameError: the camera's numbers went back, as they do when two producers use one camera's name.
            ServerUnavailable: Redis stayed away for longer than `retry_s` or until `stop`, or it refuses the
                password or the frame. The frame was not published as far as is known; publishing it again is safe.
        """
        stop = stop or threading.Event()
        self._firsts.setdefault((frame.product, frame.camera), frame.seq)
        return self._publish_in_run(frame, stop, NEVER) or self._shed_in_hand(frame, stop)

    def resend(self, frame: Frame, known: int, stop: threading.Event) -> Published:
        """Publish a frame of a spool, under the same bounds; SPOOLED says that `stop` ended the waiting.

        Args:
            frame: the spool's oldest frame; `begin_run` has told its run.
            known: a number of this spool that the ledger had when the process started, or NEVER. What is not above it
                was published before, by a process that ended before it could note that.
            stop: when set while the stream is full, the frame stays where it is.

        Raises:
            FrameError: the camera's numbers have passed the frame, as they do when another producer uses its name.
            ServerUnavailable: as `publish`.
        """
        return self._publish_in_run(frame, stop, known) or Published.SPOOLED

    def shed(self, frame: Frame, reason: str, stop: threading.Event) -> None:
        """Count a frame that was given up before it came here; a second time counts nothing.

        Raises:
            ServerUnavailable: as `publish`.
        """
        self._count_in_run(frame, lambda each, declare: self._give_up(each, reason, declare), stop)

    def lose(self, last: Frame, from_seq: int, stop: threading.Event) -> None:
        """Count the numbers from `from_seq` up to `last`'s as lost, as far as the ledger does not know them.

        Raises:
            ServerUnavailable: as `publish`.
        """
        self._count_in_run(last, lambda each, declare: self._count_lost(each, from_seq, declare), stop)

    def _publish_in_run(self, frame: Frame, stop: threading.Event, known: int) -> Published | None:
        """Publish one frame and what of its run the server forgot; None if `stop` came while the stream was full."""
        outcome = self._deliver(frame, stop, known, declare=False)
        if not isinstance(outcome, int):
            return outcome
        self._send_again(frame, outcome, stop, known)
        published = self._deliver(frame, stop, known, declare=True)
        assert not isinstance(published, int)  # a declared gap is counted, not refused
        return published

    def _send_again(self, frame: Frame, from_seq: int, stop: threading.Event, known: int) -> None:
        """Publish what is retained of a run from a number on, up to `frame`; the server forgot it."""
        with self._retention_lock:
            retained = self._retention.since(frame, from_seq)
        for old in retained:  # what of them a second answer shows to be there already is not added twice
            if self._deliver(old, stop, known, declare=True) is None:
                self._shed_in_hand(old, stop)

    def _count_in_run(self, frame: Frame, count: Callable[[Frame, bool], str], stop: threading.Event) -> None:
        """Count a frame that does not go into the stream, after what of its run the server forgot."""
        word, _, number = self._with_patience(frame, lambda each: count(each, False), stop).partition(" ")
        if word == "gap":
            self._send_again(frame, int(number), stop, NEVER)
            self._with_patience(frame, lambda each: count(each, True), stop)

    def _deliver(self, frame: Frame, stop: threading.Event, known: int, *, declare: bool) -> Published | int | None:
        """Publish one frame, or return the number from which on the server knows nothing of the camera's run."""
        pause_s, waited_s = 0.002, 0.0
        while True:
            reply = self._with_patience(
                frame,
                lambda each: self._add(each, declare),
                stop,
                without_memory=lambda each: self._give_up(each, f"{self._settings.policy} memory", declare),
            )
            word, _, number = reply.partition(" ")
            if word == "added":
                with self._retention_lock:
                    self._retention.keep(frame, time.monotonic())
                    self.gave_way += int(number)
                if waited_s < _SAY_ROOM_BELOW_S:
                    self._note_room(frame)
                return Published.ADDED
            if word == "shed":
                return Published.SHED
            if word == "gap":
                return int(number)
            if word == "behind":
                if declare or frame.seq <= known:  # not forgotten, or sent before a process of ours ended
                    return Published.ADDED
                raise FrameError(
                    f"{frame.frame_id} is not above seq {number}, the camera's last: another producer pushes as "
                    f"camera {frame.camera!r}; give each its own name"
                )
            if stop.wait(pause_s):
                return None
            waited_s += pause_s
            if waited_s > _SAY_FULL_AFTER_S:
                self._note_full(frame)
            pause_s = min(pause_s * 1.5, 0.05)

    def _note_full(self, frame: Frame) -> None:
        """Say once that a camera's frames wait, until one goes in soon."""
        camera, settings = (frame.product, frame.camera), self._settings
        if camera in self._full:
            return
        self._full.add(camera)
        bound = f"max_in_flight = {settings.max_in_flight}, max_in_flight_mb = {settings.max_in_flight_mb:g}"
        if self._memory.get(self._node(frame.product), (0.0, False))[1]:
            bound = f"memory_share = {settings.memory_share:g} of Redis' maxmemory"
        self._say(
            f"{frame.product}'s stream is full, frames of {frame.camera} wait until others in it have their verdict: "
            f"`proctor status` shows whether a replica judges ([publish] {bound})"
        )

    def _note_room(self, frame: Frame) -> None:
        if (frame.product, frame.camera) in self._full:
            self._full.discard((frame.product, frame.camera))
            self._say(f"{frame.product}'s stream takes frames of {frame.camera} again")

    def _shed_in_hand(self, frame: Frame, stop: threading.Event) -> Published:
        self.shed(frame, "stopped while full", stop)
        return Published.SHED

    def _with_patience(
        self,
        frame: Frame,
        step: Callable[[Frame], str],
        stop: threading.Event,
        without_memory: Callable[[Frame], str] | None = None,
    ) -> str:
        """Take a step; on a server without memory the other one, where the policy sheds."""
        give_up_at = time.monotonic() + self._settings.retry_s
        pause_s = 0.05
        while True:
            try:
                return step(frame)
            except AuthenticationError as error:
                raise ServerUnavailable(f"Redis refuses the password: {error}") from None
            except REDIS_ERRORS as error:
                if isinstance(error, OutOfMemoryError) and without_memory and self._settings.policy != "block":
                    step = without_memory
                    continue
                if not may_pass(error):
                    why = permission_line(error) if isinstance(error, NoPermissionError) else one_line(error)
                    raise ServerUnavailable(f"Redis refuses frame {frame.frame_id}: {why}") from None
                if isinstance(error, BusyLoadingError):  # alive and reading its data, however long that takes
                    give_up_at = time.monotonic() + self._settings.retry_s
                self._wait_or_raise(frame, error, give_up_at, stop, pause_s)
                pause_s = min(pause_s * 2, 1.0)

    def _wait_or_raise(
        self, frame: Frame, error: Exception, give_up_at: float, stop: threading.Event, pause_s: float
    ) -> None:
        """Wait for a moment; raise when the server has stayed away for too long, or the waiting was stopped."""
        if time.monotonic() <= give_up_at and not stop.wait(pause_s):
            return
        waited_s = time.monotonic() - give_up_at + self._settings.retry_s
        if "MISCONF" in str(error):
            raise ServerUnavailable(
                f"frame {frame.frame_id} was not published: Redis cannot write to its disk; free some "
                "space there, then push again"
            ) from None
        did = "refused frames" if is_refusal(error) else "did not answer"
        raise ServerUnavailable(
            f"Redis {did} for {waited_s:.1f} s, frame {frame.frame_id} was not published: {one_line(error)}"
        ) from None

    def _announce(self, product: str) -> None:
        """Make the product known to readers; frames of an unknown one would wait for ever. Once a minute again: in
        a cluster the node that knows the products may have failed over without the last ones.
        """
        now = time.monotonic()
        if now - self._announced.get(product, float("-inf")) >= _ANNOUNCE_EVERY_S:
            self._server.sadd(keys.PRODUCTS, product)
            self._announced[product] = now

    def _announce_if_possible(self, product: str) -> None:
        with contextlib.suppress(OutOfMemoryError):  # then the next frame that is added does it
            self._announce(product)

    def _add(self, frame: Frame, declare: bool) -> str:
        fields, product, settings = frame.to_fields(), frame.product, self._settings
        self._announce(product)
        reply = self._publish(
            keys=[*keys.account(product), keys.verdicts(product), keys.gaps(product)],
            args=[
                product,
                *(fields[name] for name in ("camera", "seq", "captured_at_ns")),
                self._firsts[product, frame.camera],
                int(declare),
                time.time_ns() // 1_000_000,
                int(self._memory_is_full(product)),
                settings.policy,
                settings.max_in_flight,
                int(settings.max_in_flight_mb * 2**20),
                keys.VERDICTS_KEPT,
                *(fields[name] for name in ("v", "codec", "shape", "data")),
            ],
        ).decode()
        if not reply.startswith("first"):
            return reply
        # a new camera, or a server that came back without its data and with it forgot the product
        self._announced.pop(product, None)
        self._announce(product)
        return reply.replace("first", "added")

    def _node(self, product: str) -> Any:
        """The node of a cluster that has the product's frames; None without a cluster."""
        server: Any = self._server
        return server.get_node_from_key(keys.frames(product)) if is_cluster(server) else None

    def _memory_is_full(self, product: str) -> bool:
        """Whether the server's memory is nearly used up, in a cluster that of the product's node; looked up twice a
        second.
        """
        server: Any = self._server
        node = self._node(product)
        read_at, is_full = self._memory.get(node, (float("-inf"), False))
        if time.monotonic() - read_at > 0.5:
            memory = server.info("memory") if node is None else server.info("memory", target_nodes=node)
            limit = int(memory.get("maxmemory", 0))
            is_full = 0 < self._settings.memory_share * limit < int(memory["used_memory"])
            self._memory[node] = (time.monotonic(), is_full)
        return is_full

    def _give_up(self, frame: Frame, reason: str, declare: bool) -> str:
        product = frame.product
        self._announce_if_possible(product)
        reply: bytes = self._shed(
            keys=[keys.ledger(product), keys.verdicts(product), keys.gaps(product), keys.tally(product)],
            args=[
                product,
                frame.camera,
                frame.seq,
                frame.captured_at_ns,
                self._firsts.get((product, frame.camera), frame.seq),
                reason,
                keys.VERDICTS_KEPT,
                int(declare),
            ],
        )
        return reply.decode()

    def _count_lost(self, last: Frame, from_seq: int, declare: bool) -> str:
        product, camera = last.product, last.camera
        first = self._firsts.get((product, camera), from_seq)
        self._announce_if_possible(product)
        reply: bytes = self._lost(
            keys=[keys.ledger(product), keys.gaps(product), keys.tally(product)],
            args=[camera, from_seq, last.seq, last.captured_at_ns, first, int(declare)],
        )
        return reply.decode()
