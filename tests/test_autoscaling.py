"""Replicas that follow the backlog in a real application: one becomes three, three become one, no frame is lost."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import redis
import torch
from conftest import texture

from cluster.autoscaling import BacklogPolicy
from cluster.config import load_config
from cluster.decision import Decision, read_decision, write_decision
from cluster.errors import ProctorError
from cluster.launch import Supervisor, start_supervisor
from cluster.load_watch import LoadWatch
from cluster.serve_settings import ServeSettings
from cluster.status import Status, render
from cluster.supervisor import check_resources, cpus_of_local_ray
from models.cards import DetectorRecord, ModelDraft, TeacherRecord, TrainingRecord
from models.detectors import make_detector
from models.registry import Registry
from models.settings import TrainingSettings
from models.teachers import load_teacher
from producers.frame import Frame, Picture
from producers.publisher import Publisher
from producers.sequence import Sequence
from producers.settings import PublisherSettings
from workers.backlog import read_backlog
from workers.deadlines import DeadlineWatch
from workers.ledger import read_ledger
from workers.pointers import Pointers
from workers.reading import read_results
from workers.settings import WorkerSettings

BACKLOG = 120
CONFIG = """
[http]
port = 0
[publish]
max_in_flight = 500
[serve]
min_replicas = 1
max_replicas = 3
num_cpus = 0.5
threads = 1
target_drain_s = 2
scale_up_delay_s = 0.5
scale_down_delay_s = 3
[worker]
compile = false
max_batch = 2
segment_ms = 3000 # a replica that is stopped holds rows
claim_idle_ms = 120000 # and nobody takes them over in this test's time
"""


def publish_slow_version(registry: Registry, product: str) -> str:
    """A version that judges about five frames a second on a core, with an untrained student; everything passes."""
    teacher = load_teacher("efficientnet_lite0")
    detector = make_detector("stfpm", {"width": 0.125})
    draft = ModelDraft(
        product=product,
        detector=DetectorRecord.of(detector),
        teacher=TeacherRecord(name=teacher.name, weights_sha256=teacher.weights_sha256),
        input_size=1024,
        threshold=1e9,
        false_reject_rate=0.01,
        calibration_scores=[0.5],
        training=TrainingRecord(images=[], settings=TrainingSettings(), seconds=0.0, steps=1),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return registry.publish(draft, detector.build_student(teacher).state_dict()).version


class Line:
    """One camera of the product."""

    def __init__(self, server: redis.Redis) -> None:
        self._publisher = Publisher(server, PublisherSettings(max_in_flight=500))
        self._sequence, self._picture = Sequence(), Picture.encode(texture(1))
        self.pushed: list[str] = []

    def push(self, frames: int) -> None:
        for _ in range(frames):
            frame = Frame("slow", "cam", self._sequence.next(), time.time_ns(), self._picture)
            self._publisher.publish(frame)
            self.pushed.append(frame.frame_id)

    def trickle(self, stop: threading.Event) -> None:
        """One frame every two seconds."""
        while not stop.wait(2.0):
            self.push(1)


def wait_for(what: str, holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_at, f"{what}: not within {timeout_s:g} s"
        time.sleep(0.05)


def logs_of(supervisor: Supervisor) -> Iterator[Path]:
    """Ray's logs of this application, whatever else runs on this machine."""
    owner = psutil.Process(supervisor.state.pid)
    (raylet,) = (child for child in owner.children() if child.name() == "raylet")
    (session,) = set(re.findall(r"/tmp/ray/session_[\w-]+", " ".join(raylet.cmdline())))
    return (file for file in Path(session, "logs").rglob("*") if file.is_file())


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Supervisor, Path]]:
    file = tmp_path / "proctor.toml"
    file.write_text(CONFIG)
    config = load_config(file, tmp_path / "state")
    supervisor = start_supervisor(config, file, linked=True, say=lambda step: None)
    yield supervisor, file
    supervisor.stop(lambda step: None)


