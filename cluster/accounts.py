"""The ledger of a server, as the HTTP interface and the commands show it."""

from datetime import datetime
from typing import Any

import redis

from cluster.metrics import exposition
from cluster.reading import parse_since
from cluster.shift_report import shift_document
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

    def ledger(self, since: str | None, until: str | None) -> dict[str, Any]:
        """The ledger as it stands, or a shift's account."""
        if since is None:
            products = read_ledger(self._server)
            balanced = all(product.balanced for product in products)
            return {"balanced": balanced, "products": [product.as_dict() for product in products]}
        accounts, start, end = self.shift(since, until)
        return shift_document(accounts, start, end)

    def shift(
        self, since: str, until: str | None, product: str | None = None
    ) -> tuple[list[ShiftAccount], datetime, datetime | None]:
        """The accounts of a shift, its start and its end.

        Raises:
            ProctorError: a time is none.
            StreamUnavailable: Redis does not answer.
        """
        start = parse_since(since)
        end = parse_since(until, "--until") if until else None
        found = read_shift(self._server, start, end)
        return [each for each in found if product in (None, each.product)], start, end

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text form."""
        return exposition(read_ledger(self._server), read_replicas(self._server))
