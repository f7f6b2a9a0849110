"""The fault runner itself, small: real processes, one fault of each kind, and nothing lost or doubled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(280)
def test_no_kind_of_fault_loses_or_doubles_a_frame(tmp_path):
    document = tmp_path / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--frames", "1200", "--faults", "10", "--seed", "7"]
    done = subprocess.run([*command, "--json", str(document)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(document.read_text())
    names = ("captured", "judged", "shed", "dead", "in_flight", "lost", "doubled", "balanced")
    malformed = found["runs"][0]["malformed"]
    expected = (1200 + malformed, 1200, 0, malformed, 0, 0, 0, True)
    assert tuple(found[name] for name in names) == expected
    assert len({fault["kind"] for fault in found["runs"][0]["faults"]}) >= 9
