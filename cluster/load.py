"""From looks at Redis to the figures of the load: what waits, what arrives, what one replica can do."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from workers.backlog import Backlog

_WINDOW_S = 5.0
_SHORTEST_S = 2.0  # a shorter look at the speed would take the rhythm of the segments for it
_SMOOTHING = 0.2  # weight of the newest look, of two a second


@dataclass(frozen=True)
class Figures:
    """The load as the policy sees it.

    Attributes:
        read_at: when it was read, in seconds of the monotonic clock.
        lag: frames that are not settled yet.
        untaken: those of them that no replica has taken.
        oldest_s: age of the oldest of them, None if none waits.
        arriving_per_s: frames that came, a second.
        replicas: replicas that report themselves.
        judged_per_s: frames that one replica settles a second when it is never short of them; None if not known.
        idle_s: for how long nothing has waited.
    """

    read_at: float
    lag: int
    untaken: int
    oldest_s: float | None
    arriving_per_s: float
    replicas: int
    judged_per_s: float | None
    idle_s: float


@dataclass(frozen=True, slots=True)
class _Look:
    at: float
    backlog: Backlog
    replicas: int


class Load:
    """The looks of the last seconds; each makes figures.

    A replica's speed shows only while frames wait that nobody has taken. At other times it does what comes, which
    is no more than it can do: such a speed raises the known one and never lowers it.
    """

    def __init__(self) -> None:
        self._looks: deque[_Look] = deque()
        self._speed: float | None = None
        self._busy_since: float | None = None
        self._waited_at: float | None = None

    def add(self, now: float, backlog: Backlog, replicas: int) -> Figures:
        """Take in one look.

        Args:
            now: seconds of the monotonic clock.
            backlog: what waits.
            replicas: how many report themselves.
        """
        if self._looks and backlog.settled < self._looks[-1].backlog.settled:  # a server that lost its data
            self._looks.clear()
            self._busy_since = None
        if backlog.lag or self._waited_at is None:
            self._waited_at = now
        if not backlog.untaken:
            self._busy_since = None
        elif self._busy_since is None:
            self._busy_since = now
        self._looks.append(_Look(now, backlog, replicas))
        while len(self._looks) > 2 and now - self._looks[1].at >= _WINDOW_S:
            self._looks.popleft()
        self._speed = self._measured_speed(now)
        return Figures(
            read_at=now,
            lag=backlog.lag,
            untaken=backlog.untaken,
            oldest_s=backlog.oldest_s,
            arriving_per_s=_arriving_per_s(self._looks),
            replicas=replicas,
            judged_per_s=self._speed,
            idle_s=now - self._waited_at,
        )

    def _measured_speed(self, now: float) -> float | None:
        """What one replica does a second, smoothed; what was known before if this look does not tell."""
        busy_since = now if self._busy_since is None else self._busy_since
        short_of_frames = now - busy_since < _SHORTEST_S
        looks = list(self._looks) if short_of_frames else [look for look in self._looks if look.at >= busy_since]
        seen = _settled_per_replica(looks)
        if not seen:  # nothing was judged: a full disk, or no replica yet, says nothing of the speed
            return self._speed
        if short_of_frames:
            return None if self._speed is None else max(self._speed, seen)
        return seen if self._speed is None else _SMOOTHING * seen + (1 - _SMOOTHING) * self._speed


def _settled_per_replica(looks: Sequence[_Look]) -> float | None:
    """Frames settled per second and replica, None if the looks are too close to each other."""
    if not looks or looks[-1].at - looks[0].at < _SHORTEST_S:
        return None
    worked_s = sum((b.at - a.at) * min(a.replicas, b.replicas) for a, b in pairwise(looks))
    return (looks[-1].backlog.settled - looks[0].backlog.settled) / worked_s if worked_s else None


def _arriving_per_s(looks: Sequence[_Look]) -> float:
    """What came: what was settled, and what waits more than before."""
    first, last = looks[0], looks[-1]
    came = last.backlog.settled - first.backlog.settled + last.backlog.lag - first.backlog.lag
    return max(0, came) / max(last.at - first.at, _SHORTEST_S)
