"""Consumers that left without a word: replicas that were killed stay in their groups until somebody removes them."""

import time
from collections.abc import Callable, Iterable

import redis
from redis.exceptions import ResponseError

from producers import keys

_EVERY_S = 60.0

# Checked and deleted in one step: a consumer that comes back between the two would lose what it was just given. One
# that holds entries stays, since its entries would go with it; they are claimed first.
_REMOVE_IDLE = """
local removed = 0
for _, each in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local about = {}
  for i = 1, #each, 2 do about[each[i]] = each[i + 1] end
  if about.name ~= ARGV[2] and about.pending == 0 and about.idle > tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], about.name)
    removed = removed + 1
  end
end
return removed
"""


class IdleConsumers:
    """Removes, at most once a minute, consumers that hold nothing and have not been heard of for long.

    Args:
        server: a client that returns bytes.
        own: the consumer that asks; it is never removed.
        idle_ms: how long is long.
        clock: seconds, monotonic.
    """

    def __init__(
        self, server: redis.Redis, own: str, idle_ms: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._own, self._idle_ms, self._clock = own, idle_ms, clock
        self._remove = server.register_script(_REMOVE_IDLE)
        self._next = clock() + _EVERY_S

    def remove(self, products: Iterable[str]) -> int:
        """Remove them from the groups of `products` if a minute has passed; returns how many.

        Raises:
            redis.RedisError, redis.RedisClusterException: a server does not answer.
        """
        if self._clock() < self._next:
            return 0
        self._next = self._clock() + _EVERY_S
        return sum(self._remove_from(product) for product in products)

    def _remove_from(self, product: str) -> int:
        try:
            removed: int = self._remove(keys=[keys.frames(product)], args=[keys.GROUP, self._own, self._idle_ms])
        except ResponseError as error:
            text = str(error)
            if "no such key" in text or "NOGROUP" in text:  # deleted meanwhile; the next read makes it anew
                return 0
            raise
        return removed
