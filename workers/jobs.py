"""Training jobs: a queue and a record of each in Redis."""

import secrets
import time
from datetime import UTC, datetime
from typing import Any, Literal

import redis
from pydantic import BaseModel, Field, ValidationError

from producers.redis_errors import REDIS_ERRORS, trouble
from workers.errors import JobError, StreamUnavailable

# one slot of a cluster: a job moves between them in one step
_QUEUE, _RUNNING, _ALL = "proctor:{jobs}:queue", "proctor:{jobs}:running", "proctor:{jobs}:all"
State = Literal["queued", "running", "succeeded", "failed"]
FINISHED: tuple[State, ...] = ("succeeded", "failed")


class Job(BaseModel):
    """A training job.

    Attributes:
        id: its name.
        product: whose student is trained.
        images: folders of normal images; empty takes those of the version in service.
        overrides: training settings that differ from the configuration.
        fresh: start from random weights instead of the version in service.
        promote: put the version into service when it is done.
        creator: who asked.
        state: queued, running, succeeded or failed.
        step: steps done.
        steps: steps in all.
        loss: loss of the last step reported.
        version: the version made.
        error: why it failed, one line.
        remark: what to know of the version, one line.
    """

    id: str = Field(default_factory=lambda: f"{datetime.now(UTC):%H%M%S}-{secrets.token_hex(3)}")
    product: str
    images: list[str] = []
    overrides: dict[str, Any] = {}
    fresh: bool = False
    promote: bool = True
    creator: str = ""
    state: State = "queued"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    version: str = ""
    error: str = ""
    remark: str = ""
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    started_at: datetime | None = None
    finished_at: datetime | None = None


class Jobs:
    """The queue and the records, for any number of askers and one trainer.

    A job taken by a trainer that dies is queued again when the next one starts.
    """

    def __init__(self, server: redis.Redis) -> None:
        self._server = server

    def submit(self, job: Job) -> Job:
        """Queue a job."""
        try:
            pipeline = self._server.pipeline(transaction=True)
            pipeline.set(_record(job.id), job.model_dump_json())
            pipeline.zadd(_ALL, {job.id: time.time()})
            pipeline.lpush(_QUEUE, job.id)
            pipeline.execute()
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        return job

    def take(self, wait_s: float) -> Job | None:
        """The next job, None if none came within `wait_s`.

        Raises:
            JobError: its record is gone or not readable; it is not taken again.
        """
        try:
            taken: Any = self._server.blmove(_QUEUE, _RUNNING, wait_s, "RIGHT", "LEFT")  # type: ignore[arg-type]
            if taken is None:
                return None
            try:
                return self.get(taken.decode())
            except JobError:
                self._server.lrem(_RUNNING, 0, taken)
                raise
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error

    def update(self, job: Job) -> None:
        """Record a job's progress; a finished one leaves the running list."""
        try:
            pipeline = self._server.pipeline(transaction=True)
            pipeline.set(_record(job.id), job.model_dump_json())
            if job.state in FINISHED:
                pipeline.lrem(_RUNNING, 0, job.id)
            pipeline.execute()
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error

    def requeue_interrupted(self) -> int:
        """Queue again what a dead trainer had taken; returns how many."""
        moved = 0
        try:
            while self._server.lmove(_RUNNING, _QUEUE, "LEFT", "RIGHT") is not None:
                moved += 1
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        return moved

    def get(self, job_id: str) -> Job:
        """A job by its id.

        Raises:
            JobError: there is none, or its record is not readable.
        """
        try:
            record: Any = self._server.get(_record(job_id))
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        if record is None:
            raise JobError(f"no job {job_id}; `proctor jobs` lists them")
        try:
            return Job.model_validate_json(record)
        except ValidationError:
            raise JobError(f"the record of job {job_id} is not readable") from None

    def all(self) -> list[Job]:
        """All jobs, newest first."""
        try:
            ids: Any = self._server.zrevrange(_ALL, 0, -1)
        except REDIS_ERRORS as error:
            raise StreamUnavailable(trouble(error)) from error
        return [self.get(job_id.decode()) for job_id in ids]


def _record(job_id: str) -> str:
    """Key of a job's record."""
    return f"proctor:{{jobs}}:job:{job_id}"
