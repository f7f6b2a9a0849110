"""One inspection loop over a real server, without Ray, run after run."""

import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import redis

from benchmarks.cameras import Cameras, Order
from producers import keys
from workers.engine import Engine, Resident
from workers.loop import InspectionLoop
from workers.redis_stream import RedisStream
from workers.residency import Residency
from workers.results import SegmentWriter
from workers.segments import Segments
from workers.settings import WorkerSettings

PRODUCT = "bench"
_POLL_S = 0.002


class Line:
    """A place for runs of the loop.

    Args:
        url: of the server.
        folder: for results.
        engine: serves `PRODUCT`.
        residency: of the engine.
        settings: of the loop.
    """

    def __init__(self, url: str, folder: Path, engine: Engine, residency: Residency, settings: WorkerSettings) -> None:
        self.url, self.engine, self.settings = url, engine, settings
        self._folder, self._residency = folder, residency
        self._runs = 0

    @property
    def resident(self) -> Resident:
        """The version that judges `PRODUCT`."""
        resident = self.engine.resident(PRODUCT)
        assert resident is not None
        return resident

    def stream(self) -> RedisStream:
        """Return the stream as a replica reads it."""
        return RedisStream(redis.Redis.from_url(self.url), "bench", self.settings)

    def results(self) -> str:
        """Return a new, empty place for results."""
        self._runs += 1
        return str(self._folder / f"results-{self._runs}")

    def run(self, cameras: Cameras, order: Order) -> tuple[float, np.ndarray]:
        """Inspect what the cameras publish.

        Returns:
            Frames a second from the first publish to the last acknowledgement, and (N,) latencies from capture to
            verdict in ms, in order of capture.

        Raises:
            RuntimeError: not as many rows as frames.
        """
        place, server = self.results(), redis.Redis.from_url(self.url)
        loop = InspectionLoop(
            self.stream(), self.engine, self._residency, SegmentWriter(place, "bench"), self.settings, replica="bench"
        )
        stop = threading.Event()
        worker = threading.Thread(target=loop.run, args=(stop,))
        worker.start()
        try:
            started = time.perf_counter()
            cameras.begin(order)
            cameras.answer()
            while server.zcard(keys.waiting(PRODUCT)):
                time.sleep(_POLL_S)
            seconds = time.perf_counter() - started
        finally:
            stop.set()
            worker.join()
        # not by `workers.reading`: a machine with a GPU may lack the library of the table, which nothing is folded into
        rows = pa.concat_tables(Segments(place).read_columns(["frame_id", "captured_at", "total_ms"]))
        if rows.num_rows != order.frames or len(rows["frame_id"].unique()) != order.frames:
            raise RuntimeError(f"{order.frames} frames in, {rows.num_rows} rows out")
        return order.frames / seconds, rows.sort_by("captured_at")["total_ms"].to_numpy()
