"""Files that are there whole or not at all, and survive a power cut once they are there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs


def write(fs: pafs.FileSystem, path: str, fill: Callable[[Any], None]) -> None:
    """Write a file that appears complete: beside and renamed on a local disk; an object appears when its upload ends.

    Args:
        fs: where.
        path: its name, in a folder that exists.
        fill: writes the content into an open binary file.

    Raises:
        OSError: nothing of the file is visible.
    """
    if not isinstance(fs, pafs.LocalFileSystem):
        with fs.open_output_stream(path) as sink:
            fill(sink)
        return
    final = Path(path)
    beside = final.with_name(f".{final.name}.tmp")
    try:
        with open(beside, "wb") as sink:
            fill(sink)
            sink.flush()
            os.fsync(sink.fileno())
        os.rename(beside, final)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync(final.parent)


def write_unnamed(fs: pafs.FileSystem, path: str, fill: Callable[[Any], None]) -> None:
    """Write a file that nobody looks for until something else names it; what a killed writer leaves is harmless.

    Raises:
        OSError: the file is not there.
    """
    if not isinstance(fs, pafs.LocalFileSystem):
        write(fs, path, fill)
        return
    final = Path(path)
    try:
        with open(final, "xb") as sink:
            fill(sink)
            sink.flush()
            os.fsync(sink.fileno())
    except OSError:
        final.unlink(missing_ok=True)
        raise
    sync(final.parent)


def sync(path: Path) -> None:
    """Bring a local file's content, or the names in a local folder, onto the disk.

    Raises:
        OSError: the disk does not take it.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
