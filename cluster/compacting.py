"""`proctor compact`: one round of the compactor by hand, with or without a running application."""

from dataclasses import asdict, dataclass
from typing import Any

from cluster.config import ProctorConfig
from cluster.connection import connect
from cluster.run_state import redis_url_of
from workers.compactor import Folded
from workers.compactor_loop import CompactorLoop


@dataclass(frozen=True)
class Round:
    """What one round did.

    Attributes:
        folded: what went into the table.
        rows: rows of the table now.
        damaged: segments that are set aside now.
    """

    folded: Folded
    rows: int
    damaged: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self.folded), "damaged": self.damaged, "table_rows": self.rows}

    def line(self) -> str:
        """For people."""
        damaged = f"; {self.damaged:,} damaged segments lie aside" if self.damaged else ""
        return (
            f"{self.folded.segments:,} segments folded, {self.folded.rows:,} new rows, "
            f"{self.rows:,} in the table{damaged}"
        )


def compact_once(config: ProctorConfig) -> Round:
    """Do one round.

    Raises:
        WorkerError: another compactor works at this moment, or the place cannot be read or written.
        ProctorError: results in an object store, and no server that holds the lease.
    """
    loop = CompactorLoop(config.results.uri, lambda: connect(redis_url_of(config)), config.results)
    folded = loop.round()
    state = loop.state()
    return Round(folded, state["rows"], state["damaged"])
