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

from producers.frame import Frame, Picture
from producers.settings import PublisherSettings
from workers.places import Places

LATEST_START_S = 600.0  # a producer waits so long for a server that is away


def produce(options: dict[str, Any], stop: threading.Event) -> None:
    """Push one camera's frames 1 to N, from the first that neither server nor spool has."""
    from producers.publisher import Publisher

    product, camera = options["product"], options["camera"]
    settings = PublisherSettings.model_validate(options["publish"])
    pictures = [Picture("jpeg", tuple(shape), Path(file).read_bytes()) for file, shape in options["pictures"]]
    server = Places(options["redis_url"], "", "", "").connect()
    publisher = Publisher(server, settings.model_copy(update={"retry_s": LATEST_START_S}))
    following = publisher.last_seq(product, camera) + 1
    for seq in range(following, options["frames"] + 1):
        picture = pictures[(seq * 7919 + len(camera)) % len(pictures)]
        publisher.publish(Frame(product, camera, seq, time.time_ns(), picture), stop)
        if stop.wait(options["pause_s"]):
            break


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
    stop.wait()


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