def test_replicas_follow_the_backlog_and_lose_and_double_nothing(running):
    supervisor, file = running
    config = load_config(file, file.parent / "state")
    server = redis.Redis.from_url(supervisor.state.redis_url)
    registry = Registry(config.registry.uri)
    Pointers(server, registry).promote("slow", publish_slow_version(registry, "slow"))
    line = Line(server)
    wait_for("the first decision", lambda: read_decision(server) is not None)
    assert read_decision(server).wanted == 1

    line.push(BACKLOG)
    wait_for("three are wanted", lambda: read_decision(server).wanted == 3)
    assert re.fullmatch(r"lag \d+ needs \d+ to drain in 2 s(, 3 is the most)?", read_decision(server).reason)
    shown = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "--config", str(file), "--home", str(config.home), "status"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.search(r"^replicas [123] of 1-3(, 3 wanted)?: lag \d+ ", shown.stdout, re.MULTILINE)
    while len(Status.read(server).replicas) < 3:  # a machine that is fast shall not be done before three are there
        line.push(max(0, BACKLOG - read_backlog(server).lag))
        time.sleep(0.2)
    wait_for("the backlog is judged", lambda: read_backlog(server).lag == 0)

    stop = threading.Event()
    trickling = threading.Thread(target=line.trickle, args=(stop,))
    trickling.start()  # so that replicas hold frames when they are stopped
    try:
        wait_for("one is wanted", lambda: read_decision(server).wanted == 1)
        wait_for("one inspects", lambda: len(server.xinfo_consumers("frames:{slow}", "inspectors")) == 1)
    finally:
        stop.set()
        trickling.join()
    wait_for("all is judged", lambda: read_backlog(server).lag == 0)
    assert len(Status.read(server).replicas) == 1  # the others have taken their reports along

    rows = read_results(config.results.uri, columns=("frame_id", "replica")).to_pydict()
    assert sorted(rows["frame_id"]) == sorted(line.pushed)
    assert server.xlen("verdicts:{slow}") == len(line.pushed)  # a frame that is judged twice has two verdicts
    assert len(set(rows["replica"])) == 3
    (ledger,) = read_ledger(server)
    account = ledger.cameras[0]
    assert (account.captured, account.judged, account.dead, account.in_flight) == (len(line.pushed),) * 2 + (0, 0)
    server.close()
    password = urlsplit(supervisor.state.redis_url).password
    assert password
    logs = {log.name: log.read_bytes() for log in logs_of(supervisor)}
    assert any(b"BacklogPolicy" in text for text in logs.values())  # these are the logs that name the policy
    assert [name for name, text in logs.items() if password.encode() in text] == []


# --- the policy without Serve


class Context:
    """What the policy reads of Serve's context."""

    target_num_replicas = current_num_replicas = 2


def test_a_call_never_waits_and_the_thread_ends_when_nobody_asks(server, monkeypatch):
    monkeypatch.setattr("cluster.load_watch._FORGOTTEN_S", 1.0)
    connecting, connected = threading.Event(), threading.Event()

    def connect() -> redis.Redis:
        connecting.set()
        assert connected.wait(10)
        return server

    watch = LoadWatch(connect)
    assert not watch.running
    assert watch.figures(time.monotonic()) is None
    assert connecting.wait(10)
    assert watch.figures(time.monotonic()) is None  # the connection does not come, and nobody waits for it
    watch.note(Decision(2, 3, 1, 4, "lag 840 needs 3 to drain in 10 s"))
    connected.set()
    wait_for("figures", lambda: watch.figures(time.monotonic()) is not None)
    wait_for("the decision", lambda: read_decision(server) == Decision(2, 3, 1, 4, "lag 840 needs 3 to drain in 10 s"))
    wait_for("the thread's end", lambda: not watch.running)
    watch.figures(time.monotonic())
    assert watch.running


def test_figures_grow_old_while_redis_is_away_and_are_new_afterwards(mortal):
    watch = LoadWatch(mortal.client)
    wait_for("figures", lambda: watch.figures(time.monotonic()) is not None)
    mortal.kill()
    wait_for("old figures", lambda: time.monotonic() - watch.figures(time.monotonic()).read_at > 1.5)
    mortal.start()
    wait_for("new figures", lambda: time.monotonic() - watch.figures(time.monotonic()).read_at < 1.0)


def test_the_policy_keeps_the_number_before_the_first_look(monkeypatch):
    monkeypatch.setattr("cluster.autoscaling.connect_as_told", threading.Event().wait)
    policy = BacklogPolicy(ServeSettings(max_replicas=3).model_dump(mode="json"))
    started = time.perf_counter()
    assert policy(Context()) == (2, {})
    assert time.perf_counter() - started < 0.1


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # of Ray Serve's own settings
def test_what_serve_shows_of_the_policy_has_no_address():
    from cluster.application import autoscaling_config

    config = autoscaling_config(ServeSettings(min_replicas=2, max_replicas=4, replicas=3))
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, 3, 4)
    assert config.policy.policy_function == "cluster.autoscaling:BacklogPolicy"
    assert "redis" not in json.dumps(config.policy.policy_kwargs)


