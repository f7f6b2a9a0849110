"""Addresses of Redis: one server, a master that sentinels know, or a cluster.

    redis://[user:password@]host[:6379][/db]                     rediss:// with TLS
    unix://[user:password@]/path/to/socket[?db=0]
    redis+sentinel://[user:password@]host[:26379],.../SERVICE[/db]   rediss+sentinel://
    redis+cluster://[user:password@]host[:6379],...              rediss+cluster://

Options follow a `?`, as `ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE`. A user and password are those of the
Redis servers; sentinels that ask for others get `sentinel_username=` and `sentinel_password=`. Special characters of a
user or password are percent-encoded, and so are `@` and `#` in an option.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from redis.connection import parse_url

from producers.errors import AddressError

SCHEMES = (
    "redis",
    "rediss",
    "unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)
_PORTS = {"": 6379, "cluster": 6379, "sentinel": 26379}
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_ENCODE = (
    "a user or password with a special character (/ ? # @ : %) must be percent-encoded (%2F %3F %23 %40 %3A %25), "
    "an @ or # in an option too"
)


@dataclass(frozen=True)
class ServerAddress:
    """A parsed address.

    Attributes:
        kind: empty for one server, `sentinel` or `cluster`.
        tls: whether connections are encrypted.
        hosts: (host, port) of the server, of each sentinel, or of some nodes of the cluster; empty for a socket.
        service: name of the master that the sentinels know; else empty.
        options: what a connection of redis-py takes besides host and port, user and password among them.
        sentinel_options: user and password of the sentinels where they have their own.
    """

    kind: str
    tls: bool
    hosts: tuple[tuple[str, int], ...]
    service: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def parse(cls, url: str) -> "ServerAddress":
        """Parse `url`.

        Raises:
            AddressError: one line that says what is wrong and never shows the password.
        """
        scheme, mark, rest = url.partition("://")
        if not mark or scheme not in SCHEMES:
            raise AddressError(f"should begin with {'://, '.join(SCHEMES[:-1])}:// or {SCHEMES[-1]}://")
        base, _, kind = scheme.partition("+")
        before, _, query = rest.partition("?")
        has_user = not (base == "unix" and rest.startswith("/"))  # a socket's path may hold an @
        user, _, place = before.rpartition("@") if has_user else ("", "", before)
        if "#" in rest or "@" in query or "/" in user:  # in a password, most likely: a URL's user ends there
            raise AddressError(f"cannot be read: {_ENCODE}")
        names, _, path = place.partition("/")
        if base == "unix":
            return cls("", False, (), options=_options(base, user, path, query))
        hosts = tuple(_host(name, _PORTS[kind]) for name in names.split(","))
        if len(hosts) > 1 and not kind:
            raise AddressError("names several hosts: begin it with redis+sentinel:// or redis+cluster://")
        service, _, database = path.partition("/") if kind == "sentinel" else ("", "", path)
        if kind == "sentinel" and not service:
            raise AddressError("names no service: end it with /SERVICE, the master's name at its sentinels")
        if database and not (database.isdecimal() and (kind != "cluster" or database == "0")):
            allowed = "a cluster has database 0 only" if kind == "cluster" else "a database is a number"
            raise AddressError(f"ends in /{database[:20]}: {allowed}")
        options = _options(base, user, database, query)
        own = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
        if kind == "cluster":
            options.pop("db", None)
        for name in ("host", "port"):
            options.pop(name, None)
        sentinel_options = {name: value for name, value in own.items() if value is not None}
        return cls(kind, base == "rediss", hosts, unquote(service), options, sentinel_options)

    @property
    def shown(self) -> str:
        """The address without user, password and options, fit for a message."""
        if not self.hosts:
            return f"unix://{self.options.get('path', '')}"
        scheme = ("rediss" if self.tls else "redis") + (f"+{self.kind}" if self.kind else "")
        path = {"": f"/{self.options.get('db', 0)}", "sentinel": f"/{self.service}", "cluster": ""}[self.kind]
        return f"{scheme}://{','.join(f'{host}:{port}' for host, port in self.hosts)}{path}"

    @property
    def user(self) -> str:
        """The user that the server sees."""
        return str(self.options.get("username", "default"))


def _options(base: str, user: str, path: str, query: str) -> dict[str, Any]:
    """Everything that redis-py reads from an address of one server, without the class of its connection.

    It is not given `user`, the user and password, since its errors and those of Python's URL parser quote parts of it.
    """
    try:
        options = parse_url(f"{base}:///{path}?{query}")
    except ValueError as error:
        option = re.match(r"Invalid value for '(\w+)'", str(error))
        fault = f"has an invalid value for the option '{option[1]}'" if option else f"cannot be read: {_ENCODE}"
        raise AddressError(fault) from None
    name, _, password = user.partition(":")
    for option_name, value in (("username", name), ("password", password)):
        if value:
            options[option_name] = unquote(value)
    options.pop("connection_class", None)
    for name in _FILES:
        if name in options and not Path(options[name]).is_file():
            raise AddressError(f"{name}={options[name]}: no such file on this machine")
    return options


def _host(name: str, default_port: int) -> tuple[str, int]:
    """(host, port) of `host`, `host:port` or `[IPv6]:port`."""
    bracketed, _, after = name[1:].partition("]") if name.startswith("[") else ("", "", "")
    host, colon, port = (bracketed, after[:1], after[1:]) if bracketed else name.partition(":")
    if colon and not (port.isdecimal() and 0 < int(port) < 65536):
        whose = f"host {host!r}" if host else "its host"
        # the port's text stays out of the message: it may be a password whose @HOST is missing
        raise AddressError(f"cannot be read: the port of {whose} is not a number from 1 to 65535, or {_ENCODE}")
    return unquote(host) or "localhost", int(port) if colon else default_port
