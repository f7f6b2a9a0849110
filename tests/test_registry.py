import errno
import json
import multiprocessing
import os
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from models.cards import DetectorRecord, ModelDraft, TeacherRecord, TrainingRecord
from models.errors import VersionError
from models.images import TrainingImage
from models.registry import Registry
from models.settings import TrainingSettings

STATE = {"weight": torch.arange(6.0).reshape(2, 3), "count": torch.tensor(3)}


def draft(product: str = "cells", **changes) -> ModelDraft:
    fields = {
        "product": product,
        "detector": DetectorRecord(name="stfpm", options={"width": 0.25, "hardest": 0.1}),
        "teacher": TeacherRecord(name="efficientnet_lite0", weights_sha256="ab" * 32),
        "input_size": 128,
        "threshold": 0.125,
        "false_reject_rate": 0.01,
        "calibration_scores": [0.01, 0.02],
        "training": TrainingRecord(
            images=[TrainingImage(id="a.png", sha256="cd" * 32)],
            sources=["/line/3"],
            settings=TrainingSettings(),
            seconds=12.5,
            steps=400,
        ),
    }
    return ModelDraft(**fields | changes)


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "registry")


def test_what_is_published_comes_back(registry):
    card = registry.publish(draft(creator="ann", metrics={"image_auroc": 0.94}), STATE)
    loaded, state = registry.load_student("cells", card.version)
    assert loaded == card
    assert loaded.training.images[0].id == "a.png"
    assert loaded.metrics == {"image_auroc": 0.94}
    assert set(state) == set(STATE)
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)
    assert re.fullmatch(r"\d{8}T\d{6}-[0-9a-f]{4}", card.version)
    assert registry.latest("cells") == card


def test_a_file_address_is_the_same_place(registry):
    card = registry.publish(draft(), STATE)
    assert Registry(registry.uri).versions("cells") == [card]
    assert registry.uri.startswith("file://")


def test_other_file_systems_than_the_local_one():
    # Arrow's in-memory file system takes the way that object stores take.
    registry = Registry("mock:///registry")
    card = registry.publish(draft(), STATE)
    assert registry.products() == ["cells"]
    assert registry.versions("cells") == [card]
    assert torch.equal(registry.load_student("cells", card.version)[1]["weight"], STATE["weight"])


def test_useless_address():
    with pytest.raises(VersionError, match="registry: cannot open"):
        Registry("gopher://registry")


def test_versions_are_oldest_first_and_products_apart(registry):
    assert registry.products() == []
    cards = [registry.publish(draft(parent=None), STATE) for _ in range(12)]
    other = registry.publish(draft("bolts"), STATE)
    assert registry.versions("cells") == cards
    assert registry.latest("cells") == cards[-1]
    assert registry.versions("bolts") == [other]
    assert registry.products() == ["bolts", "cells"]


def test_absent_versions(registry):
    assert registry.versions("cells") == []
    with pytest.raises(VersionError, match="no version of product 'cells'"):
        registry.latest("cells")
    with pytest.raises(VersionError, match="has no version cells/20261123T014512-3fa9"):
        registry.card("cells", "20261123T014512-3fa9")


@pytest.mark.parametrize(("product", "version"), [("../etc", "20261123T014512-3fa9"), ("cells", ".."), ("", "x")])
def test_names_cannot_leave_the_registry(registry, product, version):
    with pytest.raises(VersionError, match=r"is no (product name|version id)"):
        registry.load_student(product, version)
    with pytest.raises(ValidationError):
        draft("../etc")


def test_half_written_versions_are_not_listed(registry):
    card = registry.publish(draft(), STATE)
    product = Path(registry.uri.removeprefix("file://")) / "cells"
    crashed = product / "20991231T235959-ffff"
    crashed.mkdir()
    (crashed / "student.safetensors").write_bytes(b"whole")
    (crashed / ".model.json.0011.part").write_text("{")
    (product / "notes").mkdir()
    assert registry.versions("cells") == [card]
    assert registry.latest("cells") == card
    with pytest.raises(VersionError, match="no version"):
        registry.load_student("cells", crashed.name)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "malformed"), ("{", "malformed"), ("[]", "malformed"), ('{"product": 3}', "malformed: product")],
)
def test_malformed_card(registry, content, message):
    card = registry.publish(draft(), STATE)
    folder(registry, card).joinpath("model.json").write_text(content)
    with pytest.raises(VersionError, match=message) as caught:
        registry.card("cells", card.version)
    assert "\n" not in str(caught.value)
    assert card.version in str(caught.value)


