"""Only one compactor works at a time: a lock beside local results, a key in Redis for an object store.

The table is right without it, since commits of two writers conflict; the lease saves their work in vain.
"""

import contextlib
import fcntl
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pyarrow.fs as pafs
import redis

from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import CompactorBusy, ResultsUnavailable, StreamUnavailable
from workers.results import filesystem

LEASE = "proctor:compactor:lease"
_HELD_MS = 30_000
_RENEW_S = 10.0
_IF_OURS = "if redis.call('get', KEYS[1]) ~= ARGV[1] then return 0 end "
_RENEW = _IF_OURS + "return redis.call('pexpire', KEYS[1], ARGV[2])"
_RELEASE = _IF_OURS + "return redis.call('del', KEYS[1])"

Held = Callable[[], bool]


def lease(uri: str, connect: Callable[[], redis.Redis]) -> AbstractContextManager[Held]:
    """The lease of the results at `uri`, see below.

    Args:
        uri: the results' folder or URI.
        connect: reaches the server; called for an object store only.
    """
    local = isinstance(filesystem(uri)[0], pafs.LocalFileSystem)
    return file_lease(uri) if local else redis_lease(connect())


@contextlib.contextmanager
def file_lease(uri: str) -> Iterator[Held]:
    """Hold the lock of local results; it ends with the process, however that ends.

    Yields:
        whether it is still held: always.

    Raises:
        CompactorBusy: another process holds it.
        ResultsUnavailable: the place cannot be written.
    """
    _, root = filesystem(uri)
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        lock = open(Path(root, "compactor.lock"), "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ResultsUnavailable(f"cannot write results to {root}: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CompactorBusy(f"another compactor works on {root}: it does the same") from None
        except OSError as error:
            raise ResultsUnavailable(f"cannot lock {root}/compactor.lock: {error}") from None
        yield lambda: True


@contextlib.contextmanager
def redis_lease(server: redis.Redis, held_ms: int = _HELD_MS, renew_s: float = _RENEW_S) -> Iterator[Held]:
    """Hold the lease in Redis, renewed by a thread; it expires when this process is gone.

    Yields:
        whether it is still held; lost when Redis was away, or this process stood still, for longer than `held_ms`.

    Raises:
        CompactorBusy: another process holds it.
        StreamUnavailable: Redis does not answer.
    """
    token = uuid.uuid4().hex
    try:
        taken = server.set(LEASE, token, nx=True, px=held_ms)
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error
    if not taken:
        raise CompactorBusy("another compactor works on these results: it does the same")
    ended, lost = threading.Event(), threading.Event()

    def renew() -> None:
        while not ended.wait(renew_s):
            try:
                if not server.eval(_RENEW, 1, LEASE, token, held_ms):
                    lost.set()
                    return
            except REDIS_ERRORS:
                continue  # it may answer before the lease expires; if not, the next renewal says so

    thread = threading.Thread(target=renew, name="compactor-lease", daemon=True)
    thread.start()
    try:
        yield lambda: not lost.is_set()
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(*REDIS_ERRORS):  # then it expires
            server.eval(_RELEASE, 1, LEASE, token)
