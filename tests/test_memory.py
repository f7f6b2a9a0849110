import pytest
import torch

from models.detector import NormalBatches
from models.memory import SceneMemory

CHANNELS = (6, 10)


class Scenes(NormalBatches):
    """Smooth random features of 64 x 64 images, the same for the same seed and number."""

    def __init__(self, count: int, seed: int = 0, size: int = 16) -> None:
        generator = torch.Generator().manual_seed(seed)
        coarse = [torch.randn(count, channels, 4, 4, generator=generator) for channels in (3, *CHANNELS)]
        sizes = (2 * size, size, size // 2)
        self._features = [
            torch.nn.functional.interpolate(each, (side, side), mode="bilinear")
            for each, side in zip(coarse, sizes, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._features[0])

    def batch(self, indices):
        return torch.zeros(len(indices), 3, 8, 8), tuple(each[indices] for each in self._features)

    def chunks(self):
        return list(torch.arange(len(self)).split(4))

    def features(self, *indices: int):
        return self.batch(torch.tensor(indices))[1]


def memory(capacity: int = 64, neighbours: int = 3, components: int = 8) -> SceneMemory:
    return SceneMemory(CHANNELS, components, capacity, neighbours, attended=neighbours, temperature=0.001)


def distance(pair) -> torch.Tensor:
    return (pair.target - pair.prediction).square().sum(1)


def test_a_remembered_scene_is_predicted_and_an_unknown_one_is_not():
    seen = Scenes(10)
    trained = memory()
    trained.remember(seen)
    known, unknown = distance(trained(seen.features(2, 7))), distance(trained(Scenes(4, seed=9).features(0, 1)))
    assert known.shape == (2, 16, 16)
    assert float(known.mean()) < 0.02 * float(unknown.mean())


def test_a_change_in_one_place_shows_there():
    seen = Scenes(10)
    trained = memory()
    trained.remember(seen)
    features = [each.clone() for each in seen.features(3)]
    features[1][0, :, 4:7, 9:12] *= -1
    each = distance(trained(tuple(features)))[0]
    row, column = divmod(int(each.argmax()), 16)
    assert 3 <= row <= 7
    assert 8 <= column <= 12
    assert float(each[12:, :4].max()) < 0.05 * float(each.max())


def test_each_image_attends_to_its_own_scenes():
    seen = Scenes(12)
    trained = memory()
    trained.remember(seen)
    both, alone = trained(seen.features(1, 8)), trained(seen.features(8))
    torch.testing.assert_close(both.prediction[1:], alone.prediction, rtol=1e-4, atol=1e-5)


def test_attention_by_hand():
    """The prediction at a position is the softmax-weighted mean over the block's positions of the nearest scenes."""
    seen = Scenes(5, size=8)
    trained = SceneMemory(CHANNELS, 8, 64, neighbours=4, attended=2, temperature=0.05)
    trained.remember(seen)
    image = Scenes(1, seed=5, size=8).features(0)
    found, predicted = trained(image)
    # The second row's first block of 4 x 4, in the scenes that are alike as a whole.
    scenes = (trained.scenes.float() * trained.step).permute(0, 3, 1, 2)[trained._most_similar(image)[0]]
    wanted = found[0, :, 4:8, :4].mean((1, 2))
    nearest = (scenes[:, :, 4:8, :4].mean((2, 3)) - wanted).square().sum(1).topk(2, largest=False).indices
    # Its margin repeats the grid's border.
    padded = torch.nn.functional.pad(scenes[nearest], (1,) * 4, mode="replicate")
    keys = padded[:, :, 4:10, :6].permute(0, 2, 3, 1).reshape(-1, 8)
    query = found[0, :, 6, 2]
    shares = (-(keys - query).square().sum(1) / (2 * 0.05)).softmax(0)
    torch.testing.assert_close(predicted[0, :, 6, 2], shares @ keys, rtol=1e-3, atol=1e-4)


def test_of_too_many_scenes_the_most_different_are_kept():
    twice = Scenes(6)
    twice._features = [torch.cat([each, each]) for each in twice._features]
    trained = memory(capacity=6)
    trained.remember(twice)
    assert trained.scenes.shape == (6, 16, 16, 8)
    # One of each pair of copies, so every scene is still known.
    assert float(distance(trained(twice.features(*range(6)))).max()) < 0.02


@pytest.mark.parametrize("count", [1, 2])
def test_a_scene_or_two_are_enough(count):
    trained = memory()
    trained.remember(Scenes(count))
    assert torch.isfinite(distance(trained(Scenes(2, seed=3).features(0, 1)))).all()


@pytest.mark.parametrize(("count", "neighbours"), [(1, 3), (2, 5), (40, 48), (64, 48), (70, 48), (150, 48)])
def test_what_fills_a_memory_up_is_never_recalled(count, neighbours):
    images = Scenes(count, seed=4)
    trained = SceneMemory(CHANNELS, 8, 256, neighbours, attended=4, temperature=0.01)
    trained.remember(images)
    looked_at = (*images.features(0, count - 1),), Scenes(3, seed=9).features(0, 1, 2)
    before = [trained(features).prediction for features in looked_at]
    trained.fill_up()
    assert len(trained.codes) == len(trained.keys) == {1: 64, 2: 64, 40: 64, 64: 64, 70: 96, 150: 192}[count]
    assert trained.codes.shape[1] == trained.code_basis.shape[1] == 128
    for features, expected in zip(looked_at, before, strict=True):
        found = trained(features).prediction
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_memories_of_different_trainings_are_of_one_structure():
    def structure(count):
        trained = memory(capacity=128)
        trained.remember(Scenes(count))
        trained.fill_up()
        return {name: (each.shape, each.dtype) for name, each in trained.named_buffers()}

    assert structure(5) == structure(33) == structure(64)
    assert structure(65) == structure(96)
    assert structure(5) != structure(65)


def test_it_is_loaded_with_as_many_scenes_as_were_saved():
    trained, loaded = memory(), memory()
    trained.remember(Scenes(5))
    loaded.load_state_dict(trained.state_dict())
    assert (loaded.scenes.dtype, loaded.scenes.shape) == (torch.int8, (5, 16, 16, 8))
    assert torch.equal(loaded.scenes, trained.scenes)
    features = Scenes(2, seed=4).features(0, 1)
    assert torch.equal(loaded(features).prediction, trained(features).prediction)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("scenes"), "Missing key.*scenes"),
        (lambda state: state.update(scenes=state["scenes"][..., :4]), "scenes: no grids of 8 components"),
        (lambda state: state.update(scenes=state["scenes"][:, :4]), "scenes: no grids of 8 components"),
        (lambda state: state.update(scenes=state["scenes"][:2]), "scenes: 2 of torch.int8 do not fit 5 codes"),
        (lambda state: state.update(scenes=state["scenes"].float()), "scenes: 5 of torch.float32 do not fit"),
        (lambda state: state.update(more=torch.zeros(1)), "Unexpected key.*more"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    trained = memory()
    trained.remember(Scenes(5))
    state = trained.state_dict()
    change(state)
    with pytest.raises(RuntimeError, match=message):
        memory().load_state_dict(state)


@pytest.mark.parametrize("size", [6, 7, 8, 16])
def test_scenes_are_the_blocks_without_their_margins(size):
    trained = memory()
    trained.remember(Scenes(3, size=size))
    given = torch.randint(-127, 128, (3, size, size, 8), dtype=torch.int8)
    trained.load_state_dict(trained.state_dict() | {"scenes": given})
    assert torch.equal(trained.scenes, given)
    assert trained.side == size


def test_half_precision_networks_leave_it_as_it_is():
    trained = memory()
    trained.remember(Scenes(5))
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    for name, value in trained.to(torch.bfloat16).state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_image_of_another_size_is_compared_on_the_scenes_grid():
    trained = memory()
    trained.remember(Scenes(5))
    assert trained(Scenes(1, size=24).features(0)).target.shape == (1, 8, 16, 16)


def test_the_operator_is_the_plain_function_and_describes_its_result():
    trained = memory()
    trained.remember(Scenes(5))
    features = Scenes(2, seed=4).features(0, 1)
    plain = trained(features).prediction
    trained.by_operator = True
    torch.testing.assert_close(trained(features).prediction, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    kept = [trained.keys, trained.lengths, trained.means, trained.step, trained.absent]
    arguments = (trained(features).target, trained._most_similar(features), kept, 2, 0.01)
    torch.library.opcheck(torch.ops.proctor.recalled.default, arguments, test_utils="test_faketensor")
