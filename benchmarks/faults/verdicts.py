"""Every verdict that went out, as a line sees them: read from the streams while they are written."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import redis

from benchmarks.faults.line import PRODUCTS
from producers import keys
from producers.redis_errors import REDIS_ERRORS


class VerdictWatch:
    """Follows the verdict streams in a thread, across restarts of the server.

    Args:
        connect: gives a client past the proxy.

    Attributes:
        counts: verdicts by `frame_id`.
    """

    def __init__(self, connect: Callable[[], redis.Redis]) -> None:
        self.counts: Counter[str] = Counter()
        self._connect = connect
        self._last: dict[Any, Any] = {keys.verdicts(product).encode(): "0" for product in PRODUCTS}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="verdicts", daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator["VerdictWatch"]:
        """Follow for the block, then read what is left."""
        self._thread.start()
        yield self
        self._stop.set()
        self._thread.join()
        with self._connect() as server:
            while self._read(server):
                pass

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(*REDIS_ERRORS, OSError), self._connect() as server:
                while not self._stop.is_set():
                    if not self._read(server):
                        time.sleep(0.02)
            self._stop.wait(0.1)

    def _read(self, server: redis.Redis) -> int:
        reply: Any = server.xread(self._last, count=1000)
        found = 0
        for stream, entries in reply.items() if isinstance(reply, dict) else reply:
            for entry_id, fields in entries[0] if entries and isinstance(entries[0], list) else entries:
                self.counts[fields[b"frame_id"].decode()] += 1
                self._last[stream] = entry_id
                found += 1
        return found
