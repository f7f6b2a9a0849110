"""The programs that measure, as a user runs them: their documents hold together. No figure is looked at."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks.peer_speed import Peer, comparison, peer_settings
from benchmarks.pictures import textures
from benchmarks.precision import compare
from benchmarks.timing import in_threads

ROOT = Path(__file__).resolve().parents[1]
PNG = b"\x89PNG"
OURS = {"pair": 120.0, "default": 300.0}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", *command]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def document(*command: str) -> dict:
    done = run(*command)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_ratio(figures: dict, name: str, part: str, whole: str) -> None:
    assert figures[name] == pytest.approx(figures[part] / figures[whole], abs=1e-4)


def test_engine(tmp_path):
    picture = tmp_path / "engine.png"
    found = document("cluster.cli", "bench", "engine", "--json", "--quick", "--plot", str(picture))
    assert {"device", "batch", "products", "single_fps", "mixed_fps", "peer_fps", "batch_1_ms"} <= found.keys()
    assert {"zipf_fps", "fp32_eager_fps", "hot_swap_ms", "rows", "machine"} <= found.keys()
    check_ratio(found, "mixed_to_single", "mixed_fps", "single_fps")
    check_ratio(found, "mixed_to_peer", "mixed_fps", "peer_fps")
    check_ratio(found, "single_to_fp32_eager", "single_fps", "fp32_eager_fps")
    assert found["hot_swap_ms"]["longest_batch"] >= found["hot_swap_ms"]["batch"]
    assert {row["teacher"] for row in found["rows"]} == {"resnet18", "efficientnet_lite0"}
    for row in found["rows"]:
        assert row["fps_p10"] <= row["fps"] <= row["fps_p90"]
        assert row["tflops"] == pytest.approx(row["fps"] * row["gflop_per_frame"] / 1e3, abs=1e-4)
        assert row["of_peak"] == pytest.approx(row["tflops"] / found["peak"]["tflops"], rel=0.01, abs=1e-3)
    assert picture.read_bytes().startswith(PNG)


def test_stream(tmp_path):
    to = tmp_path / "stream.json"
    found = document("benchmarks.stream", "--quick", "--json", str(to))
    assert found == json.loads(to.read_text())
    assert [row["input"] for row in found["rows"]] == ["jpeg 256", "jpeg 1024", "raw 256"]
    for row in found["rows"]:
        check_ratio(row, "to_plain", "fps", "plain_fps")
        assert row["latency_ms_at_half_load"]["p50"] <= row["latency_ms_at_half_load"]["p99"]
    assert found["fps"] == found["rows"][0]["fps"]


def test_pipeline(tmp_path):
    picture = tmp_path / "pipeline.png"
    found = document("benchmarks.pipeline", "--quick", "--plot", str(picture))
    assert {"loop_fps", "slowest_stage", "latency_ms_at_half_load", "latency_bound_ms", "machine"} <= found.keys()
    for figures in (found, *found["rows"]):
        check_ratio(figures, "loop_to_slowest", "loop_fps", "slowest_fps")
    for row in found["rows"]:
        assert row["stages_fps"].keys() == {"publish", "read", "decode", "engine", "record"}
        assert row["slowest_fps"] == min(row["stages_fps"].values()) == row["stages_fps"][row["slowest_stage"]]
        assert row["cpu_ms_per_frame"].keys() == row["stages_fps"].keys()
        assert min(row["cpu_ms_per_frame"].values()) > 0
        check_ratio(row | {"bound": min(row["cores_fps"], row["slowest_fps"])}, "loop_to_bound", "loop_fps", "bound")
        assert row["latency_bound_ms"] == pytest.approx(2 * row["batch_ms"] + 5, abs=0.02)
    assert picture.read_bytes().startswith(PNG)


def test_the_pipeline_with_another_network():
    found = document("cluster.cli", "bench", "pipeline", "--quick", "--json", "--network", "pair")
    assert found["network"] == "stfpm, resnet18, 256 x 256"


def test_an_interrupt_ends_a_program_and_its_cameras_at_once():
    words = [sys.executable, "-m", "cluster.cli", "bench", "stream", "--frames", "100000"]
    started = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert "jpeg 256: 3 rounds" in started.stderr.readline()
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does, so the cameras get it too
    _, said = started.communicate(timeout=60)
    assert (started.returncode, said.splitlines()) == (130, ["proctor: interrupted"])
    with pytest.raises(ProcessLookupError):
        os.killpg(started.pid, 0)


def test_calls_side_by_side_are_as_many_as_asked_for_and_their_errors_are_raised():
    both, calls = threading.Barrier(2), []

    def call() -> None:
        both.wait(timeout=60)  # two are under way, or it never ends
        calls.append(threading.get_ident())

    in_threads(call, callers=2, each=3)()
    assert (len(calls), len(set(calls))) == (6, 2)
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda: 1 / 0, callers=2, each=1)()


@pytest.mark.parametrize("option", ["--frames", "--threads"])
def test_a_number_that_measures_nothing_is_refused_by_one_line(option):
    done = run("benchmarks.pipeline", option, "0")
    assert done.returncode == 2
    assert f"argument {option}: 0: expected a whole number of at least" in done.stderr.splitlines()[-1]


def test_a_document_that_cannot_be_written_is_not_lost(tmp_path):
    done = run("benchmarks.stream", "--quick", "--json", str(tmp_path))
    assert done.returncode == 1
    assert json.loads(done.stdout)["rows"]
    assert done.stderr.splitlines()[-1] == f"cannot write {tmp_path}: Is a directory"


def test_precision(tmp_path):
    for number, image in enumerate(textures(24, 64)):
        kind = ("train/good", "test/good", "test/scratch")[number % 3]
        folder = tmp_path / "set" / kind
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number}.png"), 255 - image if kind.endswith("scratch") else image)
    found = document("benchmarks.precision", "--data", str(tmp_path / "set"), "--quick")
    (each,) = found["sets"]
    assert (found["frames"], found["steps"], each["set"]) == (16, 2, "set")
    assert each["auroc_points"] == pytest.approx(each["image_auroc"] - each["image_auroc_float32"], abs=1e-3)
    assert each["flip_share"] == pytest.approx(each["flips"] / each["frames"], abs=1e-6)
    accepted = abs(found["auroc_points"]) <= 0.1 and found["flips_away_share"] <= 0.001
    assert found["is_accepted"] == accepted


def test_weights_that_are_not_there_are_one_line():
    done = run("cluster.cli", "bench", "engine", "--quick", "--weights", "nowhere.safetensors")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "teacher weights nowhere.safetensors: no such file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("to", "says"), [("a.bmp", "ends in .png"), ("nowhere/a.png", "no such folder"), ("{here}/a.png", "a folder")]
)
def test_a_picture_that_cannot_be_drawn_is_said_before_the_measuring(to, says, tmp_path):
    (tmp_path / "a.png").mkdir()
    done = run("cluster.cli", "bench", "pipeline", "--plot", to.format(here=tmp_path))
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_flip_counts_as_away_only_beyond_two_percent_of_the_threshold():
    exact = np.array([0.5, 0.99, 1.03, 1.5])
    fast = np.array([0.5, 1.03, 0.97, 1.5])
    found = compare(exact, fast, np.array([False, False, True, True]), threshold=1.0)
    assert (found["flips"], found["flips_away"], found["frames_away"]) == (2, 1, 3)
    assert (found["image_auroc_float32"], found["image_auroc"]) == (100.0, 75.0)
    assert found["auroc_points"] == -25.0


# Answers as `benchmarks.anomalib_speed` does: a batch of 8 is twice as fast as one of 1.
ANOMALIB = """#!{python}
import json, sys
print(json.dumps({{"anomalib": "0"}}), flush=True)
for line in sys.stdin:
    batch = json.loads(line)["setting"]["batch"]
    print(json.dumps({{"fps": 50.0 if batch == 1 else 100.0, "dtype": "f32"}}), flush=True)
"""


def test_the_peer_is_asked_for_every_setting_and_its_best_one_counts(tmp_path):
    python = tmp_path / "python"
    python.write_text(ANOMALIB.format(python=sys.executable))
    python.chmod(0o755)
    settings = peer_settings()
    with Peer(python, tmp_path / "weights", 2) as peer:
        assert peer.versions == {"anomalib": "0"}
        rows = [setting | peer.measure(setting, 0.1) for setting in settings]
    openvino = {(each["precision"], each["mode"], each["batch"]) for each in settings if each["runtime"] == "openvino"}
    assert len(openvino) == 3 * 2 * 2
    ours = {"runtime": "engine", "batch": 8}
    rows += [ours | {"network": name, "dtype": "bfloat16", "fps": fps} for name, fps in OURS.items()]
    rows += [ours | {"network": "pair", "dtype": "float32", "fps": 90.0}]
    found = comparison(rows)
    assert found["best_openvino_fps"] == 100.0
    assert (found["same_network_to_best_openvino"], found["default_to_best_openvino"]) == (1.2, 3.0)
    assert found["float32"] == {"openvino_fps": 100.0, "same_network_fps": 90.0, "same_network_to_openvino": 0.9}
