"""Connecting to a Redis or Valkey server, checked, with one clear line for everything that can be wrong."""

import re
import socket
import ssl
import time

import redis
from redis.exceptions import ClusterDownError, MovedError, NoPermissionError, RedisClusterException
from redis.sentinel import MasterNotFoundError

from cluster.errors import ServerAway, ServerError
from producers import keys
from producers.connecting import open_client, set_retries
from producers.errors import AddressError
from producers.redis_errors import REDIS_ERRORS, one_line, permission_line
from producers.server_address import ServerAddress

OLDEST_VERSION = (7, 0)
LOADING_PATIENCE_S = 120.0


def connect(url: str, *, timeout_s: float = 5.0, retries: int = 3) -> redis.Redis:
    """Connect to the server at `url` and check that it answers, accepts us and is new enough.

    A server that still reads its data is waited for.

    Args:
        url: see `producers.server_address`.
        timeout_s: seconds for connecting and for every answer; a blocking command must ask for less.
        retries: how often a command is tried again by the client, once it is connected.

    Raises:
        ServerAway: it does not answer.
        ServerError: one line that says what to do and never shows the password.
    """
    client = None
    try:
        address = ServerAddress.parse(url)
        first_retries = 2 if address.kind == "cluster" else 0  # there a repetition asks another node, at once
        client = open_client(url, timeout_s=timeout_s, retries=first_retries)
        # not PING: a server whose disk is full refuses that, and its ledger is wanted most then
        version = str(client.info("server").get("redis_version", "unknown"))
        _await_data(client)
    except AddressError as error:
        raise ServerError(f"redis.url is not a Redis address: {error}") from None
    except (*REDIS_ERRORS, OSError) as error:
        if client is not None:
            client.close()
        raise (ServerAway if _is_away(error) else ServerError)(_explain(error, address, timeout_s)) from None
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts is None or (int(parts[1]), int(parts[2])) < OLDEST_VERSION:
        client.close()
        raise ServerError(
            f"the server at {address.shown} is version {version}: "
            f"Proctor needs {'.'.join(map(str, OLDEST_VERSION))} or newer"
        )
    set_retries(client, retries)  # only now, so that a wrong address fails at once
    return client


def unchecked_client(url: str, *, timeout_s: float) -> redis.Redis:
    """A client that tries nothing twice, for a server that need not answer yet; a cluster must answer.

    Raises:
        ServerError: `url` is no address, or a cluster is down.
    """
    try:
        return open_client(url, timeout_s=timeout_s, retries=0)
    except AddressError as error:
        raise ServerError(f"redis.url is not a Redis address: {error}") from None
    except (*REDIS_ERRORS, OSError) as error:
        raise ServerError(_explain(error, ServerAddress.parse(url), timeout_s)) from None


def _is_away(error: BaseException) -> bool:
    """Whether the server may be only away, so that frames can wait for it."""
    gone = (redis.TimeoutError, redis.BusyLoadingError, MasterNotFoundError, ClusterDownError)
    refused = (ConnectionRefusedError, FileNotFoundError)
    return isinstance(error, gone) or any(isinstance(each, refused) for each in _causes(error))


def shown_url(url: str) -> str:
    """Return an address without user and password, fit for a message."""
    return ServerAddress.parse(url).shown


def _await_data(client: redis.Redis) -> None:
    """Read one key that every role may read: a server that is loading, down or part of a cluster says so."""
    give_up_at = time.monotonic() + LOADING_PATIENCE_S
    while True:
        try:
            client.exists(keys.PRODUCTS)
            return
        except redis.BusyLoadingError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.1)


def _explain(error: Exception, address: ServerAddress, timeout_s: float) -> str:
    """Return one line for what redis-py raised on connecting; the first case that holds speaks."""
    text = one_line(error)
    causes = _causes(error)
    refused = any(word in text for word in ("WRONGPASS", "invalid username-password", "invalid password"))
    shown, server = address.shown, f"the server at {address.shown}"
    certificate = next((each for each in causes if isinstance(each, ssl.SSLError)), None)
    cases = (
        (certificate is not None, _explain_tls(certificate, server)),
        (isinstance(error, MasterNotFoundError), _explain_no_master(text, address)),
        (
            isinstance(error, redis.TimeoutError),
            f"{server} is silent for {timeout_s:g} s: check the address" + (", and that it speaks TLS" * address.tls),
        ),
        ("without any password configured" in text, f"{server} has no password: remove it from redis.url"),
        (refused, f"{server} refuses the user or password of redis.url: correct them"),
        (
            isinstance(error, redis.AuthenticationError) or "NOAUTH" in text,
            f"{server} asks for a password: set redis.url to redis://:PASSWORD@HOST:PORT/0",
        ),
        (isinstance(error, NoPermissionError), f"{server} refuses: {permission_line(error, address.user)}"),
        (
            isinstance(error, MovedError),
            f"{server} is one node of a cluster: let redis.url begin with redis+cluster://",
        ),
        ("CLUSTERDOWN" in text or isinstance(error, ClusterDownError), f"the cluster at {shown} is down: {text}"),
        (
            "Cluster mode is not enabled" in text or "cluster support disabled" in text,
            f"{server} is no cluster: let redis.url begin with redis://",
        ),
        (isinstance(error, redis.BusyLoadingError), f"{server} still reads its data: try again later"),
        (isinstance(error, redis.InvalidResponse), f"{server} is not Redis or Valkey: correct redis.url"),
        (
            any(isinstance(each, socket.gaierror) for each in causes),
            f"the host of {shown} is unknown: correct redis.url",
        ),
        (
            address.kind == "cluster" and any(isinstance(each, ConnectionRefusedError) for each in causes),
            f"a node of the cluster at {shown} does not answer: start it or correct redis.url",
        ),
        (
            any(isinstance(each, ConnectionRefusedError | FileNotFoundError) for each in causes),
            f"nothing listens at {shown}: start that server or correct redis.url",
        ),
        (
            "onnection closed" in text or "reset by peer" in text,
            f"{server} closes the connection: if it speaks TLS, let redis.url begin with rediss://",
        ),
        (isinstance(error, RedisClusterException), f"no node of the cluster at {shown} can be used: {text}"),
    )
    return next((line for holds, line in cases if holds), f"{server} cannot be used: {text}")


def _causes(error: BaseException) -> list[BaseException]:
    """The errors behind `error`, nearest first."""
    found: list[BaseException] = []
    cause: BaseException | None = error.__cause__ or error.__context__
    while cause is not None and len(found) < 8:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


def _explain_tls(error: BaseException | None, server: str) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {server} is refused ({error.verify_message}): add ?ssl_ca_certs=FILE to redis.url, "
            "the certificate of the authority that signed it"
        )
    reason = getattr(error, "reason", None) or error
    return f"{server} does not speak TLS with us ({reason}): let redis.url begin with redis://, or correct its port"


def _explain_no_master(text: str, address: ServerAddress) -> str:
    if "AuthenticationError" in text:
        return f"a sentinel of {address.shown} asks for a password: add ?sentinel_password=PASSWORD to redis.url"
    if len(re.findall(r" - \S*(?:Connection|Timeout)Error", text)) == len(address.hosts):
        return f"no sentinel of {address.shown} answers: start them or correct redis.url"
    return (
        f"the sentinels of {address.shown} know no master {address.service!r} that is up: correct the service in "
        "redis.url, or wait for the end of the fail-over"
    )
