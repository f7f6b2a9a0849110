"""The deadline watch: a frame whose verdict would come too late for its line is answered by `unknown` in time.

The score still comes, with the row. Any number of watches may run: each frame is answered once.
"""

import logging
import threading
from collections.abc import Iterable

import redis

from producers import keys
from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable
from workers.settings import WorkerSettings
from workers.settling import EXPIRE
from workers.slotwise import for_each

logger = logging.getLogger(__name__)

_SHORTEST_S, _LONGEST_S = 0.001, 1.0
_RETRY_S = 0.5


class DeadlineWatch:
    """Answers frames in flight whose deadline comes.

    Args:
        server: a client of its own, so that nothing else delays it.
        settings: the takt of the products.
    """

    def __init__(self, server: redis.Redis, settings: WorkerSettings) -> None:
        self._server, self._settings = server, settings
        self._expire = server.register_script(EXPIRE)
        # a frame that is published after a look must be found before it is due
        self._longest_s = min(_LONGEST_S, (settings.shortest_takt_ms() or 1e9) / 4e3)

    def run(self, stop: threading.Event) -> None:
        """Watch until `stop` is set; a server that is away is waited for."""
        while not stop.is_set():
            try:
                stop.wait(self.tick())
            except StreamUnavailable as error:
                logger.warning("deadlines are not watched: %s", error)
                stop.wait(_RETRY_S)

    def tick(self) -> float:
        """Answer what is due; return the seconds until it is worth to look again.

        Raises:
            StreamUnavailable: Redis does not answer, or not for every product; see `for_each` for the others.
        """
        waits: list[float] = []
        try:
            products: Iterable[bytes] = self._server.smembers(keys.PRODUCTS)  # type: ignore[assignment]
            for_each(products, lambda product: waits.append(self._answer(product.decode(errors="replace"))))
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        return max(_SHORTEST_S, min(waits, default=self._longest_s))

    def _answer(self, product: str) -> float:
        takt_ms = self._settings.takt_of(product)
        if takt_ms is None:
            return self._longest_s
        _, left_ms = self._expire(
            keys=[keys.verdicts(product), keys.unanswered(product), keys.late(product)],
            args=[product, keys.VERDICTS_KEPT, takt_ms, self._settings.margin_of(takt_ms)],
        )
        return self._longest_s if left_ms < 0 else min(self._longest_s, left_ms / 1e3)
