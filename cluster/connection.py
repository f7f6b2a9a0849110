"""Connecting to a Redis or Valkey server, checked, with one clear line for everything that can be wrong."""

import re
import socket

import redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from cluster.errors import ServerAway, ServerError

OLDEST_VERSION = (7, 0)


def connect(url: str, *, timeout_s: float = 5.0, retries: int = 3) -> redis.Redis:
    """Connect to the server at `url` and check that it answers, accepts us and is new enough.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with user and password where the server wants them.
        timeout_s: seconds for connecting and for every answer; a blocking command must ask for less.
        retries: how often a command is tried again by the client, once it is connected.

    Raises:
        ServerAway: it does not answer.
        ServerError: one line that says what to do and never shows the password.
    """
    client = unchecked_client(url, timeout_s=timeout_s)
    shown = shown_url(client)
    try:
        # not PING: a server whose disk is full refuses that, and its ledger is wanted most then
        version = str(client.info("server").get("redis_version", "unknown"))
    except (redis.RedisError, OSError) as error:
        client.close()
        away = isinstance(error, redis.TimeoutError | redis.BusyLoadingError) or isinstance(
            error.__cause__ or error.__context__, ConnectionRefusedError | FileNotFoundError
        )
        raise (ServerAway if away else ServerError)(_explain(error, shown, timeout_s)) from None
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) < OLDEST_VERSION:
        client.close()
        raise ServerError(
            f"the server at {shown} is version {version}: Proctor needs {'.'.join(map(str, OLDEST_VERSION))} or newer"
        )
    # Only now, so that a wrong address fails at once.
    client.set_retry(Retry(ExponentialBackoff(cap=0.5, base=0.05), retries))
    return client


def unchecked_client(url: str, *, timeout_s: float) -> redis.Redis:
    """A client that tries nothing twice, for a server that need not answer yet.

    Raises:
        ServerError: `url` is no address.
    """
    try:
        client = redis.Redis.from_url(
            url, socket_connect_timeout=timeout_s, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
        client.connection_pool.make_connection()  # its options are checked only here
    except (ValueError, TypeError) as error:
        raise ServerError(f"redis.url is not a Redis address: {error}") from None
    return client


def shown_url(client: redis.Redis) -> str:
    """Return the address of `client`'s server without user and password, fit for a message."""
    options = client.connection_pool.connection_kwargs
    if "path" in options:
        return f"unix://{options['path']}"
    scheme = "rediss" if "SSL" in client.connection_pool.connection_class.__name__ else "redis"
    return f"{scheme}://{options.get('host', 'localhost')}:{options.get('port', 6379)}/{options.get('db', 0)}"


def _explain(error: Exception, shown: str, timeout_s: float) -> str:
    """Return one line for what redis-py raised on connecting to `shown`; the first case that holds speaks."""
    text = " ".join(str(error).split())
    cause = error.__cause__ or error.__context__
    refused = any(word in text for word in ("WRONGPASS", "invalid username-password", "invalid password"))
    server = f"the server at {shown}"
    cases = (
        (isinstance(error, redis.TimeoutError), f"{server} is silent for {timeout_s:g} s: check the address"),
        ("without any password configured" in text, f"{server} has no password: remove it from redis.url"),
        (refused, f"{server} refuses the user or password of redis.url: correct them"),
        (
            isinstance(error, redis.AuthenticationError) or "NOAUTH" in text,
            f"{server} asks for a password: set redis.url to redis://:PASSWORD@HOST:PORT/0",
        ),
        (isinstance(error, redis.InvalidResponse), f"{server} is not Redis or Valkey: correct redis.url"),
        (isinstance(cause, socket.gaierror), f"the host of {shown} is unknown: correct redis.url"),
        (
            isinstance(cause, ConnectionRefusedError | FileNotFoundError),
            f"nothing listens at {shown}: start that server or correct redis.url",
        ),
    )
    return next((line for holds, line in cases if holds), f"{server} cannot be used: {text}")
