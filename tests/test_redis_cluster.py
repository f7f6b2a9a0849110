"""A cluster of three nodes: products in slots of their own, read, settled, counted, and one node that dies."""

import time

import pytest
from conftest import new_frame, settlement
from redis_servers import PASSWORD, Node, free_port, launch_again, node_of, slotted, until

from cluster.connection import connect
from cluster.errors import ServerError
from models.registry import Registry
from producers import keys
from producers.publisher import Published, Publisher
from producers.settings import PublisherSettings
from workers.dead_letters import DeadLetters
from workers.errors import StreamUnavailable
from workers.jobs import Job, Jobs
from workers.ledger import read_ledger
from workers.places import Places
from workers.pointers import Pointers
from workers.redis_stream import RedisStream
from workers.reports import read_replicas, write_report
from workers.settings import WorkerSettings
from workers.stream import Entry, VerdictMessage

PRODUCTS = ("bolt", "cell", "gear", "nut", "pin", "washer")
WORKER = WorkerSettings(max_deliveries=1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster for the tests that leave it whole."""
    with slotted(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes


def url_of(nodes: list[Node]) -> str:
    return f"redis+cluster://:{PASSWORD}@127.0.0.1:{free_port()},127.0.0.1:{nodes[1].port}"


@pytest.fixture
def client(cluster):
    with connect(url_of(cluster)) as client:
        client.flushall(target_nodes=client.PRIMARIES)
        yield client


@pytest.fixture
def stream(cluster, client):
    with Places(url_of(cluster), "", "", "").connect() as server:
        yield RedisStream(server, "me", WORKER)


def publish(client, first: int, count: int, products=PRODUCTS) -> None:
    publisher = Publisher(client, PublisherSettings(max_in_flight=10_000))
    for seq in range(first, first + count):
        for product in products:
            publisher.publish(new_frame(seq, product))


def state(node: Node) -> str:
    with node.client() as client:
        return client.execute_command("CLUSTER INFO")["cluster_state"]


def test_the_products_of_these_tests_lie_on_every_node(cluster):
    assert {node_of(keys.frames(product), cluster).port for product in PRODUCTS} == {node.port for node in cluster}


def test_every_product_is_read_in_order_judged_and_counted(client, stream):
    publish(client, 1, 20)
    entries: list[Entry] = []
    while len(entries) < 20 * len(PRODUCTS):
        taken = stream.read(12, 1000)
        assert {entry.product for entry in taken} == set(PRODUCTS)  # two of each
        entries += taken
        stream.recover(entries, 0)
    for product in PRODUCTS:
        assert [int(e.fields[b"seq"]) for e in entries if e.product == product] == list(range(1, 21))
    numbered = [(entry.product, int(entry.fields[b"seq"])) for entry in entries]
    stream.send_verdicts([VerdictMessage(p, "cam-1", n, "pass", 0.1, 0.2, "v1", "", 1.0) for p, n in numbered])
    stream.settle([settlement(entry) for entry in entries])
    ledgers = read_ledger(client)
    assert [ledger.product for ledger in ledgers] == list(PRODUCTS)
    assert all(ledger.balanced and ledger.lag == 0 for ledger in ledgers)
    assert [ledger.cameras[0].judged for ledger in ledgers] == [20] * len(PRODUCTS)
    assert all(client.xlen(keys.verdicts(product)) == 20 for product in PRODUCTS)
    stream.close()


def test_a_busy_product_starves_no_other_and_waiting_is_not_busy(client, stream, monkeypatch):
    publish(client, 1, 100, ("bolt",))
    publish(client, 1, 1, ("nut",))
    assert {entry.product for entry in stream.read(8, 1000)} == {"bolt", "nut"}
    while stream.read(64, 0):
        pass
    reads = []
    inner = stream._server.xreadgroup
    monkeypatch.setattr(
        stream._server, "xreadgroup", lambda *args, **options: reads.append(1) or inner(*args, **options)
    )
    started, cpu = time.monotonic(), time.process_time()
    assert stream.read(8, 300) == []
    assert time.monotonic() - started >= 0.3
    assert 2 <= len(reads) / 2 <= 30  # sweeps over two products
    assert time.process_time() - cpu < 0.2
    publish(client, 101, 1, ("nut",))
    assert [entry.product for entry in stream.read(8, 1000)] == ["nut"]


def test_dead_letters_claims_and_lost_scripts(client, stream):
    publish(client, 1, 1)
    first = stream.read(len(PRODUCTS), 1000)
    client.script_flush()
    client.delete(keys.frames("cell"))  # a group that is gone
    for entry in first:
        stream.dead_letter(entry, "?", "no good")
    letters = DeadLetters(client)
    assert letters.counts("bolt").kept == 1
    (letter,) = letters.of("bolt")
    assert letters.retry("bolt", letter.id) == "retried"
    assert {entry.product for entry in [*stream.read(8, 0), *stream.read(8, 0)]} == {"bolt"}
    assert all(ledger.balanced for ledger in read_ledger(client))


def test_a_node_without_memory_sheds_the_frames_of_its_own_products_only(client, cluster):
    tight = node_of(keys.frames("nut"), cluster)
    publish(client, 1, 1)  # the products are known, so that only frames meet the bound
    with tight.client() as admin:
        # reached by the share of it that counts as full, and far from refusing anything by itself
        admin.config_set("maxmemory", 10 * int(admin.info("memory")["used_memory"]))
        try:
            publisher = Publisher(client, PublisherSettings(policy="drop_newest", memory_share=0.01))
            outcomes = [{p: publisher.publish(new_frame(seq, p)) for p in PRODUCTS} for seq in (2, 3, 4)]
        finally:
            admin.config_set("maxmemory", 0)
    for outcome in outcomes:
        shed = {product for product, published in outcome.items() if published is Published.SHED}
        assert shed == {product for product in PRODUCTS if node_of(keys.frames(product), cluster) is tight}


def test_jobs_pointers_and_reports(client, cluster, registry: Registry):
    jobs, pointers = Jobs(client), Pointers(client, registry)
    job = jobs.submit(Job(product="bolt"))
    assert jobs.take(1.0).id == job.id
    assert jobs.requeue_interrupted() == 1
    taken = jobs.take(1.0)
    taken.state = "succeeded"
    jobs.update(taken)
    assert [each.state for each in jobs.all()] == ["succeeded"]
    for product in ("bolt", "nut"):
        pointers.promote(product, registry.versions(product)[0].version)
    assert set(pointers.current()) == {"bolt", "nut"}
    write_report(client, {"replica": "r-1"})
    assert read_replicas(client) == [{"replica": "r-1"}]


def test_a_client_of_one_server_is_told_what_it_found(cluster, server, valkey):
    elsewhere = next(node for node in cluster if node is not node_of(keys.PRODUCTS, cluster))
    with pytest.raises(ServerError, match=r"is one node of a cluster: let redis\.url begin with redis\+cluster://"):
        connect(f"redis://:{PASSWORD}@127.0.0.1:{elsewhere.port}/0")
    with pytest.raises(ServerError, match=r"is no cluster: let redis\.url begin with redis://"):
        connect(valkey.url.replace("redis://", "redis+cluster://").removesuffix("/0"))
    with pytest.raises(ServerError, match="refuses the user or password") as caught:
        connect(f"redis+cluster://:guess@127.0.0.1:{cluster[0].port}")
    assert "guess" not in str(caught.value)
    with pytest.raises(
        ServerError, match=r"a node of the cluster at redis\+cluster://127\.0\.0\.1:\d+ does not answer"
    ):
        connect(f"redis+cluster://127.0.0.1:{free_port()}")


def test_a_node_that_dies_takes_nobody_along_and_is_found_again(tmp_path):
    with slotted(tmp_path) as nodes:
        victim = node_of(keys.frames("nut"), nodes)
        assert node_of(keys.PRODUCTS, nodes) is not victim
        with connect(url_of(nodes)) as client, Places(url_of(nodes), "", "", "").connect() as server:
            stream = RedisStream(server, "me", WORKER)
            publish(client, 1, 2)
            entries = stream.read(len(PRODUCTS), 1000)
            assert len(entries) == len(PRODUCTS)
            victim.kill()
            with pytest.raises(StreamUnavailable):
                stream.settle([settlement(entry) for entry in entries])
            others = [node for node in nodes if node is not victim]
            until(lambda: {state(node) for node in others} == {"fail"}, "the others notice")
            with pytest.raises(ServerError, match=r"the cluster at .* is down: "):
                connect(url_of(nodes))
            with pytest.raises(StreamUnavailable):
                stream.settle([settlement(entry) for entry in entries])
            with pytest.raises(StreamUnavailable):
                stream.read(8, 1)
            again = launch_again(victim)
            try:
                until(lambda: {state(node) for node in nodes} == {"ok"}, "the cluster is whole")
                stream.settle([settlement(entry) for entry in entries])
                publish(client, 3, 1)
                rest: list[Entry] = []
                until(lambda: rest.extend(stream.read(64, 50)) or len(rest) == 2 * len(PRODUCTS), "the rest is read")
                ledgers = {ledger.product: ledger for ledger in read_ledger(client)}
                assert ledgers["bolt"].cameras[0].judged == 1
                assert all(ledger.balanced for ledger in ledgers.values())
            finally:
                again.stop()
