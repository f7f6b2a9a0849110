"""What waits in the streams of all products, read with a few cheap commands: autoscaling looks twice a second."""

import time
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import RedisError, ResponseError

from producers import keys
from workers.errors import StreamUnavailable


@dataclass(frozen=True)
class Backlog:
    """Sums over all products.

    Attributes:
        lag: entries that are not settled yet.
        untaken: those of them that no replica has taken.
        settled: entries that were ever judged or dead-lettered, by the ledger.
        oldest_s: age of the oldest waiting frame, seconds since its capture; None if none waits.
    """

    lag: int
    untaken: int
    settled: int
    oldest_s: float | None


def read_backlog(server: redis.Redis) -> Backlog:
    """Read what waits now.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    try:
        products: Any = server.smembers(keys.PRODUCTS)
        parts = [_of_product(server, name.decode(errors="replace")) for name in sorted(products)]
    except RedisError as error:
        raise StreamUnavailable(f"Redis did not answer: {error}") from error
    ages = [part.oldest_s for part in parts if part.oldest_s is not None]
    return Backlog(
        lag=sum(part.lag for part in parts),
        untaken=sum(part.untaken for part in parts),
        settled=sum(part.settled for part in parts),
        oldest_s=max(ages, default=None),
    )


def _of_product(server: redis.Redis, product: str) -> Backlog:
    pipeline = server.pipeline(transaction=True)  # one step: entries and counts belong together
    pipeline.xlen(keys.frames(product))
    pipeline.hgetall(keys.ledger(product))
    pipeline.zrange(keys.waiting(product), 0, 0, withscores=True)
    pipeline.xinfo_groups(keys.frames(product))
    lag, counts, waiting, groups = pipeline.execute(raise_on_error=False)
    for reply in (lag, counts, waiting):
        if isinstance(reply, RedisError):
            raise reply
    if isinstance(groups, ResponseError):  # no stream, so nothing waits
        groups = []
    pending = sum(group["pending"] for group in groups if group["name"] == keys.GROUP.encode())
    settled = sum(int(count) for name, count in counts.items() if name.endswith((b":judged", b":dead")))
    oldest_s = max(0.0, time.time() - waiting[0][1] / 1000) if waiting else None
    return Backlog(lag, max(0, lag - pending), settled, oldest_s)
