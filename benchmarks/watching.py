"""Figures of running processes and their server over time, sampled in a thread, and their picture."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import redis

from producers import keys

Sample = dict[str, float]


class Watch:
    """Samples every `every_s` seconds from `start` to `stop`.

    Args:
        server: a client of its own.
        processes: gives the running processes, by name.
        products: whose streams are looked at.
        results: the results' folder.
        every_s: between two samples.

    Attributes:
        samples: `at_s`, `server_mb`, `held_mb`, `in_flight`, `judged`, `shed`, `captured`, `segments`, and
            `rss_mb NAME` by process.
    """

    def __init__(
        self,
        server: redis.Redis,
        processes: Callable[[], dict[str, int]],
        products: tuple[str, ...],
        results: Path,
        every_s: float,
    ) -> None:
        self.samples: list[Sample] = []
        self._server, self._processes, self._products = server, processes, products
        self._results, self._every_s = results, every_s
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator["Watch"]:
        """Sample for the block."""
        self._thread.start()
        yield self
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            with contextlib.suppress(redis.RedisError):
                self.samples.append(self._sample())

    def _sample(self) -> Sample:
        sample: Sample = {"at_s": round(time.monotonic() - self._started, 2)}
        sample["server_mb"] = int(self._server.info("memory")["used_memory"]) / 2**20
        sample["held_mb"] = sum(int(self._server.get(keys.held(each)) or 0) for each in self._products) / 2**20
        sample["in_flight"] = sum(self._server.zcard(keys.waiting(each)) for each in self._products)
        for what in ("judged", "shed", "captured"):
            sample[what] = sum(self._count(each, what) for each in self._products)
        segments = self._results / "segments"
        sample["segments"] = sum(each.suffix == ".arrow" for each in segments.iterdir()) if segments.is_dir() else 0
        for name, pid in self._processes().items():
            with contextlib.suppress(psutil.NoSuchProcess):
                sample[f"rss_mb {name}"] = psutil.Process(pid).memory_info().rss / 2**20
        return sample

    def _count(self, product: str, what: str) -> int:
        counts: Any = self._server.hgetall(keys.ledger(product))
        return sum(int(count) for name, count in counts.items() if name.endswith(f":{what}".encode()))


def slope_per_hour(samples: list[Sample], name: str) -> float:
    """The least-squares slope of a figure, per hour, over the second half of the samples."""
    import numpy as np

    half = [sample for sample in samples[len(samples) // 2 :] if name in sample]
    if len(half) < 3:
        return 0.0
    return float(np.polyfit([each["at_s"] for each in half], [each[name] for each in half], 1)[0] * 3600)


def plot(samples: list[Sample], rows: dict[str, list[str]], title: str, to: Path) -> None:
    """Draw figures over time, a row of axes for each entry of `rows`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9, 2.2 * len(rows)), sharex=True, squeeze=False)
    for axis, (label, names) in zip(axes[:, 0], rows.items(), strict=True):
        for name in names:
            points = [(each["at_s"], each[name]) for each in samples if name in each]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.removeprefix("rss_mb "), linewidth=1.2)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=3, loc="upper left")
    axes[-1, 0].set_xlabel("seconds")
    axes[0, 0].set_title(title, fontsize=10, loc="left")
    figure.tight_layout()
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, dpi=110)
    pyplot.close(figure)
