"""Reading results: the table and the live segments, each frame once, also while a compactor works.

The segments are read first, then the table: what a compactor takes away in between is in the table by then.
The first row of a frame is the one that counts: the table's, else that of the oldest segment.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.dataset as pads

from workers.results import SCHEMA
from workers.segments import Segments
from workers.table import ResultTable, first_of_each

_MAX_INT64 = 2**63 - 1
_MICROSECONDS = pa.timestamp("us", "UTC")


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
        since: only frames captured at or after this time; older days of the table are not opened.
        frame_ids: only these frames; other products of the table are not opened.
        columns: only these columns; leave out `map_u8` and `image_jpeg` when they are not needed.

    Raises:
        ResultsUnavailable: the place cannot be read, or a segment is corrupt.
    """
    wanted = list(columns or SCHEMA.names)
    needed = list(dict.fromkeys([*wanted, "frame_id", "product", "seq", "captured_at"]))
    ids = None if frame_ids is None else list(frame_ids)
    chosen = _chosen(product, since, ids)
    live = pa.concat_tables(
        [
            pa.schema([SCHEMA.field(name) for name in needed]).empty_table(),
            *(segment.filter(chosen) for segment in Segments(uri).read_columns(needed)),
        ]
    )
    folded = ResultTable(uri).read(needed, chosen & _partitions(since))  # after the segments, see above
    rows = first_of_each(pa.concat_tables([folded, live]))
    return rows.sort_by([("captured_at", "ascending"), ("frame_id", "ascending")]).select(wanted)


def _chosen(product: str | None, since: datetime | None, ids: list[str] | None) -> pads.Expression:
    chosen = pads.scalar(True)
    if product is not None:
        chosen &= pads.field("product") == product
    if since is not None:
        chosen &= pads.field("captured_at") >= pa.scalar(since, _MICROSECONDS)
    if ids is not None:
        chosen &= _named(ids)
    return chosen


def _named(ids: list[str]) -> pads.Expression:
    """These frames, in words that name files too: a frame's id says its product, and numbers grow with time."""
    parts = [frame_id.split("/") for frame_id in ids]
    named = [(part[0], int(part[2])) for part in parts if len(part) == 3 and part[2].isdecimal()]
    known = [(product, seq) for product, seq in named if seq <= _MAX_INT64]
    if not known:
        return pads.scalar(False)
    numbers = [seq for _, seq in known]
    return (
        pads.field("product").isin(sorted({product for product, _ in known}))
        & (pads.field("seq") >= min(numbers))
        & (pads.field("seq") <= max(numbers))
        & pads.field("frame_id").isin(ids)
    )


def _partitions(since: datetime | None) -> pads.Expression:
    if since is None:
        return pads.scalar(True)
    return pads.field("day") >= pa.scalar(since.astimezone(UTC).date(), pa.date32())
