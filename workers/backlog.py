"""What waits in the streams of all products, read with a few cheap commands: autoscaling looks twice a second."""

import time
from dataclasses import dataclass
from typing import Any

import redis

from producers import keys
from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable

# One step, since entries and counts belong together; only sums leave the server. KEYS frames, ledger, waiting.
_BACKLOG = """
local pending, settled = 0, 0
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    local of = {}
    for i = 1, #group, 2 do of[group[i]] = group[i + 1] end
    if of.name == ARGV[1] then pending = of.pending end
  end
end
local counts = redis.call('HGETALL', KEYS[2])
for i = 1, #counts, 2 do
  local what = string.match(counts[i], ':([%a_]+)$')
  if what == 'judged' or what == 'dead' then settled = settled + tonumber(counts[i + 1]) end
end
return {redis.call('XLEN', KEYS[1]), pending, settled, redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')}
"""


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
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error
    ages = [part.oldest_s for part in parts if part.oldest_s is not None]
    return Backlog(
        lag=sum(part.lag for part in parts),
        untaken=sum(part.untaken for part in parts),
        settled=sum(part.settled for part in parts),
        oldest_s=max(ages, default=None),
    )


def _of_product(server: redis.Redis, product: str) -> Backlog:
    of = (keys.frames, keys.ledger, keys.waiting)
    reply: Any = server.register_script(_BACKLOG)(keys=[key(product) for key in of], args=[keys.GROUP])
    lag, pending, settled, oldest = reply
    oldest_s = max(0.0, time.time() - float(oldest[1]) / 1000) if oldest else None
    return Backlog(lag, max(0, lag - pending), settled, oldest_s)
