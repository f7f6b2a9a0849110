"""`proctor demo`: the main job once, on real solar cells, with everything real.

Two cameras push labelled cells into Redis; replicas judge them by a version trained a moment before; a reviewer's
part is played by the labels: falsely rejected normal cells are approved, a new version learns them while frames
keep flowing, and takes over between two batches.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import redis
from rich.console import Console

from cluster.config import ProctorConfig, load_config
from cluster.connection import connect
from cluster.contact_sheet import Exhibit, draw_sheet
from cluster.demo_progress import DemoProgress
from cluster.demo_summary import DemoSummary
from cluster.errors import ProctorError
from cluster.launch import start_supervisor
from cluster.run_state import RunState
from cluster.solar_cells import LICENCE, Cell, CellSets, write_cells
from cluster.training import await_service
from models.metrics import image_auroc
from producers.camera import Camera
from producers.frame import Picture
from producers.publisher import Published, Publisher
from producers.sequence import Sequence
from producers.sources import FolderSource
from workers.approvals import Approvals
from workers.jobs import FINISHED, Job, Jobs
from workers.ledger import ProductLedger, read_ledger
from workers.reading import read_results

PRODUCT = "solar-cell"
HOME = Path(".proctor/demo")
CAMERAS = ("line-1", "line-2")
TRAIN_CELLS = 120
RETRAIN_STEPS = 200  # it starts from the first version's student
FPS = 15.0
_CONFIG = """\
# Written by `proctor demo`.
[http]
port = 0 # a free one

[training]
detector = "stfpm" # a network learns from approved cells; a memory would mainly let those very cells pass
detector_options = { width = 0.5, hardest = 0.03 }
false_reject_rate = 0.1 # strict, so that a reviewer finds something to approve

[worker]
compile = false # pays after a minute, when the demo is over

[worker.evidence]
pass_share = 1.0 # keep every image: the contact sheet shows what was missed, too
"""
_LOOK_S = 0.1
_PATIENCE_S = 120.0
_EXHIBITS = 12


@dataclass
class _Line:
    """The cameras, and what they showed.

    Attributes:
        shown: cell of each frame by its id.
    """

    server: redis.Redis
    config: ProctorConfig
    cells: list[Cell]
    shown: dict[str, Cell] = field(default_factory=dict)

    def __post_init__(self) -> None:
        publisher = Publisher(self.server, self.config.publish)
        self._publisher = publisher
        self._sequences = {name: Sequence(after=publisher.last_seq(PRODUCT, name)) for name in CAMERAS}
        self._failures: list[BaseException] = []

    @contextlib.contextmanager
    def running(self, fps: float | None, *, loop: bool) -> Iterator[list[threading.Thread]]:
        """Both cameras in threads of their own, each with its half of the cells; stopped on leaving."""
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._shoot, args=(name, number, fps, loop, stop), name=name)
            for number, name in enumerate(CAMERAS)
        ]
        for thread in threads:
            thread.start()
        try:
            yield threads
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        if self._failures:
            raise self._failures[0]

    def _shoot(self, name: str, number: int, fps: float | None, loop: bool, stop: threading.Event) -> None:
        cells = self.cells[number :: len(CAMERAS)]
        try:
            source = _CellSource(cells, FolderSource(cells[0].path.parent, self.config.publish))
            for position, frame in enumerate(
                Camera(PRODUCT, name, source, fps, loop).frames(self._sequences[name], stop)
            ):
                self.shown[frame.frame_id] = cells[position % len(cells)]
                if self._publisher.publish(frame, stop) is Published.SHED:
                    return
        except Exception as error:  # the thread's outer edge: raised again in `running`
            self._failures.append(error)

    def account(self) -> ProductLedger:
        """The product's ledger."""
        return next(each for each in read_ledger(self.server) if each.product == PRODUCT)


class _CellSource:
    """Some cells of a folder, in the order they come before the camera."""

    def __init__(self, cells: list[Cell], folder: FolderSource) -> None:
        self._cells, self._folder = cells, folder

    def __len__(self) -> int:
        return len(self._cells)

    def __iter__(self) -> Iterator[Picture]:
        return (self._folder.read(cell.path) for cell in self._cells)


