"""Publishing frames into their product's stream, counted, without losing or doubling one."""

import threading
import time
from collections.abc import Callable
from enum import Enum

import redis
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError

from producers import keys
from producers.errors import FrameError, ServerUnavailable
from producers.frame import Frame, check_camera, check_product
from producers.redis_errors import REDIS_ERRORS, is_refusal, may_pass, one_line, permission_line, trouble
from producers.settings import PublisherSettings

# One step, so that stream, ledger and waiting set never disagree. A frame whose sequence number and capture time
# are the camera's last ones is not added again: a publish repeated after a lost reply counts once. Any other number
# that is not above the last one comes from a second producer under the same name.
_PUBLISH = """
local camera, seq = ARGV[2], ARGV[3]
local last = redis.call('HGET', KEYS[2], camera .. ':last_seq')
if last and tonumber(seq) <= tonumber(last) then
  if seq == last and redis.call('HGET', KEYS[2], camera .. ':last_captured_at_ns') == ARGV[4] then return 'added' end
  return last
end
if redis.call('XLEN', KEYS[1]) >= tonumber(ARGV[1]) then return 'full' end
redis.call('XADD', KEYS[1], '*', 'v', ARGV[5], 'camera', camera, 'seq', seq, 'captured_at_ns', ARGV[4],
    'codec', ARGV[6], 'shape', ARGV[7], 'data', ARGV[8])
redis.call('HINCRBY', KEYS[2], camera .. ':captured', 1)
redis.call('HSET', KEYS[2], camera .. ':last_seq', seq, camera .. ':last_captured_at_ns', ARGV[4])
redis.call('ZADD', KEYS[3], math.floor(tonumber(ARGV[4]) / 1e6), camera .. '/' .. seq)
if last then return 'added' end
return 'first'
"""

_SHED = """
local camera, seq = ARGV[1], ARGV[2]
local last = redis.call('HGET', KEYS[1], camera .. ':last_seq')
if last and tonumber(seq) <= tonumber(last) then return end
redis.call('HINCRBY', KEYS[1], camera .. ':captured', 1)
redis.call('HINCRBY', KEYS[1], camera .. ':shed', 1)
redis.call('HSET', KEYS[1], camera .. ':last_seq', seq, camera .. ':last_captured_at_ns', ARGV[3])
"""


_ANNOUNCE_EVERY_S = 60.0


class Published(Enum):
    """What became of a frame."""

    ADDED = "added"
    SHED = "shed"


class Publisher:
    """Publishes the frames of any cameras; safe to share between threads.

    With the policy `block`, `publish` waits while `max_in_flight` frames of the product wait for their verdict.

    Args:
        server: a client that returns bytes.
        settings: codec, bounds and patience.
    """

    def __init__(self, server: redis.Redis, settings: PublisherSettings) -> None:
        self._server, self._settings = server, settings
        self._publish = server.register_script(_PUBLISH)
        self._shed = server.register_script(_SHED)
        self._announced: dict[str, float] = {}

    def last_seq(self, product: str, camera: str) -> int:
        """The camera's last used sequence number in the ledger, 0 if it has none."""
        name = f"{check_camera(camera)}:last_seq"
        try:
            return int(self._server.hget(keys.ledger(check_product(product)), name) or 0)
        except REDIS_ERRORS as error:
            raise ServerUnavailable(trouble(error)) from None

    def publish(self, frame: Frame, stop: threading.Event | None = None) -> Published:
        """Publish one frame; blocks while the product's stream is full.

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
        pause_s = 0.002
        while True:
            reply = self._with_patience(frame, self._add, stop)
            if reply == b"added":
                return Published.ADDED
            if reply != b"full":
                raise FrameError(
                    f"{frame.frame_id} is not above seq {int(reply)}, the camera's last: another producer pushes as "
                    f"camera {frame.camera!r}; give each its own name"
                )
            if stop.wait(pause_s):
                self._with_patience(frame, self._give_up, stop)
                return Published.SHED
            pause_s = min(pause_s * 1.5, 0.05)

    def _with_patience(self, frame: Frame, step: Callable[[Frame], bytes], stop: threading.Event) -> bytes:
        give_up_at = time.monotonic() + self._settings.retry_s
        pause_s = 0.05
        while True:
            try:
                return step(frame)
            except AuthenticationError as error:
                raise ServerUnavailable(f"Redis refuses the password: {error}") from None
            except REDIS_ERRORS as error:
                if not may_pass(error):
                    why = permission_line(error) if isinstance(error, NoPermissionError) else one_line(error)
                    raise ServerUnavailable(f"Redis refuses frame {frame.frame_id}: {why}") from None
                if isinstance(error, BusyLoadingError):  # alive and reading its data, however long that takes
                    give_up_at = time.monotonic() + self._settings.retry_s
                if time.monotonic() > give_up_at or stop.wait(pause_s):
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
                pause_s = min(pause_s * 2, 1.0)

    def _announce(self, product: str) -> None:
        """Make the product known to readers; frames of an unknown one would wait for ever. Once a minute again: in
        a cluster the node that knows the products may have failed over without the last ones.
        """
        now = time.monotonic()
        if now - self._announced.get(product, float("-inf")) >= _ANNOUNCE_EVERY_S:
            self._server.sadd(keys.PRODUCTS, product)
            self._announced[product] = now

    def _add(self, frame: Frame) -> bytes:
        fields = frame.to_fields()
        product = frame.product
        self._announce(product)
        reply = self._publish(
            keys=[keys.frames(product), keys.ledger(product), keys.waiting(product)],
            args=[
                self._settings.max_in_flight,
                *(fields[name] for name in ("camera", "seq", "captured_at_ns", "v", "codec", "shape", "data")),
            ],
        )
        if reply != b"first":
            return reply
        # a new camera, or a server that came back without its data and with it forgot the product
        self._announced.pop(product, None)
        self._announce(product)
        return b"added"

    def _give_up(self, frame: Frame) -> bytes:
        return self._shed(keys=[keys.ledger(frame.product)], args=[frame.camera, frame.seq, frame.captured_at_ns])
