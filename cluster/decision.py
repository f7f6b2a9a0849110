"""The last decision on the number of replicas, left in Redis for whoever looks."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import redis

from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import StreamUnavailable

_KEY = "proctor:autoscaling"
_KEPT_S = 10


@dataclass(frozen=True)
class Decision:
    """What was decided, and why.

    Attributes:
        replicas: how many run.
        wanted: how many shall run.
        least: lower bound.
        most: upper bound.
        reason: in a few words.
    """

    replicas: int
    wanted: int
    least: int
    most: int
    reason: str

    def line(self) -> str:
        """For a person."""
        coming = f", {self.wanted} wanted" if self.wanted != self.replicas else ""
        return f"replicas {self.replicas} of {self.least}-{self.most}{coming}: {self.reason}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def write_decision(server: redis.Redis, decision: Decision) -> None:
    """Leave the decision; it expires with its author.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    try:
        server.set(_KEY, json.dumps(decision.as_dict()), ex=_KEPT_S)
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error


def read_decision(server: redis.Redis) -> Decision | None:
    """The last decision, None where the number of replicas is fixed or nobody has decided for some seconds.

    Raises:
        StreamUnavailable: Redis does not answer.
    """
    try:
        record: Any = server.get(_KEY)
    except REDIS_ERRORS as error:
        raise StreamUnavailable(trouble(error)) from error
    return None if record is None else Decision(**json.loads(record))
