import math

import pytest
import torch
from torch.nn import functional as F

from models.detector import Pair
from models.detectors import make_detector
from models.errors import ModelError
from models.fcl import FCL, affinity
from models.reverse import Reverse
from models.snc import SNC, MaskedCentre
from models.stfpm import STFPM


def random_pair(seed: int = 0, channels: int = 6, size: int = 7) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(*(torch.randn(2, channels, size, size, generator=generator) for _ in range(2)))


def neighbours(features: torch.Tensor, row: int, column: int, radius: int) -> list[torch.Tensor]:
    """The unit features around an inner position of the first image, row by row."""
    unit = F.normalize(features, dim=1)[0]
    steps = range(-radius, radius + 1)
    return [unit[:, row + i, column + j] for i in steps for j in steps if (i, j) != (0, 0)]


@pytest.mark.parametrize("radius", [1, 2])
def test_softmax_aggregation_by_hand(radius):
    pair = random_pair()
    (coded,) = SNC(form="softmax", radius=radius, temperature=0.1).aggregated((pair,))
    own = F.normalize(pair.target, dim=1)[0][:, 3, 3]
    around = torch.stack(neighbours(pair.target, 3, 3, radius))
    shares = ((around @ own) / 0.1).softmax(0)
    torch.testing.assert_close(coded.target[0][:, 3, 3], own + shares @ around)


@pytest.mark.parametrize("radius", [1, 2])
def test_uniform_aggregation_by_hand(radius):
    pair = random_pair()
    (coded,) = SNC(form="uniform", radius=radius).aggregated((pair,))
    own = F.normalize(pair.prediction, dim=1)[0][:, 3, 3]
    window = torch.stack([own, *neighbours(pair.prediction, 3, 3, radius)])
    torch.testing.assert_close(coded.prediction[0][:, 3, 3], own + window.mean(0))


def test_relation_code_by_hand():
    pair = random_pair()
    codes = []
    for features in pair:
        own = F.normalize(features, dim=1)[0][:, 2, 4]
        codes.append(((torch.stack(neighbours(features, 2, 4, 1)) @ own) / 0.1).log_softmax(0))
    theirs, own = codes
    expected = sum(float(t.exp() * (t - o)) for t, o in zip(theirs, own, strict=True))
    assert float(SNC(form="relation").relation_map(pair)[0, 2, 4]) == pytest.approx(expected, abs=1e-5)


def test_relation_code_sees_no_rotation_of_all_features():
    """Cosines between neighbours stay when every feature turns alike, so the code compares structure alone."""
    target = random_pair().target
    turned, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))
    prediction = torch.einsum("dc,bchw->bdhw", turned, target)
    assert float(SNC(form="relation").relation_map(Pair(target, prediction)).max()) < 1e-5


@pytest.mark.parametrize("radius", [1, 2])
def test_masked_centre_never_sees_the_centre(radius):
    torch.manual_seed(0)
    predict = MaskedCentre(4, radius)
    features = torch.randn(1, 4, 9, 9)
    changed = features.clone()
    changed[..., 4, 4] += 5
    difference = (predict(changed) - predict(features)).abs().sum(dim=1)[0]
    assert float(difference[4, 4].detach()) == 0
    assert float(difference[4, 4 + radius].detach()) > 0


@pytest.mark.parametrize("form", ["softmax", "uniform"])
def test_equal_features_have_no_distance_whatever_their_code(form):
    target = random_pair().target
    (each,) = FCL(snc=SNC(form=form)).scale_maps((Pair(target, target.clone()),))
    assert float(each.max()) < 1e-6


def test_without_coding_and_high_level_it_is_its_host():
    pairs = (random_pair(0), random_pair(1))
    plain = FCL(host_options={"hardest": 0.2}, snc=SNC(form="none"), flattened=0, affinity=0, embedding=0)
    host = STFPM(hardest=0.2)
    assert float(plain.loss(pairs)) == float(host.loss(pairs))
    for own, theirs in zip(plain.scale_maps(pairs), host.scale_maps(pairs), strict=True):
        assert torch.equal(own, theirs)


