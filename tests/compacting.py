"""What the tests of the table share: a place with segments and a table, and a compactor that dies where it is told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from test_results import new_row

from workers.compactor import Compactor, Folded
from workers.reading import read_results
from workers.results import Row, SegmentWriter
from workers.segments import Segments
from workers.table import ResultTable
from workers.table_writer import TableWriter

ROOT = Path(__file__).resolve().parents[1]

# A compactor in a process of its own that kills itself at the n-th time that it reaches a step, or syncs a file.
DOOMED = """
import os, signal, sys
from workers.compactor import Compactor
from workers.segments import Segments
from workers.table import ResultTable

uri, where, left = sys.argv[1], sys.argv[2], int(sys.argv[3])

def reached(step):
    global left
    left -= step == where
    if step == where and left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

sync = os.fsync

def fsync(opened):
    reached("fsync")
    sync(opened)

os.fsync = fsync
print(Compactor(Segments(uri), ResultTable(uri), reached).fold_all().rows)
"""


class Shelf:
    """Results of this test's own.

    Attributes:
        uri: where.
        writer: of segments, replica "r".
        table: the table.
        commits: its writer.
        segments: the segments.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.writer = SegmentWriter(uri, "r")
        self.table = ResultTable(uri)
        self.commits = TableWriter(self.table)
        self.segments = Segments(uri)

    def write(self, *numbers: int, product: str = "bolt", **changes) -> str:
        """One segment with the rows of these frames."""
        return self.writer.write([new_row(seq, product, **changes) for seq in numbers])

    def write_rows(self, *rows: Row) -> str:
        return self.writer.write(rows)

    def fold(self) -> Folded:
        return Compactor(self.segments, self.table).fold_all()

    def waiting(self) -> int:
        return len(self.segments.closed())

    def table_rows(self) -> list[str]:
        """Frames in the table as they lie there, repeats and all."""
        delta = self.table.open()
        return sorted(delta.to_pyarrow_table(columns=["frame_id"])["frame_id"].to_pylist()) if delta else []

    def read(self) -> dict[str, float]:
        """Scores by frame as a reader gets them; a frame that is read twice fails here."""
        rows = read_results(self.uri, columns=["frame_id", "score"]).to_pylist()
        scores = {row["frame_id"]: row["score"] for row in rows}
        assert len(scores) == len(rows), "a frame was read twice"
        return scores

    def parquet_files(self) -> list[Path]:
        return sorted(Path(self.table.root).glob("product=*/day=*/*"))


def start_doomed(uri: str, where: str, times: int) -> "subprocess.Popen[str]":
    """Start a compactor that kills itself there."""
    return subprocess.Popen(
        [sys.executable, "-c", DOOMED, uri, where, str(times)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes in the block; a write that would fails, as on a full disk."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
