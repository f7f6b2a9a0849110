"""Which version is in service: pointers on a real server, and replicas that follow them."""

import json
import threading
from pathlib import Path

import pytest
import torch

from models.detectors import DETECTORS
from models.errors import VersionError
from models.registry import Registry
from workers import residency as residency_module
from workers.engine import Engine
from workers.errors import NoModel, StreamUnavailable
from workers.pointers import CURRENT, PREVIOUS, Pointers
from workers.residency import Residency


@pytest.fixture
def pointers(server, registry):
    return Pointers(server, registry)


@pytest.fixture
def empty(registry):
    """An engine that has nothing in service yet."""
    return Engine(registry, "cpu", dtype=torch.float32)


@pytest.fixture
def residency(empty, pointers):
    return Residency(empty, pointers, poll_s=3600.0)


def folder(registry: Registry, product: str, version: str = "") -> Path:
    return Path(registry.uri.removeprefix("file://"), product, version)


# --- pointers


def test_promoting_moves_the_pointers(pointers, versions):
    assert pointers.current() == pointers.of("bolt") == {}
    pointers.promote("bolt", versions.bolt.version)
    assert pointers.of("bolt") == {CURRENT: versions.bolt.version}
    pointers.promote("bolt", versions.bolt_new.version)
    pointers.promote("nut", versions.nut.version)
    assert pointers.of("bolt") == {CURRENT: versions.bolt_new.version, PREVIOUS: versions.bolt.version}
    assert pointers.current() == {"bolt": versions.bolt_new.version, "nut": versions.nut.version}


def test_rolling_back_and_forth(pointers, versions):
    for card in (versions.bolt, versions.bolt_new):
        pointers.promote("bolt", card.version)
    pointers.promote("bolt", pointers.of("bolt")[PREVIOUS])
    assert pointers.of("bolt") == {CURRENT: versions.bolt.version, PREVIOUS: versions.bolt_new.version}
    pointers.promote("bolt", pointers.of("bolt")[PREVIOUS])
    assert pointers.of("bolt") == {CURRENT: versions.bolt_new.version, PREVIOUS: versions.bolt.version}


def test_promoting_what_is_in_service_keeps_the_way_back(pointers, versions):
    for card in (versions.bolt, versions.bolt_new, versions.bolt_new):
        pointers.promote("bolt", card.version)
    assert pointers.of("bolt")[PREVIOUS] == versions.bolt.version


@pytest.mark.parametrize("version", ["20261123T014512-3fa9", "nonsense", ""])
def test_only_a_version_that_is_there_is_promoted(pointers, versions, version):
    pointers.promote("bolt", versions.bolt.version)
    with pytest.raises(VersionError, match=r"^[^\n]+$"):
        pointers.promote("bolt", version)
    assert pointers.of("bolt") == {CURRENT: versions.bolt.version}


def test_a_version_that_this_program_would_judge_otherwise_is_not_promoted(pointers, versions, monkeypatch):
    pointers.promote("bolt", versions.bolt.version)
    monkeypatch.setattr(DETECTORS[versions.bolt.detector.name], "revision", 99)
    with pytest.raises(VersionError, match="has revision 99 and its threshold would not hold; train the product again"):
        pointers.promote("bolt", versions.bolt_new.version)
    assert pointers.of("bolt") == {CURRENT: versions.bolt.version}


def test_an_emptied_server_gets_the_pointers_back_from_the_registry(server, registry, pointers, versions):
    for card in (versions.bolt, versions.bolt_new, versions.nut):
        pointers.promote(card.product, card.version)
    before = {name: pointers.of(name) for name in ("bolt", "nut", "washer")}
    server.flushall()
    assert pointers.current() == {}
    Pointers(server, registry).restore()
    assert {name: pointers.of(name) for name in ("bolt", "nut", "washer")} == before
    assert pointers.current() == {"bolt": versions.bolt_new.version, "nut": versions.nut.version}


def test_what_the_server_knows_is_newer_than_the_copy(server, registry, pointers, versions):
    pointers.promote("bolt", versions.bolt.version)
    copy = (folder(registry, "bolt") / "pointers.json").read_bytes()
    pointers.promote("bolt", versions.bolt_new.version)
    (folder(registry, "bolt") / "pointers.json").write_bytes(copy)
    pointers.restore()
    assert pointers.current() == {"bolt": versions.bolt_new.version}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"current": 3}'])
