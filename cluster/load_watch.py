"""A thread that looks at Redis twice a second, so that the autoscaling policy need not."""

import logging
import threading
import time
from collections.abc import Callable

import redis

from cluster.decision import Decision, write_decision
from cluster.load import Figures, Load
from workers.backlog import read_backlog
from workers.errors import StreamUnavailable
from workers.reports import read_replicas

logger = logging.getLogger("ray.serve")  # the controller's log, the only one that is kept of its process

_LOOK_EVERY_S = 0.5
_FORGOTTEN_S = 10.0


class LoadWatch:
    """The last figures, at hand without waiting.

    Serve tells a policy neither its start nor its end, so the thread starts with the first `figures` and ends when
    nobody has asked for ten seconds.

    Args:
        connect: makes the thread's own connection.
    """

    def __init__(self, connect: Callable[[], redis.Redis]) -> None:
        self._connect = connect
        self._figures: Figures | None = None
        self._decision: Decision | None = None
        self._wanted: int | None = None
        self._asked_at = 0.0
        self._thread: threading.Thread | None = None
        self._news = threading.Event()

    @property
    def running(self) -> bool:
        """Whether the thread looks."""
        return self._thread is not None and self._thread.is_alive()

    def figures(self, now: float) -> Figures | None:
        """The last figures, None before the first; never waits.

        Args:
            now: seconds of `time.monotonic`.
        """
        self._asked_at = now
        if not self.running:
            self._thread = threading.Thread(target=self._run, name="load-watch", daemon=True)
            self._thread.start()
        return self._figures

    def note(self, decision: Decision) -> None:
        """Have a decision written to Redis: with the next look, or at once when it is for another number."""
        if self._wanted not in (None, decision.wanted):
            self._news.set()
        self._decision, self._wanted = decision, decision.wanted

    def _run(self) -> None:
        load, server, trouble = Load(), None, None
        while time.monotonic() - self._asked_at < _FORGOTTEN_S:
            try:
                server = server or self._connect()
                self._look(server, load)
                trouble = None
            except StreamUnavailable as error:
                trouble = _logged(str(error), trouble)
            except Exception as error:  # the thread's outer edge: figures grow old, and the number of replicas stays
                trouble = _logged(f"looking at the load failed: {type(error).__name__}: {error}", trouble)
            self._news.wait(_LOOK_EVERY_S)
            self._news.clear()
        if server is not None:
            server.close()

    def _look(self, server: redis.Redis, load: Load) -> None:
        backlog = read_backlog(server)
        self._figures = load.add(time.monotonic(), backlog, len(read_replicas(server)))
        decision, self._decision = self._decision, None
        if decision is not None:
            write_decision(server, decision)


def _logged(trouble: str, before: str | None) -> str:
    """Log `trouble` unless that was done already, and return it."""
    if trouble != before:
        logger.warning("autoscaling: %s", trouble)
    return trouble
