"""What redis-py raises, in the words of a person, and whether waiting may help."""

from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    ConnectionError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

REDIS_ERRORS = (RedisError, RedisClusterException)  # a cluster's client has errors outside redis-py's own tree
_PASSING = (ConnectionError, TimeoutError, OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError)
# a full disk; too few replicas; a replica without its master; a call that a demotion broke off
_NO_CLUSTER = "Cluster mode is not enabled"  # redis-py's words
_PASSING_CODES = ("MISCONF", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED")


def may_pass(error: Exception) -> bool:
    """Whether waiting may help: a server that is away, starting, failing over, out of memory or on a full disk."""
    cause = error.__cause__
    if isinstance(error, RedisClusterException) and isinstance(cause, REDIS_ERRORS):  # none of the nodes would do
        return may_pass(cause)
    if isinstance(error, AuthenticationError) or _NO_CLUSTER in str(error):
        return False
    if isinstance(error, (*_PASSING, RedisClusterException)):
        return True
    return any(code in str(error) for code in _PASSING_CODES)


def is_refusal(error: Exception) -> bool:
    """Whether a server answered, in the negative."""
    return isinstance(error, ResponseError) and not isinstance(error, ClusterDownError | ReadOnlyError)


def trouble(error: Exception) -> str:
    """One line for an error of redis-py."""
    text = one_line(error)
    if isinstance(error, NoPermissionError):
        return f"Redis does not permit this: {permission_line(error)}"
    if isinstance(error, MovedError):
        return "this Redis is one node of a cluster: let redis.url begin with redis+cluster://"
    return f"Redis did not answer: {text}"


def permission_line(error: Exception, user: str = "") -> str:
    """Which user lacks what; the server names the user and the command, but neither for a key."""
    text = one_line(error).removeprefix("NOPERM ").removeprefix("ACL failure in script: ")
    who = f"user {user!r}: " if user and user.lower() not in text.lower() else ""
    return f"{who}{text}; `proctor redis-acl` prints the rights of each role"


def one_line(error: Exception) -> str:
    """An error's text without line breaks, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
