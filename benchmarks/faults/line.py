"""The line under fault: a server behind a proxy, producers, replicas and a compactor, each a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.faults.proxy import Proxy
from cluster.server import EmbeddedServer, ServerOptions
from models.images import TrainingImage
from models.registry import Registry
from models.settings import TrainingSettings
from models.training import train
from models.versions import draft_card
from producers.frame import Picture
from workers.places import Places
from workers.pointers import Pointers

PRODUCTS = ("bolt", "nut")
CAMERAS = ("left", "right")
_SIZE = 96
_WORKER = {
    "compile": False,
    "max_batch": 16,
    "claim_idle_ms": 2000,
    "max_deliveries": 100,
    "dead_kept": 100_000,  # so that every dead letter can be looked at afterwards
    "segment_ms": 100,
    "heartbeat_timeout_s": 60,
}


@dataclass
class Member:
    """A process of the line, started anew when it died.

    Attributes:
        name: unique.
        role: see `benchmarks.faults.process`.
        options: the role's.
        ends: whether it ends by itself when its work is done.
        process: the running one.
        starts: how often it was started.
    """

    name: str
    role: str
    options: dict[str, Any]
    ends: bool
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    @property
    def done(self) -> bool:
        """Whether it has done its work."""
        return self.ends and self.process is not None and self.process.poll() == 0

    def start(self) -> None:
        """Start it, its output at the end of its log."""
        command = [sys.executable, "-m", "benchmarks.faults.process", self.role, json.dumps(self.options)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        self.starts += 1

    def keep_alive(self) -> None:
        """Start it anew if it died before its work was done."""
        if self.process is not None and self.process.poll() is not None and not self.done:
            self.start()

    def signal(self, number: int) -> None:
        """Send a signal, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """End it in order, else by force."""
        if self.process is None or self.process.poll() is not None:
            return
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Line:
    """Everything that runs, and where it keeps its things.

    Attributes:
        home: a directory of the run's own.
        results: where results go, a small file system of its own if the machine allows it.
        server: the embedded server.
        proxy: between it and all members.
        members: the processes.
    """

    home: Path
    results: Path
    server: EmbeddedServer
    proxy: Proxy
    members: list[Member] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The server's address behind the proxy."""
        return self.server.url.replace(f":{self.server.port}/", f":{self.proxy.port}/")

    def of(self, role: str) -> list[Member]:
        """The members of a role that have not ended."""
        return [member for member in self.members if member.role == role and not member.done]

    def client(self) -> redis.Redis:
        """A client past the proxy."""
        return Places(self.server.url, "", "", "").connect()

    def restart_server(self) -> None:
        """Kill the server with SIGKILL and start it anew on its data."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.server.pid, signal.SIGKILL)
        self.server.restart()


@dataclass(frozen=True)
class Feed:
    """What the cameras push.

    Attributes:
        frames: of all cameras together.
        rate: frames a second of all cameras together, at most.
        publish: settings of the publishers.
    """

    frames: int
    rate: float
    publish: dict[str, Any] = field(default_factory=lambda: {"max_in_flight": 128, "retry_s": 5.0})


@contextlib.contextmanager
def running_line(home: Path, results: Path, feed: Feed, server_options: ServerOptions | None = None) -> Iterator[Line]:
    """Start a line and its cameras, and end it.

    Args:
        home: a directory of its own.
        results: where results go.
        feed: what the cameras push.
        server_options: the server's.
    """
    with EmbeddedServer.start(home / "redis", options=server_options) as server:
        line = Line(home, results, server, Proxy(server.port))
        registry = home / "registry"
        _publish_versions(registry, line.client())
        inspecting = {"redis_url": line.url, "registry": str(registry), "results": str(results), "worker": _WORKER}
        for number in range(2):
            line.members.append(Member(f"replica-{number}", "replica", inspecting, False, home / "replicas.log"))
        folding = {"results": str(results), "redis_url": line.url, "compact_every_s": 1.0}
        line.members.append(Member("compactor", "compactor", folding, False, home / "compactor.log"))
        line.members += _producers(home, line.url, feed)
        try:
            for member in line.members:
                member.start()
            yield line
        finally:
            for member in line.members:
                member.end()


def _producers(home: Path, url: str, feed: Feed) -> Iterator[Member]:
    pictures = []
    generator = np.random.default_rng(0)
    for number in range(8):
        picture = Picture.encode(
            np.kron(generator.integers(0, 256, (12, 12, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
        )
        file = home / f"picture-{number}.jpg"
        file.write_bytes(picture.data)
        pictures.append((str(file), picture.shape))
    names = [(product, camera) for product in PRODUCTS for camera in CAMERAS]
    for index, (product, camera) in enumerate(names):
        share = feed.frames // len(names) + (index < feed.frames % len(names))
        options = {
            "redis_url": url,
            "product": product,
            "camera": camera,
            "frames": share,
            "pictures": pictures,
            "pause_s": len(names) / feed.rate,
            "spool": str(home / "spool" / product / camera),
            "publish": feed.publish,
        }
        yield Member(f"{product}/{camera}", "producer", options, True, home / "producers.log")


def _publish_versions(folder: Path, server: redis.Redis) -> None:
    """A version for each product: a small network after one training step, since verdicts do not matter here."""
    images = list(np.random.default_rng(0).integers(0, 256, (8, _SIZE, _SIZE, 3), np.uint8))
    settings = TrainingSettings(detector="stfpm", detector_options={"width": 0.125}, input_size=64, steps=1)
    trained = train(images, settings)
    registry = Registry(folder)
    pointers = Pointers(server, registry)
    provenance = [TrainingImage(id=str(number), sha256="0" * 64) for number in range(len(images))]
    for product in PRODUCTS:
        card = registry.publish(draft_card(trained, product, provenance), trained.student)
        pointers.promote(product, card.version)


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Wait for a condition of other processes, which nothing tells.

    Raises:
        TimeoutError: it did not come about.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.05)
