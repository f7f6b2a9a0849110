"""`proctor redis-acl`: users of Redis with no more rights than each role needs.

One table. Whoever adds a command, or a key, to a script or a module adds it here to the roles that run it; a test
reads the scripts and the names of the keys.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import ProctorError
from producers.errors import FrameError
from producers.frame import check_product

_MIN_PASSWORD = 8
# What redis-py sends when it connects, to a cluster too, and what `cluster.connection` checks.
_CONNECTING = (
    "ping",
    "select",
    "info",
    "exists",
    "evalsha",
    "script|load",
    "client|setinfo",
    "client|setname",
    "command",
    "cluster|slots",
    "readonly",
    "asking",
)
_TRANSACTIONS = ("multi", "exec", "discard")
_COUNTING = ("expire", "hincrby", "time")  # what every script of the ledger does
_SUFFIXED = ("tally",)  # their keys go on behind the product: `NAME:{product}:...`


@dataclass(frozen=True)
class Role:
    """What one kind of program may do.

    Attributes:
        user: its name in Redis.
        what: which program it is.
        commands: commands and subcommands, those inside scripts too.
        product_keys: rights by the first part of a key `NAME:{product}`: `R` to read, `W` to write, or both. A
            key that is given to a script needs both.
        shared_keys: rights by pattern of the keys that belong to no product.
        drop_oldest: commands that the policy `drop_oldest` needs besides.
    """

    user: str
    what: str
    commands: tuple[str, ...]
    product_keys: Mapping[str, str]
    shared_keys: Mapping[str, str]
    drop_oldest: tuple[str, ...] = ()


ROLES = (
    Role(
        "producer",
        "cameras: `proctor push` and `producers.publisher`",
        (*_CONNECTING, *_COUNTING, "get", "hget", "hset", "incrby", "sadd", "srem", "xadd", "xlen", "zadd"),
        {
            "frames": "RW",
            "ledger": "RW",
            "tally": "RW",
            "gaps": "RW",
            "waiting": "RW",
            "unanswered": "RW",
            "late": "RW",
            "held": "RW",
            "verdicts": "RW",
            "model": "R",
        },
        {"proctor:products": "W"},
        drop_oldest=("decrby", "xdel", "xinfo|groups", "xrange", "zrem", "zscore"),
    ),
    Role(
        "inspector",
        "replicas and the trainer, as `proctor up` starts them",
        (
            *_CONNECTING,
            *_TRANSACTIONS,
            *_COUNTING,
            *("get", "set", "del", "decrby", "eval", "pexpire", "sadd", "srem", "smembers", "sismember"),
            *("blmove", "lmove", "lrem", "xlen", "zrange", "zrangebyscore", "zrem", "zscore"),
            *("hget", "hgetall", "hset", "xinfo|groups"),
            *("xadd", "xack", "xdel", "xclaim", "xpending", "xrange", "xreadgroup", "xtrim", "memory|usage"),
            *("xgroup|create", "xgroup|delconsumer", "xinfo|consumers"),
        ),
        {
            "frames": "RW",
            "ledger": "RW",
            "tally": "RW",
            "waiting": "RW",
            "unanswered": "RW",
            "late": "RW",
            "held": "RW",
            "verdicts": "RW",
            "latest": "RW",
            "dead": "RW",
            "dead_counts": "RW",
            "model": "RW",
        },
        {
            "proctor:products": "RW",
            "proctor:models": "RW",
            "proctor:{jobs}:*": "RW",
            "proctor:replicas": "RW",
            "replica:*": "RW",
            "proctor:compactor*": "RW",
            "proctor:autoscaling": "RW",
        },
    ),
    Role(
        "console",
        "people: `proctor status`, `ledger`, `train`, `jobs`, `models`, `dead` and `doctor`",
        (
            *_CONNECTING,
            *_TRANSACTIONS,
            *_COUNTING,
            *("get", "set", "incrby", "sadd", "srem", "smembers", "lpush"),
            *("zadd", "zrange", "zrangebyscore", "zrevrange"),
            *("hget", "hgetall", "hset"),
            *("xadd", "xdel", "xlen", "xrange", "xrevrange", "xinfo|groups"),
        ),
        {
            "frames": "RW",
            "ledger": "RW",
            "tally": "RW",
            "gaps": "RW",
            "waiting": "RW",
            "held": "RW",
            "verdicts": "R",
            "latest": "R",
            "dead": "RW",
            "dead_counts": "RW",
            "model": "RW",
        },
        {
            "proctor:products": "RW",
            "proctor:models": "RW",
            "proctor:{jobs}:*": "RW",
            "proctor:replicas": "RW",
            "replica:*": "R",
            "proctor:compactor": "R",
            "proctor:autoscaling": "R",
        },
    ),
)


def acl_lines(
    products: Sequence[str], passwords: Sequence[str], for_file: bool, drop_oldest: bool = False
) -> list[str]:
    """One line per role: `ACL SETUSER` commands, or lines of a server's `aclfile`.

    Only hashes of the passwords are in them.

    Args:
        products: the users' products; none for all of them, those to come too.
        passwords: one for each of `ROLES`.
        for_file: lines of an aclfile.
        drop_oldest: cameras may delete frames, as that policy does.

    Raises:
        ProctorError: a product has no valid name, or a password is missing or too weak.
    """
    if len(passwords) != len(ROLES):
        order = ", ".join(role.user for role in ROLES)
        raise ProctorError(f"{len(passwords)} passwords given, {len(ROLES)} expected: one a line, for {order}")
    for password in passwords:
        if len(password) < _MIN_PASSWORD:
            raise ProctorError(f"a password has fewer than {_MIN_PASSWORD} characters: choose longer ones")
    for product in products:
        try:
            check_product(product)
        except FrameError as error:
            raise ProctorError(str(error)) from None
    begin = "user {} on" if for_file else "ACL SETUSER {} reset on"
    return [
        " ".join([begin.format(role.user), _hashed(password), *_rights(role, products or ["*"], drop_oldest)])
        for role, password in zip(ROLES, passwords, strict=True)
    ]


def new_passwords() -> list[str]:
    """A random password for each of `ROLES`."""
    return [secrets.token_urlsafe(24) for _ in ROLES]


def _hashed(password: str) -> str:
    return f"#{hashlib.sha256(password.encode()).hexdigest()}"


def _rights(role: Role, products: Sequence[str], drop_oldest: bool) -> list[str]:
    """Key patterns, then commands; the braces of a key are part of it."""
    keys = [
        f"{_permission(rights)}~{name}:{{{product}}}" + (":*" if name in _SUFFIXED else "")
        for product in products
        for name, rights in role.product_keys.items()
    ]
    keys += [f"{_permission(rights)}~{pattern}" for pattern, rights in role.shared_keys.items()]
    commands = {*role.commands, *(role.drop_oldest if drop_oldest else ())}
    return [*keys, *(f"+{command}" for command in sorted(commands))]


def _permission(rights: str) -> str:
    return "" if rights == "RW" else f"%{rights}"
