"""Where the workers' things are; small and picklable, so that Ray can carry it to another node."""

from dataclasses import dataclass, field

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

_TIMEOUT_S = 5.0  # above every blocking read of this package


@dataclass(frozen=True)
class Places:
    """Addresses of the server and the stores.

    Attributes:
        redis_url: the streams, with the password.
        registry_uri: versions.
        results_uri: Arrow segments and the table of results.
        datasets_uri: approved images.
        teacher_weights: local weights file by teacher name.
    """

    redis_url: str = field(repr=False)
    registry_uri: str
    results_uri: str
    datasets_uri: str
    teacher_weights: dict[str, str] = field(default_factory=dict)

    def connect(self) -> redis.Redis:
        """A client that returns bytes, gives up on a silent server and retries a cut connection once."""
        return redis.Redis.from_url(
            self.redis_url,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            socket_keepalive=True,
            retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 1),
        )
