"""Networks made ready to infer compute what they computed."""

import pytest
import torch
from torch import nn

from models.backbones import ResNetBackbone
from models.folding import Shift, fold_batchnorm, pool_first

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 4 - 2


def normalised(network: nn.Module) -> nn.Module:
    """A network whose normalisations shift and scale, each channel otherwise, as after a training."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.running_mean, module.bias.data):
                values.copy_(torch.rand(values.shape, generator=generator) * 2 - 1)
            for values in (module.running_var, module.weight.data):
                values.copy_(torch.rand(values.shape, generator=generator) + 0.5)
    return network.eval()


def stem() -> nn.Sequential:
    torch.manual_seed(2)
    return normalised(
        nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    )


@torch.no_grad()
def test_a_stem_pools_first_and_computes_the_same():
    folded = fold_batchnorm(stem(), (IMAGES,))
    moved = pool_first(folded, (IMAGES,))
    assert [type(each) for each in moved] == [nn.Conv2d, nn.MaxPool2d, Shift, nn.ReLU]
    assert moved[0].bias is None
    assert folded[0].bias is not None
    torch.testing.assert_close(moved(IMAGES), folded(IMAGES), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_of_the_same_sums_pooling_first_gives_the_same_bits():
    """In half precision too: rounding keeps the order of values, so it does not matter when it is done."""
    generator = torch.Generator().manual_seed(3)
    sums = torch.randn(4, 16, 32, 32, generator=generator).half()
    shift, relu, pool = Shift(torch.randn(16, generator=generator).half()), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    assert torch.equal(relu(shift(pool(sums))), pool(relu(shift(sums))))


@torch.no_grad()
@pytest.mark.parametrize("width", [1.0, 0.25])
def test_a_backbone_pools_first_under_the_names_that_it_has(width):
    torch.manual_seed(4)
    network = normalised(ResNetBackbone((64, 128, 256), width))
    moved = pool_first(fold_batchnorm(network, (IMAGES,)), (IMAGES,))
    assert isinstance(moved.bn1, nn.MaxPool2d)
    for found, expected in zip(moved(IMAGES), network(IMAGES), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


class Listing(nn.Module):
    """Lists its layers in the order of a stem and computes in another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.nothing = nn.Conv2d(3, 8, 3, padding=1), nn.Identity()
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.pool(self.nothing(self.conv(images))) - self.relu(images.mean())


class Indexing(Listing):
    """Its pooling gives more than values, and comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, return_indices=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.relu(self.nothing(self.conv(self.pool(images)[0])))


@pytest.mark.parametrize("network", [Listing(), Indexing()], ids=["other numbers", "no numbers"])
def test_layers_that_only_look_like_a_stem_are_left_alone(network):
    network.eval()
    assert pool_first(network, (IMAGES,)) is network
