"""The stream in Redis: one consumer group reading all products, with claims, ledger and dead letters.

Promises: an entry leaves its stream only by `settle` or `dead_letter`, each one step in Redis together with the
ledger, so each captured frame is counted exactly once whatever is delivered twice or dies in between.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import redis
from redis.exceptions import ResponseError

from producers import keys
from producers.connecting import is_cluster
from producers.errors import FrameError
from producers.frame import check_camera
from producers.redis_errors import REDIS_ERRORS, trouble
from workers.consumers import IdleConsumers
from workers.dead_letters import DeadLetterBound
from workers.errors import StreamUnavailable
from workers.settings import WorkerSettings
from workers.settling import ANSWER, DEAD_LETTER, LATE, SETTLE
from workers.slotwise import SlotwiseReader, for_each
from workers.stream import Entry, Settlement, VerdictMessage

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", Settlement, VerdictMessage)


def _translated(method: Callable[P, T]) -> Callable[P, T]:
    """Raise StreamUnavailable where redis-py raises its own; nobody above knows redis-py."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error

    return call


class RedisStream:
    """A member of the consumer group `inspectors` on the streams of every product.

    Args:
        server: a client that returns bytes.
        consumer: this replica's name, unique.
        settings: bounds and idle times.
    """

    def __init__(self, server: redis.Redis, consumer: str, settings: WorkerSettings) -> None:
        self._server, self._consumer, self._settings = server, consumer, settings
        self._answer = server.register_script(ANSWER)
        self._settle = server.register_script(SETTLE)
        self._dead_letter = server.register_script(DEAD_LETTER)
        self._dead_bound = DeadLetterBound(server, settings.dead_kept, int(settings.dead_mb * 2**20))
        self._idle_consumers = IdleConsumers(server, consumer, settings.consumer_idle_ms)
        self._slotwise = SlotwiseReader(self._read_streams) if is_cluster(server) else None
        self._products: tuple[str, ...] = ()
        self._products_read_at = float("-inf")

    @_translated
    def read(self, count: int, block_ms: int) -> list[Entry]:
        """See FrameStream. `count` is shared evenly between the products, so none starves another."""
        products = self._known_products()
        if not products:
            time.sleep(block_ms / 1000)
            return []
        if self._slotwise is not None:
            return self._slotwise.read(products, count, block_ms)
        return self._read_streams(products, max(1, count // len(products)), block_ms)

    def _read_streams(self, products: tuple[str, ...], share: int, block_ms: int) -> list[Entry]:
        """At most `share` new entries of each product, with one command."""
        streams: dict[Any, Any] = {keys.frames(product): ">" for product in products}
        by_key = {keys.frames(product).encode(): product for product in products}
        reply: Any = None
        with self._group_may_be_gone():
            # redis-py leaves BLOCK out for None; BLOCK 0 would wait for ever
            reply = self._server.xreadgroup(keys.GROUP, self._consumer, streams, count=share, block=block_ms or None)
        pairs = reply.items() if isinstance(reply, dict) else reply or ()
        return [
            Entry(by_key[bytes(key)], entry_id, fields or {})
            for key, entries in pairs
            for entry_id, fields in _flat(entries)
        ]

    @contextlib.contextmanager
    def _group_may_be_gone(self) -> Iterator[None]:
        """A stream that was deleted took its group along; the next read makes it anew."""
        try:
            yield
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._products, self._products_read_at = (), float("-inf")

    def _known_products(self) -> tuple[str, ...]:
        """Products with a stream, looked up once a second; new ones get their consumer group."""
        now = time.monotonic()
        if now - self._products_read_at < 1.0:
            return self._products
        names: Any = self._server.smembers(keys.PRODUCTS)
        products = sorted(name.decode(errors="replace") for name in names)
        joined = (product for product in products if product in self._products or self._joins(product))
        self._products, self._products_read_at = tuple(joined), now
        return self._products

    def _joins(self, product: str) -> bool:
        """Make the product's group if there is none; in a cluster, one whose node is away is joined later."""
        try:
            self._server.xgroup_create(keys.frames(product), keys.GROUP, id="0", mkstream=True)
        except REDIS_ERRORS as error:
            if "BUSYGROUP" not in str(error):
                if self._slotwise is None:
                    raise
                return False
        return True

    @_translated
    def recover(self, held: Sequence[Entry], count: int) -> list[Entry]:
        """See FrameStream. An entry delivered too often is dead-lettered instead of being taken over.

        What was taken over is returned even if something fails after it: else it would count as delivered in vain.
        """
        taken: list[Entry] = []

        def claim(product: str) -> None:
            if len(taken) < count:
                with self._group_may_be_gone():
                    taken.extend(self._claim(product, count - len(taken)))

        try:
            self._refresh(held)
            for_each(self._known_products(), claim)
            self._idle_consumers.remove(self._products)
        except (StreamUnavailable, *REDIS_ERRORS):
            if not taken:
                raise
        return taken

    def _refresh(self, held: Sequence[Entry]) -> None:
        by_product: dict[str, list[bytes]] = {}
        for entry in held:
            by_product.setdefault(entry.product, []).append(entry.id)

        def refresh(product: str) -> None:
            ids: Any = by_product[product]
            with self._group_may_be_gone():
                # JUSTID: idle time starts anew, the delivery count stays
                self._server.xclaim(keys.frames(product), keys.GROUP, self._consumer, 0, ids, justid=True)

        for_each(by_product, refresh)

    def _claim(self, product: str, count: int) -> list[Entry]:
        key, idle = keys.frames(product), self._settings.claim_idle_ms
        stale: Any = self._server.xpending_range(key, keys.GROUP, "-", "+", count, idle=idle)
        poison = [entry for entry in stale if entry["times_delivered"] >= self._settings.max_deliveries]
        for entry in poison:
            reason = f"delivered {entry['times_delivered']} times without a row"
            found: Any = self._server.xrange(key, entry["message_id"], entry["message_id"])
            fields = found[0][1] if found else {}
            self.dead_letter(Entry(product, entry["message_id"], fields), _camera(fields), reason)
        ids = [entry["message_id"] for entry in stale if entry not in poison]
        if not ids:
            return []
        claimed: Any = self._server.xclaim(key, keys.GROUP, self._consumer, idle, ids)
        return [Entry(product, entry_id, fields) for entry_id, fields in claimed if fields]

    @_translated
    def send_verdicts(self, verdicts: Sequence[VerdictMessage]) -> set[str]:
        """See FrameStream. The verdict streams are bounded: the newest `VERDICTS_KEPT` stay."""
        late: set[str] = set()
        groups = _by_product(verdicts)

        def answer(product: str) -> None:
            args: list[str | bytes | int | float] = [product, keys.VERDICTS_KEPT, self._settings.takt_of(product) or 0]
            for verdict in groups[product]:
                args += [verdict.camera, verdict.seq, verdict.verdict, repr(verdict.score), repr(verdict.threshold)]
                args += [verdict.model_version, verdict.reason, f"{verdict.total_ms:.3f}", verdict.id]
            of = (keys.verdicts, keys.latest, keys.waiting, keys.unanswered, keys.late, keys.ledger, keys.frames)
            answers = self._answer(keys=[key(product) for key in of], args=args)
            each = zip(groups[product], answers, strict=True)
            late.update(verdict.frame_id for verdict, answered in each if answered == LATE)

        for_each(groups, answer)
        return late

    @_translated
    def settle(self, settlements: Sequence[Settlement]) -> None:
        """See FrameStream. XACK alone frees no memory, so the entry is deleted in the same step."""
        groups = _by_product(settlements)

        def settle(product: str) -> None:
            args: list[str | bytes | int] = [keys.GROUP]
            for item in groups[product]:
                args += [item.id, item.camera, item.seq, item.verdict, item.size, item.captured_at_ns // 1_000_000]
            self._settle(keys=keys.account(product), args=args)

        for_each(groups, settle)

    @_translated
    def dead_letter(self, entry: Entry, camera: str, reason: str) -> None:
        """See FrameStream."""
        product = entry.product
        self._dead_letter(
            keys=[*keys.account(product), keys.dead(product), keys.verdicts(product)],
            args=[keys.GROUP, entry.id, camera, reason, product, keys.VERDICTS_KEPT],
        )
        self._dead_bound.trim(product)

    @_translated
    def close(self) -> None:
        """See FrameStream. Deleting a consumer that holds entries would orphan them, so that one stays."""
        for product in self._products:
            key = keys.frames(product)
            with self._group_may_be_gone():
                pending: Any = self._server.xpending_range(key, keys.GROUP, "-", "+", 1, self._consumer)
                if not pending:
                    self._server.xgroup_delconsumer(key, keys.GROUP, self._consumer)


def _by_product(items: Sequence[M]) -> dict[str, list[M]]:
    groups: dict[str, list[M]] = {}
    for item in items:
        groups.setdefault(item.product, []).append(item)
    return groups


def _camera(fields: dict[bytes, bytes]) -> str:
    """The camera that an entry names, `?` if it names none."""
    try:
        return check_camera(fields.get(b"camera", b"").decode("ascii"))
    except (UnicodeDecodeError, FrameError):
        return "?"


def _flat(entries: Any) -> Any:
    """Entries of one stream; redis-py's RESP3 replies nest them in one more list."""
    if entries and isinstance(entries[0], list) and entries[0] and isinstance(entries[0][0], tuple | list):
        return entries[0]
    return entries
