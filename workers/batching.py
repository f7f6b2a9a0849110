"""Batches over products, closed by size, by their oldest member's age or by a deadline. Pure: the clock is given."""

import math
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Batcher(Generic[T]):
    """A queue that gives a batch when one is full or has waited long enough.

    Args:
        max_batch: size of a full batch.
        wait_s: longest wait of a member for company.
    """

    def __init__(self, max_batch: int, wait_s: float) -> None:
        self._max_batch, self._wait_s = max_batch, wait_s
        self._waiting: deque[tuple[float, T]] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def members(self) -> list[T]:
        """What waits, oldest first."""
        return [item for _, item in self._waiting]

    def add(self, item: T, now_s: float, close_by_s: float = math.inf) -> None:
        """Queue `item`, which arrived at `now_s` and whose batch must close by `close_by_s`."""
        self._waiting.append((min(now_s + self._wait_s, close_by_s), item))

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until a batch is due, 0 if one is, None if nothing waits."""
        if not self._waiting:
            return None
        if len(self._waiting) >= self._max_batch:
            return 0.0
        return max(0.0, min(due_s for due_s, _ in self._waiting) - now_s)

    def take(self, now_s: float) -> list[T]:
        """The batch that is due, oldest first; empty if none is."""
        return self.drain() if self.wait_s(now_s) == 0.0 else []

    def put_back(self, items: list[T], now_s: float) -> None:
        """Return a batch that could not be judged yet to the front of the queue."""
        self._waiting.extendleft((now_s + self._wait_s, item) for item in reversed(items))

    def drain(self) -> list[T]:
        """The next batch, due or not, oldest first; empty if nothing waits."""
        return [self._waiting.popleft()[1] for _ in range(min(self._max_batch, len(self._waiting)))]
