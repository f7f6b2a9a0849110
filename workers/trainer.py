"""The trainer: takes jobs from the queue, trains outside the serving path, publishes and promotes."""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from models.calibration import few_scores
from models.cards import DetectorRecord, ModelCard
from models.detectors import make_detector
from models.errors import ModelError, TrainingDataError, TrainingStoppedError
from models.images import TrainingImage, list_images, read_training_images
from models.preprocess import fit_to_input, least_side
from models.registry import Registry
from models.settings import TrainingSettings
from models.teachers import Teacher, load_teacher
from models.training import train
from models.versions import draft_card
from producers.errors import UnreadableImage
from producers.frame import Picture, header_size
from workers.approvals import Approvals
from workers.errors import JobError, StreamUnavailable, WorkerError
from workers.jobs import Job, Jobs
from workers.pointers import CURRENT, Pointers

logger = logging.getLogger(__name__)

_REPORT_EVERY_S = 0.25
_RETRY_S = 1.0


@dataclass(frozen=True)
class TrainerStores:
    """What a trainer reads and writes."""

    jobs: Jobs
    registry: Registry
    approvals: Approvals
    pointers: Pointers


class Trainer:
    """Runs jobs one after another until stopped.

    Args:
        stores: queue, registry, approvals and pointers.
        settings_of: training settings of a product, as configured.
        teacher_weights: local weights file by teacher name.
    """

    def __init__(
        self,
        stores: TrainerStores,
        settings_of: Callable[[str], TrainingSettings],
        teacher_weights: Mapping[str, str],
    ) -> None:
        self._stores, self._settings_of, self._teacher_weights = stores, settings_of, dict(teacher_weights)

    def run(self, stop: threading.Event) -> None:
        """Take jobs until `stop` is set; what was left half done starts anew."""
        while not stop.is_set():
            try:
                # this trainer works on none here, so what counts as taken was cut short, by a crash or a lost server
                self._stores.jobs.requeue_interrupted()
                job = self._stores.jobs.take(wait_s=0.5)
                if job is not None:
                    self.work(job, stop)
            except JobError as error:
                logger.error("%s", error)
            except StreamUnavailable as error:
                logger.warning("cannot take jobs: %s", error)
                stop.wait(_RETRY_S)

    def work(self, job: Job, stop: threading.Event) -> Job:
        """Run one job and record how it ended; a job cut short by `stop` stays taken and starts anew later."""
        job.state, job.started_at = "running", datetime.now(UTC)
        self._stores.jobs.update(job)
        try:
            job.version = self._train(job, stop).version
            if job.promote:
                self._patiently(lambda: self._stores.pointers.promote(job.product, job.version), stop)
            job.state = "succeeded"
        except (TrainingStoppedError, StreamUnavailable):
            return job  # it stays among the running jobs, from where `run` takes it up again
        except (ModelError, WorkerError) as error:
            job.state, job.error = "failed", str(error)
        except Exception as error:  # the job's outer edge: the trainer lives on for the next job
            logger.exception("job %s failed", job.id)
            job.state, job.error = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        job.finished_at = datetime.now(UTC)
        self._patiently(lambda: self._stores.jobs.update(job), stop)
        return job

    def _patiently(self, record: Callable[[], None], stop: threading.Event) -> None:
        """Record how a training ended, however long the server is away: to train again would cost more."""
        while True:
            try:
                return record()
            except StreamUnavailable as error:
                logger.warning("cannot record a job: %s", error)
                if stop.wait(_RETRY_S):
                    raise

    def _report(self, job: Job) -> None:
        """Record a job's progress; a training goes on while nobody can be told."""
        try:
            self._stores.jobs.update(job)
        except StreamUnavailable as error:
            logger.warning("cannot report the progress of a job: %s", error)

    def _train(self, job: Job, stop: threading.Event) -> ModelCard:
        settings = self._job_settings(job)
        parent = self._parent(job.product)
        sources = job.images or (parent.training.sources if parent else [])
        images, records = self._images(job, sources, settings.input_size)
        teacher = load_teacher(settings.teacher, settings.weights)
        start_from = None if job.fresh or parent is None else self._start_from(parent, settings, teacher)
        reported_at = 0.0

        def progress(step: int, steps: int, loss: float) -> None:
            nonlocal reported_at
            now = time.monotonic()
            if step == steps or now - reported_at > _REPORT_EVERY_S:
                reported_at = now
                job.step, job.steps, job.loss = step, steps, loss
                self._report(job)

        trained = train(
            images, settings, start_from=start_from, teacher=teacher, progress=progress, should_stop=stop.is_set
        )
        warm = parent.version if parent and start_from is not None else None
        draft = draft_card(trained, job.product, records, sources, warm, job.creator or "unknown")
        card = self._stores.registry.publish(draft, trained.student)
        job.remark = few_scores(len(card.calibration_scores), card.false_reject_rate) or ""
        return card

    def _job_settings(self, job: Job) -> TrainingSettings:
        try:
            settings = self._settings_of(job.product).changed(job.overrides)
        except ValidationError as error:
            first = error.errors()[0]
            raise JobError(f"training setting {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        weights = settings.weights or self._teacher_weights.get(settings.teacher)
        return settings.model_copy(update={"weights": weights})

    def _parent(self, product: str) -> ModelCard | None:
        version = self._stores.pointers.of(product).get(CURRENT)
        return self._stores.registry.card(product, version) if version else None

    def _start_from(self, parent: ModelCard, settings: TrainingSettings, teacher: Teacher) -> dict | None:
        """The parent's student where the new one is built, taught and judged like it: a retraining then starts warm."""
        detector = DetectorRecord.of(make_detector(settings.detector, settings.detector_options))
        before = (parent.detector, parent.teacher.name, parent.teacher.weights_sha256, parent.input_size)
        if before != (detector, teacher.name, teacher.weights_sha256, settings.input_size):
            return None
        return self._stores.registry.load_student(parent.product, parent.version)[1]

    def _images(self, job: Job, sources: list[str], size: int) -> tuple[np.ndarray, list[TrainingImage]]:
        """All normal images (N, size, size, 3) uint8 RGB of the folders and the approvals, with their hashes."""
        paths = [path for folder in sources for path in list_images(Path(folder))]
        approvals = self._stores.approvals.of(job.product)
        if not paths and not approvals:
            raise TrainingDataError(
                f"{job.product} has neither images nor approvals to train on: give a folder with --images"
            )
        images, records = read_training_images(paths, size) if paths else (np.empty((0, size, size, 3), np.uint8), [])
        approved = np.empty((len(approvals), size, size, 3), np.uint8)
        for index, approval in enumerate(approvals):
            data = self._stores.approvals.image(approval)
            try:
                image = Picture("jpeg", (*header_size(data), 3), data).decode(at_least=least_side(size))
            except UnreadableImage as error:
                raise TrainingDataError(f"the approved image of {approval.frame_id} is unreadable: {error}") from None
            approved[index] = fit_to_input(image, size)
            records.append(TrainingImage(id=approval.frame_id, sha256=hashlib.sha256(data).hexdigest()))
        return np.concatenate([images, approved]), records
