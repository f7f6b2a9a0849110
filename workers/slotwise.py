"""Reading many streams of a cluster, where one command reaches one slot, so one product, only."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from producers.redis_errors import REDIS_ERRORS, one_line
from workers.stream import Entry

logger = logging.getLogger(__name__)

_SHORTEST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.016
_AWAY_S = 2.0
_SLOW_S = 1.0  # a node that refuses at once delays the others little, a silent one would

T = TypeVar("T")
ReadStreams = Callable[[tuple[str, ...], int, int], list[Entry]]


class SlotwiseReader:
    """Sweeps over the products, each asked once for its share, so none starves another.

    Nothing can wait for several slots at once. So an empty sweep is repeated after a pause, which grows while nothing
    comes: up to 16 ms late, in exchange for at most about 60 sweeps a second on an idle line. A product whose node is
    away is left out for two seconds at a time, and the others go on.

    Args:
        read_streams: reads streams of one slot: products, entries of each, and milliseconds to wait for the first.
    """

    def __init__(self, read_streams: ReadStreams) -> None:
        self._read_streams = read_streams
        self._pause_s = _SHORTEST_PAUSE_S
        self._first = 0
        self._away: dict[str, tuple[float, Exception]] = {}

    def read(self, products: tuple[str, ...], count: int, block_ms: int) -> list[Entry]:
        """New entries of any product, about `count` at most; waits up to `block_ms` for the first.

        Raises:
            redis.RedisError, redis.RedisClusterException: no product can be read.
        """
        if len(products) == 1:
            return self._read_streams(products, count, block_ms)
        give_up_at = time.monotonic() + block_ms / 1000
        while True:
            entries = self._sweep(products, max(1, count // len(products)))
            if entries:
                self._pause_s = _SHORTEST_PAUSE_S
                return entries
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                return []
            time.sleep(min(self._pause_s, left_s))
            self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)

    def _sweep(self, products: tuple[str, ...], share: int) -> list[Entry]:
        """One read of each product. What was delivered is returned even if others fail: it would wait for its claim."""
        self._first = (self._first + 1) % len(products)
        entries: list[Entry] = []
        started = time.monotonic()
        for product in products[self._first :] + products[: self._first]:
            if self._is_away(product):
                continue
            try:
                entries += self._read_streams((product,), share, 0)
                self._away.pop(product, None)
            except REDIS_ERRORS as error:
                if product not in self._away:
                    logger.warning("product %s cannot be read just now: %s", product, one_line(error))
                self._away[product] = (time.monotonic() + _AWAY_S, error)
                if time.monotonic() - started > _SLOW_S:
                    break
        if not entries and all(product in self._away for product in products):
            raise self._away[products[0]][1]
        return entries

    def _is_away(self, product: str) -> bool:
        return product in self._away and time.monotonic() < self._away[product][0]


def for_each(items: Iterable[T], step: Callable[[T], None]) -> None:
    """Take the step with every item, those after a failed one too, unless the failure took long.

    Raises:
        redis.RedisError, redis.RedisClusterException: the first failure, after the other steps.
    """
    failure: Exception | None = None
    for item in items:
        started = time.monotonic()
        try:
            step(item)
        except REDIS_ERRORS as error:
            failure = failure or error
            if time.monotonic() - started > _SLOW_S:
                break
    if failure is not None:
        raise failure
