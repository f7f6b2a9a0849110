"""Any order of publishing, reading, judging, dying and claiming on a real server: each frame is counted once."""

from collections import Counter

import redis
from conftest import new_frame
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from producers import keys
from producers.frame import Frame
from producers.publisher import Published, Publisher
from producers.settings import PublisherSettings
from workers.deadlines import DeadlineWatch
from workers.ledger import read_ledger
from workers.redis_stream import RedisStream
from workers.settings import WorkerSettings
from workers.stream import Entry, Settlement, VerdictMessage

CAMERAS = st.sampled_from(["left", "right"])
REPLICAS = st.integers(0, 2)
SETTINGS = WorkerSettings(claim_idle_ms=100, max_deliveries=4, takt_ms=1.0, takt_margin_ms=0.0)


class LineMachine(RuleBasedStateMachine):
    """Two cameras, three replicas that may die, a deadline watch, and what they are promised."""

    server: redis.Redis
    held = Bundle("held")

    @initialize(policy=st.sampled_from(["drop_newest", "drop_oldest"]))
    def start(self, policy: str) -> None:
        self.server.flushall()
        self.server.sadd(keys.PRODUCTS, "bolt")  # readers look for new products once a second only
        self.publisher = Publisher(self.server, PublisherSettings(policy=policy, max_in_flight=6))
        self.streams = [RedisStream(self.server, f"r{number}", SETTINGS) for number in range(3)]
        self.watch = DeadlineWatch(self.server, SETTINGS)
        self.next_seq = Counter[str]()
        self.outcomes = Counter[Published]()

    @rule(camera=CAMERAS, skipped=st.integers(0, 2))
    def publish(self, camera: str, skipped: int) -> None:
        """The camera may have had frames that never came here, once its run has begun."""
        self.next_seq[camera] += 1 + (skipped if self.next_seq[camera] else 0)
        frame = new_frame(self.next_seq[camera], camera=camera)
        self.outcomes[self.publisher.publish(frame)] += 1
        self.publisher.publish(frame)  # a repetition after a lost reply

    @rule(target=held, replica=REPLICAS, count=st.integers(1, 3))
    def read(self, replica: int, count: int) -> object:
        return multiple(*((replica, entry) for entry in self.streams[replica].read(count, 0)))

    @rule(target=held, replica=REPLICAS)
    def claim(self, replica: int) -> object:
        """Everything that anyone holds has become old; the holder may be dead, or only slow."""
        for entry in self.server.xpending_range(keys.frames("bolt"), keys.GROUP, "-", "+", 100) if self.known else ():
            holder, entry_id = entry["consumer"], entry["message_id"]
            self.server.xclaim(keys.frames("bolt"), keys.GROUP, holder, 0, [entry_id], idle=1000, justid=True)
        return multiple(*((replica, entry) for entry in self.streams[replica].recover([], 8)))

    @rule(taken=held)
    def answer(self, taken: tuple[int, Entry]) -> None:
        self._answer(*taken)

    @rule(taken=consumes(held))
    def judge(self, taken: tuple[int, Entry]) -> None:
        replica, entry = taken
        late = self._answer(replica, entry)
        frame = Frame.from_fields("bolt", entry.fields)
        verdict = "unknown" if frame.frame_id in late else "pass"
        size = len(frame.picture.data)
        settlement = Settlement("bolt", entry.id, frame.camera, frame.seq, verdict, size, frame.captured_at_ns)
        self.streams[replica].settle([settlement])
        self.streams[replica].settle([settlement])  # a repetition after a lost reply

    @rule(taken=consumes(held))
    def die(self, taken: tuple[int, Entry]) -> None:
        """The replica forgets what it held."""

    @rule(taken=consumes(held))
    def give_up(self, taken: tuple[int, Entry]) -> None:
        replica, entry = taken
        self.streams[replica].dead_letter(entry, "?", "malformed")

    @rule()
    def deadline(self) -> None:
        self.watch.tick()

    @property
    def known(self) -> bool:
        return bool(self.server.exists(keys.frames("bolt"))) and bool(self.server.xinfo_groups(keys.frames("bolt")))

    def _answer(self, replica: int, entry: Entry) -> set[str]:
        frame = Frame.from_fields("bolt", entry.fields)
        message = VerdictMessage("bolt", frame.camera, frame.seq, "pass", 0.5, 1.0, "v1", "", 1.0)
        return self.streams[replica].send_verdicts([message])

    @invariant()
    def the_ledger_balances(self) -> None:
        for product in read_ledger(self.server):
            assert product.balanced, product
            captured = sum(camera.captured for camera in product.cameras)
            assert captured == sum(self.next_seq.values())
            assert all(camera.camera in ("left", "right") for camera in product.cameras)

    @invariant()
    def a_frame_has_one_verdict_at_most(self) -> None:
        answered = Counter(fields[b"frame_id"] for _, fields in self.server.xrange(keys.verdicts("bolt")))
        assert not answered or max(answered.values()) == 1

    def teardown(self) -> None:
        """Whoever still lives finishes: then every frame is judged, shed, dead or lost, and each has its verdict."""
        if not self.next_seq:
            return
        for _ in range(3):
            for replica, entry in [*self._left()]:
                self.judge((replica, entry))
        (product,) = read_ledger(self.server)
        assert product.balanced
        assert sum(camera.in_flight for camera in product.cameras) == 0
        assert self.server.xlen(keys.frames("bolt")) == 0
        assert int(self.server.get(keys.held("bolt")) or 0) == 0
        assert not self.server.exists(keys.unanswered("bolt"))
        assert not self.server.exists(keys.late("bolt"))
        lost = sum(camera.lost for camera in product.cameras)
        captured = sum(camera.captured for camera in product.cameras)
        assert self.server.xlen(keys.verdicts("bolt")) == captured - lost

    def _left(self) -> list[tuple[int, Entry]]:
        new = [(0, entry) for entry in self.streams[0].read(100, 0)]
        pending = self.server.xpending_range(keys.frames("bolt"), keys.GROUP, "-", "+", 100) if self.known else []
        held = [
            (0, Entry("bolt", entry["message_id"], self.server.xrange(keys.frames("bolt"), entry["message_id"])[0][1]))
            for entry in pending
            if entry["message_id"] not in {each.id for _, each in new}
        ]
        return new + held


def test_any_order_of_events_counts_each_frame_once(server):
    LineMachine.server = server
    machine = LineMachine.TestCase
    machine.settings = settings(
        max_examples=60,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    machine().runTest()
