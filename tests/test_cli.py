"""A user's mistakes at the command line: one clear line, a non-zero status, never a traceback."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import redis

from cluster.server import EmbeddedServer
from producers.frame import Picture
from producers.spool import Spool
from producers.spooled import Record
from workers.ledger import read_ledger

PROCTOR = [sys.executable, "-m", "cluster.cli"]


@pytest.fixture(scope="module")
def valkey(tmp_path_factory):
    with EmbeddedServer.start(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.png"), np.full((32, 32, 3), number, np.uint8))
    return folder


def proctor(*command, cwd, env=None):
    environment = os.environ | (env or {})
    return subprocess.run(
        [*PROCTOR, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a user's mistake."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("·")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [
        ["status"],
        ["jobs"],
        ["down"],
        ["push", "images", "--product", "p", "--camera", "c"],
        ["train", "--product", "p", "--images", "images"],
        ["models", "list"],
    ],
)
def test_no_application(command, tmp_path, images):
    line = one_line(proctor(*command, cwd=tmp_path))
    assert line.startswith("proctor: no application runs from")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["push", "nowhere", "--product", "p", "--camera", "c"], "no such folder or video: nowhere"),
        (["push", "empty", "--product", "p", "--camera", "c"], "no image in empty"),
        (["push", "images", "--product", "Not Valid", "--camera", "c"], "product 'Not Valid' is not a valid name"),
        (["push", "images", "--product", "p", "--camera", "a/b"], "camera 'a/b' is not a valid name"),
        (["push", "text.mp4", "--product", "p", "--camera", "c"], "cannot decode text.mp4 as a video"),
        (["train", "--product", "p", "--images", "nowhere"], "no such folder of images: nowhere"),
        (["train", "--product", "p", "--images", "text.mp4"], "a file, not a folder of images: text.mp4"),
        (["train", "--product", "p", "--detector", "asymt"], 'unknown detector: "asymt"; did you mean "asymts"?'),
        (["results", "--since", "yesterday"], "--since 'yesterday'"),
        (["results", "--verdict", "good"], "--verdict 'good'"),
        (["approve", "p/c/1"], "no result for frame p/c/1"),
        (["evaluate", "--data", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "--data", "text.mp4"], "text.mp4: is a file, not a folder"),
        (["evaluate", "--data", "images", "--recipe", "magic"], 'unknown recipe: "magic"'),
    ],
)
def test_wrong_argument(command, says, tmp_path, images):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    assert says in one_line(proctor(*command, cwd=tmp_path))


def test_unreadable_configuration(tmp_path):
    (tmp_path / "proctor.toml").write_text("[redis\n")
    assert "proctor.toml: is not valid TOML" in one_line(proctor("status", cwd=tmp_path))


def test_unknown_key_names_the_nearest(tmp_path):
    (tmp_path / "proctor.toml").write_text("[worker]\nmax_bach = 3\n")
    assert 'did you mean "max_batch"' in one_line(proctor("status", cwd=tmp_path))


def test_wrong_password(tmp_path, valkey):
    url = f"redis://:wrong@127.0.0.1:{valkey.port}/0"
    line = one_line(proctor("status", cwd=tmp_path, env={"PROCTOR_REDIS__URL": url}))
    assert "refuses the user or password" in line
    assert "wrong" not in line.replace("refuses", "")


def test_busy_http_port_starts_nothing(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = one_line(proctor("up", cwd=tmp_path, env={"PROCTOR_HTTP__PORT": str(port)}))
    assert f"port {port} of 127.0.0.1 cannot be used for HTTP" in line
    assert not children_of_home(tmp_path)


def children_of_home(home: Path) -> list[psutil.Process]:
    """Processes that work from a home: the embedded server's configuration is on its command line."""
    return [
        process for process in psutil.process_iter(["cmdline"]) if str(home) in " ".join(process.info["cmdline"] or [])
    ]


def test_home_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    line = one_line(proctor("--home", "file/home", "up", cwd=tmp_path))
    assert line.startswith("proctor: cannot write to")


