"""Mixed batches: every frame gets its own product's map, whatever its neighbours are."""

import threading

import numpy as np
import pytest
import torch
from conftest import texture, with_student

from models import inference
from models.cards import ModelCard
from models.errors import ModelError, TeacherError, VersionError
from models.inference import best_dtype, to_input
from models.preprocess import fit_to_input
from models.registry import Registry
from models.stfpm import STFPM
from models.teachers import load_teacher
from models.versions import restore
from workers.engine import Budget, Engine, Judgement, Request, Resident

# Largest difference between a frame's map in a mixed batch and alone, relative to the map's maximum. Measured over
# students of width 1/8 to 1, 64 to 256 pixels, batches of 1 to 32, on a CPU with AMX: 4e-7 in float32, none in
# bfloat16. In bfloat16 a kernel chosen by the batch's size may round otherwise: one step is 2**-8 = 0.4 %.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
# Measured in the same way: at most 4 % between bfloat16 and float32, at least 36 % between two products.
HALF_PRECISION = 0.08
DISTINCT = 0.2

NAMES = ("bolt", "bolt_new", "nut", "washer")


def difference(one: Judgement, other: Judgement) -> float:
    """Of two maps, relative to the larger maximum."""
    largest = max(one.anomaly_map.max(), other.anomaly_map.max())
    return float(np.abs(one.anomaly_map - other.anomaly_map).max() / largest)


def alone(engine: Engine, resident: Resident, image: np.ndarray) -> Judgement:
    (judgement,) = engine.judge([Request(resident, image)])
    return judgement


@pytest.fixture(scope="module", params=list(TOLERANCE), ids=["float32", "bfloat16"])
def loaded(request, versions):
    """An engine of each precision, with four versions that it holds."""
    engine = Engine(Registry(versions.uri), "cpu", dtype=request.param, budget=Budget(max_batch=16, threads=2))
    return engine, {
        name: engine.build(getattr(versions, name).product, getattr(versions, name).version) for name in NAMES
    }


@pytest.mark.parametrize("seed", range(3))
def test_a_mixed_batch_gives_every_frame_the_map_it_gets_alone(loaded, seed):
    engine, versions = loaded
    generator = np.random.default_rng(seed)
    batch = []
    for number in range(14):
        height, width = generator.integers(40, 120, 2)
        name = NAMES[generator.integers(len(NAMES))] if number >= len(NAMES) else NAMES[number]
        batch.append(Request(versions[name], texture(100 * seed + number, int(height), int(width))))
    generator.shuffle(batch)
    for request, judgement in zip(batch, engine.judge(batch), strict=True):
        size = request.resident.card.input_size
        assert judgement.card is request.resident.card
        assert judgement.infer_ms > 0
        assert (judgement.anomaly_map.shape, judgement.anomaly_map.dtype) == ((size, size), np.float32)
        assert judgement.score == pytest.approx(judgement.anomaly_map.max(), rel=1e-6)
        assert difference(judgement, alone(engine, request.resident, request.image)) <= TOLERANCE[engine.dtype]
        for other in versions.values():
            if other is not request.resident and other.card.input_size == size:
                swapped = alone(engine, other, request.image)
                assert difference(judgement, swapped) > DISTINCT > 10 * TOLERANCE[engine.dtype]


def test_half_precision_stays_near_full_precision(loaded, residents, engine):
    half, versions = loaded
    for name in NAMES:
        image = texture(3, 80, 90)
        assert difference(alone(half, versions[name], image), alone(engine, residents[name], image)) < HALF_PRECISION


@pytest.mark.parametrize("name", ["bolt", "washer"])
def test_the_engine_computes_what_the_plain_networks_compute(versions, engine, residents, name):
    card = getattr(versions, name)
    teacher = load_teacher(card.teacher.name)
    detector, student = restore(*Registry(versions.uri).load_student(card.product, card.version), teacher)
    image = texture(5, 90, 70)
    fitted = torch.from_numpy(fit_to_input(image, card.input_size))[None]
    with torch.inference_mode():
        inputs = to_input(fitted, teacher, torch.float32)
        maps = detector.scale_maps(student(inputs, teacher(inputs)))
        expected = detector.fuse(maps, card.input_size, student.statistics)[0].numpy()
    judgement = alone(engine, residents[name], image)
    np.testing.assert_allclose(judgement.anomaly_map, expected, atol=1e-4 * expected.max())
    assert judgement.score == pytest.approx(expected.max(), rel=1e-4)


def test_a_student_without_numbers_spoils_nobody_elses_frames(engine, residents):
    names = ["bolt", "blank", "nut", "blank", "bolt"]
    judged = engine.judge([Request(residents[name], texture(seed)) for seed, name in enumerate(names)])
    for seed, (name, judgement) in enumerate(zip(names, judged, strict=True)):
        if name == "blank":
            assert not np.isfinite(judgement.score)
        else:
            assert np.isfinite(judgement.score)
            assert difference(judgement, alone(engine, residents[name], texture(seed))) <= 1e-5


class Cornered(STFPM):
    """A method that looks at one corner of the map only."""

    def score(self, fused):
        return fused[:, -1, -1]


def test_one_value_that_is_no_number_makes_no_score_even_where_the_method_does_not_look(engine, residents):
    class Spotted(torch.nn.Module):
        """Gives numbers but for one position of the second frame."""

        statistics = residents["bolt"].student.statistics

        def forward(self, images, features):
            low, *others = residents["bolt"].student(images, features)
            prediction = low.prediction.clone()
            prediction[1, 0, 0, 0] = torch.nan
            return low._replace(prediction=prediction), *others

    spotted = with_student(residents["bolt"], Spotted(), Cornered(width=0.125))
    scores = [each.score for each in engine.judge([Request(spotted, texture(seed)) for seed in range(4)])]
    assert np.isfinite(scores).tolist() == [True, False, True, True]