def run_demo(frames: int, keep: bool, console: Console) -> DemoSummary:
    """Run the demo in `.proctor/demo`.

    Args:
        frames: about as many are pushed, beside those that flow while the second version is trained.
        keep: leave the application running.
        console: for the progress.

    Raises:
        ProctorError: something a user can put right, or a phase that did not come to its end.
    """
    if RunState.find(HOME) is not None:
        raise ProctorError(f"the demo still runs: `proctor --home {HOME} down` ends it")
    shutil.rmtree(HOME, ignore_errors=True)
    console.print(f"[dim]{LICENCE}[/]")
    with DemoProgress(console) as show, contextlib.ExitStack() as stack:
        show.phase("reading the solar cells")
        config = _configure(HOME / "proctor.toml")
        cells = write_cells(config.home / "cells", TRAIN_CELLS, frames // 3)
        show.phase("starting Valkey, Ray, replicas and trainer")
        supervisor = start_supervisor(config, HOME / "proctor.toml", linked=not keep, say=lambda step: None)
        if keep:
            stack.push(lambda kind, *_: supervisor.stop(lambda step: None) if kind else None)
        else:
            stack.callback(supervisor.stop, lambda step: None)
        server = connect(supervisor.state.redis_url)
        show.watch(server)
        stack.callback(show.watch, None)
        summary = _Demo(config, _Line(server, config, cells.line), cells, show).run()
    if keep:
        kept = f"{supervisor.state.http_url}; `proctor --home {HOME} status` watches, `... down` ends it"
        return DemoSummary(**{**summary.as_dict(), "kept": kept})
    return summary


def _configure(file: Path) -> ProctorConfig:
    """Write the demo's configuration and read it as everybody else does."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_CONFIG)
    except OSError as error:
        raise ProctorError(f"cannot write to {file.parent} ({error.strerror}): run the demo somewhere else") from None
    return load_config(file, HOME)


class _Demo:
    """The demo's phases."""

    def __init__(self, config: ProctorConfig, line: _Line, cells: CellSets, show: DemoProgress) -> None:
        self._config, self._line, self._cells, self._show = config, line, cells, show
        self._jobs = Jobs(line.server)

    def run(self) -> DemoSummary:
        """All phases; each begins where the one before has come to its end."""
        show, line = self._show, self._line
        show.phase(f"training a first version on {TRAIN_CELLS} normal cells")
        first = self._train("demo", images=[str(self._cells.train_folder)])
        if not await_service(line.server, PRODUCT, first.version):
            raise ProctorError(f"no replica took version {first.version} over: `proctor doctor` looks for the cause")
        show.phase(f"inspecting {len(line.cells)} cells by version {first.version}")
        self._one_pass(FPS)
        show.phase("reviewing what was rejected")
        approved = self._approve()
        show.phase(f"retraining with {approved} approved cells while frames keep flowing")
        with line.running(FPS, loop=True):
            second = self._train("demo reviewer", overrides={"steps": RETRAIN_STEPS})
            self._await_version(second.version)
        show.phase(f"inspecting the same cells by version {second.version}")
        self._one_pass(FPS)
        paced = set(line.shown)
        show.phase("inspecting flat out")
        started = time.monotonic()
        self._one_pass(None)
        frames_per_s = (len(line.shown) - len(paced)) / (time.monotonic() - started)
        show.phase("summing up")
        return self._summary((first, second), approved, paced, frames_per_s)

    def _train(self, creator: str, images: Iterable[str] = (), overrides: dict[str, Any] | None = None) -> Job:
        job = Job(product=PRODUCT, images=list(images), overrides=overrides or {}, creator=creator)
        self._jobs.submit(job)
        while job.state not in FINISHED:
            time.sleep(_LOOK_S)
            job = self._jobs.get(job.id)
        if job.state == "failed":
            raise ProctorError(f"training failed: {job.error}")
        return job

    def _one_pass(self, fps: float | None) -> None:
        """Show every cell once and wait until each has its row."""
        with self._line.running(fps, loop=False) as threads:
            for thread in threads:
                thread.join()
        self._await("every frame to be judged", lambda: all(not c.in_flight for c in self._line.account().cameras))

    def _await_version(self, version: str) -> None:
        self._await(
            f"version {version} to take over",
            lambda: all(camera.model_version == version for camera in self._line.account().cameras),
        )

    def _await(self, what: str, done: Any) -> None:
        give_up_at = time.monotonic() + _PATIENCE_S
        while not done():
            if time.monotonic() > give_up_at:
                log = self._config.home / "logs"
                raise ProctorError(f"waited {_PATIENCE_S:.0f} s for {what}: `proctor doctor` and {log} tell more")
            time.sleep(_LOOK_S)

    def _approve(self) -> int:
        """Approve the falsely rejected cells of those for review: what an operator does at the console."""
        rows = self._rows(("frame_id", "verdict"))
        wrong = [
            row["frame_id"]
            for row in rows.to_pylist()
            if row["verdict"] == "fail" and self._is(row["frame_id"], is_reviewed=True)
        ]
        if wrong:
            Approvals(self._config.datasets.uri, self._config.results.uri).approve(wrong, "normal", "demo reviewer")
        return len(wrong)

    def _is(self, frame_id: str, *, is_reviewed: bool) -> bool:
        cell = self._line.shown[frame_id]
        return cell.is_reviewed is is_reviewed and not (is_reviewed and cell.is_defect)

    def _rows(self, columns: tuple[str, ...]) -> pa.Table:
        return read_results(self._config.results.uri, product=PRODUCT, columns=columns)

    def _summary(self, jobs: tuple[Job, Job], approved: int, paced: set[str], frames_per_s: float) -> DemoSummary:
        table = self._rows(("frame_id", "camera", "verdict", "score", "threshold", "model_version", "total_ms"))
        rows = table.to_pylist()
        account = self._line.account()
        before, after = (self._accuracy(rows, job.version) for job in jobs)
        latency = np.array([row["total_ms"] for row in rows if row["frame_id"] in paced])
        versions: dict[str, int] = {}
        for row in rows:
            versions[row["model_version"]] = versions.get(row["model_version"], 0) + 1
        return DemoSummary(
            **{
                name: sum(getattr(camera, name) for camera in account.cameras)
                for name in ("captured", "judged", "shed", "dead", "in_flight")
            },
            balanced=account.balanced,
            frames_per_s=round(frames_per_s, 1),
            latency_ms={name: round(float(np.percentile(latency, p)), 1) for name, p in (("p50", 50), ("p99", 99))},
            auroc_before=before[0],
            auroc_after=after[0],
            false_rejects_before=before[1],
            false_rejects_after=after[1],
            detected_before=before[2],
            detected_after=after[2],
            approved=approved,
            versions=versions,
            rows=table.num_rows,
            training_s=[
                round((job.finished_at - job.started_at).total_seconds(), 1)
                for job in jobs
                if job.finished_at and job.started_at
            ],
            seconds=round(time.monotonic() - self._show.started, 1),
            contact_sheet=str(self._contact_sheet(rows, jobs[1].version)),
        )

    def _accuracy(self, rows: list[dict], version: str) -> tuple[float, float, float]:
        """Image AUROC, false rejects and detected defects of a version, over the cells that nobody reviews."""
        measured: dict[str, tuple[float, bool, bool]] = {}
        for row in rows:
            cell = self._line.shown[row["frame_id"]]
            if row["model_version"] == version and not cell.is_reviewed:
                measured[cell.name] = (row["score"], cell.is_defect, row["verdict"] == "fail")
        scores = np.array([score for score, _, _ in measured.values()])
        labels = np.array([is_defect for _, is_defect, _ in measured.values()])
        fails = np.array([fail for _, _, fail in measured.values()])
        auroc = image_auroc(scores, labels)
        if auroc is None:
            raise ProctorError(f"version {version} judged no defective or no normal cell")
        return round(auroc, 4), round(float(fails[~labels].mean()), 4), round(float(fails[labels].mean()), 4)

    def _contact_sheet(self, rows: list[dict], version: str) -> Path:
        path = self._config.home / "contact_sheet.png"
        chosen = _choose(rows, self._line.shown, version)
        kept = read_results(self._config.results.uri, frame_ids=[row["frame_id"] for row, _ in chosen]).to_pylist()
        full = {row["frame_id"]: row for row in kept}
        exhibits = [
            Exhibit(full[row["frame_id"]], remark) for row, remark in chosen if full[row["frame_id"]]["image_jpeg"]
        ]
        subtitle = f"version {version}; each: image | anomaly map | verdict.  {LICENCE}"
        draw_sheet(exhibits, "Solar cells, inspected by Proctor", subtitle, path)
        return path


def _choose(rows: list[dict], shown: dict[str, Cell], version: str) -> list[tuple[dict, str]]:
    """Frames for the sheet, one of each cell: defects found, from clear to faint, misses, false rejects, passes."""
    latest = {shown[row["frame_id"]].name: row for row in rows if row["model_version"] == version}
    groups: dict[tuple[bool, str], list[dict]] = {}
    for row in sorted(latest.values(), key=lambda row: row["score"], reverse=True):
        groups.setdefault((shown[row["frame_id"]].is_defect, row["verdict"]), []).append(row)
    wanted = (
        ((True, "fail"), 6, "defective: found"),
        ((True, "pass"), 2, "defective: missed"),
        ((False, "fail"), 2, "normal: falsely rejected"),
        ((False, "pass"), 5, "normal: passed"),
    )
    chosen = [(row, remark) for group, most, remark in wanted for row in _spread(groups.get(group, []), most)]
    return chosen[:_EXHIBITS]


def _spread(rows: list[dict], most: int) -> list[dict]:
    """At most so many rows, evenly from the first to the last."""
    return [rows[index] for index in sorted({round(i) for i in np.linspace(0, len(rows) - 1, min(most, len(rows)))})]
