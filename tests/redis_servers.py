"""Servers of a test's own: with replicas, sentinels, slots or users, on free ports of the loopback address."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.retry import Retry

from cluster.server import find_binary

PASSWORD = "s3cret"
SERVICE = "line-1"
SLOTS = 16384


def free_port() -> int:
    """A port whose cluster bus, 10,000 above it, is free too."""
    while True:
        with socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
            if port < 55_000:
                try:
                    bus.bind(("127.0.0.1", port + 10_000))
                except OSError:
                    continue
                return port


@dataclass
class Node:
    """A server process; `client` is one connection's worth of an administrator."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes]
    password: str = PASSWORD

    def client(self) -> redis.Redis:
        return redis.Redis(
            port=self.port, password=self.password or None, socket_timeout=5, retry=Retry(NoBackoff(), 0)
        )

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def launch(folder: Path, port: int, lines: str, *options: str, password: str = PASSWORD) -> Node:
    """Start a server on the configuration `lines`; it may not answer yet."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "server.conf"
    config.write_text(f"bind 127.0.0.1\nport {port}\ndir {folder}\n{lines}\n")
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [str(find_binary()), str(config), *options], stdout=log, stderr=log, env=os.environ | {"LC_ALL": "C"}
        )
    return Node(port, folder, process, password)


def launch_again(node: Node) -> Node:
    """Start a killed server on its port, configuration and data."""
    with (node.folder / "server.log").open("ab") as log:
        command = [str(find_binary()), str(node.folder / "server.conf")]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"LC_ALL": "C"})
    return Node(node.port, node.folder, process, node.password)


def until(holds: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Wait until `holds` returns something true; a server that is not there yet counts as not."""
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        try:
            if holds():
                return
        except (redis.RedisError, OSError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"in vain for {timeout_s} s: {what}")


def answers(node: Node) -> bool:
    with node.client() as client:
        return bool(client.ping())


@dataclass
class Replicated:
    """A master, its replica, and the sentinel that watches them."""

    master: Node
    replica: Node
    sentinel: Node

    @property
    def url(self) -> str:
        return f"redis+sentinel://:{PASSWORD}@127.0.0.1:{free_port()},127.0.0.1:{self.sentinel.port}/{SERVICE}"


def _has_replica(master: Node) -> bool:
    with master.client() as client:
        return client.info("replication").get("slave0", {}).get("state") == "online"


def _knows_replica(sentinel: Node) -> bool:
    with sentinel.client() as client:
        return client.sentinel_master(SERVICE)["num-slaves"] == 1


@contextmanager
def replicated(folder: Path) -> Iterator[Replicated]:
    """Start them; the replica is in step when the block begins."""
    common = f'requirepass {PASSWORD}\nmasterauth {PASSWORD}\nsave ""\nrepl-diskless-sync-delay 0\n'
    with ExitStack() as stack:
        ports = [free_port() for _ in range(3)]
        master = launch(folder / "a", ports[0], common)
        stack.callback(master.stop)
        replica = launch(folder / "b", ports[1], f"{common}replicaof 127.0.0.1 {master.port}\n")
        stack.callback(replica.stop)
        until(lambda: _has_replica(master), "the replica is in step")
        # only now: a sentinel asks a master for its replicas once in ten seconds
        watch = (
            f"sentinel monitor {SERVICE} 127.0.0.1 {master.port} 1\n"
            f"sentinel auth-pass {SERVICE} {PASSWORD}\n"
            f"sentinel down-after-milliseconds {SERVICE} 500\n"
            f"sentinel failover-timeout {SERVICE} 4000\n"
        )
        sentinel = launch(folder / "s", ports[2], watch, "--sentinel", password="")
        stack.callback(sentinel.stop)
        until(lambda: _knows_replica(sentinel), "the sentinel knows the replica")
        yield Replicated(master, replica, sentinel)


@contextmanager
def slotted(folder: Path, count: int = 3) -> Iterator[list[Node]]:
    """Start a cluster of `count` nodes, each with its share of the slots."""
    lines = (
        f'requirepass {PASSWORD}\nmasterauth {PASSWORD}\nsave ""\nappendonly yes\nappendfsync always\n'
        "cluster-enabled yes\ncluster-node-timeout 2000\n"
    )
    with ExitStack() as stack:
        nodes = []
        for number in range(count):
            nodes.append(launch(folder / f"n{number}", free_port(), lines))
            stack.callback(nodes[-1].stop)
        until(lambda: all(answers(node) for node in nodes), "every node answers")
        for number, node in enumerate(nodes):
            with node.client() as client:
                first, last = SLOTS * number // count, SLOTS * (number + 1) // count - 1
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                if number:
                    client.execute_command("CLUSTER MEET", "127.0.0.1", nodes[0].port)

        def whole(node: Node) -> bool:
            with node.client() as client:
                info = client.execute_command("CLUSTER INFO")
                return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == count

        until(lambda: all(whole(node) for node in nodes), "every node sees the whole cluster")
        yield nodes


def node_of(key: str, nodes: list[Node]) -> Node:
    """The node that has a key's slot."""
    return nodes[min(len(nodes) - 1, key_slot(key.encode()) * len(nodes) // SLOTS)]
