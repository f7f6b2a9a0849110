"""Opening a client of Redis, whatever kind of server the address names. Nowhere else are clients opened."""

import socket
from typing import Any, cast

import redis
from redis.backoff import ExponentialBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError, ReadOnlyError, TimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel

from producers.errors import AddressError
from producers.server_address import ServerAddress

_BACKOFF = ExponentialBackoff(cap=0.5, base=0.02)
# A read-only server is a master that was demoted: a new connection finds the one that took its place.
_RECONNECT_ON = (ConnectionError, TimeoutError, socket.timeout, ReadOnlyError)


def open_client(url: str, *, timeout_s: float, retries: int) -> redis.Redis:
    """A client that returns bytes and connects when it is first used; a cluster is asked for its nodes at once.

    A cluster's client has the same commands, but its commands may not span products: see `is_cluster`.

    Args:
        url: see `producers.server_address`.
        timeout_s: seconds for connecting and for every answer; a blocking command must ask for less.
        retries: how often a command is repeated on a new connection, with growing pauses, before it fails.

    Raises:
        AddressError: the address is none, or one of its options is unknown.
        redis.RedisError, redis.RedisClusterException: a cluster does not answer or is down.
    """
    address = ServerAddress.parse(url)
    common: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        **address.options,
    }
    if address.hosts:
        common["socket_keepalive"] = True
    if address.kind == "cluster":
        return _open_cluster(address, common, retries)
    if address.kind == "sentinel":
        client = _open_behind_sentinels(address, common, retries)
    else:
        client = _open_server(address, common, retries)
    try:
        client.connection_pool.make_connection()  # its options are checked only here
    except (ValueError, TypeError) as error:
        raise AddressError(_unknown_option(error)) from None
    return client


def set_retries(client: redis.Redis, retries: int) -> None:
    """Change how often `client` repeats a command."""
    client.set_retry(_retry(retries))


def is_cluster(client: redis.Redis) -> bool:
    """Whether `client` speaks with a cluster, where one command or transaction concerns one product only."""
    return isinstance(client, RedisCluster)


def _retry(retries: int) -> Retry:
    return Retry(_BACKOFF, retries, _RECONNECT_ON)


def _open_server(address: ServerAddress, common: dict[str, Any], retries: int) -> redis.Redis:
    options = {**common, "retry": _retry(retries)}
    if address.tls:
        options["connection_class"] = SSLConnection
    elif not address.hosts:
        options["connection_class"] = UnixDomainSocketConnection
    for host, port in address.hosts:
        options["host"], options["port"] = host, port
    return redis.Redis.from_pool(ConnectionPool(**options))


def _open_behind_sentinels(address: ServerAddress, common: dict[str, Any], retries: int) -> redis.Redis:
    transport = {name: value for name, value in common.items() if name.startswith(("socket_", "ssl_"))}
    sentinels = Sentinel(
        list(address.hosts),
        sentinel_kwargs={**transport, **address.sentinel_options, "ssl": address.tls, "retry": _retry(0)},
    )
    client = sentinels.master_for(address.service, ssl=address.tls, retry=_retry(retries), **common)
    return cast(redis.Redis, client)


def _open_cluster(address: ServerAddress, common: dict[str, Any], retries: int) -> redis.Redis:
    nodes = [ClusterNode(host, port) for host, port in address.hosts]
    client = ClusterClient(startup_nodes=nodes, ssl=address.tls, retry=_retry(retries), **common)
    return cast(redis.Redis, client)


def _unknown_option(error: Exception) -> str:
    """One line for what redis-py says of an option that it does not know."""
    _, found, option = str(error).partition("unexpected keyword argument ")
    return f"option {option} is unknown" if found else str(error)


class ClusterClient(RedisCluster):
    """redis-py's client, which finds the slot of a read without asking a server."""

    def determine_slot(self, *args: Any) -> int | None:
        """The slot of a command's keys; redis-py asks a node for those of XREADGROUP, at each call."""
        if args[0] == "XREADGROUP":
            return self.keyslot(args[args.index(b"STREAMS") + 1])
        return super().determine_slot(*args)
