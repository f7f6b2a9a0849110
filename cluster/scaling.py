"""How many replicas the load needs: functions of figures, settings and time, without a clock of their own."""

import math
from dataclasses import dataclass

from cluster.load import Figures
from cluster.serve_settings import ServeSettings

STALE_S = 5.0
_ROOM = 0.8  # fewer replicas are wanted only if they would be busy for less than this share of their time
_MOST_LOAD = 1e6  # replicas; a speed that is next to nothing asks for more than a number can hold


@dataclass(frozen=True)
class Wish:
    """A number of replicas.

    Attributes:
        replicas: within the bounds.
        reason: why, in a few words.
        at_once: whether a smaller number needs no further waiting.
    """

    replicas: int
    reason: str
    at_once: bool = False


def replicas_wanted(figures: Figures | None, settings: ServeSettings, current: int, now: float) -> Wish:
    """The number that works the backlog off in time, the current one where that cannot be told.

    For a load of x replicas' work, more than the current number are wanted from x above it, and fewer only if x is
    below 80 % of that smaller number. So a load that moves by less than a fifth changes nothing.

    Args:
        figures: the load, None before the first look.
        settings: bounds and times.
        current: replicas that run or are on their way.
        now: seconds of the clock of `figures.read_at`.
    """
    kept = settings.bounded(current)
    if figures is None:
        return Wish(kept, "no figures yet")
    if now - figures.read_at > STALE_S:
        return Wish(kept, f"no figures for {now - figures.read_at:.0f} s, {kept} kept")
    if figures.idle_s >= settings.scale_down_idle_s:
        return Wish(settings.least, f"nothing waits for {figures.idle_s:.0f} s, {settings.least} kept", at_once=True)
    by_lag = _by_lag(figures, settings, kept)
    by_age = _by_age(figures, settings, kept)
    return by_age if by_age is not None and by_age.replicas > by_lag.replicas else by_lag


def _by_lag(figures: Figures, settings: ServeSettings, current: int) -> Wish:
    """Arrivals and backlog against what one replica does: n replicas drain in lag / (n * speed - arriving)."""
    if figures.lag == 0 and figures.arriving_per_s == 0:
        return Wish(settings.least, f"nothing waits, {settings.least} will do")
    if not figures.judged_per_s:
        return Wish(current, f"lag {figures.lag}, speed of a replica not known yet, {current} kept")
    load = (figures.arriving_per_s + figures.lag / settings.target_drain_s) / figures.judged_per_s
    load = min(load, _MOST_LOAD)
    needed = math.ceil(load)
    more, fewer = settings.bounded(needed), settings.bounded(math.ceil(load / _ROOM))
    wanted = more if more > current else min(fewer, current)
    reason = f"lag {figures.lag} needs {needed} to drain in {settings.target_drain_s:g} s"
    if needed != wanted:
        why = "is the most" if needed > settings.most else "is the least" if wanted == settings.least else "leaves room"
        reason = f"{reason}, {wanted} {why}"
    return Wish(wanted, reason)


def _by_age(figures: Figures, settings: ServeSettings, current: int) -> Wish | None:
    """One more than report themselves while frames wait too long; none fewer until the oldest is judged."""
    oldest_s = figures.oldest_s or 0.0
    if not settings.max_oldest_s or oldest_s <= settings.max_oldest_s:
        return None
    wanted = max(current, settings.bounded(figures.replicas + 1)) if figures.untaken else current
    return Wish(wanted, f"a frame of {oldest_s:.0f} s is older than {settings.max_oldest_s:g} s, {wanted} needed")


@dataclass(frozen=True)
class Waiting:
    """A change that waits for its delay.

    Attributes:
        since: when it was first wanted.
        replicas: for fewer replicas the largest number wanted since then.
        more: whether it is for more.
    """

    since: float
    replicas: int
    more: bool


def after_delay(
    wish: Wish, waiting: Waiting | None, settings: ServeSettings, current: int, now: float
) -> tuple[int, Waiting | None]:
    """The number to have now, and the change that still waits.

    Args:
        wish: what is wanted now.
        waiting: what the call before returned, None at first.
        settings: the delays.
        current: replicas that run or are on their way.
        now: seconds of any clock that only goes forward.
    """
    if wish.replicas == current:
        return current, None
    more = wish.replicas > current
    if waiting is None or waiting.more != more:
        waiting = Waiting(now, wish.replicas, more)
    else:
        replicas = wish.replicas if more else max(wish.replicas, waiting.replicas)
        waiting = Waiting(waiting.since, replicas, more)
    delay_s = settings.scale_up_delay_s if more else settings.scale_down_delay_s
    if wish.at_once and not more:
        return wish.replicas, None
    if now - waiting.since >= delay_s:
        return waiting.replicas, None
    return current, waiting
