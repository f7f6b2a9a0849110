"""A shift's account: what became of the frames captured in a span of time, added up from the hourly tallies."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import redis

from producers import keys
from producers.counting import TALLY_DAYS
from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable
from workers.ledger import VERDICTS

_MINUTE_MS = 60_000
# One step: tallies and waiting set belong together. No MULTI, whose replies redis-py leaves raw in a cluster.
_SHIFT = """
local reply = {redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], ARGV[2]), redis.call('XRANGE', KEYS[2], ARGV[1], '+')}
for i = 3, #KEYS do reply[i] = redis.call('HGETALL', KEYS[i]) end
return reply
"""


@dataclass(frozen=True)
class Gap:
    """Sequence numbers that a camera's run had and that are lost, `first` to `last`, found at `found_at`."""

    camera: str
    first: int
    last: int
    found_at: datetime


@dataclass(frozen=True)
class ShiftAccount:
    """One camera's frames of a span of time, by the minute of their capture.

    Attributes:
        product: whose frames.
        camera: which source.
        captured: frames taken.
        verdicts: judged frames by verdict: pass, fail, unknown.
        late: of these, frames whose verdict came from their deadline.
        shed: frames given up, by policy and bound.
        dead: frames that went to the dead letters.
        lost: frames lost, see `gaps`.
        in_flight: frames that still wait.
        gaps: ranges of lost numbers, each counted in the minute of the frame that showed it.
    """

    product: str
    camera: str
    captured: int = 0
    verdicts: dict[str, int] = field(default_factory=dict)
    late: int = 0
    shed: dict[str, int] = field(default_factory=dict)
    dead: int = 0
    lost: int = 0
    in_flight: int = 0
    gaps: tuple[Gap, ...] = ()

    @property
    def judged(self) -> int:
        """Frames with a verdict and a durable row."""
        return sum(self.verdicts.values())

    @property
    def balanced(self) -> bool:
        """Whether captured = judged + shed + dead + lost + in flight."""
        return self.captured == self.judged + sum(self.shed.values()) + self.dead + self.lost + self.in_flight

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"judged": self.judged, "balanced": self.balanced}


def read_shift(server: redis.Redis, since: datetime, until: datetime | None = None) -> list[ShiftAccount]:
    """The accounts of every camera that captured frames from `since` up to `until`, whole minutes.

    Args:
        server: a client that returns bytes.
        since: the first minute; what is older than 35 days is forgotten.
        until: the minute after the last one; None for now and later.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    oldest = time.time() / 60 - TALLY_DAYS * 24 * 60
    first = int(max(since.timestamp() / 60, oldest))
    last = int(until.timestamp() / 60) - 1 if until else int(time.time() / 60) + 24 * 60
    try:
        products: Any = server.smembers(keys.PRODUCTS)
        return [
            account
            for name in sorted(products)
            for account in _accounts(server, name.decode(errors="replace"), first, last)
        ]
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error


def _accounts(server: redis.Redis, product: str, first: int, last: int) -> Iterator[ShiftAccount]:
    hours = range(first // 60, last // 60 + 1)
    tallies_at = [keys.tally(product, hour) for hour in hours]
    reply: Any = server.register_script(_SHIFT)(
        keys=[keys.waiting(product), keys.gaps(product), *tallies_at],
        args=[first * _MINUTE_MS, (last + 1) * _MINUTE_MS - 1],
    )
    waiting, gaps, *tallies = reply
    counts: dict[str, Counter[str]] = {}
    for hour, tally in zip(hours, tallies, strict=True):
        for name, count in zip(tally[::2], tally[1::2], strict=True):
            minute, camera, what = name.decode(errors="replace").split(":", 2)
            if first <= hour * 60 + int(minute) <= last:
                counts.setdefault(camera, Counter())[what] += int(count)
    for member in waiting:
        counts.setdefault(member.decode(errors="replace").rpartition("/")[0], Counter())["in_flight"] += 1
    named = [(entry_id, dict(zip(flat[::2], flat[1::2], strict=True))) for entry_id, flat in gaps]
    found = [_gap(each, fields) for each, fields in named if first <= int(fields[b"at_ms"]) // _MINUTE_MS <= last]
    for camera in sorted(counts):
        yield _account(product, camera, counts[camera], tuple(gap for gap in found if gap.camera == camera))


def _account(product: str, camera: str, counts: Counter[str], gaps: tuple[Gap, ...]) -> ShiftAccount:
    return ShiftAccount(
        product,
        camera,
        captured=counts["captured"],
        verdicts={verdict: counts[verdict] for verdict in VERDICTS},
        late=counts["late"],
        shed={what.removeprefix("shed."): n for what, n in sorted(counts.items()) if what.startswith("shed.")},
        dead=counts["dead"],
        lost=counts["lost"],
        in_flight=counts["in_flight"],
        gaps=gaps,
    )


def _gap(entry_id: bytes, fields: dict[bytes, bytes]) -> Gap:
    found_at = datetime.fromtimestamp(int(entry_id.split(b"-")[0]) / 1e3, UTC)
    return Gap(fields[b"camera"].decode(), int(fields[b"first"]), int(fields[b"last"]), found_at)