def test_predictors_of_masked_centres_must_be_trained():
    with pytest.raises(ModelError, match=r"snc.form 'masked' has predictors to train"):
        make_detector("fcl", {"snc": {"form": "masked", "place": "map"}})


def test_masked_centres_count_in_loss_and_map():
    pairs = (random_pair(0), random_pair(1))
    loss, both = (FCL(snc=SNC(form="masked", place=place)) for place in ("loss", "both"))
    host = FCL(snc=SNC(form="none"))
    added = STFPM().loss(pairs[1:])
    assert float(loss.loss(pairs)) == pytest.approx(float(host.loss(pairs[:1]) + added), rel=1e-5)
    assert len(loss.scale_maps(pairs)) == 1
    assert torch.equal(both.scale_maps(pairs)[1], STFPM().scale_maps(pairs[1:])[0])


@pytest.mark.parametrize("form", ["softmax", "uniform", "relation"])
def test_place_decides_where_the_code_counts(form):
    pairs = (random_pair(0),)
    none = FCL(snc=SNC(form="none"))
    loss, where, both = (FCL(snc=SNC(form=form, place=place)) for place in ("loss", "map", "both"))
    assert float(loss.loss(pairs)) == float(both.loss(pairs)) != pytest.approx(float(none.loss(pairs[:1])))
    assert float(where.loss(pairs)) == pytest.approx(float(none.loss(pairs[:1])))
    assert torch.equal(loss.scale_maps(pairs)[0], none.scale_maps(pairs[:1])[0])
    for one, other in zip(where.scale_maps(pairs), both.scale_maps(pairs), strict=True):
        assert torch.equal(one, other)
    assert len(both.scale_maps(pairs)) == (1 if form in ("softmax", "uniform") else 2)


def test_flattened_weighs_positions_by_their_strength():
    """(3, 0) against (3, 0) and (0, 1) against (1, 0): the low-level distance takes both positions alike."""
    target = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
    prediction = torch.tensor([[3.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
    bare = FCL(snc=SNC(form="none"), flattened=0, affinity=0, embedding=0)
    weighed = bare.model_copy(update={"flattened": 1.0})
    pairs = (Pair(target, prediction),)
    # 1 - 9 / 10 of the whole map, where the mean over positions is 1 / 2.
    assert float(weighed.loss(pairs)) - float(bare.loss(pairs)) == pytest.approx(0.1, abs=1e-6)
    assert float(bare.loss(pairs)) == pytest.approx(0.5, abs=1e-6)


def test_a_host_that_is_none_is_named():
    with pytest.raises(ModelError, match=r"detector fcl, option 'host': .*'stfpm', 'asymts' or 'reverse'"):
        make_detector("fcl", {"host": "associative"})


def test_the_hosts_defaults_are_written_down_and_its_fusion_refused():
    recorded = FCL(host="reverse", host_options={"width": 0.25}).model_dump()["host_options"]
    assert recorded == Reverse(width=0.25).model_dump(exclude={"fusion"})
    with pytest.raises(ModelError, match="set fusion beside host_options"):
        make_detector("fcl", {"host_options": {"fusion": {"kind": "sum"}}})


def test_high_level_terms_by_hand():
    # One image, one cell: two channels, (1, 0) against (1, 1).
    target = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    prediction = torch.tensor([1.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    pairs = (Pair(target, prediction),)
    cosine = 1 / math.sqrt(2)
    bare = FCL(snc=SNC(form="none"), flattened=0, affinity=0, embedding=0)
    base = float(bare.loss(pairs))
    for term in ("flattened", "embedding"):
        weighed = bare.model_copy(update={term: 2.0})
        assert float(weighed.loss(pairs)) - base == pytest.approx(2 * (1 - cosine), abs=1e-6)
    # Every cell equals every other in both, so the affinities agree.
    assert float(bare.model_copy(update={"affinity": 2.0}).loss(pairs)) == pytest.approx(base, abs=1e-6)
    assert affinity(target).shape == (1, 16, 16)


def test_gradients_are_finite_at_dead_features():
    prediction = torch.zeros(1, 4, 8, 8, requires_grad=True)
    FCL(snc=SNC(form="softmax")).loss((Pair(torch.zeros(1, 4, 8, 8), prediction),)).backward()
    assert prediction.grad.isfinite().all()