def test_a_malformed_copy_is_one_line_and_keeps_no_other_back(server, registry, pointers, versions, content):
    pointers.promote("nut", versions.nut.version)
    server.flushall()
    (folder(registry, "bolt") / "pointers.json").write_text(content)
    with pytest.raises(VersionError, match=r"bolt/pointers\.json malformed; delete it") as caught:
        pointers.restore()
    assert "\n" not in str(caught.value)
    assert pointers.current() == {"nut": versions.nut.version}


def test_the_copy_is_plain_json(registry, pointers, versions):
    pointers.promote("bolt", versions.bolt.version)
    assert json.loads((folder(registry, "bolt") / "pointers.json").read_text()) == {CURRENT: versions.bolt.version}


@pytest.mark.parametrize(
    "call",
    [
        lambda pointers, card: pointers.current(),
        lambda pointers, card: pointers.of("bolt"),
        lambda pointers, card: pointers.promote("bolt", card.version),
        lambda pointers, card: Residency(None, pointers, 1.0).start(),
    ],
    ids=["current", "of", "promote", "residency"],
)
def test_a_server_that_is_gone_is_our_own_error(mortal, registry, versions, call):
    client = mortal.client()
    mortal.kill()
    with pytest.raises(StreamUnavailable, match=r"^Redis did not answer: "):
        call(Pointers(client, registry), versions.bolt)
    client.close()


# --- replicas


def test_the_engine_is_brought_to_the_pointers(empty, residency, pointers, versions):
    pointers.promote("bolt", versions.bolt.version)
    pointers.promote("washer", versions.washer.version)
    residency.follow()
    assert empty.residents() == pointers.current()
    pointers.promote("bolt", versions.bolt_new.version)
    residency.follow()
    assert empty.residents() == pointers.current()
    assert residency.require("bolt").card == versions.bolt_new
    pointers.promote("bolt", pointers.of("bolt")[PREVIOUS])
    residency.follow()
    assert residency.require("bolt").card == versions.bolt


def test_what_is_in_service_is_not_loaded_again(empty, residency, pointers, versions):
    pointers.promote("bolt", versions.bolt.version)
    residency.follow()
    resident = empty.resident("bolt")
    residency.follow()
    assert residency.require("bolt") is empty.resident("bolt") is resident


def test_a_version_that_was_just_promoted_is_loaded_when_it_is_needed(residency, pointers, versions):
    with pytest.raises(NoModel, match=r"^no model for this product$"):
        residency.require("bolt")
    pointers.promote("bolt", versions.bolt.version)
    assert residency.require("bolt").card == versions.bolt


def test_a_product_without_model_waits_for_nobody_elses_version(residency, pointers, versions, empty, monkeypatch):
    """While one version loads, for however long, the loop gets its answer about another product."""
    loading, answered = threading.Event(), threading.Event()

    def slow(product: str, version: str, build=empty.build):
        loading.set()
        assert answered.wait(timeout=60)
        return build(product, version)

    monkeypatch.setattr(empty, "build", slow)
    pointers.promote("bolt", versions.bolt.version)
    thread = threading.Thread(target=residency.follow)
    thread.start()
    assert loading.wait(timeout=60)
    with pytest.raises(NoModel):
        residency.require("nut")
    answered.set()
    thread.join()
    assert residency.require("bolt").card == versions.bolt


