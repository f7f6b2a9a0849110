"""`proctor train` and `proctor jobs`."""

import time
from pathlib import Path
from typing import Any

import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from cluster.config import ProctorConfig
from cluster.errors import ConfigError, ProctorError
from producers.errors import FrameError
from producers.frame import check_product
from workers.errors import StreamUnavailable
from workers.jobs import FINISHED, Job, Jobs
from workers.reports import read_replicas

_LOOK_EVERY_S = 0.2
_PATIENCE_S = 60.0


def new_job(config: ProctorConfig, product: str, images: list[Path], overrides: dict[str, Any]) -> Job:
    """A job, checked as far as it can be here.

    Raises:
        ProctorError: no such folder, or the product has no valid name.
        ModelError: no such detector.
    """
    try:
        check_product(product)
    except FrameError as error:
        raise ConfigError(str(error)) from None
    for folder in images:
        if not folder.is_dir():
            reason = "a file, not a folder of images" if folder.is_file() else "no such folder of images"
            raise ProctorError(f"{reason}: {folder}")
    if "detector" in overrides:
        from models.detectors import make_detector  # here, since it loads PyTorch

        make_detector(overrides["detector"])
    steps = int(overrides.get("steps", config.training_for(product).steps))
    return Job(product=product, images=[str(folder.absolute()) for folder in images], overrides=overrides, steps=steps)


def wait_for(jobs: Jobs, job: Job, console: Console) -> Job:
    """Follow a job to its end, with a progress bar; Ctrl-C stops the watching, not the job."""
    try:
        return _follow(jobs, job, console)
    except KeyboardInterrupt:
        raise ProctorError(f"the training goes on as job {job.id}: `proctor jobs` shows it") from None


def _follow(jobs: Jobs, job: Job, console: Console) -> Job:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"training {job.product}", total=None, loss="")
        seen_at = time.monotonic()
        while job.state not in FINISHED:
            time.sleep(_LOOK_EVERY_S)
            try:
                job, seen_at = jobs.get(job.id), time.monotonic()
            except StreamUnavailable:  # the trainer goes on; a fail-over takes some seconds
                if time.monotonic() - seen_at > _PATIENCE_S:
                    raise
                continue
            loss = "" if job.loss is None else f"loss {job.loss:.4f}"
            progress.update(task, total=job.steps or None, completed=job.step, loss=loss)
    return job


def await_service(server: redis.Redis, product: str, version: str, timeout_s: float = 15.0) -> bool:
    """Wait until every replica reports a version in service; False if that does not happen in time."""
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        replicas = read_replicas(server)
        if replicas and all(replica["versions"].get(product) == version for replica in replicas):
            return True
        time.sleep(_LOOK_EVERY_S)
    return False


def job_table(jobs: list[Job]) -> Table:
    """The table of `proctor jobs`."""
    table = Table()
    for name in ("job", "product", "state", "progress", "loss", "version or reason", "by", "queued (UTC)"):
        table.add_column(name, overflow="fold")
    colours = {"succeeded": "green", "failed": "red", "running": "cyan", "queued": "dim"}
    for job in jobs:
        table.add_row(
            job.id,
            job.product,
            f"[{colours[job.state]}]{job.state}[/]",
            f"{job.step}/{job.steps}" if job.steps else "-",
            "-" if job.loss is None else f"{job.loss:.4f}",
            "; ".join(filter(None, (job.version or job.error, job.remark))) or "-",
            job.creator,
            f"{job.created_at:%Y-%m-%d %H:%M:%S}",
        )
    return table
