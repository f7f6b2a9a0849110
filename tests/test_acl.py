"""Users with the rights of `proctor redis-acl` on a real server: each role does its work, and nothing else."""

import re
import threading
from pathlib import Path

import pytest
import redis
from conftest import new_frame, texture
from PIL import Image
from redis_servers import PASSWORD, answers, free_port, launch, slotted, until
from typer.testing import CliRunner

from cluster.acl import ROLES, acl_lines
from cluster.cli import app
from cluster.connection import connect
from cluster.errors import ProctorError, ServerError
from cluster.status import Status
from models.settings import TrainingSettings
from producers import keys
from producers.errors import ServerUnavailable
from producers.publisher import Publisher
from producers.settings import PublisherSettings
from workers.approvals import Approvals
from workers.dead_letters import DeadLetters
from workers.errors import StreamUnavailable
from workers.jobs import Job, Jobs
from workers.loop import InspectionLoop
from workers.places import Places
from workers.pointers import Pointers
from workers.reading import read_results
from workers.redis_stream import RedisStream
from workers.reports import read_replicas, remove_report, write_report
from workers.residency import Residency
from workers.results import SegmentWriter
from workers.settings import WorkerSettings
from workers.trainer import Trainer, TrainerStores

ROOT = Path(__file__).resolve().parents[1]
PASSWORDS = [f"password-of-{role.user}" for role in ROLES]
TRAINING = TrainingSettings(
    detector_options={"width": 0.125, "hardest": 0.1}, input_size=64, steps=4, batch_size=4, device="cpu"
)


def as_user(user: str, port: int) -> str:
    return f"redis://{user}:password-of-{user}@127.0.0.1:{port}/0"


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """A server with the three users, beside its administrator."""
    started = launch(tmp_path_factory.mktemp("acl"), free_port(), f'requirepass {PASSWORD}\nsave ""')
    until(lambda: answers(started), "it answers")
    with started.client() as admin:
        for line in acl_lines([], PASSWORDS, for_file=False):
            assert admin.execute_command(*line.split()) in (b"OK", True)
    yield started
    started.stop()


@pytest.fixture
def admin(node):
    with node.client() as client:
        client.flushall()
        yield client


def client_of(user: str, node) -> redis.Redis:
    return Places(as_user(user, node.port), "", "", "").connect()


@pytest.fixture
def producer(node, admin):
    with client_of("producer", node) as client:
        yield client


@pytest.fixture
def inspector(node, admin):
    with client_of("inspector", node) as client:
        yield client


@pytest.fixture
def console(node, admin):
    with connect(as_user("console", node.port)) as client:
        yield client


# --- each role does its work


