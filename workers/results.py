"""Results as Arrow: the schema, and the durable segments that replicas write.

A segment is an Arrow IPC file that appears whole or not at all (written beside, fsync, renamed). Delivery is at
least once, so two segments may hold the same frame; the compactor and `workers.reading` keep the first row of a
`frame_id`.
"""

import contextlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from workers import durable
from workers.errors import ResultsUnavailable

MAP_SIZE = 64

SCHEMA = pa.schema(
    [
        pa.field("frame_id", pa.string(), nullable=False),
        pa.field("product", pa.string(), nullable=False),
        pa.field("camera", pa.string(), nullable=False),
        pa.field("seq", pa.int64(), nullable=False),
        pa.field("captured_at", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("verdict", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("threshold", pa.float64()),
        pa.field("model_version", pa.string()),
        pa.field("detector", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("queue_ms", pa.float64(), nullable=False),
        pa.field("infer_ms", pa.float64(), nullable=False),
        pa.field("total_ms", pa.float64(), nullable=False),
        pa.field("replica", pa.string(), nullable=False),
        pa.field("map_u8", pa.binary()),
        pa.field("map_min", pa.float32()),
        pa.field("map_max", pa.float32()),
        pa.field("image_jpeg", pa.binary()),
    ]
)
HEAVY = ("map_u8", "image_jpeg")


@dataclass(frozen=True, slots=True)
class Row:
    """One result; the fields are the schema's. `map_u8` is 64x64 bytes, row by row, 0 = map_min, 255 = map_max."""

    frame_id: str
    product: str
    camera: str
    seq: int
    captured_at: datetime
    verdict: str
    score: float | None
    threshold: float | None
    model_version: str | None
    detector: str | None
    reason: str | None
    queue_ms: float
    infer_ms: float
    total_ms: float
    replica: str
    map_u8: bytes | None = None
    map_min: float | None = None
    map_max: float | None = None
    image_jpeg: bytes | None = None


def captured_at(captured_at_ns: int) -> datetime:
    """Capture time in UTC, to the microsecond."""
    seconds, rest_ns = divmod(captured_at_ns, 1_000_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest_ns // 1000)


class SegmentWriter:
    """Writes rows as segments below `{uri}/segments`.

    Args:
        uri: a folder or a pyarrow.fs URI.
        replica: becomes part of the segments' names, so that two replicas never meet.

    Raises:
        ResultsUnavailable: the place cannot be made or written.
    """

    def __init__(self, uri: str, replica: str) -> None:
        self._fs, self._root = filesystem(uri)
        self._folder = f"{self._root}/segments"
        self._replica = replica
        self._numbers = itertools.count()
        try:
            self._fs.create_dir(self._folder, recursive=True)
        except OSError as error:
            raise ResultsUnavailable(f"cannot write results to {uri}: {error}") from None

    def check(self) -> None:
        """Write a file that nobody looks for, and remove it.

        Raises:
            ResultsUnavailable: nothing can be written.
        """
        # By its name a leftover of a writer that was killed, in case that this one is.
        path = f"{self._folder}/.{self._replica}-{time.time_ns()}.arrow.tmp"
        try:
            durable.write_unnamed(self._fs, path, lambda sink: sink.write(b"proctor"))
        except OSError as error:
            raise self._unavailable(error) from None
        with contextlib.suppress(OSError):  # a store may grant writing alone
            self._fs.delete_file(path)

    def write(self, rows: Sequence[Row]) -> str:
        """Write one segment and return its path; when this returns, the rows survive a power cut.

        Raises:
            ResultsUnavailable: nothing of the segment became visible.
        """
        table = _table(rows)
        name = f"{time.time_ns():020d}-{self._replica}-{next(self._numbers):08d}.arrow"
        path = f"{self._folder}/{name}"
        try:
            durable.write(self._fs, path, lambda sink: _write_table(table, sink))
        except OSError as error:
            raise self._unavailable(error) from None
        return path

    def _unavailable(self, error: OSError) -> ResultsUnavailable:
        return ResultsUnavailable(f"cannot write results to {self._folder}: {error}")


def _table(rows: Sequence[Row]) -> pa.Table:
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _write_table(table: pa.Table, sink: object) -> None:
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and path of a folder or pyarrow.fs URI.

    Raises:
        ResultsUnavailable: no such kind of place, or it cannot be reached.
    """
    if "://" not in uri:
        uri = Path(uri).absolute().as_uri()
    try:
        return pafs.FileSystem.from_uri(uri)
    except (OSError, pa.ArrowInvalid) as error:
        raise ResultsUnavailable(f"cannot use {uri} for results: {error}") from None
