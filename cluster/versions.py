"""`proctor models`: versions and the pointers to those in service."""

from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.config import ProctorConfig
from cluster.connection import connect
from cluster.errors import ProctorError
from cluster.run_state import redis_url_of
from models.registry import Registry
from workers.pointers import CURRENT, PREVIOUS, Pointers


def _pointers(config: ProctorConfig, registry: Registry) -> Pointers:
    return Pointers(connect(redis_url_of(config)), registry)


def list_versions(config: ProctorConfig, product: str | None) -> list[dict[str, Any]]:
    """Versions of one product or of all, oldest first, with what is in service.

    Raises:
        NotRunning: the pointers are in Redis, and it does not run.
        VersionError: the registry is not readable.
    """
    registry = Registry(config.registry.uri)
    pointers = _pointers(config, registry)
    rows = []
    for name in [product] if product else registry.products():
        pointed = pointers.of(name)
        for card in registry.versions(name):
            states = [pointer for pointer in (CURRENT, PREVIOUS) if pointed.get(pointer) == card.version]
            rows.append(
                {
                    "product": name,
                    "version": card.version,
                    "state": states[0] if states else "",
                    "detector": card.detector.name,
                    "teacher": card.teacher.name,
                    "images": len(card.training.images),
                    "threshold": card.threshold,
                    "parent": card.parent,
                    "creator": card.creator,
                    "created_at": card.created_at.isoformat(),
                }
            )
    return rows


def version_table(rows: list[dict[str, Any]]) -> Table:
    """The table of `proctor models list`."""
    table = Table()
    for name in ("product", "version", "state", "detector", "teacher", "images", "threshold", "parent", "by"):
        table.add_column(
            name, no_wrap=name == "version", justify="right" if name in ("images", "threshold") else "left"
        )
    for row in rows:
        state = f"[green]{row['state']}[/]" if row["state"] == CURRENT else row["state"]
        cells = (row["product"], row["version"], state, row["detector"], row["teacher"], f"{row['images']:,}")
        table.add_row(*cells, f"{row['threshold']:.6g}", row["parent"] or "-", row["creator"])
    return table


def show_version(config: ProctorConfig, product: str, version: str | None) -> dict[str, Any]:
    """A version's whole record; the one in service if none is named."""
    registry = Registry(config.registry.uri)
    if version is None:
        version = _pointers(config, registry).of(product).get(CURRENT)
        if version is None:
            raise ProctorError(f"{product} has no version in service: `proctor train` makes one")
    return registry.card(product, version).model_dump(mode="json")


def promote_version(config: ProctorConfig, product: str, version: str) -> None:
    """Put a version into service."""
    registry = Registry(config.registry.uri)
    _pointers(config, registry).promote(product, version)


def roll_back(config: ProctorConfig, product: str) -> str:
    """Put the previous version back into service and return it."""
    registry = Registry(config.registry.uri)
    pointers = _pointers(config, registry)
    previous = pointers.of(product).get(PREVIOUS)
    if previous is None:
        raise ProctorError(f"{product} has no previous version to go back to")
    pointers.promote(product, previous)
    return previous


def export_version(config: ProctorConfig, product: str, version: str, to: Path) -> None:
    """Copy a version's two files into a folder."""
    from safetensors.torch import save_file

    card, state = Registry(config.registry.uri).load_student(product, version)
    try:
        to.mkdir(parents=True, exist_ok=True)
        save_file(state, to / "student.safetensors")
        (to / "model.json").write_text(card.to_json())
    except OSError as error:
        raise ProctorError(f"cannot write to {to}: {error.strerror}") from None