def test_card_of_another_version(registry):
    first, second = registry.publish(draft(), STATE), registry.publish(draft(), STATE)
    folder(registry, first).joinpath("model.json").write_text(second.to_json())
    with pytest.raises(VersionError, match=f"belongs to cells/{second.version}"):
        registry.card("cells", first.version)


def test_damaged_and_missing_student(registry):
    card = registry.publish(draft(), STATE)
    student = folder(registry, card) / "student.safetensors"
    data = bytearray(student.read_bytes())
    data[-1] ^= 1
    student.write_bytes(data)
    with pytest.raises(VersionError, match="damaged"):
        registry.load_student("cells", card.version)
    student.unlink()
    with pytest.raises(VersionError, match="cannot read"):
        registry.load_student("cells", card.version)


def test_other_teacher_weights_are_refused(registry):
    card = registry.publish(draft(), STATE)
    card.check_teacher("ab" * 32)
    with pytest.raises(VersionError, match="other weights of teacher efficientnet_lite0"):
        card.check_teacher("cd" * 32)


@pytest.mark.parametrize("failing_file", ["student.safetensors", "model.json"])
def test_full_disk_publishes_nothing(registry, monkeypatch, failing_file):
    kept = registry.publish(draft(), STATE)
    rename = Path.replace

    def full(self, target):
        if Path(target).name == failing_file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(VersionError, match="No space left on device") as caught:
        registry.publish(draft(), STATE)
    assert "\n" not in str(caught.value)
    assert registry.versions("cells") == [kept]
    assert os.listdir(folder(registry, kept).parent) == [kept.version]


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(VersionError, match="cannot write"):
        Registry(tmp_path / "file").publish(draft(), STATE)


def test_readers_never_see_a_version_without_its_student(registry, monkeypatch):
    seen = []
    write = registry._storage.write

    def look(path, data):
        write(path, data)
        for card in registry.versions("cells"):
            seen.append(path.rsplit("/", 1)[1])
            registry.load_student("cells", card.version)

    monkeypatch.setattr(registry._storage, "write", look)
    registry.publish(draft(), STATE)
    assert seen == ["model.json"]


def publish_some(uri: str, count: int) -> None:
    registry = Registry(uri)
    for _ in range(count):
        registry.publish(draft(), STATE)


def test_two_publishers_at_once(registry):
    context = multiprocessing.get_context("spawn")
    publishers = [context.Process(target=publish_some, args=(registry.uri, 25)) for _ in range(2)]
    for publisher in publishers:
        publisher.start()
    while any(publisher.is_alive() for publisher in publishers):
        for card in registry.versions("cells"):
            registry.load_student("cells", card.version)
    for publisher in publishers:
        publisher.join()
        assert publisher.exitcode == 0
    versions = [card.version for card in registry.versions("cells")]
    assert len(versions) == len(set(versions)) == 50


def test_a_product_folder_that_appears_while_it_is_listed(registry):
    class Racing:
        def get_file_info(self, selector):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    registry._storage._fs = Racing()
    assert registry.versions("cells") == []


def test_one_version_id_is_given_once(registry, monkeypatch):
    digits = iter(["0000", "0000", "0000", "1111"])
    monkeypatch.setattr("models.registry.secrets.token_hex", lambda count: next(digits) if count == 2 else "ff" * count)
    monkeypatch.setattr("models.registry._now", lambda: datetime(2026, 11, 23, 1, 45, 12, tzinfo=UTC))
    cards = [registry.publish(draft(), STATE) for _ in range(2)]
    assert [card.version for card in cards] == ["20261123T014512-0000", "20261123T014512-1111"]


def test_model_json_is_plain_json(registry):
    card = registry.publish(draft(), STATE)
    document = json.loads(folder(registry, card).joinpath("model.json").read_text())
    assert document["version"] == card.version
    assert document["detector"] == {"name": "stfpm", "options": {"width": 0.25, "hardest": 0.1}, "revision": 1}
    assert document["created_at"].endswith("Z")


def folder(registry: Registry, card) -> Path:
    return Path(registry.uri.removeprefix("file://")) / card.product / card.version
