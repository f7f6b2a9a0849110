"""Results as Arrow: the schema, durable segments and reading them back, each frame once.

A segment is an Arrow IPC file that appears whole or not at all (written beside, fsync, renamed). Delivery is at
least once, so two segments may hold the same frame; readers keep the newest row of a `frame_id`.
"""

import itertools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

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

    def write(self, rows: Sequence[Row]) -> str:
        """Write one segment and return its path; when this returns, the rows survive a power cut.

        Raises:
            ResultsUnavailable: nothing of the segment became visible.
        """
        table = pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA)
        name = f"{time.time_ns():020d}-{self._replica}-{next(self._numbers):08d}.arrow"
        path = f"{self._folder}/{name}"
        try:
            if isinstance(self._fs, pafs.LocalFileSystem):
                _write_local(table, Path(path))
            else:
                with self._fs.open_output_stream(path) as sink:  # an object appears when its upload completes
                    _write_table(table, sink)
        except OSError as error:
            raise ResultsUnavailable(f"cannot write results to {self._folder}: {error}") from None
        return path


def _write_local(table: pa.Table, path: Path) -> None:
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as sink:
            _write_table(table, sink)
            sink.flush()
            os.fsync(sink.fileno())
        os.rename(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_table(table: pa.Table, sink: object) -> None:
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_table(table)


def read_results(
    uri: str,
    *,
    product: str | None = None,
    since: datetime | None = None,
    frame_ids: Iterable[str] | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Rows in order of capture, each frame once.

    Args:
        uri: the results' folder or URI.
        product: only this product's rows.
        since: only frames captured at or after this time.
        frame_ids: only these frames.
        columns: only these columns; leave out `map_u8` and `image_jpeg` when they are not needed.

    Raises:
        ResultsUnavailable: the place cannot be read, or a segment is corrupt.
    """
    wanted = list(columns or SCHEMA.names)
    keep = list(dict.fromkeys([*wanted, "frame_id", "product", "captured_at"]))
    ids = None if frame_ids is None else pa.array(list(frame_ids), pa.string())
    parts = [_selected(segment, product, since, ids) for segment in _segments(*filesystem(uri), keep)]
    schema = pa.schema([SCHEMA.field(name) for name in keep])
    table = pa.concat_tables(parts) if parts else schema.empty_table()
    order = pc.sort_indices(table, [("captured_at", "ascending"), ("frame_id", "ascending")])
    return _newest(table.take(order)).select(wanted)


def _selected(table: pa.Table, product: str | None, since: datetime | None, ids: pa.Array | None) -> pa.Table:
    if product is not None:
        table = table.filter(pc.equal(table["product"], product))
    if since is not None:
        table = table.filter(pc.greater_equal(table["captured_at"], pa.scalar(since, pa.timestamp("us", "UTC"))))
    if ids is not None:
        table = table.filter(pc.is_in(table["frame_id"], ids))
    return table


def _newest(table: pa.Table) -> pa.Table:
    """Keep the last row of each `frame_id`; segments come in the order of their writing and sorting is stable."""
    last = {frame_id: row for row, frame_id in enumerate(table["frame_id"].to_pylist())}
    if len(last) == table.num_rows:
        return table
    return table.take(pa.array(sorted(last.values()), pa.int64()))


def _segments(fs: pafs.FileSystem, root: str, columns: list[str]) -> Iterable[pa.Table]:
    """The columns of each segment in the order of their writing; other columns are not even read."""
    options = pa.ipc.IpcReadOptions(included_fields=[SCHEMA.get_field_index(name) for name in columns])
    selector = pafs.FileSelector(f"{root}/segments", allow_not_found=True)
    try:
        infos = [info for info in fs.get_file_info(selector) if _is_segment(info)]
        for info in sorted(infos, key=lambda info: info.base_name):
            with fs.open_input_file(info.path) as source:
                yield pa.ipc.open_file(source, options=options).read_all().select(columns)
    except (OSError, pa.ArrowInvalid) as error:
        raise ResultsUnavailable(f"cannot read results in {root}: {error}") from None


def _is_segment(info: pafs.FileInfo) -> bool:
    return info.base_name.endswith(".arrow") and not info.base_name.startswith(".")


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
