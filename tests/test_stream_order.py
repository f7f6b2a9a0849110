"""That no two streams touch the same memory unordered: a race detector over the executor's work, without a GPU.

Streams are played: each has a clock that knows how far it has seen every other, marks and waits join clocks, and every
access to the executor's buffers is checked against those before it. What would be a race on a GPU is one here.
"""

from contextlib import contextmanager

import pytest
import torch
from conftest import texture
from test_cuda_executor import Bench, requests_for
from torch.utils._python_dispatch import TorchDispatchMode

from models.stfpm import STFPM
from workers import cuda_executor, streams
from workers.executor import Request

HOST = "host"


class Clocks:
    """What each actor, the host or a stream, has seen of the others: by actor, the number of its last event."""

    def __init__(self) -> None:
        self.seen: dict[object, dict[object, int]] = {HOST: {HOST: 0}}
        self.current: list[object] = [HOST]

    def join(self, actor: object, clock: dict[object, int]) -> None:
        own = self.seen.setdefault(actor, {})
        for other, number in clock.items():
            own[other] = max(own.get(other, 0), number)

    def step(self, on_host: bool) -> tuple[object, int]:
        """Let the current actor do something; a stream does it after what the host did before queueing it."""
        actor = HOST if on_host else self.current[-1]
        self.join(actor, self.seen[HOST])
        self.seen[actor][actor] = self.seen[actor].get(actor, 0) + 1
        return actor, self.seen[actor][actor]


class Races(TorchDispatchMode):
    """Records accesses to watched memory and the races among them."""

    def __init__(self, clocks: Clocks) -> None:
        super().__init__()
        self._clocks = clocks
        self._names: dict[int, str] = {}
        self._accesses: dict[int, list[tuple[int, int, bool, object, int]]] = {}
        self.found: set[str] = set()

    def watch(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            self._names.setdefault(tensor.untyped_storage().data_ptr(), name)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view:
            event = self._clocks.step(on_host=self._is_hosts(func, args))
            for argument, value in zip(func._schema.arguments, args, strict=False):
                written = argument.alias_info is not None and argument.alias_info.is_write
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    if isinstance(tensor, torch.Tensor):
                        self._touch(func, args, tensor, written, event)
        return out

    def _is_hosts(self, func, args):
        """Whether it fills host memory from host memory, which is done at once whatever stream is the current one."""
        filled = func._schema.name == "aten::copy_" and args[0].untyped_storage().data_ptr()
        return self._names.get(filled) in ("stage's index", "stage's frames")

    def _touch(self, func, args, tensor, written, event):
        # Of what rows are picked from, or copied to, only those are touched.
        rows = [tensor]
        if tensor is args[0] and func._schema.name in ("aten::index_select", "aten::index_copy_"):
            rows = [tensor.select(args[1], number) for number in args[2].tolist()]
        for row in rows:
            self._check(row, written, event)

    def _check(self, tensor, written, event):
        storage = tensor.untyped_storage().data_ptr()
        if storage not in self._names:
            return
        start = tensor.storage_offset() * tensor.itemsize
        length = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        stop = start + length * tensor.itemsize
        actor, number = event
        clock = self._clocks.seen[actor]
        log = self._accesses.setdefault(storage, [])
        for low, high, wrote, other, at in log:
            if low < stop and start < high and (wrote or written) and other != actor and clock.get(other, 0) < at:
                self.found.add(self._names[storage])
        access = (start, stop, written, actor, number)
        log[:] = [each for each in log if each[:4] != access[:4]] + [access]


@pytest.fixture
def clocks(monkeypatch):
    """Clocks that the executor's streams keep."""
    clocks = Clocks()

    @contextmanager
    def use(self):
        clocks.current.append(self)
        try:
            yield
        finally:
            clocks.current.pop()

    def mark(self):
        return dict(clocks.seen.setdefault(self, {}))

    def wait(self, mark):
        clocks.join(self, mark or {})

    def finish(self):
        clocks.join(HOST, clocks.seen.setdefault(self, {}))

    for method in (use, mark, wait, finish):
        monkeypatch.setattr(streams.Stream, method.__name__, method)
    monkeypatch.setattr(cuda_executor, "finish", lambda mark: clocks.join(HOST, mark))
    return clocks


def watch_all(races, bench):
    for lane in bench.executor._banks._lanes.values():
        buffers = vars(lane.buffers)
        races.watch(**{name: each for name, each in buffers.items() if isinstance(each, torch.Tensor)})
        races.watch(**{f"feature {number}": each for number, each in enumerate(buffers["features"])})
        stages = [lane.stages.get() for _ in range(lane.stages.qsize())]
        for stage in stages:
            races.watch(**{f"stage's {name}": each for name, each in vars(stage).items()})
            lane.stages.put(stage)
    for bank in bench.executor._banks.by_structure.values():
        races.watch(slots=bank._slots, one=bank._one, index=bank._index)


def judge_much(versions, clocks):
    """Two structures, more versions than slots, parts that overlap, a swap; returns what raced."""
    bench = Bench(versions, max_batch=4, memory_mb=0.1)
    residents = [bench.add_other(seed, STFPM(width=0.125)) for seed in range(3)] + [bench.add_other(9)]
    with Races(clocks) as races:
        watch_all(races, bench)
        for turn in range(2):
            bench.executor.run(requests_for(residents, 18, turn))
            bench.executor.run([Request(residents[turn], texture(turn, 64, 64))] * 9)
            there = torch.from_numpy(texture(3))
            bench.executor.run([Request(each, there) for each in residents])
            residents[0] = bench.add_other(20 + turn, STFPM(width=0.125))
    return races.found


def test_nothing_is_touched_out_of_order(versions, clocks):
    assert judge_much(versions, clocks) == set()


def test_without_waiting_there_would_be_races(versions, clocks, monkeypatch):
    monkeypatch.setattr(streams.Stream, "wait", lambda self, mark: None)
    found = judge_much(versions, clocks)
    assert {"slots", "stage's arrived", "stage's maps", "stage's scores"} <= found


def test_a_stage_that_is_reused_too_early_would_be_a_race(versions, clocks, monkeypatch):
    monkeypatch.setattr(cuda_executor, "finish", lambda mark: None)
    assert {"stage's index", "stage's arrived", "stage's maps"} <= judge_much(versions, clocks)


def test_clocks_know_what_is_ordered(clocks):
    one, other = (streams.Stream(torch.device("cpu")) for _ in range(2))
    memory = torch.zeros(4)
    with Races(clocks) as races:
        races.watch(memory=memory)
        with one.use():
            memory[:2].add_(1)
        with other.use():
            memory[2:].add_(1)
        assert races.found == set()
        other.wait(one.mark())
        with other.use():
            memory.add_(1)
        assert races.found == set()
        memory.sum()
        assert races.found == {"memory"}
