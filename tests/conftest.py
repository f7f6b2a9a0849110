"""A real server, real published versions and real images, made once and handed to every test clean."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is loaded: threads that wait for each other must not spin on cores that others use too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import cv2
import numpy as np
import pytest
import redis

from cluster.server import EmbeddedServer, ServerOptions
from models.cards import DetectorRecord, ModelCard, ModelDraft, TeacherRecord, TrainingRecord
from models.registry import Registry
from models.settings import TrainingSettings
from producers.frame import Frame, Picture
from workers.places import Places
from workers.stream import Entry, Settlement

if TYPE_CHECKING:
    import torch

    from models.detector import Detector
    from workers.engine import Engine, Resident

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# --- images


def texture(seed: int = 0, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth picture of random colours, (height, width, 3) uint8 RGB, another one for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def new_frame(seq: int = 1, product: str = "bolt", camera: str = "cam-1", picture: Picture | None = None) -> Frame:
    """A frame captured now; its picture follows from its number."""
    return Frame(product, camera, seq, time.time_ns(), picture or Picture.encode(texture(seq)))


def wire(frame: Frame) -> dict[bytes, bytes]:
    """The frame's fields as a reader gets them."""
    return {
        name.encode(): value if isinstance(value, bytes) else str(value).encode()
        for name, value in frame.to_fields().items()
    }


def settlement(entry: Entry, verdict: str = "pass") -> Settlement:
    """That an entry's row is durable, whatever the entry holds."""
    camera, seq, at_ns, data = (entry.fields.get(name, b"") for name in (b"camera", b"seq", b"captured_at_ns", b"data"))
    return Settlement(entry.product, entry.id, camera.decode(), int(seq), verdict, len(data), int(at_ns or 0))


@pytest.fixture(scope="session")
def solar_cells() -> Path:
    """The folder of real solar cells; it lies beside the checkout, not in it."""
    folder = SHARED_DATA / "elpv_mono"
    if not folder.is_dir():
        reason = f"{folder} is missing: the benchmark images are not part of the repository; CI has them"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


class WatchedStop(threading.Event):
    """Tells when somebody waits on it, so that a test knows that a publisher is blocked."""

    def __init__(self) -> None:
        super().__init__()
        self.waited_on = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waited_on.release()
        return super().wait(timeout)


# --- the server


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedServer]:
    """One server for the whole run, in a directory whose path is short enough for its socket."""
    home = Path(tempfile.mkdtemp(prefix="proctor-test-"))
    with EmbeddedServer.start(home) as started:
        yield started
    shutil.rmtree(home)


@pytest.fixture
def places(valkey: EmbeddedServer, registry: Registry, tmp_path: Path) -> Places:
    """Addresses of the server and of stores of this test's own."""
    return Places(valkey.url, registry.uri, str(tmp_path / "results"), str(tmp_path / "datasets"))


@pytest.fixture
def server(valkey: EmbeddedServer) -> Iterator[redis.Redis]:
    """A client as workers have it, of a server that is empty."""
    client = Places(valkey.url, "", "", "").connect()
    client.flushall()
    yield client
    client.close()


class MortalServer:
    """A server that a test may kill and start again; its address, password and data stay."""

    def __init__(self, home: Path, options: ServerOptions) -> None:
        self.home, self._options = home, options
        self._running = EmbeddedServer.start(home, options=options)
        self.url = self._running.url

    def client(self) -> redis.Redis:
        return Places(self.url, "", "", "").connect()

    def kill(self) -> None:
        os.kill(self._running.pid, signal.SIGKILL)
        self._running.stop()

    def start(self) -> None:
        self._running = EmbeddedServer.start(self.home, port=self._running.port, options=self._options)

    def stop(self) -> None:
        self._running.stop()


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[MortalServer]:
    """A server of this test's own; `appendfsync` may be its parameter."""
    monkeypatch.setattr("cluster.server.secrets.token_urlsafe", lambda _: "the-same-after-a-restart")
    home = Path(tempfile.mkdtemp(prefix="proctor-test-"))
    started = MortalServer(home, ServerOptions(appendfsync=getattr(request, "param", "everysec")))
    yield started
    started.stop()
    shutil.rmtree(home)


@contextlib.contextmanager
def full(server: redis.Redis) -> Iterator[None]:
    """The server has no memory left for the block."""
    server.config_set("maxmemory", 1)
    try:
        yield
    finally:
        server.config_set("maxmemory", 0)