def test_ctrl_c_ends_a_push_in_order(tmp_path, images, valkey):
    process = subprocess.Popen(
        [*PROCTOR, "push", "images", "--product", "ctrl-c", "--camera", "top", "--loop", "--fps", "50"],
        cwd=tmp_path,
        env=os.environ | {"PROCTOR_REDIS__URL": valkey.url, "PROCTOR_PUBLISH__MAX_IN_FLIGHT": "5"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    server = redis.Redis.from_url(valkey.url)
    while server.xlen("frames:{ctrl-c}") < 5:  # full: the next publish blocks, since nobody reads
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "pushed 5 frames as ctrl-c/top" in stdout
    (account,) = next(each for each in read_ledger(server) if each.product == "ctrl-c").cameras
    assert account.balanced
    assert (account.judged, account.in_flight) == (0, 5)
    assert account.captured == 5 + account.shed
    server.close()


def test_a_push_without_a_source_says_what_it_needs(tmp_path, images):
    for command in (["push"], ["push", "images", "--product", "p"], ["push", "--camera", "c"]):
        assert "push needs a SOURCE, --product and --camera, or --replay" in one_line(proctor(*command, cwd=tmp_path))
    assert "takes no source" in one_line(proctor("push", "images", "--replay", cwd=tmp_path))


def test_a_push_without_a_server_goes_to_the_spool_and_is_sent_later(tmp_path, images, valkey):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"redis://127.0.0.1:{unused.getsockname()[1]}/0"
    away = {"PROCTOR_REDIS__URL": nowhere, "PROCTOR_PUBLISH__RETRY_S": "0", "PROCTOR_PUBLISH__SPOOL_AFTER_S": "0"}
    done = proctor("push", "images", "-p", "later", "-c", "top", cwd=tmp_path, env=away)
    assert done.returncode == 0, done.stderr
    assert "pushed 0 frames as later/top" in done.stdout
    assert "3 wait in the spool: `proctor push --replay` sends them" in done.stdout
    assert f"nothing listens at {nowhere}" in done.stderr
    assert f"frames go to the spool {tmp_path}/.proctor/spool/later/top" in done.stderr

    replay = proctor("push", "--replay", cwd=tmp_path, env={"PROCTOR_REDIS__URL": valkey.url})
    assert (replay.returncode, replay.stdout.strip()) == (0, "later/top: 3 frames sent")
    again = proctor("push", "--replay", "--json", cwd=tmp_path, env={"PROCTOR_REDIS__URL": valkey.url})
    assert (again.returncode, json.loads(again.stdout)) == (0, [])
    with redis.Redis.from_url(valkey.url) as server:
        (account,) = next(each for each in read_ledger(server) if each.product == "later").cameras
    assert (account.captured, account.in_flight, account.lost) == (3, 3, 0)


def test_a_replay_leaves_the_spool_of_a_camera_that_pushes_alone(tmp_path, valkey):
    spool = Spool(tmp_path / ".proctor" / "spool" / "busy" / "top", 1 << 20)
    spool.append(Record(7, 7, 1, Picture("raw", (1, 1, 1), b"x")))
    done = proctor("push", "--replay", cwd=tmp_path, env={"PROCTOR_REDIS__URL": valkey.url})
    assert done.returncode == 1
    assert "busy/top: another producer uses the spool" in done.stdout
    assert "proctor: 1 of 1 spools were not emptied" in done.stderr
    assert spool.waiting() == (1, 0)
    spool.close()


def test_without_a_spool_a_lost_server_ends_the_push(tmp_path, images):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"redis://127.0.0.1:{unused.getsockname()[1]}/0"
    environment = {"PROCTOR_REDIS__URL": nowhere, "PROCTOR_PUBLISH__SPOOL_MB": "0"}
    line = one_line(proctor("push", "images", "-p", "p", "-c", "c", cwd=tmp_path, env=environment))
    assert "nothing listens at" in line
    assert not (tmp_path / ".proctor" / "spool").exists()


def test_help_names_every_command(tmp_path):
    done = proctor("--help", cwd=tmp_path)
    assert done.returncode == 0
    commands = (
        "up down status ledger push train jobs models approve results dead compact evaluate demo doctor redis-acl"
    )
    assert all(f" {command} " in done.stdout for command in commands.split())