def test_from_camera_to_result_and_status(node, inspector, console, registry, engine, tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(5):
        Image.fromarray(texture(number)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROCTOR_REDIS__URL", as_user("producer", node.port))
    pushed = CliRunner().invoke(app, ["push", str(folder), "-p", "bolt", "-c", "cam-1"], catch_exceptions=False)
    assert pushed.stdout.startswith("pushed 5 frames"), pushed.output

    pointers = Pointers(inspector, registry)
    pointers.restore()
    pointers.promote("bolt", registry.latest("bolt").version)
    results, settings = str(tmp_path / "results"), WorkerSettings(device="cpu", segment_ms=0.0, claim_idle_ms=100)
    stream = RedisStream(inspector, "replica", settings)
    loop = InspectionLoop(
        stream, engine, Residency(engine, pointers, 0.5), SegmentWriter(results, "r"), settings, replica="r"
    )
    until(lambda: loop.tick() or loop.judged == 5, "five frames are judged")
    write_report(inspector, {"replica": "r", "trouble": None})
    loop.drain()
    assert read_results(results).num_rows == 5

    status = Status.read(console)
    assert [(product.product, product.balanced) for product in status.products] == [("bolt", True)]
    assert status.products[0].cameras[0].judged == 5
    assert [replica["replica"] for replica in read_replicas(console)] == ["r"]
    remove_report(inspector, "r")


def test_a_training_job_from_console_to_trainer(inspector, console, registry, tmp_path):
    folder = tmp_path / "normal"
    folder.mkdir()
    for seq in range(12):
        Image.fromarray(texture(seq)).save(folder / f"{seq:02}.png")
    job = Jobs(console).submit(Job(product="cell", images=[str(folder)]))
    jobs, stop = Jobs(inspector), threading.Event()
    approvals = Approvals(str(tmp_path / "datasets"), str(tmp_path / "results"))
    trainer = Trainer(TrainerStores(jobs, registry, approvals, Pointers(inspector, registry)), lambda _: TRAINING, {})
    assert jobs.requeue_interrupted() == 0
    trainer.work(jobs.take(1.0), stop)
    done = Jobs(console).all()[0]
    assert (done.id, done.state, done.error) == (job.id, "succeeded", "")
    assert Pointers(console, registry).of("cell") == {"current": done.version}
    Pointers(console, registry).promote("cell", done.version)
    assert Pointers(inspector, registry).current() == {"cell": done.version}


def test_dead_letters_claims_and_consumers(producer, inspector, console):
    publisher = Publisher(producer, PublisherSettings())
    for seq in (1, 2, 3):
        publisher.publish(new_frame(seq))
    settings = WorkerSettings(dead_kept=1, max_deliveries=1, claim_idle_ms=100)
    stream = RedisStream(inspector, "me", settings)
    first, second, _ = stream.read(8, 1)
    stream.dead_letter(first, "cam-1", "no good")
    stream.dead_letter(second, "cam-1", "no good")
    group = (keys.frames("bolt"), keys.GROUP)
    until(lambda: inspector.xpending_range(*group, "-", "+", 1, idle=100), "the third is idle")
    stream.recover([], 8)
    stream._idle_consumers._next = 0.0
    stream.recover([], 8)
    letters = DeadLetters(console)
    assert letters.counts("bolt").trimmed == 2
    (letter,) = letters.of("bolt")
    assert letters.retry("bolt", letter.id) == "retried"
    (entry,) = stream.read(8, 1)
    stream.dead_letter(entry, "cam-1", "again")
    assert [letters.drop("bolt", each.id) for each in letters.of("bolt")] == ["dropped"]
    stream.close()


# --- and nothing else


@pytest.mark.parametrize(
    "command",
    [
        ("XREVRANGE", keys.verdicts("bolt"), "+", "-"),
        ("XRANGE", keys.frames("bolt"), "-", "+"),
        ("XREAD", "STREAMS", keys.frames("bolt"), "0"),
        ("HGETALL", keys.latest("bolt")),
        ("XDEL", keys.frames("bolt"), "1-1"),
        ("XTRIM", keys.frames("bolt"), "MAXLEN", "0"),
        ("DEL", keys.frames("bolt")),
        ("UNLINK", keys.ledger("bolt")),
        ("HSET", keys.model("bolt"), "current", "x"),
        ("SMEMBERS", keys.PRODUCTS),
        ("FLUSHALL",),
        ("KEYS", "*"),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("EVAL", "return redis.call('KEYS', '*')", "0"),
    ],
    ids=lambda command: command[0].lower(),
)
def test_a_producer_reads_no_results_and_deletes_nothing(producer, command):
    Publisher(producer, PublisherSettings()).publish(new_frame(1))
    with pytest.raises(redis.exceptions.NoPermissionError):
        producer.execute_command(*command)


@pytest.mark.parametrize("user", ["inspector", "console"])
@pytest.mark.parametrize("command", [("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "*"), ("SET", "other", "x")])
def test_nobody_administrates(node, admin, user, command):
    with client_of(user, node) as client, pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command)


def test_a_camera_that_drops_the_oldest_needs_the_right_to(node, admin, producer):
    def fill() -> None:
        publisher = Publisher(producer, PublisherSettings(policy="drop_oldest", max_in_flight=1))
        first = publisher.last_seq("bolt", "cam-1") + 1
        for seq in (first, first + 1):
            publisher.publish(new_frame(seq))

    with pytest.raises(ServerUnavailable, match=r"Redis refuses frame bolt/cam-1/2: .*xinfo"):
        fill()
    for line in acl_lines([], PASSWORDS, for_file=False, drop_oldest=True):
        admin.execute_command(*line.split())
    try:
        fill()
        assert admin.hget(keys.ledger("bolt"), "cam-1:shed") == b"2"
    finally:
        for line in acl_lines([], PASSWORDS, for_file=False):
            admin.execute_command(*line.split())


def test_what_is_refused_is_one_line_with_user_and_command(node, admin, producer, console):
    said = "^Redis does not permit this: User producer has no permissions to run the 'smembers' command; `proctor"
    with pytest.raises(StreamUnavailable, match=said):
        DeadLetters(producer).products()
    admin.execute_command("ACL", "SETUSER", "producer", "-xadd")
    try:
        with pytest.raises(ServerUnavailable, match=r"^Redis refuses frame bolt/cam-1/1: [^\n]*producer.*'xadd'"):
            Publisher(producer, PublisherSettings()).publish(new_frame(1))
    finally:
        admin.execute_command("ACL", "SETUSER", "producer", "+xadd")
    admin.execute_command("ACL", "SETUSER", "guest", "reset", "on", ">password-of-guest", "+ping")
    with pytest.raises(ServerError, match="refuses: User guest has no permissions to run the 'info' command"):
        connect(as_user("guest", node.port))
    admin.execute_command("ACL", "SETUSER", "guest", "+info", "+exists", "~other")
    with pytest.raises(
        ServerError, match=r"refuses: user 'guest': No permissions to access a key; `proctor redis-acl`"
    ):
        connect(as_user("guest", node.port))


def test_a_user_of_one_product_has_no_other(node, admin):
    for line in acl_lines(["bolt"], PASSWORDS, for_file=False):
        admin.execute_command(*line.split())
    try:
        with client_of("producer", node) as camera:
            Publisher(camera, PublisherSettings()).publish(new_frame(1))
            with pytest.raises(ServerUnavailable, match=r"Redis refuses frame nut/cam-1/1: .*to access a key"):
                Publisher(camera, PublisherSettings()).publish(new_frame(1, product="nut"))
    finally:
        for line in acl_lines([], PASSWORDS, for_file=False):
            admin.execute_command(*line.split())


# --- the lines


def test_a_server_starts_with_the_file(tmp_path):
    file = tmp_path / "users.acl"
    done = CliRunner().invoke(app, ["redis-acl", "--format", "file", "--password-stdin"], input="\n".join(PASSWORDS))
    assert done.exit_code == 0
    file.write_text(f"user default on >{PASSWORD} ~* &* +@all\n{done.stdout}")
    node = launch(tmp_path, free_port(), f'aclfile {file}\nsave ""')
    try:
        until(lambda: answers(node), "it answers")
        for role in ROLES:
            connect(as_user(role.user, node.port)).close()
    finally:
        node.stop()


def test_in_a_cluster_every_node_has_the_users(tmp_path):
    with slotted(tmp_path) as nodes:
        for node in nodes:
            with node.client() as admin:
                for line in acl_lines([], PASSWORDS, for_file=False):
                    admin.execute_command(*line.split())
        url = as_user("{}", nodes[0].port).replace("redis://", "redis+cluster://").replace("/0", "")
        with connect(url.replace("{}", "producer")) as camera, connect(url.replace("{}", "inspector")) as worker:
            for product in ("bolt", "nut", "gear"):
                Publisher(camera, PublisherSettings()).publish(new_frame(1, product))
            assert len(RedisStream(worker, "me", WorkerSettings()).read(3, 1000)) == 3


def test_passwords_are_made_and_shown_apart_from_the_lines():
    done = CliRunner().invoke(app, ["redis-acl", "--product", "bolt"])
    assert [line.split()[:5] for line in done.stdout.splitlines()] == [
        ["ACL", "SETUSER", role.user, "reset", "on"] for role in ROLES
    ]
    assert "frames:{bolt}" in done.stdout
    shown = re.findall(r"^(\w+): password (\S+)$", done.stderr, re.MULTILINE)
    assert [user for user, _ in shown] == [role.user for role in ROLES]
    assert all(len(password) >= 24 and password not in done.stdout for _, password in shown)


@pytest.mark.parametrize(
    ("products", "passwords", "said"),
    [
        ([], ["long-enough"], "1 passwords given, 3 expected: one a line, for producer, inspector, console"),
        ([], ["short"] * 3, "fewer than 8 characters"),
        (["A B"], PASSWORDS, "product 'A B' is not a valid name"),
    ],
)
def test_what_cannot_be_made_is_said(products, passwords, said):
    with pytest.raises(ProctorError, match=said):
        acl_lines(products, passwords, for_file=False)


# --- the table follows the code


def scripts_of(*files: str) -> set[str]:
    """Commands of the Lua scripts, with the subcommand of those that have some."""
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    found = set()
    for name, argument in re.findall(r"redis\.p?call\('(\w+)'(?:, '(\w+)')?", text):
        has_parts = name in ("XINFO", "XGROUP", "MEMORY")
        found.add(f"{name}|{argument}".lower() if has_parts else name.lower())
    return found


def test_every_command_of_a_script_is_in_the_table():
    producer, inspector, console = (set(role.commands) for role in ROLES)
    dropping = set(ROLES[0].drop_oldest)
    counting = scripts_of("producers/counting.py")
    publishing = scripts_of("producers/publishing.py") | counting
    assert publishing - producer == dropping
    workers = ("settling", "consumers", "backlog", "ledger", "shifts")
    assert (scripts_of(*(f"workers/{name}.py" for name in workers)) | counting) - inspector == set()
    people = scripts_of(*(f"workers/{name}.py" for name in ("ledger", "shifts", "dead_letters")))
    assert (people | counting) - console == {"xtrim", "memory|usage"}
    assert scripts_of("workers/dead_letters.py") >= {"xtrim"}
    assert "xtrim" in inspector


def test_every_key_of_a_product_is_in_the_table():
    text = (ROOT / "producers" / "keys.py").read_text(encoding="utf-8")
    names = set(re.findall(r'f"(\w+):\{\{\{product\}\}\}', text))
    assert names >= {"frames", "ledger"}
    assert names - set.union(*(set(role.product_keys) for role in ROLES)) == set()
