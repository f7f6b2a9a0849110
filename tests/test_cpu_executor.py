"""Streams, background compiling and swaps of the engine on a CPU."""

import gc
import itertools
import os
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import texture
from test_slotted import SIZE, SMALL, remember
from test_teachers import save_resnet18
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from models.detectors import make_detector
from models.registry import Registry
from models.teachers import load_teacher
from workers import cpu_executor
from workers.compiling import BackgroundCompiler, cache_folder, take_short_turns
from workers.cpu_executor import CpuExecutor
from workers.engine import Budget, Engine, Request


def maps_of(engine, resident, count=6):
    return np.stack([each.anomaly_map for each in engine.judge([Request(resident, texture(n)) for n in range(count)])])


def test_any_number_of_streams_gives_the_same(versions):
    found = []
    for threads in (1, 3):
        engine = Engine(Registry(versions.uri), "cpu", dtype=torch.float32, budget=Budget(16, threads))
        found.append(maps_of(engine, engine.build("bolt", versions.bolt.version), 11))
        engine.close()
    np.testing.assert_allclose(found[0], found[1], atol=1e-5 * found[0].max())


@pytest.mark.parametrize(
    ("frames", "streams", "parts"),
    [
        (8, 2, [4, 4]),
        (16, 2, [8, 8]),
        (24, 2, [8, 8, 4, 4]),
        (12, 2, [4, 4, 2, 2]),
        (7, 2, [4, 2, 1]),
        (20, 1, [16, 4]),
        (1, 4, [1]),
    ],
)
def test_streams_get_equal_shares_in_few_parts(frames, streams, parts):
    assert cpu_executor.cut(frames, streams, cpu_executor._CHUNKS) == parts


def test_a_failing_stream_is_an_error_of_the_batch_and_of_no_other(engine, residents, monkeypatch):
    expected = maps_of(engine, residents["bolt"])

    def fail(*_):
        raise ArithmeticError("no such number")

    with monkeypatch.context() as patch:
        patch.setattr(cpu_executor, "_judge", fail)
        with pytest.raises(ArithmeticError, match="no such number"):
            maps_of(engine, residents["bolt"])
    np.testing.assert_array_equal(maps_of(engine, residents["bolt"]), expected)


def test_compiled_in_the_background_it_judges_the_same_and_a_new_version_compiles_nothing(versions, monkeypatch):
    times = itertools.cycle([2.0, 1.0])  # the compiled form counts as faster, however busy this machine is
    monkeypatch.setattr("models.programs._seconds", lambda call: next(times))
    engine = Engine(Registry(versions.uri), "cpu", dtype=torch.float32, budget=Budget(max_batch=1, compiled=True))
    resident = engine.build("bolt", versions.bolt.version)
    before = maps_of(engine, resident, 2)
    assert engine.ready(240)
    assert len(resident.studying._compiled) == 1
    compiled = dict(resident.studying._compiled)
    np.testing.assert_allclose(maps_of(engine, resident, 2), before, atol=1e-4 * before.max())
    newer = engine.build("bolt", versions.bolt_new.version)
    assert engine.ready(0), "nothing was given to the compiler"
    assert newer.studying is resident.studying
    assert newer.studying._compiled == compiled
    assert np.abs(maps_of(engine, newer, 2) - before).max() > 0.2 * before.max()
    engine.close()


def test_versions_of_trainings_of_different_length_share_their_programs(versions):
    executor, detector = CpuExecutor(torch.float32, Budget()), make_detector("associative", SMALL)
    teacher = executor.teacher(load_teacher("efficientnet_lite0"))
    card = versions.bolt.model_copy(update={"input_size": SIZE})
    residents = []
    for scenes in (3, 40):
        student = detector.build_student(teacher).eval()
        remember(student.memory, torch.Generator().manual_seed(scenes), scenes, code=scenes)
        residents.append(executor.resident(card, detector, student, teacher))
    assert residents[0].studying is residents[1].studying
    maps, _ = executor.run([Request(resident, texture(0)) for resident in residents])
    assert np.isfinite(maps).all()
    assert np.abs(maps[0] - maps[1]).max() > 0.01 * maps.max()
    executor.close()


