"""From a job to a version in service, with real trainings of few steps."""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
import torch
from conftest import texture
from PIL import Image
from test_results import new_row

from models.cards import ModelCard
from models.detectors import DETECTORS
from models.registry import Registry
from models.settings import TrainingSettings
from models.weights import packaged_lite0, read_weights
from producers.frame import Picture
from workers import trainer as trainer_module
from workers.approvals import Approvals
from workers.engine import Engine, Request
from workers.errors import StreamUnavailable
from workers.jobs import Job, Jobs
from workers.pointers import CURRENT, PREVIOUS, Pointers
from workers.results import SegmentWriter
from workers.trainer import Trainer, TrainerStores

SETTINGS = TrainingSettings(
    detector_options={"width": 0.125, "hardest": 0.1}, input_size=64, steps=20, batch_size=4, device="cpu"
)


class Shop:
    """A trainer with everything around it."""

    def __init__(self, server: redis.Redis, registry: Registry, folder: Path) -> None:
        self.jobs = Jobs(server)
        self.registry = registry
        self.pointers = Pointers(server, self.registry)
        self.results = str(folder / "results")
        self.approvals = Approvals(str(folder / "datasets"), self.results)
        self.trainer = Trainer(
            TrainerStores(self.jobs, self.registry, self.approvals, self.pointers), lambda product: SETTINGS, {}
        )

    def work(self, job: Job) -> Job:
        """Submit a job and let the trainer take it."""
        self.jobs.submit(job)
        taken = self.jobs.take(0.1)
        assert taken is not None
        self.trainer.work(taken, threading.Event())
        return self.jobs.get(job.id)

    def card(self, job: Job) -> ModelCard:
        return self.registry.card(job.product, job.version)

    def approve(self, *numbers: int, label: str = "normal") -> None:
        """Let a person approve frames of the product `cell`."""
        rows = [new_row(seq, "cell", verdict="fail", image_jpeg=Picture.encode(texture(seq)).data) for seq in numbers]
        SegmentWriter(self.results, f"r{numbers[0]}").write(rows)
        self.approvals.approve([row.frame_id for row in rows], label, "ann")


@pytest.fixture
def shop(server, registry, tmp_path):
    return Shop(server, registry, tmp_path)


@pytest.fixture
def images(tmp_path):
    """A folder of twelve normal images."""
    folder = tmp_path / "normal"
    folder.mkdir()
    for seq in range(12):
        Image.fromarray(texture(seq)).save(folder / f"{seq:02}.png")
    return folder


def test_a_job_becomes_a_version_in_service(shop, images):
    before = datetime.now(UTC)
    job = shop.work(Job(product="cell", images=[str(images)], creator="ann"))
    assert (job.state, job.error, job.step, job.steps) == ("succeeded", "", 20, 20)
    assert job.loss > 0
    assert job.remark.startswith("the threshold rests on 4 held-out images where 1.0% false rejects need 99; ")
    assert before <= job.started_at <= job.finished_at <= datetime.now(UTC)
    card = shop.card(job)
    assert (card.product, card.creator, card.parent, card.input_size) == ("cell", "ann", None, 64)
    assert card.training.settings == SETTINGS
    assert card.training.sources == [str(images)]
    assert [image.id for image in card.training.images] == [f"{seq:02}.png" for seq in range(12)]
    assert card.training.images[3].sha256 == hashlib.sha256((images / "03.png").read_bytes()).hexdigest()
    assert shop.pointers.of("cell") == {CURRENT: job.version}
    assert shop.jobs.requeue_interrupted() == 0
    engine = Engine(shop.registry, "cpu", dtype=torch.float32)
    (judgement,) = engine.judge([Request(engine.build("cell", job.version), texture(0))])
    assert judgement.score > 0


def test_a_version_that_is_not_promoted_waits(shop, images):
    job = shop.work(Job(product="cell", images=[str(images)], promote=False))
    assert (job.state, shop.pointers.of("cell")) == ("succeeded", {})
    assert shop.registry.latest("cell").version == job.version


def test_retraining_starts_from_the_version_in_service_and_takes_the_approvals(shop, images):
    first = shop.work(Job(product="cell", images=[str(images)], overrides={"steps": 60}))
    shop.approve(101, 102)
    shop.approve(103, label="defect")
    second = shop.work(Job(product="cell", creator="reviewer"))
    card = shop.card(second)
    assert (card.parent, card.creator) == (first.version, "reviewer")
    assert [image.id for image in card.training.images][12:] == ["cell/cam-1/101", "cell/cam-1/102"]
    assert card.training.images[12].sha256 == hashlib.sha256(Picture.encode(texture(101)).data).hexdigest()
    assert card.training.sources == [str(images)]
    assert shop.pointers.of("cell") == {CURRENT: second.version, PREVIOUS: first.version}
    # it went on where the first one was: a cold start of as many steps ends higher
    cold = shop.work(Job(product="cell", images=[str(images)], overrides={"seed": 1, "input_size": 96}))
    assert shop.card(cold).parent is None  # of another shape
    assert card.metrics["final_loss"] < 0.7 * shop.card(cold).metrics["final_loss"]


