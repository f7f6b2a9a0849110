"""The number of replicas follows the backlog: a policy that Serve's controller calls about ten times a second.

Serve's own policy counts requests, and a replica that pulls its frames gets none. Serve pickles this module's class
by value and imports the rest, so Proctor must be installed on the head; nothing of this may load PyTorch.
"""

import time
from typing import TYPE_CHECKING, Any

import redis
from ray.experimental import internal_kv

from cluster.decision import Decision
from cluster.load_watch import LoadWatch
from cluster.scaling import Waiting, after_delay, replicas_wanted
from cluster.serve_settings import ServeSettings
from workers.errors import StreamUnavailable
from workers.places import Places

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

_NAMESPACE = "proctor"
_KEY = "redis_url"


class BacklogPolicy:
    """How many replicas shall run. A call is arithmetic on the figures that a thread has brought.

    Args:
        settings: `[serve]` as JSON has it.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = ServeSettings.model_validate(settings)
        self._watch = LoadWatch(connect_as_told)
        self._waiting: Waiting | None = None

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """The number to have now, and no state for Serve to keep."""
        now, current = time.monotonic(), context.target_num_replicas
        wish = replicas_wanted(self._watch.figures(now), self._settings, current, now)
        wanted, self._waiting = after_delay(wish, self._waiting, self._settings, current, now)
        least, most = self._settings.least, self._settings.most
        self._watch.note(Decision(context.current_num_replicas, wanted, least, most, wish.reason))
        return wanted, {}


def tell_redis_url(url: str) -> None:
    """Leave the address for the policy in the key-value store of the cluster's head.

    It has the password. `policy_kwargs` would show it: Serve logs them, and `serve status` and the dashboard print
    them. The store is read only by who may run programs on the cluster.
    """
    internal_kv._internal_kv_put(_KEY, url, namespace=_NAMESPACE)


def forget_redis_url() -> None:
    """Take the address out of the store again."""
    internal_kv._internal_kv_del(_KEY, namespace=_NAMESPACE)


def connect_as_told() -> redis.Redis:
    """Connect to the Redis of `tell_redis_url`.

    Raises:
        StreamUnavailable: nobody has told.
    """
    url = internal_kv._internal_kv_get(_KEY, namespace=_NAMESPACE)
    if url is None:
        raise StreamUnavailable("no Redis address in the cluster's key-value store")
    return Places(url.decode(), "", "", "").connect()
