"""The ledger of a server, as the HTTP interface and the commands show it."""

from datetime import UTC, datetime, timedelta
from typing import Any

import redis

from cluster.errors import ProctorError
from cluster.metrics import exposition
from cluster.reading import parse_since
from cluster.shift_report import shift_document
from producers.counting import TALLY_DAYS
from workers.ledger import read_ledger
from workers.reports import read_replicas
from workers.shifts import ShiftAccount, read_shift


class RedisAccounts:
    """See `cluster.http.Accounts`.

    Args:
        server: a client that returns bytes.
    """

    def __init__(self, server: redis.Redis) -> None:
        self._server = server

    def ledger(self, since: str | None, until: str | None, product: str | None = None) -> dict[str, Any]:
        """The ledger as it stands, or a shift's account."""
        if since is None and until is not None:
            raise ProctorError("until needs since: the start of the shift")
        if since is None:
            products = [each for each in read_ledger(self._server) if product in (None, each.product)]
            balanced = all(product.balanced for product in products)
            return {"balanced": balanced, "products": [product.as_dict() for product in products]}
        accounts, start, end = self.shift(since, until, product)
        return shift_document(accounts, start, end)

    def shift(
        self, since: str, until: str | None, product: str | None = None
    ) -> tuple[list[ShiftAccount], datetime, datetime | None]:
        """The accounts of a shift, its start and its end.

        Raises:
            ProctorError: a time is none, the end is not after the start, or the start is too long ago.
            StreamUnavailable: Redis does not answer.
        """
        start = parse_since(since)
        end = parse_since(until, "--until") if until else None
        if end is not None and end <= start:
            raise ProctorError(f"the shift ends at {until}, before it starts at {since}: correct one of them")
        if start < datetime.now(UTC) - timedelta(days=TALLY_DAYS):
            raise ProctorError(f"tallies are kept for {TALLY_DAYS} days: give a later start than {since}")
        found = read_shift(self._server, start, end)
        return [each for each in found if product in (None, each.product)], start, end

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text form."""
        return exposition(read_ledger(self._server), read_replicas(self._server))