def test_a_teacher_has_a_program_for_each_way_its_layers_are_laid_out(versions, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(BackgroundCompiler, "add", lambda *_: None)
    executor = CpuExecutor(torch.bfloat16, Budget(compiled=True))
    teacher = executor.teacher(load_teacher("resnet18", save_resnet18(tmp_path / "resnet18.safetensors")))
    detector = make_detector("stfpm", {"width": 0.125})
    student = detector.build_student(teacher)
    programs = {}
    for size in (64, 128, 192, 128):  # large enough for Winograd's way are no layers, those of one stage, of two
        card = versions.bolt.model_copy(update={"input_size": size})
        resident = executor.resident(card, detector, student, teacher)
        maps, scores = executor.run([Request(resident, texture(0))])
        assert maps.shape == (1, size, size)
        assert np.isfinite(scores).all()
        assert programs.setdefault(size, resident.teaching) is resident.teaching
    executor.close()
    assert len({id(program) for program in programs.values()}) == 3


def test_what_was_compiled_is_kept_where_it_survives_a_boot(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as PyTorch sets it when it is loaded
    assert cache_folder() == tmp_path / "proctor" / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/else")
    assert cache_folder() == Path("/somewhere/else")


def test_threads_that_compute_do_not_wait_long_for_one_that_compiles():
    before = sys.getswitchinterval()
    try:
        take_short_turns()
        assert sys.getswitchinterval() <= 1e-3
    finally:
        sys.setswitchinterval(before)


def test_more_threads_than_cores_are_said(caplog):
    cores = os.cpu_count() or 1
    CpuExecutor(torch.float32, Budget(threads=cores, compiled=False)).close()
    assert not caplog.text
    CpuExecutor(torch.float32, Budget(threads=cores + 1, compiled=False)).close()
    assert f"{cores + 1} threads take turns on {cores} cores" in caplog.text


def test_full_garbage_collections_wait_until_what_is_compiled_is_done():
    class Node:
        me: "Node"

    def cycles(count: int) -> list[weakref.ref[Node]]:
        nodes = [Node() for _ in range(count)]
        for node in nodes:
            node.me = node
        return [weakref.ref(node) for node in nodes[:1]]

    full: list[bool] = []
    made: list[weakref.ref[Node]] = []
    thresholds: list[int] = []
    compiling = threading.Event()

    def task() -> None:
        compiling.set()
        thresholds.append(gc.get_threshold()[2])
        for _ in range(200):
            made.extend(cycles(1000))
        compiling.clear()

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            full.append(compiling.is_set())

    before, compiler = gc.get_threshold(), BackgroundCompiler()
    gc.callbacks.append(watch)
    try:
        compiler.add("task", task)
        assert compiler.wait(60)
    finally:
        gc.callbacks.remove(watch)
        compiler.close()
    assert thresholds[0] > 10**9
    assert full == [False]  # one, after the task
    assert not any(ref() for ref in made)
    assert gc.get_threshold() == before


def test_what_cannot_be_compiled_is_computed_as_it_is(caplog):
    def fail():
        raise RuntimeError("no compiler on this machine\nand a long tale")

    done = []
    compiler = BackgroundCompiler()
    compiler.add("one", fail)
    compiler.add("two", fail)
    for _ in range(2):
        compiler.add("three", lambda: done.append(3))
    assert compiler.wait(300)
    compiler.close()
    assert done == [3]
    assert caplog.text.count("no compiler on this machine") == 1
    assert "slower but no less right: RuntimeError: no compiler on this machine" in caplog.text
    assert "long tale" not in caplog.text


def test_a_swap_is_in_place_between_two_batches_and_no_frame_is_judged_by_half_of_it(engine, residents):
    image = texture(1)
    old, new = (maps_of_one(engine, residents[name], image) for name in ("bolt", "bolt_new"))
    assert np.abs(old - new).max() > 0.2 * old.max()
    swapping, done, judged = threading.Event(), threading.Event(), []

    def judge():
        while not done.is_set():
            resident = engine.resident("bolt")
            judged.append((resident.card.version, maps_of_one(engine, resident, image)))
            swapping.set()

    thread = threading.Thread(target=judge)
    thread.start()
    assert swapping.wait(60)
    for _ in range(20):
        for name in ("bolt_new", "bolt"):
            engine.install(residents[name])
            engine.judge([Request(engine.resident("nut"), image)])
    done.set()
    thread.join()
    of = {residents["bolt"].card.version: old, residents["bolt_new"].card.version: new}
    assert set(of) >= {version for version, _ in judged}
    for version, found in judged:
        np.testing.assert_allclose(found, of[version], atol=1e-5 * old.max())


def maps_of_one(engine, resident, image):
    (judgement,) = engine.judge([Request(resident, image)])
    return judgement.anomaly_map
