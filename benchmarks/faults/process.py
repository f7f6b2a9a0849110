"""One process of the line under fault, which may be killed: `python -m benchmarks.faults.process ROLE JSON`."""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import redis

from producers.connecting import open_client
from producers.errors import ServerUnavailable
from producers.frame import Frame, Picture
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.places import Places

LATEST_START_S = 600.0  # a producer waits so long for a server that is away


def produce(options: dict[str, Any], stop: threading.Event) -> None:
    """Push one camera's frames 1 to N, from the first that neither server nor spool has."""
    from producers.spool import Spool
    from producers.spooling import SpooledPublisher

    product, camera = options["product"], options["camera"]
    settings = PublisherSettings.model_validate(options["publish"])
    pictures = [Picture("jpeg", tuple(shape), Path(file).read_bytes()) for file, shape in options["pictures"]]
    server = open_client(options["redis_url"], timeout_s=2.0, retries=0)
    spool = Spool(Path(options["spool"]), int(settings.spool_mb * 2**20), settings.spool_fsync)
    following = max(spool.last_seq, _last_in_ledger(server, product, camera)) + 1
    with SpooledPublisher(product, camera, server, spool, settings) as publisher:
        for seq in range(following, options["frames"] + 1):
            picture = pictures[(seq * 7919 + len(camera)) % len(pictures)]
            publisher.publish(Frame(product, camera, seq, time.time_ns(), picture), stop)
            if stop.wait(options["pause_s"]):
                break
        while not publisher.drain(stop) and not stop.is_set():
            pass  # the server is away for longer than a camera waits at its end


def _last_in_ledger(server: redis.Redis, product: str, camera: str) -> int:
    """The camera's last number, from a server that may be away just now."""
    publisher = Publisher(server, PublisherSettings())
    give_up_at = time.monotonic() + LATEST_START_S
    while True:
        try:
            return publisher.last_seq(product, camera)
        except ServerUnavailable:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.1)


def inspect(options: dict[str, Any], stop: threading.Event) -> None:
    """Judge, as a replica of the application does."""
    from workers.replica import Replica
    from workers.settings import WorkerSettings

    places = Places(options["redis_url"], options["registry"], options["results"], "")
    replica = Replica(places, WorkerSettings.model_validate(options["worker"]), threads=1)
    while not stop.wait(0.5):
        replica.check_health()
    asyncio.run(replica.drain())


def compact(options: dict[str, Any], stop: threading.Event) -> None:
    """Fold segments into the table, round after round."""
    from workers.compactor_loop import CompactorLoop
    from workers.settings import ResultsSettings

    settings = ResultsSettings(compact_every_s=options["compact_every_s"])
    places = Places(options["redis_url"], "", options["results"], "")
    CompactorLoop(options["results"], places.connect, settings).run(stop)


ROLES = {"producer": produce, "replica": inspect, "compactor": compact}


def main() -> None:
    """Do one role until its end or SIGTERM, and die with the runner."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    os.nice(5)
    ROLES[sys.argv[1]](json.loads(sys.argv[2]), stop)


if __name__ == "__main__":
    main()