def test_options_spelled_out_are_the_same_detector(shop, images):
    first = shop.work(Job(product="cell", images=[str(images)]))
    options = shop.card(first).detector.options
    second = shop.work(Job(product="cell", overrides={"detector_options": options}))
    assert shop.card(second).parent == first.version


def test_a_retraining_starts_cold_where_the_method_computes_something_else_since(shop, images, monkeypatch):
    shop.work(Job(product="cell", images=[str(images)]))
    monkeypatch.setattr(DETECTORS[SETTINGS.detector], "revision", 99)
    second = shop.work(Job(product="cell"))
    assert (second.state, second.error) == ("succeeded", "")
    assert (shop.card(second).parent, shop.card(second).detector.revision) == (None, 99)


def test_a_retraining_starts_cold_with_other_weights_of_its_teacher(shop, images, tmp_path):
    first = shop.work(Job(product="cell", images=[str(images)]))
    other = tmp_path / "other.pth"
    torch.save({name: value * 1.01 for name, value in read_weights(packaged_lite0()).items()}, other)
    second = shop.work(Job(product="cell", overrides={"weights": str(other)}))
    assert (second.state, second.error) == ("succeeded", "")
    assert shop.card(second).parent is None
    assert shop.card(second).teacher.weights_sha256 != shop.card(first).teacher.weights_sha256


def test_approvals_alone_are_enough(shop):
    shop.approve(1, 2, 3, 4)
    job = shop.work(Job(product="cell"))
    assert job.state == "succeeded"
    assert len(shop.card(job).training.images) == 4
    assert shop.card(job).training.sources == []


def test_overrides_are_this_jobs_only(shop, images):
    job = shop.work(Job(product="cell", images=[str(images)], overrides={"steps": 10, "seed": 7}))
    assert (job.steps, shop.card(job).training.settings.seed) == (10, 7)
    assert shop.card(shop.work(Job(product="cell"))).training.settings == SETTINGS


def corrupt(images: Path) -> None:
    (images / "05.png").write_bytes(b"no picture")


@pytest.mark.parametrize(
    ("job", "before", "message"),
    [
        ({"images": []}, None, "cell has neither images nor approvals to train on: give a folder with --images"),
        ({"images": ["/no/such/folder"]}, None, "/no/such/folder: no such folder"),
        ({}, corrupt, "05.png: not an image of a known format"),
        ({"overrides": {"steps": 0}}, None, "training setting steps: Input should be greater than or equal to 1"),
        ({"overrides": {"stpes": 5}}, None, "training setting stpes: Extra inputs are not permitted"),
        ({"overrides": {"teacher": "owl"}}, None, 'unknown teacher: "owl"'),
        ({"overrides": {"detector": "owl", "detector_options": {}}}, None, 'unknown detector: "owl"'),
        ({"overrides": {"device": "abacus"}}, None, "unknown device 'abacus'"),
        ({"overrides": {"optimizer": "sgd", "learning_rate": 1e30}}, None, "training diverged at step 10"),
    ],
)
def test_a_failed_job_says_why_in_one_line_and_changes_nothing(shop, images, job, before, message):
    if before:
        before(images)
    failed = shop.work(Job(**{"product": "cell", "images": [str(images)]} | job))
    assert (failed.state, failed.version) == ("failed", "")
    assert message in failed.error
    assert "\n" not in failed.error
    assert failed.finished_at is not None
    assert shop.pointers.of("cell") == {}
    assert shop.registry.versions("cell") == []
    assert shop.jobs.requeue_interrupted() == 0


def test_an_unreadable_approved_image_is_named(shop, images, tmp_path):
    shop.approve(101)
    Path(tmp_path, "datasets/cell/approved/cam-1-101.jpg").write_bytes(b"no picture")
    failed = shop.work(Job(product="cell", images=[str(images)]))
    assert failed.error.startswith("the approved image of cell/cam-1/101 is unreadable: not an image")


