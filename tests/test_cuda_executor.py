"""The executor of a GPU, run on the CPU: its buffers, slots and order of work; what needs a GPU is at the end."""

import contextlib
import gc
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import texture

from models import slotted_conv
from models.detectors import DETECTORS, make_detector
from models.errors import ModelError
from models.inference import infer, prepare, to_input
from models.preprocess import fit_to_input
from models.registry import Registry
from models.slotted_kernel import is_tuning
from models.stfpm import STFPM
from models.teachers import load_teacher
from models.versions import restore
from workers import banks, cuda_executor, graphs
from workers.cuda_executor import CudaExecutor
from workers.device_faults import is_fault, is_out_of_memory
from workers.errors import DeviceFault
from workers.executor import Budget, Request
from workers.graphs import Captures, Graphs, capacities_up_to, capturing
from workers.slot_table import SlotTable

CPU = torch.device("cpu")
TWO_SLOTS = 0.1  # megabytes: less than one version takes, and two there always are
WIDE = STFPM(width=0.25)  # another structure than the published versions


class Bench:
    """An executor with versions in it, and what each frame must give."""

    def __init__(self, versions, device=CPU, dtype=torch.float32, **budget):
        self.executor = CudaExecutor(device, dtype, Budget(**{"max_batch": 8, **budget}))
        self.plain = prepare(load_teacher("efficientnet_lite0"), device, dtype)
        self.teacher = self.executor.teacher(load_teacher("efficientnet_lite0"))
        self._registry, self._versions, self._prepared = Registry(versions.uri), versions, {}

    def add(self, name):
        """Bring a published version."""
        card = getattr(self._versions, name)
        return self._add(card, *restore(card, self._registry.load_student(card.product, card.version)[1], self.teacher))

    def add_other(self, seed, detector=WIDE):
        """Bring an unpublished version of any structure."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = detector.build_student(self.teacher).eval()
        return self._add(replace_product(self._versions.bolt, f"other{seed}"), detector, student)

    def _add(self, card, detector, student):
        resident = self.executor.resident(card, detector, student, self.teacher)
        self._prepared[resident.held.serial] = prepare(student, self.executor.device, self.executor.dtype)
        return resident

    def expected(self, resident, image):
        """The map of one frame by the plain networks."""
        fitted = torch.from_numpy(fit_to_input(image, resident.card.input_size))[None].to(self.executor.device)
        with torch.no_grad():
            images = to_input(fitted, self.plain, self.executor.dtype)
            maps, _ = infer(resident.detector, self._prepared[resident.held.serial], images, self.plain(images))
        return maps[0].float().cpu().numpy()

    def assert_judged(self, requests, tolerance=1e-5):
        maps, scores = self.executor.run(requests)
        size = requests[0].resident.card.input_size
        assert (maps.shape, maps.dtype) == ((len(requests), size, size), np.float32)
        assert (scores.shape, scores.dtype) == ((len(requests),), np.float64)
        for request, found, score in zip(requests, maps, scores, strict=True):
            expected = self.expected(request.resident, request.image)
            assert np.abs(found - expected).max() <= tolerance * expected.max()
            assert score == pytest.approx(expected.max(), rel=tolerance)
        return maps


def replace_product(card, product):
    return card.model_copy(update={"product": product})


def requests_for(residents, count, first=0):
    """Frames that take turns between residents."""
    return [Request(residents[row % len(residents)], texture(first + row, 40 + row, 90)) for row in range(count)]


@pytest.fixture
def bench(versions):
    return Bench(versions)


# --- batches


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 20])
def test_mixed_batches_of_any_size_give_every_frame_its_own_map(bench, count):
    residents = [bench.add("bolt"), bench.add_other(1), bench.add("nut"), bench.add("bolt_new"), bench.add_other(2)]
    bench.assert_judged(requests_for(residents, count))
    assert len(bench.executor._banks.by_structure) == 2


def test_detectors_of_every_kind_share_a_batch(versions):
    bench = Bench(versions)
    kinds = {name: {"width": 0.125} for name in DETECTORS if name != "fcl"}
    kinds["fcl"] = {"host": "reverse", "host_options": {"width": 0.125}, "snc": {"form": "masked"}}
    residents = [
        bench.add_other(seed, make_detector(name, options)) for name, options in kinds.items() for seed in (1, 2)
    ]
    requests = requests_for(residents, 2 * len(residents))
    maps, scores = bench.executor.run(requests)
    for request, found, score in zip(requests, maps, scores, strict=True):
        expected = bench.expected(request.resident, request.image)
        assert np.abs(found - expected).max() <= 1e-5 * expected.max()
        method = request.resident.detector
        assert score == pytest.approx(float(method.score(torch.from_numpy(expected)[None])), rel=1e-5)
    assert len(bench.executor._banks.by_structure) == len(DETECTORS)


def test_half_precision_stays_near_full_precision(versions):
    bench = Bench(versions, dtype=torch.bfloat16)
    residents = [bench.add("bolt"), bench.add("nut")]
    bench.assert_judged(requests_for(residents, 5), 0.05)
    assert residents[0].held.bank._student.statistics.scale.dtype == torch.float32


def test_a_batch_of_one_product_goes_through_plain_networks(bench):
    bolt, nut = bench.add("bolt"), bench.add("nut")
    for resident in (bolt, nut, nut, bolt):
        bench.assert_judged(requests_for([resident], 3))
    bench.assert_judged(requests_for([bolt, nut], 4))
    bench.assert_judged(requests_for([bolt], 1))


def test_input_sizes_have_their_own_way(bench):
    bench.assert_judged(requests_for([bench.add("bolt")], 3))
    bench.assert_judged(requests_for([bench.add("washer")], 3))
    assert len(bench.executor._banks._lanes) == 2


def test_what_an_earlier_batch_left_in_the_buffers_shows_nowhere(bench):
    bolt, nut = bench.add("bolt"), bench.add("nut")
    bench.assert_judged(requests_for([bolt, nut], 8, first=50))
    lane = bolt.held.bank.lane
    lane.buffers.maps.fill_(torch.nan)
    lane.buffers.images[3:].fill_(torch.nan)
    bench.assert_judged(requests_for([bolt, nut], 3))
    assert lane.buffers.maps[3:-1].isnan().all()


def test_images_on_the_device_and_on_the_host_may_be_mixed(bench):
    bolt = bench.add("bolt")
    images = [texture(seed, 64, 64) for seed in range(4)]
    expected, _ = bench.executor.run([Request(bolt, image) for image in images])
    mixed = [torch.from_numpy(image) if row % 2 else image for row, image in enumerate(images)]
    found, _ = bench.executor.run([Request(bolt, image) for image in mixed])
    assert np.array_equal(expected, found)
    all_there, _ = bench.executor.run([Request(bolt, torch.from_numpy(image)) for image in images])
    assert np.array_equal(expected, all_there)


def test_images_on_the_device_of_several_sizes_are_each_fitted(bench, monkeypatch):
    bolt = bench.add("bolt")
    monkeypatch.setattr(cuda_executor, "_FITTED_VALUES", 3 * 90 * 70 * 2)  # so many of the size below at once: two
    sizes = [(90, 70), (90, 70), (90, 70), (64, 64), (40, 50), (40, 50), (90, 70)]
    images = [texture(seed, *size) for seed, size in enumerate(sizes)]
    expected, _ = bench.executor.run([Request(bolt, fit_to_input(image, bolt.card.input_size)) for image in images])
    found, _ = bench.executor.run([Request(bolt, torch.from_numpy(image)) for image in images])
    for one, other in zip(expected, found, strict=True):  # they differ by a grey level here and there
        assert np.abs(one - other).max() <= 0.05 * one.max()


def test_a_student_without_numbers_touches_no_other_row(bench):
    residents = [bench.add("bolt"), bench.add("nut")]
    requests = requests_for(residents, 6)
    before, _ = bench.executor.run(requests)
    bank, blank = residents[1].held.bank, torch.full((residents[1].held.row.nbytes // 4,), torch.nan)
    bank._slots[bank.table.slot(residents[1].held.serial)].copy_(blank.view(torch.uint8))
    after, scores = bench.executor.run(requests)
    assert np.array_equal(before[::2], after[::2])
    assert np.isnan(after[1::2]).all()
    assert np.isnan(scores[1::2]).all()


class Spotted(STFPM):
    """Looks at the last corner of the map only, and gives no number in the first where a map is not all dark."""

    def fuse(self, maps, size, statistics):
        fused = super().fuse(maps, size, statistics)
        first = torch.arange(size, device=fused.device) == 0
        bright = fused.amax((-2, -1), keepdim=True) > 0
        return fused.masked_fill(first[:, None] & first & bright, torch.nan)

    def score(self, fused):
        return fused[:, -1, -1]


@pytest.mark.parametrize("products", [1, 2])
def test_one_value_that_is_no_number_makes_no_score_even_where_the_method_does_not_look(bench, products):
    spotted = [bench.add_other(seed, Spotted(width=0.25)) for seed in range(products)]
    bolt = bench.add("bolt")
    maps, scores = bench.executor.run(requests_for(spotted, 4) + requests_for([bolt], 2))
    assert np.isnan(maps[:4]).sum(axis=(1, 2)).tolist() == [1] * 4
    assert np.isnan(scores).tolist() == [True] * 4 + [False] * 2


def test_what_is_no_picture_is_refused_and_leaves_nothing_behind(bench):
    bolt = bench.add("bolt")
    for _ in range(5):  # more often than there are stages
        with pytest.raises(ModelError, match=r"expected \(H, W, 3\) uint8"):
            bench.executor.run([Request(bolt, np.zeros((4, 4), np.uint8))])
    bench.assert_judged(requests_for([bolt], 2))


def test_a_version_of_another_executor_is_refused(bench, residents):
    with pytest.raises(TypeError, match="another executor"):
        bench.executor.run([Request(residents["bolt"], texture(1))])


def test_threads_may_judge_side_by_side(bench):
    residents = [bench.add("bolt"), bench.add("nut"), bench.add_other(1)]
    failures = []

    def judge(first):
        try:
            for turn in range(4):
                bench.assert_judged(requests_for(residents, 20, first + turn))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=judge, args=(100 * number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert failures == []


# --- slots


def test_more_versions_than_slots_take_turns(versions):
    bench = Bench(versions, memory_mb=TWO_SLOTS)
    residents = [bench.add_other(seed) for seed in range(4)]
    bank = residents[0].held.bank
    assert bank.table.slots == 2
    for turn in range(2):
        bench.assert_judged(requests_for(residents, 8, turn))
        bench.assert_judged(requests_for(residents[turn : turn + 2], 4))
        bench.assert_judged(requests_for(residents[2:], 4))


def test_a_small_budget_leaves_room_for_two(versions):
    bench = Bench(versions, memory_mb=TWO_SLOTS)
    residents = [bench.add("bolt"), bench.add("nut"), bench.add("bolt_new")]
    bank = residents[0].held.bank
    assert (bank.table.slots, residents[0].nbytes) == (2, bank.layout.nbytes)
    bench.assert_judged(requests_for(residents, 6))


def test_the_budget_says_how_many_versions_lie_beside_each_other(versions):
    bench = Bench(versions, memory_mb=20)
    bank = bench.add("bolt").held.bank
    assert bank.table.slots == int(10e6 / bank.layout.nbytes)
    assert bank.nbytes <= 20e6


def test_a_version_that_is_gone_leaves_its_slot_and_a_structure_its_memory(bench):
    bolt, other = bench.add("bolt"), bench.add_other(1)
    table = bolt.held.bank.table
    assert table.free() == table.slots - 1
    bench.assert_judged([Request(bolt, texture(1))])
    del bolt
    gc.collect()
    assert table.free() == table.slots
    third = bench.add_other(3, STFPM(width=0.375))
    assert len(bench.executor._banks.by_structure) == 2
    bench.assert_judged(requests_for([other, third], 4))


def test_copies_of_a_resident_share_its_slot(bench):
    bolt = bench.add("bolt")
    again = replace(bolt, card=replace_product(bolt.card, "again"))
    bench._prepared[again.held.serial] = bench._prepared[bolt.held.serial]
    bench.assert_judged(requests_for([bolt, again], 4))
    table = bolt.held.bank.table
    assert table.free() == table.slots - 1


def test_the_resident_shows_its_student(bench):
    bolt = bench.add("bolt")
    own = bench._prepared[bolt.held.serial]
    for name, tensor in own.state_dict().items():
        assert torch.equal(bolt.student.state_dict()[name], tensor)


def test_a_hot_swap_is_seen_whole_or_not_at_all(versions):
    bench = Bench(versions, memory_mb=TWO_SLOTS)
    serving = [bench.add("bolt")]
    image = texture(1, 64, 64)
    valid = [bench.expected(serving[0], image)]
    stop, seen, failures = threading.Event(), [], []

    def judge():
        try:
            while not stop.is_set():
                maps, _ = bench.executor.run([Request(serving[0], image)] * 3)
                seen.extend(maps)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=judge)
    thread.start()
    for seed in range(11, 15):
        new = bench.add_other(seed, STFPM(width=0.125))  # built as the one in service
        valid.append(bench.expected(new, image))
        serving[0] = new
        count = len(seen)
        deadline = time.monotonic() + 60
        while len(seen) < count + 6 and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
    stop.set()
    thread.join(timeout=60)
    assert failures == []
    nearest = [min(range(len(valid)), key=lambda n: np.abs(valid[n] - found).max()) for found in seen]
    for found, number in zip(seen, nearest, strict=True):
        assert np.abs(valid[number] - found).max() <= 1e-5 * valid[number].max()
    assert nearest == sorted(nearest)
    assert set(nearest) == set(range(len(valid)))


def test_a_slot_whose_copy_failed_is_written_again(bench, monkeypatch):
    residents = [bench.add_other(seed) for seed in (1, 2)]
    bank = residents[0].held.bank
    for resident in residents:
        bank.table.forget(resident.held.serial)
    bank._slots.fill_(255)
    row, residents[1].held.row = residents[1].held.row, torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="must match"):
        bench.executor.run(requests_for(residents, 4))
    residents[1].held.row = row
    bench.assert_judged(requests_for(residents, 4))


def test_slots_are_taken_from_who_was_not_used_for_longest():
    table = SlotTable(3)
    assert table.assign([10, 11, 12, 10]) == {10: 0, 11: 1, 12: 2}
    assert table.assign([10]) == {}
    assert table.assign([13, 12]) == {13: 1}
    table.forget(10)
    assert table.free() == 1
    assert table.assign([14]) == {14: 0}
    assert (table.slot(12), table.slot(13), table.slot(14)) == (2, 1, 0)
    with pytest.raises(ValueError, match="4 versions do not fit 3 slots"):
        table.assign([1, 2, 3, 4])
    table.forget(999)
    assert table.free() == 0


# --- trouble


def failing(executor, monkeypatch, error_of):
    """Let batches fail by their size; returns the sizes that were tried."""
    tried, queue = [], executor._queue

    def queue_or_fail(lane, stage, requests):
        tried.append(len(requests))
        error = error_of(len(requests))
        if error is not None:
            raise error
        queue(lane, stage, requests)

    monkeypatch.setattr(executor, "_queue", queue_or_fail)
    return tried


SHORT = [torch.OutOfMemoryError("CUDA out of memory."), torch.AcceleratorError("CUDA error: out of memory")]
BROKEN = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_a_batch_that_does_not_fit_the_memory_is_halved_for_good(bench, monkeypatch, caplog, error):
    residents = [bench.add("bolt"), bench.add("nut")]
    tried = failing(bench.executor, monkeypatch, lambda count: error if count > 2 else None)
    bench.assert_judged(requests_for(residents, 7))
    assert tried == [7, 2, 2, 2, 1]
    assert bench.executor.max_batch == 2
    bench.assert_judged(requests_for(residents, 4))
    assert tried[5:] == [2, 2]
    assert sum("out of memory" in record.message for record in caplog.records) == 1
    bench.assert_judged(requests_for([bench.add_other(1)], 3))


def test_one_frame_that_does_not_fit_the_memory_is_an_error(bench, monkeypatch):
    residents = [bench.add("bolt")]
    failing(bench.executor, monkeypatch, lambda count: SHORT[0])
    for _ in range(4):
        with pytest.raises(torch.OutOfMemoryError):
            bench.executor.run(requests_for(residents, 5))
    assert bench.executor.max_batch == 1
    monkeypatch.undo()
    bench.assert_judged(requests_for(residents, 3))


def test_a_structure_that_does_not_fit_the_memory_is_captured_for_smaller_batches(bench, monkeypatch):
    captured = []

    def capture(self, job, compute, capacity):
        if capacity > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        captured.append(capacity)
        return lambda: job.do(compute, capacity)

    monkeypatch.setattr(Graphs, "capture", capture)
    bolt = bench.add("bolt")
    assert bench.executor.max_batch == 4
    assert set(captured) == {1, 2, 4}
    bench.assert_judged(requests_for([bolt, bench.add("nut")], 9))


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: str(error)[:20])
def test_a_broken_device_stays_broken(bench, monkeypatch, caplog, error):
    bolt = bench.add("bolt")
    failing(bench.executor, monkeypatch, lambda count: error)
    with pytest.raises(DeviceFault, match=r"cpu is broken: (CUDA|cuDNN) error"):
        bench.executor.run(requests_for([bolt], 2))
    monkeypatch.undo()
    with pytest.raises(DeviceFault, match="cpu is broken"):
        bench.executor.run(requests_for([bolt], 2))
    with pytest.raises(DeviceFault, match="cpu is broken"):
        bench.add("nut")
    assert sum("is broken" in record.message for record in caplog.records) == 1


def test_other_errors_are_no_fault_of_the_device(bench, monkeypatch):
    bolt = bench.add("bolt")
    failing(bench.executor, monkeypatch, lambda count: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        bench.executor.run(requests_for([bolt], 2))
    monkeypatch.undo()
    bench.assert_judged(requests_for([bolt], 2))


def test_errors_are_told_apart():
    assert all(is_out_of_memory(error) and not is_fault(error) for error in SHORT)
    assert all(is_fault(error) and not is_out_of_memory(error) for error in BROKEN)
    ended = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    assert is_fault(ended)
    ended.__context__ = SHORT[0]
    assert is_out_of_memory(ended)
    assert not is_fault(ValueError("CUDA error"))


# --- captures and compiling


def test_capacities_are_few():
    assert capacities_up_to(1) == (1,)
    assert capacities_up_to(8) == (1, 2, 4, 8)
    assert capacities_up_to(48) == (1, 2, 4, 8, 16, 32, 48)


def test_padding_is_to_the_next_capacity(bench):
    looks = bench.add("bolt").held.bank.lane.looks
    assert [looks.capacity(count) for count in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]


def test_nothing_is_captured_when_versions_or_mixes_change(bench, monkeypatch):
    residents = [bench.add("bolt"), bench.add_other(1)]
    captured = []
    monkeypatch.setattr(Graphs, "capture", lambda *arguments: captured.append(arguments))
    residents += [bench.add("nut"), bench.add("bolt_new"), bench.add_other(2)]
    for count in (1, 5, 8):
        bench.assert_judged(requests_for(residents, count))
    assert captured == []


@pytest.fixture
def adopted(monkeypatch):
    """The captures that have taken compiled networks."""
    told, adopt = [], Captures.adopt

    def adopt_and_tell(self, compute, pause, *, ends_only=False):
        assert is_tuning()  # of the kernel's tiles: beside the work, never before a version serves
        adopt(self, compute, pause, ends_only=ends_only)
        told.append((self, ends_only))

    monkeypatch.setattr(Captures, "adopt", adopt_and_tell)
    return told


def test_compiled_networks_take_their_places_while_judging_goes_on(versions, monkeypatch, adopted):
    compiled = []

    def compile_(compute, dynamic, options):
        compiled.append(options)
        return compute

    monkeypatch.setattr(torch, "compile", compile_)
    bench = Bench(versions, compiled=True)
    residents = [bench.add("bolt"), bench.add("nut")]
    bench.assert_judged(requests_for(residents, 8))
    assert bench.executor.ready(60)
    assert not is_tuning()
    assert [ends_only for _, ends_only in adopted] == [False] * 3 + [True] * 3  # what takes minutes comes last
    bench.assert_judged(requests_for(residents, 8))
    bench.assert_judged(requests_for(residents[:1], 8))
    bench.executor.close()
    assert compiled == [None] * 3 + [banks._TUNED] * 3


def test_a_structure_that_is_gone_leaves_its_memory_to_others_though_it_was_compiled(versions, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda compute, dynamic, options: compute)
    bench = Bench(versions, compiled=True)
    gone = bench.add_other(1)
    assert bench.executor.ready(60)
    bank = weakref.ref(gone.held.bank)
    del gone
    bench._prepared.clear()
    gc.collect()
    bench.add_other(2, STFPM(width=0.375))
    assert bench.executor.ready(60)
    gc.collect()
    assert bank() is None
    bench.executor.close()


def test_a_version_does_not_wait_for_what_is_compiled_for_others(versions, monkeypatch):
    """Without a graph until then; where there is no CUDA there are none, so what asks for one is played."""
    monkeypatch.setattr(graphs, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(Graphs, "_captured", lambda *_: pytest.fail("captured beside another"))
    made = Graphs(CPU, patient=False)
    monkeypatch.setattr(made._stream, "cuda", object())
    done = []

    class Work:
        def do(self, compute, capacity):
            done.append((compute, capacity))

    with capturing:
        captures = Captures(made, (1, 4), Work(), "plain")
    captures(4)
    assert (done, captures.lacks_graphs) == ([("plain", 4)], True)


def test_what_takes_minutes_is_done_for_full_batches_and_single_frames_only():
    class Told:
        exist = False

        def capture(self, job, compute, capacity, patient=False):
            return compute, capacity

    captures = Captures(Told(), (1, 2, 4, 8), None, "plain")
    captures.adopt("tuned", contextlib.nullcontext, ends_only=True)
    assert captures._works == {8: ("tuned", 8), 4: ("plain", 4), 2: ("plain", 2), 1: ("tuned", 1)}


def test_a_failing_compiler_is_heard_once_and_costs_nothing(versions, monkeypatch, caplog):
    def compile_(compute, dynamic, options):
        raise RuntimeError("no compiler for this")

    monkeypatch.setattr(torch, "compile", compile_)
    bench = Bench(versions, compiled=True)
    residents = [bench.add("bolt"), bench.add_other(1)]
    assert bench.executor.ready(60)
    bench.assert_judged(requests_for(residents, 5))
    bench.executor.close()
    assert caplog.text.count("no compiler for this") == 1


# --- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: graphs, streams and slots")


def assert_fast(residents):
    """What is right without graphs or without the kernel would hide that they do not work."""
    assert slotted_conv._kernel_works
    for resident in residents:
        bank = resident.held.bank
        assert not any(captures.lacks_graphs for captures in (bank.lane.looks, bank.mixed, bank.plain))


@needs_gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 5e-2)], ids=str)
def test_graphs_give_what_plain_networks_give(versions, dtype, tolerance):
    bench = Bench(versions, torch.device("cuda"), dtype)
    residents = [bench.add("bolt"), bench.add("nut"), bench.add_other(1)]
    for count in (1, 3, 8, 20):
        bench.assert_judged(requests_for(residents, count), tolerance)
        bench.assert_judged(requests_for(residents[:1], count), tolerance)
    assert_fast(residents)


@needs_gpu
def test_graphs_are_captured_once(versions, monkeypatch):
    bench = Bench(versions, torch.device("cuda"), torch.float16, memory_mb=TWO_SLOTS)
    residents = [bench.add("bolt"), bench.add("nut")]
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", None)
    residents += [bench.add("bolt_new"), bench.add_other(5, STFPM(width=0.125))]
    for count in (1, 5, 8, 20):
        bench.assert_judged(requests_for(residents, count), 5e-2)


@needs_gpu
@pytest.mark.timeout(1500)  # every convolution is timed in several forms
def test_compiled_graphs_give_what_plain_networks_give(versions, adopted):
    bench = Bench(versions, torch.device("cuda"), torch.float16, compiled=True, max_batch=2)
    residents = [bench.add("bolt"), bench.add("nut")]
    assert bench.executor.ready(1400)
    assert len(adopted) == 6
    bench.assert_judged(requests_for(residents, 6), 5e-2)
    bench.assert_judged(requests_for(residents[:1], 6), 5e-2)
    assert_fast(residents)
