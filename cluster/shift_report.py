"""`proctor ledger`: a shift's account as table, JSON or CSV."""

import csv
import io
from datetime import datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from workers.shifts import ShiftAccount

_COUNTS = ("captured", "pass", "fail", "unknown", "late", "shed", "dead", "lost", "in_flight")


def shift_document(accounts: list[ShiftAccount], since: datetime, until: datetime | None) -> dict[str, Any]:
    """The report as one JSON document."""
    return {
        "since": since.isoformat(),
        "until": until.isoformat() if until else None,
        "balanced": all(account.balanced for account in accounts),
        "cameras": [account.as_dict() for account in accounts],
    }


def shift_csv(accounts: list[ShiftAccount]) -> str:
    """The report as CSV, a line for each camera."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(["product", "camera", *_COUNTS, "shed_by", "gaps", "balanced"])
    for account in accounts:
        counts = _counts(account)
        shed = "; ".join(f"{reason}={n}" for reason, n in account.shed.items())
        gaps = "; ".join(f"{gap.first}-{gap.last}" for gap in account.gaps)
        writer.writerow([account.product, account.camera, *counts.values(), shed, gaps, account.balanced])
    return sink.getvalue()


def shift_table(accounts: list[ShiftAccount], since: datetime, until: datetime | None) -> RenderableType:
    """The report for people: a line for each camera, then why frames were shed and which numbers are lost."""
    span = f"{since.astimezone():%Y-%m-%d %H:%M} to {f'{until.astimezone():%Y-%m-%d %H:%M}' if until else 'now'}"
    if not accounts:
        return Text(f"no frame was captured from {span}", style="dim")
    balanced = all(account.balanced for account in accounts)
    table = Table(
        title=f"{span}, {'balanced' if balanced else 'NOT BALANCED'}",
        title_justify="left",
        title_style="bold" if balanced else "bold red",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("camera", overflow="fold")
    for name in _COUNTS:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    notes: list[Text] = []
    for account in accounts:
        name = f"{account.product}/{account.camera}"
        style = None if account.balanced else "red"
        table.add_row(name, *(f"{count:,}" for count in _counts(account).values()), style=style)
        notes += [Text(f"{name} shed {n:,}: {reason}", style="yellow") for reason, n in account.shed.items()]
        for gap in account.gaps:
            count = gap.last - gap.first + 1
            text = f"{name} lost {count:,}: {gap.first} to {gap.last}, found {gap.found_at:%H:%M:%S} UTC"
            notes.append(Text(text, style="red"))
    return Group(table, *notes)


def _counts(account: ShiftAccount) -> dict[str, int]:
    return {
        "captured": account.captured,
        **account.verdicts,
        "late": account.late,
        "shed": sum(account.shed.values()),
        "dead": account.dead,
        "lost": account.lost,
        "in_flight": account.in_flight,
    }
