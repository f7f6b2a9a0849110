"""Dead letters: what was given up, put back into its stream or dropped, each exactly once.

The ledger counts an entry as dead when it is given up. Put back, it is in flight again; dropped or trimmed, it stays
counted as dead.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from producers import keys
from producers.counting import COUNT, NAMED
from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable

_PAGE = 100
_SHOWN = 200  # bytes of a reason or a name that are read

# Newest first, without the images: KEYS dead; ARGV the id to begin before, how many, bytes of a text.
_LIST = """
local rows = {}
for _, entry in ipairs(redis.call('XREVRANGE', KEYS[1], ARGV[1], '-', 'COUNT', ARGV[2])) do
  local fields, found, size = entry[2], {camera = '', seq = '', captured_at_ns = ''}, 0
  for i = 5, #fields, 2 do
    if found[fields[i]] == '' then found[fields[i]] = string.sub(fields[i + 1], 1, ARGV[3]) end
    size = size + #fields[i] + #fields[i + 1]
  end
  rows[#rows + 1] = {entry[1], string.sub(fields[2], 1, ARGV[3]), found.camera, found.seq, found.captured_at_ns, size}
end
return rows
"""

# One step, which looks at everything before it writes, begins with what a full server refuses and ends with the
# deletion that makes a repetition harmless. KEYS dead, frames, ledger, waiting, dead_counts, held, tally; ARGV the id.
# `account` says who was charged for the death. An entry is in flight again under its camera's name if that was the one
# and it is not in flight already. Else its count is taken back, as if a producer without ledger had just written it: it
# is counted again when it is settled.
_RETRY = (
    COUNT
    + NAMED
    + """
local entry = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not entry then return 'gone' end
local fields, of = entry[2], {}
if #fields < 6 or (#fields == 6 and fields[5] == 'fields') then return 'noted' end
local camera, ms = string.match(fields[4], '^(.*) (%d+)$')
for i = 5, #fields, 2 do of[fields[i]] = of[fields[i]] or fields[i + 1] end
local own, seq, at_ns = of.camera or '', of.seq or '', of.captured_at_ns or ''
local ours = camera == own and is_named(own, seq) and #at_ns < 20 and string.match(at_ns, '^%d+$')
redis.call('XADD', KEYS[2], '*', unpack(fields, 5))
count(KEYS[3], KEYS[7], tonumber(ms), camera, 'dead', -1)
if ours and redis.call('ZADD', KEYS[4], ms, own .. '/' .. seq) == 1 then
  redis.call('INCRBY', KEYS[6], #(of.data or ''))
else
  count(KEYS[3], KEYS[7], tonumber(ms), camera, 'captured', -1)
end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[5], 'retried', 1)
return 'retried'
"""
)

# KEYS dead, dead_counts; ARGV the id.
_DROP = """
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 then return 'gone' end
redis.call('HINCRBY', KEYS[2], 'dropped', 1)
return 'dropped'
"""

# KEYS dead, dead_counts; ARGV how many stay, and in how many bytes; the newest stays however large it is.
_TRIM = """
local trimmed = redis.call('XTRIM', KEYS[1], 'MAXLEN', '=', ARGV[1])
local left = redis.call('XLEN', KEYS[1])
while left > 1 and redis.call('MEMORY', 'USAGE', KEYS[1], 'SAMPLES', 0) > tonumber(ARGV[2]) do
  trimmed = trimmed + redis.call('XTRIM', KEYS[1], 'MAXLEN', '=', left - math.max(1, math.floor(left / 8)))
  left = redis.call('XLEN', KEYS[1])
end
if trimmed > 0 then redis.call('HINCRBY', KEYS[2], 'trimmed', trimmed) end
return trimmed
"""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An entry that was given up.

    Attributes:
        product: whose frame.
        id: its id in the dead-letter stream; begins with the time of its death, milliseconds since the epoch.
        camera: the camera it names, as it stands there.
        seq: its sequence number, as it stands there.
        captured_at: when it was captured; None if it does not say so.
        reason: why it was given up.
        size: bytes of its fields.
    """

    product: str
    id: str
    camera: str
    seq: str
    captured_at: datetime | None
    reason: str
    size: int


@dataclass(frozen=True, slots=True)
class DeadCounts:
    """What became of a product's dead letters.

    Attributes:
        product: the product.
        kept: entries that are there.
        retried: put back into the stream.
        dropped: deleted by a person.
        trimmed: deleted because more than `dead_kept` were there.
    """

    product: str
    kept: int
    retried: int
    dropped: int
    trimmed: int


class DeadLetters:
    """The dead-letter streams of all products. Every method may raise StreamUnavailable; repeating it is safe.

    Args:
        server: a client that returns bytes.
    """

    def __init__(self, server: redis.Redis) -> None:
        self._server = server
        self._list = server.register_script(_LIST)
        self._retry = server.register_script(_RETRY)
        self._drop = server.register_script(_DROP)

    def products(self) -> list[str]:
        """Products that may have some."""
        try:
            names: Any = self._server.smembers(keys.PRODUCTS)
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        return sorted(name.decode(errors="replace") for name in names)

    def of(self, product: str) -> Iterator[DeadLetter]:
        """A product's entries, newest first, read page by page."""
        before = "+"
        while True:
            try:
                rows: Any = self._list(keys=[keys.dead(product)], args=[before, _PAGE, _SHOWN])
            except REDIS_ERRORS as error:
                raise StreamUnavailable(trouble(error)) from error
            for entry_id, reason, camera, seq, at_ns, size in rows:
                yield DeadLetter(product, _text(entry_id), _text(camera), _text(seq), _time(at_ns), _text(reason), size)
            if len(rows) < _PAGE:
                return
            before = f"({_text(rows[-1][0])}"

    def counts(self, product: str) -> DeadCounts:
        """What became of a product's entries."""
        try:
            kept: Any = self._server.xlen(keys.dead(product))
            found: Any = self._server.hgetall(keys.dead_counts(product))
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        retried, dropped, trimmed = (int(found.get(name, 0)) for name in (b"retried", b"dropped", b"trimmed"))
        return DeadCounts(product, kept, retried, dropped, trimmed)

    def retry(self, product: str, entry_id: str) -> str:
        """Put an entry back into its stream.

        Returns:
            `retried`; `gone` if it is not there, perhaps since an earlier call; `noted` if too little of it was kept.
        """
        of = (keys.dead, keys.frames, keys.ledger, keys.waiting, keys.dead_counts, keys.held, keys.tally)
        return self._step(self._retry, [key(product) for key in of], entry_id)

    def drop(self, product: str, entry_id: str) -> str:
        """Delete an entry; it stays counted as dead. Returns `dropped`, or `gone` if it is not there."""
        return self._step(self._drop, [keys.dead(product), keys.dead_counts(product)], entry_id)

    def _step(self, script: Any, names: list[str], entry_id: str) -> str:
        try:
            return _text(script(keys=names, args=[entry_id]))
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error


class DeadLetterBound:
    """Keeps the newest entries of a dead-letter stream and counts the others as trimmed.

    Args:
        server: a client that returns bytes.
        kept: how many of each product stay.
        kept_bytes: in how much of the server's memory.
    """

    def __init__(self, server: redis.Redis, kept: int, kept_bytes: int) -> None:
        self._bounds = (kept, kept_bytes)
        self._trim = server.register_script(_TRIM)

    def trim(self, product: str) -> None:
        """Trim a product's stream; cut short after an entry was added, the next entry makes up for it."""
        self._trim(keys=[keys.dead(product), keys.dead_counts(product)], args=list(self._bounds))


def _text(value: bytes) -> str:
    return value.decode(errors="replace")


def _time(at_ns: bytes) -> datetime | None:
    if not at_ns.isdigit() or len(at_ns) > 19:
        return None
    return datetime.fromtimestamp(int(at_ns) / 1e9, UTC)
