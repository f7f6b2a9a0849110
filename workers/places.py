"""Where the workers' things are; small and picklable, so that Ray can carry it to another node."""

import random
import time
from dataclasses import dataclass, field

import redis

from producers.connecting import open_client
from producers.redis_errors import REDIS_ERRORS, may_pass, trouble
from workers.errors import StreamUnavailable

_TIMEOUT_S = 5.0  # above every blocking read of this package
_CLUSTER_PATIENCE_S = 60.0


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
        """A client that returns bytes, gives up on a silent server and retries a cut connection once.

        A cluster must tell its nodes first: one that is away or failing over is waited for, for a minute.

        Raises:
            StreamUnavailable: the cluster stayed away, or refuses us.
        """
        give_up_at = time.monotonic() + _CLUSTER_PATIENCE_S
        pause_s = 0.1
        while True:
            try:
                return open_client(self.redis_url, timeout_s=_TIMEOUT_S, retries=1)
            except REDIS_ERRORS as error:
                if not may_pass(error) or time.monotonic() > give_up_at:
                    raise StreamUnavailable(trouble(error)) from error
                time.sleep(pause_s * random.uniform(0.5, 1.0))  # not all replicas in step
                pause_s = min(pause_s * 2, 2.0)
