"""What waits in the streams of all products, read with a few cheap commands: autoscaling looks twice a second."""

from dataclasses import dataclass
from typing import Any

import redis

from producers import keys
from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable

# One step, since entries and counts belong together; only sums leave the server. KEYS frames, ledger, unanswered.
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
local oldest_ms, oldest = -1, redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
if #oldest > 0 then
  local now = redis.call('TIME')
  oldest_ms = math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(oldest[2]))
end
return {redis.call('XLEN', KEYS[1]), pending, settled, oldest_ms}
"""


@dataclass(frozen=True)
class Backlog:
    """Sums over all products.

    Attributes:
        lag: entries that are not settled yet.
        untaken: those of them that no replica has taken.
        settled: entries that were ever judged or dead-lettered, by the ledger.
        oldest_s: age of the oldest frame without a verdict, seconds since its capture, in the server's clock; None if
            all have theirs.
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
    of = (keys.frames, keys.ledger, keys.unanswered)
    reply: Any = server.register_script(_BACKLOG)(keys=[key(product) for key in of], args=[keys.GROUP])
    lag, pending, settled, oldest_ms = reply
    return Backlog(lag, max(0, lag - pending), settled, None if oldest_ms < 0 else oldest_ms / 1000)
