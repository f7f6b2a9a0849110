"""`proctor up` and `proctor down`: the supervisor in the background."""

import json
import subprocess
import sys
from pathlib import Path
from typing import IO

import psutil

from cluster.config import ProctorConfig
from cluster.errors import NotRunning, ProctorError
from cluster.run_state import RunState
from cluster.supervisor import KEEP, Say

_STOP_S = 90.0


class Supervisor:
    """A supervisor in the background, as its starter sees it.

    Attributes:
        state: where the application is.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", state: RunState) -> None:
        self._process, self.state = process, state

    def stop(self, say: Say) -> None:
        """Drain and end it; harmless when it has ended."""
        stop_supervisor(self.state, say)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def start_supervisor(config: ProctorConfig, config_file: Path | None, *, linked: bool, say: Say) -> Supervisor:
    """Start the application in the background and wait until it is ready.

    Args:
        config: says where `home` is.
        config_file: read anew by the supervisor, None for the usual places.
        linked: the supervisor drains and ends with this process, however this one ends.
        say: told each step.

    Raises:
        ProctorError: it did not start, with its reason.
    """
    logs = config.home / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        log = (logs / "supervisor.log").open("wb")
    except OSError as error:
        raise ProctorError(
            f"cannot write to {config.home}: {error.strerror}: set `home` to a writable directory"
        ) from None
    options = {"config": str(config_file) if config_file else None, "home": str(config.home)}
    with log:
        process = subprocess.Popen(
            # -P: a folder here that is called like one of our packages must not take its place
            [sys.executable, "-P", "-m", "cluster.supervisor", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the command in the foreground, which ends us in order
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        _await_ready(process.stdout, say, Path(log.name))
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if not linked:
        process.stdin.write(KEEP)
        process.stdin.close()
    state = RunState.find(config.home)
    if state is None:
        raise ProctorError(f"the application ended right after its start: see {log.name}")
    return Supervisor(process, state)


def _await_ready(progress: IO[bytes], say: Say, log: Path) -> None:
    for line in progress:
        message = json.loads(line)
        if "error" in message:
            raise ProctorError(message["error"])
        if "ready" in message:
            return
        say(message["step"])
    lines = log.read_text(errors="replace").strip().splitlines()
    raise ProctorError(f"the application did not start: {lines[-1] if lines else 'no word'} (log: {log})")


def stop_supervisor(state: RunState, say: Say) -> None:
    """Ask a supervisor to drain and wait for its end; what does not end is killed."""
    process = state.owner()
    if process is None:
        return
    try:
        say("draining")
        process.terminate()
        process.wait(_STOP_S)
    except psutil.NoSuchProcess:
        return
    except psutil.TimeoutExpired:
        say("it does not end: killing it")
        process.kill()
        process.wait()


def take_down(config: ProctorConfig, say: Say) -> None:
    """End the application that runs from `home`.

    Raises:
        NotRunning: there is none.
    """
    state = RunState.find(config.home)
    if state is None:
        raise NotRunning(f"no application runs from {config.home}")
    if state.pid == 0:
        raise NotRunning(f"the application runs on a cluster: `proctor down --address {state.ray_address}` ends it")
    stop_supervisor(state, say)
    RunState.remove(config.home)
