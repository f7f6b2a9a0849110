"""`proctor doctor`: what is wrong with this machine, configuration and application."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from cluster.config import ProctorConfig
from cluster.connection import connect, shown_url
from cluster.errors import ProctorError
from cluster.origin import check_origin
from cluster.run_state import RunState
from cluster.server import find_binary
from cluster.spools import waiting_spools
from models.errors import ModelError
from workers.errors import WorkerError

_FREE_BYTES = 2 * 2**30
_PACKAGES = ("ray", "torch", "torchvision", "timm", "redis", "pyarrow", "opencv-python-headless")


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    state: Literal["ok", "notice", "wrong"]
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def examine(load: Callable[[], ProctorConfig]) -> list[Finding]:
    """Look at everything; each thing that is wrong says what to do.

    Args:
        load: reads the configuration.
    """
    findings = [*_machine(), *_attempt("packages' origin", _origin)]
    try:
        config = load()
    except ProctorError as error:
        return [*findings, Finding("configuration", "wrong", str(error))]
    findings.append(Finding("configuration", "ok", f"home {config.home}"))
    looks = {
        "disk": _disk,
        "server": _server,
        "spools": _spools,
        "teachers": _teachers,
        "application": _application,
    }
    for what, look in looks.items():
        findings += _attempt(what, lambda look=look: look(config))  # type: ignore[misc]
    return findings


def _attempt(what: str, look: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(look())
    except (ProctorError, ModelError, WorkerError, OSError) as error:
        return [Finding(what, "wrong", str(error))]


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "ok", f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for package in _PACKAGES:
        try:
            yield Finding(package, "ok", version(package))
        except PackageNotFoundError:
            yield Finding(package, "wrong", f"not installed in {sys.prefix}: pip install proctor")
    import torch

    from models.inference import best_dtype, pick_device

    device = pick_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    dtype = str(best_dtype(device)).removeprefix("torch.")
    yield Finding("device", "ok" if device.type == "cuda" else "notice", f"{device.type} ({name}), {dtype}")
    if sys.platform == "linux" and shutil.disk_usage("/dev/shm").total < 256 * 2**20:
        yield Finding("/dev/shm", "wrong", "smaller than 256 MB, too small for Ray: enlarge it (docker: --shm-size=1g)")


def _origin() -> Iterator[Finding]:
    check_origin()
    yield Finding("packages' origin", "ok", str(Path(__file__).parent.parent))


def _disk(config: ProctorConfig) -> Iterator[Finding]:
    place = config.home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if not os.access(place, os.W_OK):
        yield Finding("disk", "wrong", f"{place} is not writable: set `home` to a writable directory")
    elif free < _FREE_BYTES:
        yield Finding("disk", "wrong", f"only {free / 2**30:.1f} GB free at {place}: results stop when it is full")
    else:
        yield Finding("disk", "ok", f"{free / 2**30:.0f} GB free at {place}")


def _server(config: ProctorConfig) -> Iterator[Finding]:
    if not config.redis.url:
        yield Finding("server", "ok", f"embedded: {find_binary()}")
        return
    client = connect(config.redis.url)
    yield Finding("server", "ok", shown_url(config.redis.url))
    client.close()


def _spools(config: ProctorConfig) -> Iterator[Finding]:
    for product, camera in waiting_spools(config):
        detail = "holds frames that are in no ledger yet: `proctor push --replay` sends them, if no push runs"
        yield Finding(f"spool {product}/{camera}", "notice", detail)


def _teachers(config: ProctorConfig) -> Iterator[Finding]:
    from models.teachers import load_teacher

    names = {config.training.teacher, *(config.training_for(product).teacher for product in config.products)}
    for name in sorted(names):
        teacher = load_teacher(name, config.teachers.get(name))
        yield Finding(f"teacher {name}", "ok", f"weights {teacher.weights_sha256[:12]}")


def _application(config: ProctorConfig) -> Iterator[Finding]:
    from cluster.status import Status

    state = RunState.find(config.home)
    if state is None and not config.redis.url:
        yield Finding("application", "notice", f"none runs from {config.home}: `proctor up` starts one")
        return
    client = connect(config.redis.url or (state.redis_url if state else ""))
    status = Status.read(client)
    client.close()
    if not status.replicas:
        logs = f"{config.home / 'logs'} and /tmp/ray/session_latest/logs"
        yield Finding("replicas", "wrong", f"none reports: see {logs}, then `proctor down` and `up`")
    for replica in status.replicas:
        trouble = replica["trouble"]
        yield Finding(f"replica {replica['replica']}", "wrong" if trouble else "ok", trouble or "inspecting")
    for product in status.products:
        ok = product.balanced
        detail = "balances" if ok else "does not balance: keep Redis and results as they are and report it"
        yield Finding(f"ledger {product.product}", "ok" if ok else "wrong", detail)


def findings_table(findings: list[Finding]) -> Table:
    """The table of `proctor doctor`."""
    table = Table(show_header=False, box=None)
    marks = {"ok": "[green]ok[/]", "notice": "[yellow]notice[/]", "wrong": "[red]wrong[/]"}
    for finding in findings:
        table.add_row(marks[finding.state], finding.what, finding.detail)
    return table
