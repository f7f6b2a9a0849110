"""The ledger: what became of every frame, per product and camera."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import redis
from redis.exceptions import ResponseError

from producers import keys
from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable

VERDICTS = ("pass", "fail", "unknown")
SKEW_LIMIT_MS = 1000
_RATE_WINDOW_S = 10.0

# One step: counts and waiting set belong together. No MULTI, whose replies redis-py leaves raw in a cluster.
_ACCOUNTS = "return {redis.call('HGETALL', KEYS[1]), redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')}"


@dataclass(frozen=True)
class CameraLedger:
    """One camera's account. `in_flight` is counted apart from the others, so the balance is a real check.

    Attributes:
        product: whose frames.
        camera: which source; `?` for entries that name none.
        captured: frames taken by the camera.
        judged: frames with a verdict and a durable row.
        shed: frames given up before the stream.
        dead: entries that went to the dead-letter stream.
        lost: frames that the camera took and the server never got or forgot, found by the gap in their numbers.
        in_flight: frames that wait for their verdict or their row.
        oldest_s: age of the oldest frame in flight, seconds since its capture; None if none waits.
        frames_per_s: verdicts of the last seconds.
        model_version: version of the newest verdict, empty if there is none.
        last_verdict: the newest verdict, empty if there is none.
        verdicts: judged frames by verdict; `late` of them were answered `unknown` by their deadline.
        shed_by: shed frames by policy and bound.
        skew_ms: the producer's clock minus the server's when the newest frame was sent, None if unknown.
    """

    product: str
    camera: str
    captured: int = 0
    judged: int = 0
    shed: int = 0
    dead: int = 0
    lost: int = 0
    in_flight: int = 0
    oldest_s: float | None = None
    frames_per_s: float = 0.0
    model_version: str = ""
    last_verdict: str = ""
    verdicts: dict[str, int] = field(default_factory=dict)
    shed_by: dict[str, int] = field(default_factory=dict)
    skew_ms: int | None = None

    @property
    def balanced(self) -> bool:
        """Whether captured = judged + shed + dead + lost + in_flight, and the judged are those of all verdicts."""
        verdicts = sum(self.verdicts.get(verdict, 0) for verdict in VERDICTS)
        settled = self.judged + self.shed + self.dead + self.lost
        return self.captured == settled + self.in_flight and self.judged == verdicts

    @property
    def skewed(self) -> bool:
        """Whether the producer's clock is so far off that its capture times mislead."""
        return self.skew_ms is not None and abs(self.skew_ms) > SKEW_LIMIT_MS


@dataclass(frozen=True)
class ProductLedger:
    """A product's cameras and its stream.

    Attributes:
        product: the product.
        lag: entries that no replica has taken yet.
        cameras: its cameras, by name.
    """

    product: str
    lag: int
    cameras: tuple[CameraLedger, ...]

    @property
    def balanced(self) -> bool:
        """Whether every camera balances."""
        return all(camera.balanced for camera in self.cameras)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "product": self.product,
            "lag": self.lag,
            "balanced": self.balanced,
            "cameras": [asdict(camera) for camera in self.cameras],
        }


def read_ledger(server: redis.Redis) -> list[ProductLedger]:
    """The ledger of every product.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    try:
        products: Any = server.smembers(keys.PRODUCTS)
        return [_product(server, name.decode(errors="replace")) for name in sorted(products)]
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error


def _product(server: redis.Redis, product: str) -> ProductLedger:
    now_ms = time.time() * 1000
    accounts: Any = server.register_script(_ACCOUNTS)(keys=[keys.ledger(product), keys.waiting(product)])
    (counts, waiting) = (list(zip(flat[::2], flat[1::2], strict=True)) for flat in accounts)
    pipeline = server.pipeline(transaction=False)
    pipeline.xrevrange(keys.verdicts(product), "+", f"{int(now_ms - _RATE_WINDOW_S * 1000)}")
    pipeline.hgetall(keys.latest(product))
    recent, latest = pipeline.execute()
    fields: dict[str, dict[str, Any]] = {}
    for name, count in counts:
        camera, _, what = name.decode(errors="replace").rpartition(":")
        account = fields.setdefault(camera, {})
        if what in ("captured", "judged", "shed", "dead", "lost", "skew_ms"):
            account[what] = int(count)
        elif what in (*VERDICTS, "late"):
            account.setdefault("verdicts", {})[what] = int(count)
        elif what.startswith("shed."):
            account.setdefault("shed_by", {})[what.removeprefix("shed.")] = int(count)
    for member, captured_ms in waiting:
        account = fields.setdefault(member.decode(errors="replace").rpartition("/")[0], {})
        account["in_flight"] = account.get("in_flight", 0) + 1
        account.setdefault("oldest_s", max(0.0, (now_ms - float(captured_ms)) / 1000))  # lowest score first
    for camera, rate in _rates(recent, now_ms).items():
        fields.setdefault(camera, {})["frames_per_s"] = rate
    for camera, newest in latest.items():
        account = fields.setdefault(camera.decode(), {})
        account["model_version"], _, account["last_verdict"] = newest.decode().rpartition(" ")
    cameras = (CameraLedger(product, camera, **fields[camera]) for camera in sorted(fields))
    return ProductLedger(product, _lag(server, product), tuple(cameras))


def _rates(recent: list[Any], now_ms: float) -> dict[str, float]:
    """Verdicts a second by camera, over the window or the shorter time since the first verdict in it."""
    if not recent:
        return {}
    oldest_ms = int(recent[-1][0].split(b"-")[0])
    seconds = min(_RATE_WINDOW_S, max(1.0, (now_ms - oldest_ms) / 1000))
    counts: dict[str, int] = {}
    for _, verdict in recent:
        camera = verdict[b"camera"].decode()
        counts[camera] = counts.get(camera, 0) + 1
    return {camera: count / seconds for camera, count in counts.items()}


def _lag(server: redis.Redis, product: str) -> int:
    """Entries not yet delivered. Redis's own figure is unknown after every deletion, which here is every settlement."""
    try:
        groups: Any = server.xinfo_groups(keys.frames(product))
    except ResponseError:  # no stream, so nothing waits
        return 0
    pending = sum(group["pending"] for group in groups if group["name"] == keys.GROUP.encode())
    return max(0, int(server.xlen(keys.frames(product))) - pending)
