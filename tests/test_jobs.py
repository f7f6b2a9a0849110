"""The queue of training jobs on a real server."""

import re
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from workers.errors import JobError, StreamUnavailable
from workers.jobs import FINISHED, Job, Jobs


@pytest.fixture
def jobs(server):
    return Jobs(server)


def test_a_job_is_what_was_asked_for(jobs):
    asked = Job(product="bolt", images=["/a", "/b"], overrides={"steps": 20}, promote=False, creator="ann", steps=20)
    jobs.submit(asked)
    assert jobs.get(asked.id) == asked
    assert (asked.state, asked.step, asked.loss, asked.version, asked.error) == ("queued", 0, None, "", "")
    assert re.fullmatch(r"\d{6}-[0-9a-f]{6}", asked.id)
    assert (datetime.now(UTC) - asked.created_at).total_seconds() < 60


def test_jobs_are_taken_in_the_order_they_were_asked_for_and_once(jobs):
    asked = [jobs.submit(Job(product="bolt")) for _ in range(3)]
    assert [jobs.take(0.01).id for _ in range(3)] == [job.id for job in asked]
    assert jobs.take(0.01) is None


def test_taking_waits_for_a_job(jobs):
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(jobs.take, 4.0)
        asked = jobs.submit(Job(product="bolt"))
        assert taking.result(timeout=60) == asked


def test_progress_is_there_for_everybody(jobs):
    job = jobs.submit(Job(product="bolt"))
    job.state, job.step, job.steps, job.loss = "running", 10, 400, 0.125
    jobs.update(job)
    assert jobs.get(job.id) == job


def test_all_jobs_are_listed_newest_first(jobs):
    asked = [jobs.submit(Job(product=name)) for name in ("bolt", "nut", "washer")]
    assert [job.product for job in jobs.all()] == ["washer", "nut", "bolt"]
    assert jobs.all()[0] == asked[-1]


@pytest.mark.parametrize("state", FINISHED)
def test_a_finished_job_is_not_taken_again(jobs, state):
    jobs.submit(Job(product="bolt"))
    job = jobs.take(0.01)
    job.state = state
    jobs.update(job)
    assert jobs.requeue_interrupted() == 0
    assert jobs.take(0.01) is None
    assert jobs.get(job.id).state == state


def test_interrupted_jobs_come_first_and_in_their_order(jobs):
    asked = [jobs.submit(Job(product=name)) for name in ("bolt", "nut", "washer")]
    for _ in range(2):
        taken = jobs.take(0.01)
        taken.state = "running"
        jobs.update(taken)
    assert jobs.requeue_interrupted() == 2
    assert [jobs.take(0.01).id for _ in range(3)] == [job.id for job in asked]


def test_an_unknown_job_is_one_line(jobs):
    with pytest.raises(JobError, match=r"^no job 010203-abcdef; `proctor jobs` lists them$"):
        jobs.get("010203-abcdef")


@pytest.mark.parametrize("record", [None, b"{", b'{"product": 3}'])
def test_a_job_without_readable_record_is_told_once_and_holds_up_nobody(server, jobs, record):
    broken, good = (jobs.submit(Job(product="bolt")) for _ in range(2))
    if record is None:
        server.delete(f"proctor:{{jobs}}:job:{broken.id}")
    else:
        server.set(f"proctor:{{jobs}}:job:{broken.id}", record)
    with pytest.raises(JobError, match=broken.id):
        jobs.take(0.01)
    assert jobs.requeue_interrupted() == 0
    assert jobs.take(0.01).id == good.id


@pytest.mark.parametrize(
    "call",
    [
        lambda jobs: jobs.submit(Job(product="bolt")),
        lambda jobs: jobs.take(0.01),
        lambda jobs: jobs.update(Job(product="bolt")),
        lambda jobs: jobs.requeue_interrupted(),
        lambda jobs: jobs.get("x"),
        lambda jobs: jobs.all(),
    ],
    ids=["submit", "take", "update", "requeue", "get", "all"],
)
def test_a_server_that_is_gone_is_our_own_error(mortal, call):
    client = mortal.client()
    mortal.kill()
    with pytest.raises(StreamUnavailable, match=r"^Redis did not answer: "):
        call(Jobs(client))
    client.close()
