"""The page on operating: other programs read the table with the very lines that it shows."""

import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from compacting import Shelf
from test_results import START, new_row

from workers.settings import ResultsSettings
from workers.upkeep import Upkeep

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operate.md"
SECTION = re.compile(r"^### Other programs read the table\n(.*?)^### ", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"^(\w+):\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def programs() -> dict[str, str]:
    return dict(PROGRAM.findall(SECTION.search(PAGE.read_text(encoding="utf-8"))[1]))


def test_the_page_shows_three_programs():
    assert list(programs()) == ["DuckDB", "Polars", "pandas"]


@pytest.fixture
def folder(tmp_path):
    """A folder as it is after a shift, with a table that was merged and lost its evidence."""
    shelf = Shelf(str(tmp_path / ".proctor" / "results"))
    shelf.write_rows(*(new_row(seq, "nut", verdict="fail", score=3.0, image_jpeg=b"\xff\xd8") for seq in range(6)))
    shelf.write_rows(*(new_row(seq, captured_at=START + timedelta(days=1)) for seq in range(5)))
    shelf.fold()
    shelf.write_rows(new_row(7, "nut", verdict="fail", score=3.0))
    shelf.fold()
    Upkeep(shelf.table, ResultsSettings(evidence_days=1), lambda: START + timedelta(days=5)).run()
    assert len(shelf.parquet_files()) > len(shelf.table.files(shelf.table.open())) == 2
    return tmp_path


@pytest.mark.parametrize(
    ("program", "shown"),
    [
        ("DuckDB", ["nut", "2026-11-23", "fail", "7"]),
        ("Polars", ["nut", "fail", "7", "3.0"]),
        ("pandas", ["nut", "7.0"]),
    ],
)
def test_a_program_runs_as_it_is_printed(folder, program, shown):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", programs()[program]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "nut" in line)
    for word in shown:
        assert word in line
