"""A replica: a loop in a thread, health from its heartbeat, drain on shutdown, and direct inspections."""

import asyncio
import base64
import contextlib
import gc
import logging
import os
import socket
import threading
import time
from typing import Any

import cv2
import numpy as np
import torch

from models.calibration import is_fail
from models.errors import ModelError
from models.preprocess import least_side
from models.registry import Registry
from producers.errors import UnreadableImage
from producers.frame import Picture, header_size
from workers.compiling import take_short_turns
from workers.deadlines import DeadlineWatch
from workers.engine import Budget, Engine, Judgement, Request
from workers.errors import NoModel, StreamUnavailable
from workers.evidence import FAIL, PASS, UNKNOWN
from workers.loop import InspectionLoop
from workers.places import Places
from workers.pointers import Pointers
from workers.redis_stream import RedisStream
from workers.reports import remove_report, write_report
from workers.residency import Residency
from workers.results import SegmentWriter
from workers.settings import WorkerSettings

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
_DRAIN_S = 30.0


class Replica:
    """Judges the frames of the streams from the moment it is made; made and ended by Serve.

    Args:
        places: server and stores.
        settings: of loop, engine and health.
        threads: CPU threads of the engine.
    """

    def __init__(self, places: Places, settings: WorkerSettings, threads: int) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        torch.set_num_threads(max(1, threads))
        take_short_turns()
        self.name = f"{socket.gethostname()}-{os.getpid()}"
        self._settings = settings
        Picture.encode(np.zeros((8, 8, 3), np.uint8), "png").decode()  # the first decoding loads the codecs
        self._server = places.connect()
        registry = Registry(places.registry_uri)
        pointers = Pointers(self._server, registry)
        try:
            pointers.restore()  # before the first frame is read: a Redis that starts empty knows no version
        except ModelError as error:  # one product's damaged copy keeps no other from being judged
            logger.error("%s", error)
        budget = Budget(settings.max_batch, threads, settings.gpu_memory_mb, settings.compile)
        self._engine = Engine(registry, settings.device, places.teacher_weights, budget=budget)
        self._residency = Residency(self._engine, pointers, settings.pointer_poll_s)
        self._loop = InspectionLoop(
            RedisStream(places.connect(), self.name, settings),
            self._engine,
            self._residency,
            SegmentWriter(places.results_uri, self.name),
            settings,
            replica=self.name,
        )
        gc.collect()
        gc.freeze()  # what is here stays, so no later collection, for which all threads stand still, looks at it again
        # Behind the loop, whose decoder for a GPU wants it to itself for a moment: what is loaded is compiled at once.
        self._residency.start()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        watch = DeadlineWatch(places.connect(), settings)
        self._threads = [
            threading.Thread(target=self._inspect, name="inspection-loop", daemon=True),
            threading.Thread(target=self._report, name="report", daemon=True),
            threading.Thread(target=watch.run, args=(self._stop,), name="deadlines", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # --- called by Serve

    def check_health(self) -> None:
        """Raise when the loop is dead or silent; Serve then replaces this replica."""
        if self._failure is not None:
            raise RuntimeError(f"the inspection loop failed: {self._failure!r}") from self._failure
        silent_s = time.monotonic() - self._loop.heartbeat
        if silent_s > self._settings.heartbeat_timeout_s:
            raise RuntimeError(f"the inspection loop has been silent for {silent_s:.1f} s")

    async def drain(self) -> None:
        """Take nothing new, finish and acknowledge what is held."""
        self._stop.set()
        self._residency.stop()
        await asyncio.to_thread(self._threads[0].join, _DRAIN_S)
        with contextlib.suppress(StreamUnavailable):
            remove_report(self._server, self.name)

    # --- called by the HTTP interface

    async def inspect(self, product: str, data: bytes) -> dict[str, Any]:
        """Judge one image that belongs to no camera; it enters neither ledger nor results.

        Args:
            product: whose version judges it.
            data: JPEG or PNG bytes.

        Returns:
            Verdict, score, threshold, version and the map; `unknown` with its reason for an unreadable image.
            `verdict` is absent when the product has no version in service.
        """
        return await asyncio.to_thread(self._inspect_image, product, data)

    def _inspect_image(self, product: str, data: bytes) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            resident = self._residency.require(product)
        except NoModel as error:
            return {"product": product, "reason": str(error)}
        answer = {
            "product": product,
            "detector": resident.card.detector.name,
            "model_version": resident.card.version,
            "threshold": resident.card.threshold,
        }
        if not data:
            return answer | {"verdict": UNKNOWN, "score": None, "map": None, "reason": "the body is empty"}
        try:
            height, width = header_size(data)
            picture = Picture("jpeg" if data[:2] == b"\xff\xd8" else "png", (height, width, 3), data)
            at_least = least_side(resident.card.input_size)
            image = picture.decode(int(self._settings.max_megapixels * 1e6), at_least)
        except UnreadableImage as error:
            return answer | {"verdict": UNKNOWN, "score": None, "map": None, "reason": str(error)}
        judgement = self._engine.judge([Request(resident, image)])[0]
        if not np.isfinite(judgement.score):
            return answer | {
                "verdict": UNKNOWN,
                "score": None,
                "map": None,
                "reason": "the score is not finite",
            }
        return answer | {
            "verdict": FAIL if is_fail(judgement.score, resident.card.threshold) else PASS,
            "score": judgement.score,
            "map": _map_png(judgement),
            "reason": None,
            "total_ms": (time.perf_counter() - started) * 1e3,
        }

    # --- threads

    def _inspect(self) -> None:
        try:
            self._loop.run(self._stop)
        except BaseException as error:  # the thread's outer edge: health reports it and Serve replaces us
            logger.exception("the inspection loop failed; its entries go to the next replica")
            self._failure = error

    def _report(self) -> None:
        """Tell Redis once a second how this replica is; the record expires with it."""
        while True:
            try:
                write_report(self._server, self.state())
            except StreamUnavailable as error:
                logger.warning("cannot report: %s", error)
            if self._stop.wait(_REPORT_EVERY_S):
                return

    def state(self) -> dict[str, Any]:
        """This replica's state, see `workers.reports`."""
        return {
            "replica": self.name,
            "pid": os.getpid(),
            "node": socket.gethostname(),
            "device": str(self._engine.device),
            "dtype": str(self._engine.dtype).removeprefix("torch."),
            "judged": self._loop.judged,
            "versions": self._engine.residents(),
            "silent_s": round(time.monotonic() - self._loop.heartbeat, 3),
            "trouble": self._loop.trouble,
        }


def _map_png(judgement: Judgement) -> dict[str, Any]:
    """The whole map as a grey PNG: value = min + level / 255 * (max - min)."""
    anomaly_map = judgement.anomaly_map
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    levels = (anomaly_map - low) * (255.0 / (high - low) if high > low else 0.0)
    _, png = cv2.imencode(".png", levels.round().astype(np.uint8))
    return {
        "encoding": "png/base64",
        "shape": list(anomaly_map.shape),
        "min": low,
        "max": high,
        "data": base64.b64encode(png.tobytes()).decode(),
    }