def test_two_who_want_a_version_load_it_once(residency, pointers, versions, empty, monkeypatch):
    wanted, loaded = threading.Semaphore(0), []

    def bring(product: str, real=residency._bring):
        wanted.release()
        real(product)

    def build(product: str, version: str, real=empty.build):
        loaded.append(version)
        for _ in range(2 if len(loaded) == 1 else 0):  # until both have seen that it is not in service
            assert wanted.acquire(timeout=60)
        return real(product, version)

    monkeypatch.setattr(residency, "_bring", bring)
    monkeypatch.setattr(empty, "build", build)
    pointers.promote("bolt", versions.bolt.version)
    threads = [threading.Thread(target=residency.follow) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert loaded == [versions.bolt.version]


def damage(registry: Registry, card) -> Path:
    student = folder(registry, card.product, card.version) / "student.safetensors"
    student.write_bytes(student.read_bytes()[:-1] + b"\xff")
    return student


def test_a_bad_version_leaves_the_old_one_in_service(residency, pointers, registry, versions, caplog):
    pointers.promote("bolt", versions.bolt.version)
    residency.follow()
    damage(registry, versions.bolt_new)
    pointers.promote("bolt", versions.bolt_new.version)
    pointers.promote("nut", versions.nut.version)
    for _ in range(3):
        residency.follow()
    assert residency.require("bolt").card == versions.bolt
    assert residency.require("nut").card == versions.nut  # products behind it are followed all the same
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 1
    assert f"bolt: version {versions.bolt_new.version} cannot be put into service" in said[0]


@pytest.mark.parametrize("card", ["bolt", "blank"])
def test_without_an_old_version_the_reason_is_given(residency, pointers, registry, versions, card):
    card = getattr(versions, card)
    if card.product == "bolt":
        damage(registry, card)
    pointers.promote(card.product, card.version)
    for _ in range(2):
        with pytest.raises(NoModel, match=rf"^version {card.version} cannot be loaded: [^\n]+$"):
            residency.require(card.product)


def test_a_version_that_could_not_be_loaded_is_tried_again(residency, pointers, registry, versions, monkeypatch):
    monkeypatch.setattr(residency_module, "_RETRY_S", 0.0)
    student = folder(registry, "bolt", versions.bolt.version) / "student.safetensors"
    content = student.read_bytes()
    student.unlink()  # a store that is away for a moment
    pointers.promote("bolt", versions.bolt.version)
    residency.follow()
    student.write_bytes(content)
    with pytest.raises(NoModel):
        residency.require("bolt")
    residency.follow()
    assert residency.require("bolt").card == versions.bolt


def test_a_failure_nobody_foresaw_holds_up_no_other_product(residency, pointers, versions, empty, monkeypatch):
    tried = []

    def fail(product: str, version: str, build=empty.build):
        tried.append(product)
        if product == "bolt":
            raise RuntimeError("out of memory\nsecond line")
        return build(product, version)

    monkeypatch.setattr(empty, "build", fail)
    pointers.promote("bolt", versions.bolt.version)
    pointers.promote("nut", versions.nut.version)
    for _ in range(3):
        residency.follow()
    assert residency.require("nut").card == versions.nut
    with pytest.raises(NoModel, match=r"cannot be loaded: RuntimeError: out of memory$"):
        residency.require("bolt")
    assert tried == ["bolt", "nut"]  # not again and again


def test_pointers_are_followed_in_the_background_until_stopped(empty, pointers, versions, monkeypatch):
    installed = threading.Semaphore(0)

    def install(resident, real=empty.install):
        real(resident)
        installed.release()

    monkeypatch.setattr(empty, "install", install)
    residency = Residency(empty, pointers, poll_s=0.01)
    pointers.promote("bolt", versions.bolt.version)
    residency.start()
    assert installed.acquire(timeout=60)
    pointers.promote("bolt", versions.bolt_new.version)
    assert installed.acquire(timeout=60)
    assert empty.residents() == {"bolt": versions.bolt_new.version}
    residency.stop()
    assert "residency" not in [thread.name for thread in threading.enumerate()]
    residency.stop()


def test_following_goes_on_after_the_server_was_away(empty, mortal, registry, versions, monkeypatch):
    missed, installed = threading.Event(), threading.Event()
    client = mortal.client()
    pointers = Pointers(client, registry)
    monkeypatch.setattr(residency_module.logger, "warning", lambda *_: missed.set())

    def install(resident, real=empty.install):
        real(resident)
        installed.set()

    monkeypatch.setattr(empty, "install", install)
    residency = Residency(empty, pointers, poll_s=0.01)
    residency.start()
    mortal.kill()
    assert missed.wait(timeout=60)
    mortal.start()
    pointers.promote("bolt", versions.bolt.version)
    assert installed.wait(timeout=60)
    residency.stop()
    client.close()
