"""What a running application leaves for the commands that find it: `{home}/run.json`, readable by its owner only."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.config import ProctorConfig
from cluster.errors import NotRunning

_FILE = "run.json"


@dataclass(frozen=True)
class RunState:
    """Addresses and owner of a running application.

    Attributes:
        pid: process that owns the embedded server and the local Ray; 0 on a cluster of its own.
        started: when that process started, seconds since the epoch: it tells the owner from a later process
            that was given the same pid.
        redis_url: the streams, with the password.
        ray_address: the Ray cluster.
        http_url: the HTTP interface.
    """

    pid: int
    started: float
    redis_url: str
    ray_address: str
    http_url: str

    def write(self, home: Path) -> None:
        """Write the file whole, with mode 0600."""
        home.mkdir(parents=True, exist_ok=True)
        part = home / f".{_FILE}.part"
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file, indent=2)
        part.replace(home / _FILE)

    @staticmethod
    def remove(home: Path) -> None:
        """Forget the application."""
        (home / _FILE).unlink(missing_ok=True)

    @classmethod
    def find(cls, home: Path) -> "RunState | None":
        """The application that runs from `home`, None if there is none."""
        try:
            state = cls(**json.loads((home / _FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return state if state.pid == 0 or state.owner() is not None else None

    def owner(self) -> psutil.Process | None:
        """The process that owns the application, None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            return process if process.create_time() == self.started else None
        except psutil.NoSuchProcess:
            return None


def redis_url_of(config: ProctorConfig) -> str:
    """Where the streams are: the configured server, or that of the application that runs from `home`.

    Raises:
        NotRunning: neither.
    """
    if config.redis.url:
        return config.redis.url
    state = RunState.find(config.home)
    if state is None:
        raise NotRunning(f"no application runs from {config.home}: start it with `proctor up`")
    return state.redis_url