# --- published versions


@dataclass(frozen=True)
class Versions:
    """Cards of versions with untrained students: each is another network, so each gives another map.

    Attributes:
        uri: their registry; read only, see the fixture `registry`.
        bolt: 64 pixels, everything passes.
        bolt_new: another version of the same product.
        nut: 64 pixels, everything fails.
        washer: 96 pixels, everything fails.
        blank: 64 pixels, its student's weights and so its maps are no numbers.
    """

    uri: str
    bolt: ModelCard
    bolt_new: ModelCard
    nut: ModelCard
    washer: ModelCard
    blank: ModelCard


@pytest.fixture(scope="session")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    """Publish the versions once for the whole run."""
    import torch

    from models.detectors import make_detector
    from models.teachers import load_teacher

    registry = Registry(tmp_path_factory.mktemp("published"))
    teacher = load_teacher("efficientnet_lite0")
    detector = make_detector("stfpm", {"width": 0.125})

    def publish(product: str, seed: int, threshold: float, input_size: int = 64) -> ModelCard:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = detector.build_student(teacher)
        state = student.state_dict()
        if product == "blank":
            name = "network.conv1.weight"
            state[name] = torch.full_like(state[name], torch.nan)
        draft = ModelDraft(
            product=product,
            detector=DetectorRecord.of(detector),
            teacher=TeacherRecord(name=teacher.name, weights_sha256=teacher.weights_sha256),
            input_size=input_size,
            threshold=threshold,
            false_reject_rate=0.01,
            calibration_scores=[0.5],
            training=TrainingRecord(images=[], settings=TrainingSettings(), seconds=0.0, steps=1),
        )
        return registry.publish(draft, state)

    return Versions(
        uri=registry.uri,
        bolt=publish("bolt", 1, threshold=1e9),
        bolt_new=publish("bolt", 2, threshold=1e9),
        nut=publish("nut", 3, threshold=0.0),
        washer=publish("washer", 4, threshold=0.0, input_size=96),
        blank=publish("blank", 5, threshold=0.5),
    )


@pytest.fixture
def registry(versions: Versions, tmp_path: Path) -> Registry:
    """A registry of this test's own that holds the versions."""
    shutil.copytree(versions.uri.removeprefix("file://"), tmp_path / "registry")
    return Registry(tmp_path / "registry")


@pytest.fixture(scope="session")
def residents(versions: Versions) -> "dict[str, Resident]":
    """The versions in memory, float32 on the CPU, by their names in `Versions`."""
    import torch

    from models.teachers import load_teacher
    from models.versions import restore
    from workers.cpu_executor import CpuExecutor
    from workers.engine import Budget, Engine

    engine = Engine(Registry(versions.uri), "cpu", dtype=torch.float32)
    names = ("bolt", "bolt_new", "nut", "washer")
    built = {name: engine.build(getattr(versions, name).product, getattr(versions, name).version) for name in names}
    detector, student = restore(*no_numbers(versions), load_teacher("efficientnet_lite0"))
    executor = CpuExecutor(torch.float32, Budget())
    return built | {"blank": executor.resident(versions.blank, detector, student, built["bolt"].teacher)}


def no_numbers(versions: Versions) -> "tuple[ModelCard, dict[str, torch.Tensor]]":
    """The version `blank`, whose weights are not all numbers; an engine refuses to build it."""
    return Registry(versions.uri).load_student(versions.blank.product, versions.blank.version)


def with_student(resident: "Resident", student: "torch.nn.Module", detector: "Detector | None" = None) -> "Resident":
    """A resident that computes with another student, as it is."""
    from models.inference import infer
    from models.programs import Program

    detector = detector or resident.detector
    studying = Program(student, lambda net, images, *features: infer(detector, net, images, features))
    return replace(resident, student=student, detector=detector, studying=studying, state={})


@pytest.fixture
def engine(registry: Registry, residents: "dict[str, Resident]") -> "Engine":
    """An engine of this test's own with every product in service."""
    import torch

    from workers.engine import Budget, Engine

    engine = Engine(registry, "cpu", dtype=torch.float32, budget=Budget(max_batch=16))
    for name in ("bolt", "nut", "washer", "blank"):
        engine.install(residents[name])
    return engine
