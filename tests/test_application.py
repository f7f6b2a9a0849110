"""The whole application as its users meet it: `proctor` commands, real Ray Serve, real Valkey, real processes."""

import base64
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import httpx
import numpy as np
import psutil
import pytest
import redis
from PIL import Image

from cluster.config import load_config
from cluster.launch import start_supervisor
from cluster.run_state import RunState
from producers.camera import Camera
from producers.frame import Frame, Picture
from producers.publisher import Publisher
from producers.sequence import Sequence
from producers.settings import PublisherSettings
from workers.ledger import read_ledger

PROCTOR = [sys.executable, "-m", "cluster.cli"]
CONFIG = """
[http]
port = 0
[training]
input_size = 64
steps = 40
false_reject_rate = 0.05
[results]
compact_every_s = 1
[worker]
compile = false
claim_idle_ms = 1500
[worker.evidence]
pass_share = 1.0
"""


def weave(generator: np.random.Generator, size: int = 96) -> np.ndarray:
    """A woven pattern with sensor noise, (size, size, 3) uint8."""
    y, x = np.mgrid[:size, :size]
    phase = generator.uniform(0, 2 * np.pi, 2)
    grey = 128 + 60 * np.sin(x / 3 + phase[0]) * np.sin(y / 4 + phase[1]) + generator.normal(0, 4, (size, size))
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[:, :, None], 3, axis=2)


def torn(generator: np.random.Generator, size: int = 96) -> np.ndarray:
    """A woven pattern with a flat patch."""
    image = weave(generator, size)
    image[30:60, 30:60] = 128
    return image


def write_images(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"{number:03d}.png"), image)
    return folder


class Application:
    """A running application and the command line beside it."""

    def __init__(self, home: Path, config: Path) -> None:
        self.home, self.config_file = home, config
        self.config = load_config(config, home)
        self.supervisor = start_supervisor(self.config, config, linked=True, say=lambda step: None)
        self.url = self.supervisor.state.http_url
        self.server = redis.Redis.from_url(self.supervisor.state.redis_url)

    def stop(self) -> None:
        self.server.close()
        self.supervisor.stop(lambda step: None)

    def line(self, *command: str) -> list[str]:
        return [*PROCTOR, "--config", str(self.config_file), "--home", str(self.home), *command]

    def run(self, *command: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.line(*command), input=stdin, capture_output=True, text=True, timeout=120, check=False
        )

    def json(self, *command: str) -> object:
        done = self.run(*command)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def settled(self, product: str, timeout_s: float = 60.0) -> None:
        """Wait until no frame of a product is in flight."""
        give_up_at = time.monotonic() + timeout_s
        while self.server.zcard(f"waiting:{{{product}}}"):
            assert time.monotonic() < give_up_at, f"{product} still has frames in flight"
            time.sleep(0.02)

    def ledger(self, product: str) -> object:
        return next(each for each in read_ledger(self.server) if each.product == product)


@pytest.fixture(scope="module")
def application(tmp_path_factory):
    home = tmp_path_factory.mktemp("application")
    config = home / "proctor.toml"
    config.write_text(CONFIG)
    application = Application(home / "state", config)
    generator = np.random.default_rng(0)
    images = write_images(home / "normal", [weave(generator) for _ in range(24)])
    done = application.run("train", "--product", "fabric", "--images", str(images), "--wait")
    assert done.returncode == 0, done.stderr
    yield application
    application.stop()


def test_pushed_frames_get_verdicts_and_rows(application, tmp_path):
    generator = np.random.default_rng(1)
    good = write_images(tmp_path / "good", [weave(generator) for _ in range(12)])
    bad = write_images(tmp_path / "bad", [torn(generator) for _ in range(8)])
    for folder, camera in ((good, "top"), (bad, "side")):
        pushed = application.json("push", str(folder), "--product", "fabric", "--camera", camera, "--json")
        assert pushed["published"] == len(list(folder.iterdir()))
    application.settled("fabric")
    rows = application.json("results", "--product", "fabric", "--format", "json")
    assert len(rows) == 20
    assert len({row["frame_id"] for row in rows}) == 20
    verdicts = {camera: [row["verdict"] for row in rows if row["camera"] == camera] for camera in ("top", "side")}
    assert verdicts["side"] == ["fail"] * 8
    assert verdicts["top"].count("pass") >= 10
    scores = {camera: [row["score"] for row in rows if row["camera"] == camera] for camera in ("top", "side")}
    assert min(scores["side"]) > max(scores["top"])
    status = application.json("status", "--json")
    assert status["balanced"] is True
    cameras = {camera["camera"]: camera for product in status["products"] for camera in product["cameras"]}
    assert (cameras["top"]["captured"], cameras["top"]["judged"], cameras["top"]["in_flight"]) == (12, 12, 0)
    assert cameras["top"]["model_version"] == rows[0]["model_version"]


