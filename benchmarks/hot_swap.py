"""What a swap of versions costs the frames that are judged meanwhile."""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.networks import publish
from models.registry import Registry
from models.training import TrainedStudent
from workers.engine import Engine, Request

_QUIET = 20


def hot_swap_ms(
    engine: Engine, registry: Registry, student: TrainedStudent, images: Sequence[np.ndarray], swaps: int
) -> dict[str, Any]:
    """Judge p0's batches while a second thread builds new versions of it and puts them into service.

    Args:
        engine: serves p0; each batch is judged by the version in service when it begins, as in the loop.
        registry: the engine's.
        student: published anew for each swap.
        images: (S, S, 3) uint8 RGB each, the frames of a batch.
        swaps: how many, at least one.

    Returns:
        The median and longest `install` (building left out), the median and longest batch meanwhile, and the median
        batch before, in milliseconds.
    """
    quiet = [_seconds(lambda: _judge(engine, images)) for _ in range(_QUIET)]
    versions = [publish(registry, student, "p0") for _ in range(swaps)]
    installs: list[float] = []

    def swap() -> None:
        for version in versions:
            resident = engine.build("p0", version)
            installs.append(_seconds(lambda built=resident: engine.install(built)))  # type: ignore[misc]

    swapping = threading.Thread(target=swap)
    batches: list[float] = []
    swapping.start()
    while swapping.is_alive() or not batches:
        batches.append(_seconds(lambda: _judge(engine, images)))
    swapping.join()
    if len(installs) != swaps:
        raise RuntimeError(f"{swaps} versions were to be installed, {len(installs)} were")
    return {
        "install": _ms(statistics.median(installs)),
        "longest_install": _ms(max(installs)),
        "batch": _ms(statistics.median(batches)),
        "longest_batch": _ms(max(batches)),
        "quiet_batch": _ms(statistics.median(quiet)),
        "swaps": swaps,
    }


def _judge(engine: Engine, images: Sequence[np.ndarray]) -> None:
    resident = engine.resident("p0")
    assert resident is not None
    engine.judge([Request(resident, image) for image in images])


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)
