"""What replicas and the compactor report of themselves, once a second, to whoever looks."""

import json
from typing import Any

import redis

from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable

_REPLICAS = "proctor:replicas"
_COMPACTOR = "proctor:compactor"
_KEPT_S = 10


def write_report(server: redis.Redis, state: dict[str, Any]) -> None:
    """Record a replica's state under its name; the record expires with the replica.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    try:
        server.set(f"replica:{state['replica']}", json.dumps(state), ex=_KEPT_S)
        server.sadd(_REPLICAS, state["replica"])
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error


def remove_report(server: redis.Redis, replica: str) -> None:
    """Forget a replica that ended in order."""
    try:
        server.delete(f"replica:{replica}")
        server.srem(_REPLICAS, replica)
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error


def read_replicas(server: redis.Redis) -> list[dict[str, Any]]:
    """State of every replica that reported within the last seconds, by name.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    try:
        members: Any = server.smembers(_REPLICAS)
        names = sorted(name.decode() for name in members)
        records: dict[str, Any] = {name: server.get(f"replica:{name}") for name in names}
        gone = [name for name, record in records.items() if record is None]
        if gone:
            server.srem(_REPLICAS, *gone)
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error
    return [json.loads(record) for record in records.values() if record is not None]


def write_compactor(server: redis.Redis, state: dict[str, Any]) -> None:
    """Record the compactor's state; the record expires with it.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    try:
        server.set(_COMPACTOR, json.dumps(state), ex=_KEPT_S)
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error


def read_compactor(server: redis.Redis) -> dict[str, Any] | None:
    """The compactor's state; None when none reported within the last seconds.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    try:
        record: Any = server.get(_COMPACTOR)
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error
    return None if record is None else json.loads(record)