def test_unreadable_images_are_unknown_and_the_others_are_judged(application, tmp_path):
    generator = np.random.default_rng(2)
    folder = write_images(tmp_path / "mixed", [weave(generator) for _ in range(4)])
    (folder / "0-empty.jpg").write_bytes(b"")
    jpeg = Picture.encode(weave(generator)).data
    (folder / "1-cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    bomb = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(bomb, "PNG")
    (folder / "2-bomb.png").write_bytes(bomb.getvalue())
    (folder / "3-text.png").write_bytes(b"this is no image")
    application.json("push", str(folder), "--product", "fabric", "--camera", "mixed", "--json")
    application.settled("fabric")
    rows = application.json("results", "--product", "fabric", "--format", "json")
    mine = [row for row in rows if row["camera"] == "mixed"]
    reasons = [row["reason"] for row in mine if row["verdict"] == "unknown"]
    assert len(mine) == 8
    assert len(reasons) == 4
    assert all(any(word in reason for reason in reasons) for word in ("0 bytes", "corrupt", "100 megapixels"))
    assert application.ledger("fabric").balanced


def test_product_without_model_is_unknown_never_pass(application, tmp_path):
    folder = write_images(tmp_path / "new", [weave(np.random.default_rng(3))])
    application.json("push", str(folder), "--product", "brand-new", "--camera", "top", "--json")
    application.settled("brand-new")
    rows = application.json("results", "--product", "brand-new", "--format", "json")
    assert [(row["verdict"], row["reason"]) for row in rows] == [("unknown", "no model for this product")]


def test_http_judges_an_image(application):
    generator = np.random.default_rng(4)
    url = f"{application.url}/api/v1/products/fabric/inspect"
    answer = httpx.post(url, content=Picture.encode(torn(generator)).data, timeout=30)
    verdict = answer.json()
    assert answer.status_code == 200, answer.text
    assert verdict["verdict"] == "fail"
    assert verdict["score"] > verdict["threshold"]
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(verdict["map"]["data"]), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert list(shown.shape) == verdict["map"]["shape"]
    row, column = np.unravel_index(shown.argmax(), shown.shape)
    assert 15 <= row <= 45  # the patch, in the network's 64 x 64 input
    assert 15 <= column <= 45


def test_http_refuses_clearly(application):
    base = f"{application.url}/api/v1/products"
    unknown = httpx.post(f"{base}/nothing/inspect", content=b"x", timeout=30)
    assert unknown.status_code == 404
    assert "no model" in unknown.json()["detail"]
    unreadable = httpx.post(f"{base}/fabric/inspect", content=b"x", timeout=30)
    assert unreadable.status_code == 422
    assert unreadable.json()["verdict"] == "unknown"


def test_health_and_readiness(application):
    assert httpx.get(f"{application.url}/health", timeout=30).status_code == 200
    ready = httpx.get(f"{application.url}/ready", timeout=30)
    assert ready.status_code == 200
    assert "fabric" in ready.json()["versions"]


def test_second_application_in_the_same_home_is_refused(application):
    done = application.run("up")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("proctor: an application already runs from")
    assert "Traceback" not in done.stderr


def test_retraining_swaps_under_load_and_loses_nothing(application, tmp_path):
    generator = np.random.default_rng(5)
    folder = write_images(tmp_path / "line", [weave(generator) for _ in range(10)])
    application.json("push", str(folder), "--product", "fabric", "--camera", "swap", "--json")
    application.settled("fabric")
    before = application.json("models", "show", "--product", "fabric")["version"]
    rows = application.json("results", "--product", "fabric", "--format", "json")
    frame_ids = "\n".join(row["frame_id"] for row in rows if row["camera"] == "swap")
    approved = application.run("approve", "-", "--by", "anna", stdin=frame_ids)
    assert approved.returncode == 0, approved.stderr
    assert approved.stdout.strip() == "recorded 10 as normal by anna"
    pusher = subprocess.Popen(
        application.line(
            "push", str(folder), *["--product", "fabric", "--camera", "swap", "--loop", "--fps", "20", "--json"]
        ),
        stdout=subprocess.PIPE,
    )
    job = application.json("train", "--product", "fabric", "--wait", "--json")
    await_verdict_by(application, "fabric", job["version"])
    pusher.send_signal(signal.SIGINT)
    pushed = json.loads(pusher.communicate(timeout=60)[0])
    application.settled("fabric")
    assert pusher.returncode == 0
    card = application.json("models", "show", "--product", "fabric")
    assert card["parent"] == before
    assert len(card["training"]["images"]) == 34
    rows = application.json("results", "--product", "fabric", "--format", "json")
    mine = [row for row in rows if row["camera"] == "swap"]
    assert len(mine) == pushed["captured"] + 10
    assert {row["model_version"] for row in mine} == {before, job["version"]}
    order = [row["model_version"] for row in sorted(mine, key=lambda row: row["seq"])]
    assert order == sorted(order), "a frame was judged by the old version after the new one had taken over"
    assert application.ledger("fabric").balanced
    rolled_back = application.run("models", "rollback", "--product", "fabric")
    assert before in rolled_back.stdout


def await_verdict_by(application, product, version, timeout_s=60):
    """Follow the verdict stream until a verdict of this version comes."""
    last, give_up_at = "0", time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        reply = application.server.xread({f"verdicts:{{{product}}}": last}, count=500, block=1000)
        for _, entries in reply.items() if isinstance(reply, dict) else reply:
            flat = entries[0] if entries and isinstance(entries[0], list) else entries
            for entry_id, fields in flat:
                last = entry_id
                if fields[b"model_version"].decode() == version:
                    return
    raise AssertionError(f"no verdict by version {version}")


def test_killed_replica_loses_and_doubles_nothing(application):
    generator = np.random.default_rng(6)
    publisher = Publisher(application.server, PublisherSettings(max_in_flight=64))
    sequence = Sequence(after=publisher.last_seq("fabric", "kill"))
    pictures = [Picture.encode(weave(generator)) for _ in range(4)]
    killed = None
    for number in range(600):
        if number == 200:
            replicas = application.json("status", "--json")["replicas"]
            killed = replicas[0]["pid"]
            os.kill(killed, signal.SIGKILL)
        publisher.publish(Frame("fabric", "kill", sequence.next(), time.time_ns(), pictures[number % 4]))
    application.settled("fabric", timeout_s=90)
    rows = [
        row for row in application.json("results", "--product", "fabric", "--format", "json") if row["camera"] == "kill"
    ]
    assert len(rows) == 600
    assert len({row["frame_id"] for row in rows}) == 600
    assert len({row["replica"] for row in rows}) == 2
    account = next(camera for camera in application.ledger("fabric").cameras if camera.camera == "kill")
    assert (account.captured, account.judged, account.dead, account.in_flight) == (600, 600, 0, 0)
    assert not psutil.pid_exists(killed)


def compactor(application) -> dict | None:
    return application.json("status", "--json")["compactor"]


def test_a_killed_compactor_comes_back_and_rows_go_into_the_table(application):
    generator = np.random.default_rng(11)
    application.settled("fabric")
    first = compactor(application)
    os.kill(first["pid"], signal.SIGKILL)
    publisher = Publisher(application.server, PublisherSettings())
    sequence = Sequence()
    for _ in range(5):
        publisher.publish(Frame("fabric", "folded", sequence.next(), time.time_ns(), Picture.encode(weave(generator))))
    application.settled("fabric")
    rows = application.json("results", "--format", "json")
    give_up_at = time.monotonic() + 60
    while not ((now := compactor(application)) and now["pid"] != first["pid"] and now["rows"] == len(rows)):
        assert time.monotonic() < give_up_at, now
        time.sleep(0.2)
    assert now["trouble"] is None
    assert now["damaged"] == 0
    assert application.json("results", "--format", "json") == rows
    assert f"results: {len(rows)} in the table, 0 segments waiting" in application.run("status", "--once").stdout


def test_a_round_by_hand_says_what_the_table_holds(application):
    rows = len(application.json("results", "--format", "json"))
    give_up_at = time.monotonic() + 30
    while (done := application.run("compact", "--json")).returncode:  # it may meet the application's own round
        assert "another compactor works on" in done.stderr
        assert time.monotonic() < give_up_at
    assert json.loads(done.stdout)["table_rows"] == rows


def test_killed_valkey_is_started_anew(application):
    generator = np.random.default_rng(9)
    pid = application.server.info("server")["process_id"]
    os.kill(pid, signal.SIGKILL)
    publisher = Publisher(application.server, PublisherSettings(retry_s=60))  # waits for the new server
    sequence = Sequence()
    picture = Picture.encode(weave(generator))
    for _ in range(20):
        publisher.publish(Frame("fabric", "again", sequence.next(), time.time_ns(), picture))
    application.settled("fabric")
    assert application.server.info("server")["process_id"] != pid
    rows = application.json("results", "--product", "fabric", "--format", "json")
    assert sum(row["camera"] == "again" for row in rows) == 20
    account = next(camera for camera in application.ledger("fabric").cameras if camera.camera == "again")
    assert account.balanced


def test_status_refreshes_on_a_terminal(application, tmp_path):
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200", "LINES": "50"}
    watcher = subprocess.Popen(application.line("status"), stdout=slave, stderr=slave, stdin=slave, env=environment)
    os.close(slave)
    screen = read_until(master, "Ledger")
    folder = write_images(tmp_path / "live", [weave(np.random.default_rng(7))])
    assert "live-camera" not in screen
    application.json("push", str(folder), "--product", "fabric", "--camera", "live-camera", "--json")
    screen = read_until(master, "live-camera")
    watcher.send_signal(signal.SIGINT)
    assert watcher.wait(timeout=30) == 0
    os.close(master)
    for column in ("captured", "judged", "shed", "dead", "in flight", "lag", "oldest", "frames/s", "version"):
        assert column in screen


def read_until(terminal: int, text: str, timeout_s: float = 30.0) -> str:
    screen, give_up_at = "", time.monotonic() + timeout_s
    while text not in screen:
        assert time.monotonic() < give_up_at, f"{text!r} did not appear in {screen[-2000:]!r}"
        if select.select([terminal], [], [], 1.0)[0]:
            screen += os.read(terminal, 65536).decode(errors="replace")
    return screen


def test_doctor_finds_a_healthy_application(application):
    findings = application.json("doctor", "--json")
    assert {finding["state"] for finding in findings} <= {"ok", "notice"}
    assert any(finding["what"] == "ledger fabric" for finding in findings)


def test_down_leaves_no_process_and_frames_survive_a_restart(tmp_path):
    config = tmp_path / "proctor.toml"
    config.write_text(CONFIG)
    first = Application(tmp_path / "state", config)
    family = [psutil.Process(first.supervisor.state.pid)]
    family += family[0].children(recursive=True)
    replica = first.json("status", "--json")["replicas"][0]["pid"]
    os.kill(first.supervisor.state.pid, signal.SIGSTOP)  # nobody replaces what is killed now
    os.kill(replica, signal.SIGKILL)
    publisher = Publisher(first.server, PublisherSettings())
    picture = Picture.encode(weave(np.random.default_rng(8)))
    camera = Camera("later", "top", [picture] * 5)
    for frame in camera.frames(Sequence(), threading.Event()):
        publisher.publish(frame)
    os.kill(first.supervisor.state.pid, signal.SIGCONT)
    first.stop()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert RunState.find(first.config.home) is None
    second = Application(tmp_path / "state", config)
    try:
        second.settled("later")
        account = second.ledger("later")
        assert account.balanced
        assert sum(camera.judged for camera in account.cameras) == 5
    finally:
        second.stop()
    assert list(Path(second.config.results.uri, "segments").glob("*.arrow")) == []  # the last round took them
    assert len(second.json("results", "--product", "later", "--format", "json")) == 5


def test_killed_supervisor_leaves_no_orphan(tmp_path):
    config = tmp_path / "proctor.toml"
    config.write_text(CONFIG)
    application = Application(tmp_path / "state", config)
    supervisor = psutil.Process(application.supervisor.state.pid)
    family = supervisor.children(recursive=True)
    assert len(family) >= 4  # Valkey, GCS, raylet, workers
    supervisor.kill()
    _, alive = psutil.wait_procs([supervisor, *family], timeout=60)
    application.stop()
    assert not alive, [process.cmdline()[:3] for process in alive]
