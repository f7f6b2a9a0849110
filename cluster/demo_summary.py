"""What the demo found, as a JSON document and as a panel for people."""

from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table

from cluster.solar_cells import LICENCE


@dataclass(frozen=True)
class DemoSummary:
    """What the demo found; field names are those of its JSON document."""

    captured: int
    judged: int
    shed: int
    dead: int
    in_flight: int
    balanced: bool
    frames_per_s: float
    latency_ms: dict[str, float]
    auroc_before: float
    auroc_after: float
    false_rejects_before: float
    false_rejects_after: float
    detected_before: float
    detected_after: float
    approved: int
    versions: dict[str, int]
    rows: int
    training_s: list[float]
    seconds: float
    contact_sheet: str
    licence: str = LICENCE
    kept: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def render(self) -> RenderableType:
        """For people."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        balance = "[green]balanced[/]" if self.balanced else "[red]NOT BALANCED[/]"
        table.add_row(
            "ledger",
            f"captured {self.captured:,} = judged {self.judged:,} + shed {self.shed} + dead {self.dead} "
            f"+ in flight {self.in_flight}  {balance}",
        )
        table.add_row("results", f"{self.rows:,} rows, each frame once")
        table.add_row("speed", f"{self.frames_per_s:.0f} frames/s flat out")
        table.add_row(
            "latency", f"p50 {self.latency_ms['p50']:.0f} ms, p99 {self.latency_ms['p99']:.0f} ms camera → verdict"
        )
        table.add_row("image AUROC", f"{self.auroc_before * 100:.1f} % → {self.auroc_after * 100:.1f} %")
        table.add_row(
            "false rejects",
            f"{self.false_rejects_before * 100:.1f} % → {self.false_rejects_after * 100:.1f} % "
            f"after approving {self.approved} cells",
        )
        table.add_row("defects found", f"{self.detected_before * 100:.1f} % → {self.detected_after * 100:.1f} %")
        table.add_row("versions", ", ".join(f"{version} ({n:,} frames)" for version, n in self.versions.items()))
        table.add_row("training", " and ".join(f"{seconds:.0f} s" for seconds in self.training_s))
        table.add_row("contact sheet", self.contact_sheet)
        table.add_row("images", self.licence)
        if self.kept:
            table.add_row("running", self.kept)
        return Panel(table, title=f"Proctor demo, {self.seconds:.0f} s", title_align="left", border_style="green")