def test_pictures_that_may_not_be_written_to_are_judged(engine, residents):
    image = texture(1, 64, 64)
    frozen = image.copy()
    frozen.flags.writeable = False
    assert difference(alone(engine, residents["bolt"], frozen), alone(engine, residents["bolt"], image)) == 0


def test_an_empty_batch_is_no_work(engine):
    assert engine.judge([]) == []


def test_what_is_no_picture_is_refused(engine, residents):
    with pytest.raises(ModelError, match=r"expected \(H, W, 3\) uint8"):
        alone(engine, residents["bolt"], np.zeros((4, 4), np.uint8))


# --- versions


def test_products_share_one_teacher(residents):
    assert len({id(resident.teacher) for resident in residents.values()}) == 1


def test_a_swap_falls_between_two_batches(engine, residents, versions):
    image, before = texture(1), engine.resident("bolt")
    old = alone(engine, before, image)
    engine.install(residents["bolt_new"])
    assert engine.residents()["bolt"] == versions.bolt_new.version
    assert engine.resident("nut").card.version == versions.nut.version
    new = alone(engine, engine.resident("bolt"), image)
    assert new.card.version == versions.bolt_new.version
    assert difference(old, new) > DISTINCT
    # a batch that was put together before the swap is judged by the version it was put together for
    assert difference(alone(engine, before, image), old) == 0
    assert engine.resident("absent") is None


def test_a_version_is_built_while_others_judge(registry, residents, versions):
    engine = Engine(registry, "cpu", dtype=torch.float32)
    engine.install(engine.build("bolt", versions.bolt.version))
    expected = alone(engine, engine.resident("bolt"), texture(1))
    judging, done, judged = threading.Event(), threading.Event(), []

    def judge() -> None:
        while not done.is_set():
            judged.append(alone(engine, engine.resident("bolt"), texture(1)))
            judging.set()

    thread = threading.Thread(target=judge)
    thread.start()
    assert judging.wait(timeout=60)
    built = [engine.build("bolt", versions.bolt_new.version), engine.build("washer", versions.washer.version)]
    done.set()
    thread.join()
    assert {each.card.version for each in judged} == {versions.bolt.version}
    assert max(difference(each, expected) for each in judged) <= 1e-5
    assert [resident.card for resident in built] == [versions.bolt_new, versions.washer]
    assert engine.residents() == {"bolt": versions.bolt.version}


def rewrite(registry: Registry, card: ModelCard, old: str, new: str) -> None:
    path = f"{registry.uri.removeprefix('file://')}/{card.product}/{card.version}/model.json"
    with open(path) as file:
        text = file.read()
    assert old in text
    with open(path, "w") as file:
        file.write(text.replace(old, new))


def test_a_student_of_another_teacher_is_refused(registry, versions):
    rewrite(registry, versions.bolt, versions.bolt.teacher.weights_sha256, "0" * 64)
    engine = Engine(registry, "cpu", dtype=torch.float32)
    with pytest.raises(VersionError, match=r"was trained with other weights of teacher efficientnet_lite0") as caught:
        engine.build("bolt", versions.bolt.version)
    assert "\n" not in str(caught.value)
    assert engine.residents() == {}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"width": 0.125', '"width": 0.25', "student does not fit"),
        ('"stfpm"', '"unheard-of"', 'unknown detector: "unheard-of"'),
        ('"name": "efficientnet_lite0"', '"name": "unheard-of"', 'unknown teacher: "unheard-of"'),
    ],
)
def test_a_version_that_does_not_fit_is_one_line(registry, versions, old, new, message):
    rewrite(registry, versions.nut, old, new)
    with pytest.raises(ModelError, match=message) as caught:
        Engine(registry, "cpu").build("nut", versions.nut.version)
    assert "\n" not in str(caught.value)


def test_a_version_that_is_not_there_is_one_line(registry):
    with pytest.raises(VersionError, match="has no version bolt/20261123T014512-3fa9"):
        Engine(registry, "cpu").build("bolt", "20261123T014512-3fa9")


def test_a_version_of_no_numbers_is_not_put_into_service(registry, versions):
    with pytest.raises(VersionError, match=r"^version blank/[^ ]*: its weights are not all finite numbers$"):
        Engine(registry, "cpu").build("blank", versions.blank.version)


def test_configured_teacher_weights_are_used(registry, versions):
    with pytest.raises(TeacherError, match=r"/no/such\.file: no such file"):
        Engine(registry, "cpu", {"efficientnet_lite0": "/no/such.file"}).build("bolt", versions.bolt.version)


def test_device_and_precision_are_chosen_when_none_is_named(registry):
    engine = Engine(registry)
    assert engine.dtype == best_dtype(engine.device)
    with pytest.raises(ModelError, match="unknown device 'abacus'; allowed: auto, cpu, cuda, cuda:N"):
        Engine(registry, "abacus")


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "gain", "chosen"),
    [
        (False, True, 1.9, torch.bfloat16),
        (False, True, 1.0, torch.float32),
        (True, True, 1.0, torch.bfloat16),
        (False, False, 1.9, torch.float32),
    ],
    ids=["gains", "gains nothing", "has matrix units", "cannot"],
)
def test_a_processor_computes_in_bfloat16_where_it_gains(monkeypatch, amx, avx512_bf16, gain, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(inference, "_bfloat16_gain", lambda: gain)
    assert best_dtype(torch.device("cpu")) == chosen


def test_the_gain_of_bfloat16_is_measured_once_a_process():
    gain = inference._bfloat16_gain()
    assert gain > 0
    assert inference._bfloat16_gain() == gain
