"""Repeated calls and what they took."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Patience:
    """How long one figure is measured.

    Attributes:
        warm_up: calls before the timed ones.
        calls: timed calls at least.
        seconds: of timed calls at least.
    """

    warm_up: int
    calls: int
    seconds: float


THOROUGH = Patience(warm_up=5, calls=20, seconds=2.0)
ROUND = Patience(warm_up=2, calls=5, seconds=1.0)  # of several that are taken in turn
QUICK = Patience(warm_up=1, calls=3, seconds=0.0)


@dataclass(frozen=True)
class Timing:
    """Durations of equal calls.

    Attributes:
        seconds: of each call.
    """

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """The median call's duration."""
        return float(np.median(self.seconds))

    def rates(self, frames: int) -> dict[str, float]:
        """Frames a second of calls over so many frames: of the median, the slow tenth and the fast tenth."""
        slow, median, fast = np.percentile(self.seconds, (90, 50, 10))
        return {
            "fps": round(frames / median, 2),
            "fps_p10": round(frames / slow, 2),
            "fps_p90": round(frames / fast, 2),
        }


def timed(call: Callable[[], object], patience: Patience) -> Timing:
    """Call again and again. The call must end with its result on the CPU, or wait for the device itself."""
    for _ in range(patience.warm_up):
        call()
    seconds: list[float] = []
    while len(seconds) < patience.calls or sum(seconds) < patience.seconds:
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return Timing(tuple(seconds))


def in_threads(call: Callable[[], object], callers: int, each: int) -> Callable[[], None]:
    """Return a call that has so many threads make a call side by side, `each` times each."""

    def repeat() -> None:
        for _ in range(each):
            call()

    def run() -> None:
        with ThreadPoolExecutor(callers) as threads:
            for done in [threads.submit(repeat) for _ in range(callers)]:
                done.result()

    return run


def interleaved(calls: Mapping[str, Callable[[], object]], patience: Patience, rounds: int) -> dict[str, Timing]:
    """Time several calls in turn, round after round, so that what else the machine does weighs on all alike.

    Args:
        calls: by name; each as `timed` takes it.
        patience: of one call in one round.
        rounds: how many.
    """
    found: dict[str, tuple[float, ...]] = dict.fromkeys(calls, ())
    for _ in range(rounds):
        for name, call in calls.items():
            found[name] += timed(call, patience).seconds
    return {name: Timing(seconds) for name, seconds in found.items()}
