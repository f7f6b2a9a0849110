import pytest
import torch
from torch.nn import functional as F

from models.aggregation import local_aggregation
from models.contextual import SHARED, ContextualBlock, ContextualTransformer


def by_unfolding(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = values.shape
    groups = weights.shape[1] // 9
    windows = F.unfold(values, 3, padding=1).view(batch, groups, channels // groups, 9, height, width)
    return (windows * weights.view(batch, groups, 1, 9, height, width)).sum(dim=3).flatten(1, 2)


def inputs(channels: int, groups: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(channels)
    values = torch.randn(2, channels, 5, 4, generator=generator, dtype=dtype, requires_grad=True)
    weights = torch.randn(2, groups * 9, 5, 4, generator=generator, dtype=dtype, requires_grad=True)
    return values, weights


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (16, 2), (6, 3), (4, 4)])
def test_aggregation_is_a_weighted_sum_over_the_neighbourhood(channels, groups):
    values, weights = inputs(channels, groups)
    torch.testing.assert_close(local_aggregation(values, weights), by_unfolding(values, weights))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_aggregation_has_unfoldings_gradients(layout):
    values, weights = inputs(16, 2)
    gradient = torch.randn(2, 16, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = torch.autograd.grad(by_unfolding(values, weights), (values, weights), gradient)
    out = local_aggregation(values.to(memory_format=layout), weights.to(memory_format=layout))
    for own, wanted in zip(torch.autograd.grad(out, (values, weights), gradient), expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_a_kernel_that_holds_only_its_centre_changes_nothing():
    values, _ = inputs(8, 1)
    weights = torch.zeros(2, 9, 5, 4, dtype=torch.float64)
    weights[:, 4] = 1
    assert torch.equal(local_aggregation(values, weights), values)


def test_the_kernels_of_a_position_see_its_neighbours_through_static_context():
    torch.manual_seed(0)
    layer = ContextualTransformer(16).eval()
    layer.attention[4] = torch.nn.Identity()  # group normalisation would see the whole map
    features = torch.randn(1, 16, 9, 9)
    changed = features.clone()
    changed[..., 4, 4] += 1

    def kernels(given: torch.Tensor, static: torch.Tensor) -> torch.Tensor:
        return layer.attention(torch.cat([given, static], dim=1))

    def reach(before: torch.Tensor, after: torch.Tensor) -> list[list[int]]:
        places = ((after - before).abs().sum(dim=1)[0] > 1e-6).nonzero()
        return [places.amin(0).tolist(), places.amax(0).tolist()]

    with torch.inference_mode():
        static = layer.static(features)
        assert reach(kernels(features, static), kernels(changed, layer.static(changed))) == [[3, 3], [5, 5]]
        # From the input alone they would see their own position only.
        assert reach(kernels(features, static), kernels(changed, static)) == [[4, 4], [4, 4]]


def test_block_keeps_the_residual_blocks_shape():
    block = ContextualBlock(16, 16, 1, None)
    features = torch.randn(2, 16, 8, 8)
    out = block(features)
    assert out.shape == features.shape
    assert any(isinstance(module, ContextualTransformer) for module in block.modules())
    assert SHARED == 8
