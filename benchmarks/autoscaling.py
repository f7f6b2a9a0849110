"""A flood against one replica: when more are wanted, when they run, and when they are gone again.

    python -m benchmarks.autoscaling --json benchmarks/results/autoscaling.json --picture docs/pictures/autoscaling.svg

Starts a whole application with one to three replicas in a folder of its own and pushes a flood of frames at once.
The version is an untrained student at a large input, since only its slowness matters here. What is lost and what is
judged twice is counted by the ids of the rows and the number of the verdicts.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import redis

from benchmarks.machine import describe_machine
from cluster.config import ProctorConfig, load_config
from cluster.decision import read_decision
from cluster.launch import start_supervisor
from models.cards import DetectorRecord, ModelDraft, TeacherRecord, TrainingRecord
from models.detectors import make_detector
from models.registry import Registry
from models.settings import TrainingSettings
from models.teachers import load_teacher
from producers import keys
from producers.frame import Frame, Picture
from producers.publisher import Publisher
from producers.sequence import Sequence
from workers.backlog import read_backlog
from workers.ledger import read_ledger
from workers.pointers import Pointers
from workers.reading import read_results
from workers.reports import read_replicas

_PRODUCT, _INPUT_SIZE = "flood", 512
_LOOK_S, _PATIENCE_S = 0.1, 300.0
_CONFIG = """\
[http]
port = 0
[publish]
max_in_flight = 100000
[serve]
min_replicas = 1
max_replicas = 3
target_drain_s = 10
scale_up_delay_s = 2
scale_down_delay_s = 10
scale_down_idle_s = 10
"""


@dataclass(frozen=True)
class Moment:
    """What was seen at one time.

    Attributes:
        at_s: seconds since the flood began.
        lag: frames that are not settled.
        wanted: replicas that the policy wants.
        running: replicas that report themselves.
    """

    at_s: float
    lag: int
    wanted: int
    running: int


def main() -> None:
    """Measure, write the document, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=2000, help="frames of the flood")
    parser.add_argument("--json", type=Path, help="where the document goes; else standard output")
    parser.add_argument("--picture", type=Path, help="where the picture of lag and replicas goes, an SVG file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = _measure(Path(folder), options.frames)
    text = json.dumps(document, indent=2) + "\n"
    if options.json:
        options.json.write_text(text)
    print(json.dumps({key: value for key, value in document.items() if key != "timeline"}, indent=2))
    if options.picture:
        _draw(document["timeline"], document["seconds"], options.picture)


def _measure(folder: Path, frames: int) -> dict[str, Any]:
    file = folder / "proctor.toml"
    file.write_text(_CONFIG)
    config = load_config(file, folder / "state")
    supervisor = start_supervisor(config, file, linked=True, say=lambda step: None)
    try:
        server = redis.Redis.from_url(supervisor.state.redis_url)
        registry = Registry(config.registry.uri)
        Pointers(server, registry).promote(_PRODUCT, _publish_version(registry))
        _wait("a decision", lambda: read_decision(server) is not None)
        _wait("the version", lambda: any(_PRODUCT in replica["versions"] for replica in read_replicas(server)))
        return _flood(server, config, frames)
    finally:
        supervisor.stop(lambda step: None)


def _publish_version(registry: Registry) -> str:
    teacher = load_teacher("efficientnet_lite0")
    detector = make_detector("stfpm", {"width": 0.5})
    draft = ModelDraft(
        product=_PRODUCT,
        detector=DetectorRecord.of(detector),
        teacher=TeacherRecord(name=teacher.name, weights_sha256=teacher.weights_sha256),
        input_size=_INPUT_SIZE,
        threshold=1e9,
        false_reject_rate=0.01,
        calibration_scores=[0.5],
        training=TrainingRecord(images=[], settings=TrainingSettings(), seconds=0.0, steps=1),
    )
    return registry.publish(draft, detector.build_student(teacher).state_dict()).version


def _flood(server: redis.Redis, config: ProctorConfig, frames: int) -> dict[str, Any]:
    publisher, sequence = Publisher(server, config.publish), Sequence()
    coarse = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    picture = Picture.encode(np.kron(coarse, np.ones((8, 8, 1), np.uint8)))
    busy_cores = psutil.cpu_percent(interval=2.0) / 100 * (psutil.cpu_count() or 1)
    started = time.monotonic()
    pushed = [Frame(_PRODUCT, "cam", sequence.next(), time.time_ns(), picture) for _ in range(frames)]
    for frame in pushed:
        publisher.publish(frame)
    timeline: list[Moment] = []

    def until(holds: Callable[[Moment], bool]) -> float:
        """Look until it holds; return when that was, seconds since the flood began."""
        while True:
            timeline.append(_look(server, started))
            if holds(timeline[-1]):
                return round(timeline[-1].at_s, 1)
            if timeline[-1].at_s > _PATIENCE_S:
                raise RuntimeError(f"not within {_PATIENCE_S:g} s; last seen: {timeline[-1]}")
            time.sleep(_LOOK_S)

    pushed_s = round(time.monotonic() - started, 1)
    seconds = {
        "flood_pushed": pushed_s,
        "first_wanted_3": until(lambda seen: seen.wanted == 3),
        "running_3": until(lambda seen: seen.running == 3),
        "backlog_gone": until(lambda seen: seen.lag == 0),
        "wanted_1": until(lambda seen: seen.wanted == 1),
        "running_1": until(lambda seen: seen.running == 1),
    }
    until(lambda seen: seen.at_s > seconds["running_1"] + 5)  # for the picture
    rows = read_results(config.results.uri, columns=("frame_id", "replica")).to_pydict()
    lost = {frame.frame_id for frame in pushed} - set(rows["frame_id"])
    return {
        "benchmark": "autoscaling",
        "machine": describe_machine(),
        "busy_cores_before": round(busy_cores, 2),  # by all programs, this application idle among them
        "settings": config.serve.model_dump(mode="json"),
        "version": f"untrained stfpm, width 0.5, efficientnet_lite0, input {_INPUT_SIZE}",
        "frames": frames,
        "seconds": seconds,
        "judged_by_replica": {name: rows["replica"].count(name) for name in sorted(set(rows["replica"]))},
        "lost": len(lost),
        "doubled": int(server.xlen(keys.verdicts(_PRODUCT))) - len(rows["frame_id"]),
        "balanced": all(product.balanced for product in read_ledger(server)),
        "timeline": [asdict(moment) for moment in _thinned(timeline)],
    }


def _thinned(timeline: list[Moment]) -> list[Moment]:
    """One moment a second, and every one with another number of replicas."""
    kept = timeline[:1]
    for moment in timeline[1:]:
        changed = (moment.wanted, moment.running) != (kept[-1].wanted, kept[-1].running)
        if changed or moment.at_s - kept[-1].at_s >= 1.0 or moment is timeline[-1]:
            kept.append(moment)
    return kept


def _look(server: redis.Redis, started: float) -> Moment:
    decision = read_decision(server)
    running = len(read_replicas(server))
    lag = read_backlog(server).lag
    return Moment(round(time.monotonic() - started, 2), lag, decision.wanted if decision else 0, running)


def _wait(what: str, holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + _PATIENCE_S
    while not holds():
        if time.monotonic() > give_up_at:
            raise RuntimeError(f"{what} did not come within {_PATIENCE_S:g} s")
        time.sleep(_LOOK_S)


def _draw(timeline: list[dict[str, Any]], seconds: dict[str, float], picture: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "proctor"
    from matplotlib import pyplot

    at_s = [moment["at_s"] for moment in timeline]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 4.5), height_ratios=(3, 2))
    above.fill_between(at_s, [moment["lag"] for moment in timeline], color="#4c78a8", alpha=0.35, linewidth=0)
    above.plot(at_s, [moment["lag"] for moment in timeline], color="#4c78a8")
    above.set_ylabel("frames not settled")
    above.set_ylim(bottom=0)
    below.step(at_s, [moment["wanted"] for moment in timeline], where="post", color="#9d9d9d", label="wanted", ls="--")
    below.step(at_s, [moment["running"] for moment in timeline], where="post", color="#e45756", label="running")
    below.set_ylabel("replicas")
    below.set_xlabel("seconds since the flood began")
    below.set_yticks([0, 1, 2, 3])
    below.set_ylim(0, 3.4)
    below.legend(frameon=False, loc="lower center", ncols=2)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(seconds["backlog_gone"], color="#bbbbbb", linewidth=0.8, linestyle=":")
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
