"""The main job as a stranger meets it: `proctor demo --json`, everything real, on real solar cells."""

import json
import subprocess
import sys

import psutil
import pytest
from PIL import Image

pytest.importorskip("elpv_dataset", reason="needs the demo's images: pip install 'proctor[demo]'")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "cluster.cli", "demo", "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_ledger_balances_and_every_frame_has_one_row(demo):
    _, summary = demo
    assert summary["captured"] == summary["judged"] + summary["shed"] + summary["dead"] + summary["in_flight"]
    assert summary["captured"] > 900
    assert (summary["shed"], summary["dead"], summary["in_flight"]) == (0, 0, 0)
    assert summary["rows"] == summary["judged"]


def test_two_versions_judged_and_the_second_is_no_worse(demo):
    _, summary = demo
    assert len(summary["versions"]) == 2
    assert sum(summary["versions"].values()) == summary["judged"]
    assert summary["auroc_before"] >= 0.90
    assert summary["auroc_after"] >= summary["auroc_before"]
    assert summary["approved"] > 0


def test_contact_sheet_is_a_picture(demo):
    _, summary = demo
    with Image.open(summary["contact_sheet"]) as sheet:
        assert sheet.format == "PNG"
        assert min(sheet.size) > 500


def test_nothing_keeps_running(demo):
    folder, _ = demo
    left = [process for process in psutil.process_iter(["cwd"]) if str(folder) in (process.info["cwd"] or "")]
    assert not left
    assert not (folder / ".proctor" / "demo" / "run.json").exists()