def test_an_error_nobody_foresaw_fails_the_job_not_the_trainer(shop, images, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory\nand a second line")

    monkeypatch.setattr(trainer_module, "train", fail)
    failed = shop.work(Job(product="cell", images=[str(images)]))
    assert (failed.state, failed.error) == ("failed", "RuntimeError: out of memory")
    monkeypatch.undo()
    assert shop.work(Job(product="cell", images=[str(images)])).state == "succeeded"


# --- the trainer's life


@contextlib.contextmanager
def running(shop: Shop) -> Iterator[None]:
    """A trainer that takes jobs for the block, and then ends in order."""
    stop = threading.Event()
    thread = threading.Thread(target=shop.trainer.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=60)
    assert not thread.is_alive()


def await_state(shop: Shop, job: Job, done: Callable[[Job], bool]) -> Job:
    """Look until a job is as expected; the server tells nobody by itself."""
    give_up_at = datetime.now(UTC) + timedelta(seconds=60)
    while not done(found := shop.jobs.get(job.id)):
        assert datetime.now(UTC) < give_up_at
        threading.Event().wait(0.01)
    return found


def test_a_running_trainer_works_the_queue_off_and_stops(shop, images):
    asked = [shop.jobs.submit(Job(product="cell", images=[str(images)], steps=n)) for n in range(2)]
    with running(shop):
        for job in asked:
            assert await_state(shop, job, lambda job: job.state == "succeeded").version
    assert len(shop.registry.versions("cell")) == 2


def test_a_job_cut_short_by_stop_starts_anew_with_the_next_trainer(shop, images):
    asked = shop.jobs.submit(Job(product="cell", images=[str(images)], overrides={"steps": 1_000_000}))
    with running(shop):
        await_state(shop, asked, lambda job: job.step > 0)
    assert shop.jobs.get(asked.id).state == "running"
    assert shop.registry.versions("cell") == []
    assert shop.jobs.requeue_interrupted() == 1
    assert shop.jobs.take(0.1).id == asked.id


def test_a_job_of_a_dead_trainer_is_taken_up_again(shop, images):
    asked = shop.jobs.submit(Job(product="cell", images=[str(images)]))
    dead = shop.jobs.take(0.1)
    dead.state = "running"
    shop.jobs.update(dead)
    with running(shop):
        assert await_state(shop, asked, lambda job: job.state == "succeeded").version


def test_a_trainer_survives_a_job_it_cannot_read(shop, images, server):
    broken = shop.jobs.submit(Job(product="cell"))
    server.set(f"proctor:{{jobs}}:job:{broken.id}", "{")
    good = shop.jobs.submit(Job(product="cell", images=[str(images)]))
    with running(shop):
        assert await_state(shop, good, lambda job: job.state == "succeeded").version


def losing(method: Callable[..., object], lost: Callable[..., bool]) -> Callable[..., object]:
    """The method, but the server is away where `lost` says so."""

    def call(*args: object) -> object:
        if lost(*args):
            raise StreamUnavailable("Redis did not answer")
        return method(*args)

    return call


def test_a_training_outlasts_a_server_that_is_away_meanwhile(shop, images, monkeypatch):
    """Progress that cannot be told is dropped; the end and the promotion are told when it is back."""
    monkeypatch.setattr(trainer_module, "_RETRY_S", 0.001)
    monkeypatch.setattr(trainer_module, "_REPORT_EVERY_S", 0.0)
    shop.jobs.submit(Job(product="cell", images=[str(images)]))
    job = shop.jobs.take(0.1)
    ends, promotions = iter([True, True, False]), iter([True, False])
    monkeypatch.setattr(
        shop.jobs,
        "update",
        losing(shop.jobs.update, lambda job: next(ends) if job.state == "succeeded" else job.step > 0),
    )
    monkeypatch.setattr(shop.pointers, "promote", losing(shop.pointers.promote, lambda *_: next(promotions)))
    shop.trainer.work(job, threading.Event())
    recorded = shop.jobs.get(job.id)
    assert recorded.state == "succeeded"
    assert shop.pointers.of("cell") == {CURRENT: recorded.version}
    assert len(shop.registry.versions("cell")) == 1


def test_a_job_that_lost_its_server_at_the_start_is_run_by_the_same_trainer(shop, images, monkeypatch):
    monkeypatch.setattr(trainer_module, "_RETRY_S", 0.001)
    lost = iter([True, False, False])
    monkeypatch.setattr(shop.pointers, "of", losing(shop.pointers.of, lambda _: next(lost)))
    asked = shop.jobs.submit(Job(product="cell", images=[str(images)]))
    with running(shop):
        assert await_state(shop, asked, lambda job: job.state == "succeeded").version
