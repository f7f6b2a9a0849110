"""`proctor status`: ledger, replicas and jobs, once or live."""

from dataclasses import dataclass
from typing import Any

import redis
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.decision import Decision, read_decision
from workers.errors import StreamUnavailable
from workers.jobs import FINISHED, Job, Jobs
from workers.ledger import CameraLedger, ProductLedger, read_ledger
from workers.reports import read_compactor, read_replicas

_REFRESH_S = 0.5


@dataclass(frozen=True)
class Status:
    """What `proctor status` shows."""

    products: list[ProductLedger]
    replicas: list[dict[str, Any]]
    jobs: list[Job]
    compactor: dict[str, Any] | None = None
    scaling: Decision | None = None

    @classmethod
    def read(cls, server: redis.Redis) -> "Status":
        """Read everything from Redis.

        Raises:
            StreamUnavailable: Redis does not answer.
        """
        jobs = [job for job in Jobs(server).all() if job.state not in FINISHED]
        return cls(
            read_ledger(server),
            read_replicas(server),
            jobs,
            compactor=read_compactor(server),
            scaling=read_decision(server),
        )

    @property
    def balanced(self) -> bool:
        """Whether every camera's ledger balances."""
        return all(product.balanced for product in self.products)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "balanced": self.balanced,
            "products": [product.as_dict() for product in self.products],
            "replicas": self.replicas,
            "compactor": self.compactor,
            "scaling": self.scaling.as_dict() if self.scaling else None,
            "jobs": [job.model_dump(mode="json") for job in self.jobs],
        }


def render(status: Status) -> RenderableType:
    """The tables of `proctor status`."""
    parts: list[RenderableType] = [_ledger_table(status)]
    if not status.products:
        parts.append(Text("no frames yet: `proctor push SOURCE --product P --camera C` sends some", style="dim"))
    parts.append(_replica_table(status))
    if status.scaling:
        parts.append(Text(status.scaling.line()))
    parts.append(_compactor_line(status.compactor))
    parts += _remarks(status)
    for job in status.jobs:
        done = f"{job.step}/{job.steps}" if job.steps else job.state
        parts.append(Text(f"training {job.product}: {done}", style="cyan"))
    return Group(*parts)


def _remarks(status: Status) -> list[RenderableType]:
    """What a camera's line has no room for, and that should not stay unseen."""
    lines: list[RenderableType] = []
    for camera in (camera for product in status.products for camera in product.cameras):
        name = f"{camera.product}/{camera.camera}"
        for reason, count in camera.shed_by.items():
            lines.append(Text(f"{name}: {count:,} shed, {reason}", style="yellow"))
        if late := camera.verdicts.get("late"):
            lines.append(Text(f"{name}: {late:,} answered late by `unknown`", style="yellow"))
        if camera.lost:
            lines.append(Text(f"{name}: {camera.lost:,} LOST, `proctor ledger` names their numbers", style="bold red"))
        if camera.skewed:
            lines.append(
                Text(f"{name}: its producer's clock is {(camera.skew_ms or 0) / 1e3:+.1f} s off", style="yellow")
            )
    return lines


def _table(title: str, style: str) -> Table:
    """An empty table that leaves its width to the figures: 80 columns shall do."""
    return Table(title=title, title_justify="left", title_style=style, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _ledger_table(status: Status) -> Table:
    verdict = "balanced" if status.balanced else "NOT BALANCED"
    table = _table(f"Ledger ({verdict})", "bold" if status.balanced else "bold red")
    table.add_column("camera", overflow="fold")
    for name in ("captured", "judged", "shed", "dead", "in flight", "lag", "oldest", "frames/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("version", overflow="fold", min_width=6)
    for product in status.products:
        for camera in product.cameras:
            table.add_row(*_camera_cells(product, camera), style=None if camera.balanced else "red")
    return table


def _camera_cells(product: ProductLedger, camera: CameraLedger) -> list[str]:
    return [
        f"{camera.product}/{camera.camera}",
        *(f"{n:,}" for n in (camera.captured, camera.judged, camera.shed, camera.dead, camera.in_flight)),
        f"{product.lag:,}",
        "-" if camera.oldest_s is None else f"{camera.oldest_s:.1f} s",
        f"{camera.frames_per_s:.1f}",
        camera.model_version or "-",
    ]


def _replica_table(status: Status) -> RenderableType:
    if not status.replicas:
        return Text("no replica reports: `proctor doctor` looks for the cause", style="yellow")
    table = _table("Replicas", "bold")
    for name in ("replica", "device", "judged", "versions", "state"):
        table.add_column(name, justify="right" if name == "judged" else "left", overflow="fold")
    for replica in status.replicas:
        versions = ", ".join(f"{product} {version}" for product, version in replica["versions"].items())
        state = Text(replica["trouble"], style="red") if replica["trouble"] else Text("inspecting", style="green")
        device = f"{replica['device']} {replica['dtype']}"
        table.add_row(replica["replica"], device, f"{replica['judged']:,}", versions or "-", state)
    return table


def _compactor_line(compactor: dict[str, Any] | None) -> Text:
    if compactor is None:
        return Text("no compactor reports: results stay in segments until one runs", style="yellow")
    if compactor["trouble"]:
        return Text(f"results: {compactor['trouble']}", style="red")
    if compactor["rows"] is None:
        return Text("results: the compactor has not done a round yet", style="dim")
    line = f"results: {compactor['rows']:,} in the table, {compactor['waiting']:,} segments waiting"
    if compactor["damaged"]:
        return Text(f"{line}, {compactor['damaged']:,} damaged segments set aside", style="red")
    return Text(line)


def show_live(server: redis.Redis, console: Console, wait: Any) -> None:
    """Refresh on the terminal until `wait(seconds)` returns true; a server that is away is waited for, and named."""
    shown = render(Status.read(server))
    with Live(shown, console=console, auto_refresh=False, screen=False) as live:
        while not wait(_REFRESH_S):
            try:
                shown = render(Status.read(server))
                live.update(shown, refresh=True)
            except StreamUnavailable as error:
                live.update(Group(shown, Text(f"as it was before: {error}", style="red")), refresh=True)