# --- what is read and shown


def test_backlog_adds_up_over_products(server):
    publisher = Publisher(server, PublisherSettings())
    for product, frames in (("bolt", 3), ("nut", 2)):
        for seq in range(1, frames + 1):
            publisher.publish(Frame(product, "cam", seq, time.time_ns() - 4_000_000_000, Picture.encode(texture(seq))))
    server.xgroup_create("frames:{bolt}", "inspectors", id="0")
    server.xreadgroup("inspectors", "one", {"frames:{bolt}": ">"}, count=1)
    server.hincrby("ledger:{bolt}", "cam:judged", 7)
    server.hincrby("ledger:{nut}", "cam:dead", 2)
    backlog = read_backlog(server)
    assert (backlog.lag, backlog.untaken, backlog.settled) == (5, 4, 9)
    assert backlog.oldest_s == pytest.approx(4.0, abs=1.0)


@pytest.mark.parametrize("ahead_s", [-60, 60])
def test_a_producers_clock_that_is_wrong_makes_no_frame_old(server, monkeypatch, ahead_s):
    monkeypatch.setattr("producers.publisher.time.time_ns", lambda now=time.time_ns: now() + ahead_s * 10**9)
    frame = Frame("bolt", "cam", 1, time.time_ns() - 4_000_000_000, Picture.encode(texture(1)))
    Publisher(server, PublisherSettings()).publish(frame)
    monkeypatch.undo()
    assert read_backlog(server).oldest_s == pytest.approx(4.0, abs=1.0)


def test_a_frame_that_has_its_verdict_is_no_longer_old(server):
    publisher = Publisher(server, PublisherSettings())
    publisher.publish(Frame("bolt", "cam", 1, time.time_ns() - 4_000_000_000, Picture.encode(texture(1))))
    DeadlineWatch(server, WorkerSettings(takt_ms=500)).tick()
    backlog = read_backlog(server)
    assert (backlog.lag, backlog.oldest_s) == (1, None)


def test_an_empty_server_has_no_backlog(server):
    server.sadd("proctor:products", "bolt")
    backlog = read_backlog(server)
    assert (backlog.lag, backlog.untaken, backlog.settled, backlog.oldest_s) == (0, 0, 0, None)


def test_status_shows_the_decision(server):
    assert Status.read(server).as_dict()["scaling"] is None
    write_decision(server, Decision(2, 3, 1, 3, "lag 840 needs 3 to drain in 10 s"))
    status = Status.read(server)
    assert status.as_dict()["scaling"]["wanted"] == 3
    shown = [str(part) for part in render(status).renderables]
    assert "replicas 2 of 1-3, 3 wanted: lag 840 needs 3 to drain in 10 s" in shown


# --- what Ray must have room for


def room_for(text: str, found: dict[str, float], tmp_path: Path) -> list[str]:
    file = tmp_path / "proctor.toml"
    file.write_text(f"[serve]\n{text}\n")
    said: list[str] = []
    check_resources(load_config(file), found, said.append)
    return said


@pytest.mark.parametrize(
    ("text", "found", "said"),
    [
        ("replicas = 3", {"CPU": 4.0}, []),
        ("max_replicas = 3", {"CPU": 4.0}, []),
        (
            "max_replicas = 8\nnum_cpus = 2",
            {"CPU": 12.0},
            ["warning: max_replicas = 8, but Ray's 12 CPUs have room for 5"],
        ),
        (
            "max_replicas = 2\nnum_gpus = 1",
            {"CPU": 9.0, "GPU": 1.0},
            ["warning: max_replicas = 2, but Ray's 1 GPUs have room for 1"],
        ),
    ],
)
def test_replicas_that_find_no_room_are_warned_of(text, found, said, tmp_path):
    assert room_for(text, found, tmp_path) == said


@pytest.mark.parametrize(
    "text", ["replicas = 4", "min_replicas = 4\nmax_replicas = 5", "replicas = 4\nmax_replicas = 5"]
)
def test_a_start_that_finds_no_room_is_refused(text, tmp_path):
    with pytest.raises(ProctorError, match=r"reserve 5 CPUs, Ray has 4: lower num_cpus"):
        room_for(text, {"CPU": 4.0}, tmp_path)


def test_a_local_ray_believes_in_enough_cpus_for_the_largest_number(tmp_path):
    file = tmp_path / "proctor.toml"
    file.write_text("[serve]\nmax_replicas = 100\nnum_cpus = 1.5\n")
    assert cpus_of_local_ray(load_config(file)) == 151
