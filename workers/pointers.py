"""Which version of a product is in service: pointers in Redis, mirrored in the registry."""

import json
from typing import Any

import redis
from pydantic import TypeAdapter, ValidationError

from models.errors import VersionError
from models.registry import Registry
from models.storage import Storage
from models.versions import check_revision
from producers import keys
from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable

PRODUCTS = "proctor:models"
CURRENT, PREVIOUS = "current", "previous"
_POINTERS = TypeAdapter(dict[str, str])


class Pointers:
    """Reads and moves the `current` and `previous` pointers of products.

    Redis is what replicas follow; the registry's copy brings the pointers back when Redis starts empty.
    """

    def __init__(self, server: redis.Redis, registry: Registry) -> None:
        self._server, self._registry = server, registry
        self._mirror = Storage(registry.uri)

    def current(self) -> dict[str, str]:
        """Version in service by product.

        Raises:
            StreamUnavailable: Redis does not answer.
        """
        try:
            products: Any = sorted(self._server.smembers(PRODUCTS))
            pipeline = self._server.pipeline(transaction=False)
            for product in products:
                pipeline.hget(keys.model(product.decode()), CURRENT)
            versions = pipeline.execute()
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        return {p.decode(): v.decode() for p, v in zip(products, versions, strict=True) if v is not None}

    def of(self, product: str) -> dict[str, str]:
        """Pointers of a product by name, empty if it has none."""
        try:
            pointers: Any = self._server.hgetall(keys.model(product))
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        return {name.decode(): version.decode() for name, version in pointers.items()}

    def promote(self, product: str, version: str) -> None:
        """Put a version into service; the one it replaces becomes `previous`.

        Raises:
            VersionError: no such version, or this program cannot judge by it.
            StreamUnavailable: Redis does not answer.
        """
        check_revision(self._registry.card(product, version))
        before = self.of(product)
        pointers = {CURRENT: version}
        replaced = before.get(CURRENT)
        if replaced is not None and replaced != version:
            pointers[PREVIOUS] = replaced
        elif PREVIOUS in before:
            pointers[PREVIOUS] = before[PREVIOUS]
        self._mirror.write(f"{product}/pointers.json", json.dumps(pointers).encode())
        self._write(product, pointers)

    def restore(self) -> None:
        """Bring back from the registry what Redis does not know.

        Raises:
            VersionError: the registry or a product's copy is not readable; the other products are back.
            StreamUnavailable: Redis does not answer.
        """
        malformed = []
        for product in self._mirror.folders(""):
            name = f"{product}/pointers.json"
            if self._mirror.exists(name) and not self.of(product):
                try:
                    self._write(product, _POINTERS.validate_json(self._mirror.read(name)))
                except ValidationError:
                    malformed.append(name)
        if malformed:
            raise VersionError(
                f"registry {self._registry.uri}: {', '.join(malformed)} malformed; delete it and promote a version anew"
            )

    def _write(self, product: str, pointers: dict[str, str]) -> None:
        try:
            pipeline = self._server.pipeline(transaction=False)
            pipeline.hset(keys.model(product), mapping=dict[Any, Any](pointers))
            pipeline.sadd(PRODUCTS, product)
            pipeline.sadd(keys.PRODUCTS, product)  # replicas then listen to its stream before the first frame comes
            pipeline.execute()
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
