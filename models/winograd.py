"""Convolutions of 3 x 3 by Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin and Gray, CVPR 2016).

Tiles of 4 x 4 positions become 16 numbers by additions alone, the 16 are multiplied by as many transformed weights,
and additions give 2 x 2 results: 16 multiplications for what takes 36. What the additions cost is less than that saves
where a layer is large. Rounding in bfloat16 weighs about twice as much as in a plain convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

from models.geometry import Geometry

# Below this the additions cost what the multiplications save. On an EPYC with AVX512-BF16, compiled, one or four frames
# at a time: 1.2 to 1.5 times as fast as oneDNN with 64 channels of 64 x 64 to 256 of 16 x 16 positions, 0.7 to 1 times
# with 64 channels of 16 x 16, no gain with 32 channels.
_LEAST_CHANNELS, _LEAST_VALUES = 64, 2**16
_GEOMETRY = Geometry(padding=(1, 1))

_OF_WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])
_OF_TILES = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_OF_RESULTS = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]])
# The last two for both axes at once: (16, 16) and (4, 16).
_OF_WHOLE_TILES, _OF_WHOLE_RESULTS = (torch.kron(each, each) for each in (_OF_TILES, _OF_RESULTS))

_OPERATORS = torch.library.Library("proctor", "FRAGMENT")
_OPERATORS.define("padded(Tensor x) -> Tensor")

Finish = Callable[[Tensor, Tensor | None], Tensor]


def pays(weight: Tensor, geometry: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a convolution is faster so, compiled, on this machine.

    Args:
        weight: (K, C, 3, 3) of any type; in float32 it loses (0.7 times as fast on an EPYC, where PyTorch multiplies
            matrices at 0.4 of the rate of oneDNN's convolutions), and matrix units (AMX) are faster than additions.
        geometry: `Geometry.numbers`.
        shape: (B, C, H, W) of its input.
    """
    return (
        weight.dtype == torch.bfloat16
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= _LEAST_CHANNELS
        and Geometry.from_numbers(geometry) == _GEOMETRY
        and weight.shape[1] * shape[2] * shape[3] >= _LEAST_VALUES
        and shape[2] % 2 == shape[3] % 2 == 0
        and not torch.cpu._is_amx_tile_supported()
    )


def transform(weight: Tensor) -> Tensor:
    """Return (K, C, 3, 3) weights as `convolve` takes them, (16, C, K)."""
    found = torch.einsum("ay,kcyx,bx->abck", _OF_WEIGHTS, weight.float(), _OF_WEIGHTS)
    return found.reshape(16, weight.shape[1], weight.shape[0]).to(weight.dtype)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, finish: Finish, added: Tensor | None = None) -> Tensor:
    """Convolve 3 x 3, stride 1, with a border of zeros.

    Args:
        x: (B, C, H, W), fastest in channels_last.
        weight: (16, C, K) of `transform`.
        bias: (K,).
        finish: What follows, position by position: maps a part of the result, of any shape, and that of `added`.
        added: (B, K, H, W), for `finish`.

    Returns:
        (B, K, H, W) of x's type in channels_last; of odd sides, a view of that.
    """
    height, width = x.shape[2:]
    tiles = torch.ops.proctor.padded(x)
    rows, columns = tiles.shape[1] // 2 - 1, tiles.shape[2] // 2 - 1
    # The compiler makes one pass of many small steps; without it each would be a pass, and matrix products are few.
    parts, joined = (_parts, _joined) if get_proxy_mode() else (_parts_eagerly, _joined_eagerly)
    products = torch.bmm(parts(tiles, rows, columns), weight)
    products = products.view(4, 4, x.shape[0], rows, columns, -1)
    if added is not None:
        added = added.permute(0, 2, 3, 1)
        if height % 2 or width % 2:
            added = F.pad(added, (0, 0, 0, width % 2, 0, height % 2))
    return joined(products, bias, finish, added)[:, :height, :width].permute(0, 3, 1, 2)


def _padded(x: Tensor) -> Tensor:
    """Return (B, C, H, W) with a border of zeros and even sides as (B, H', W', C)."""
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + x.shape[3] % 2, 1, 1 + x.shape[2] % 2)).contiguous()


def _padded_shape(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.new_empty(batch, height + 2 + height % 2, width + 2 + width % 2, channels)


# An operator of its own, since the compiler would ask at each of 16 x 4 reads whether it meets the border.
_OPERATORS.impl("padded", _padded, "CPU")
torch.library.register_fake("proctor::padded", _padded_shape, lib=_OPERATORS)


def _parts(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Return the 16 numbers of each tile, (16, B x rows x columns, C)."""

    def mixed(of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return of[0] - of[2], of[1] + of[2], of[2] - of[1], of[1] - of[3]

    reads = [[tiles[:, y : y + 2 * rows : 2, x : x + 2 * columns : 2].float() for y in range(4)] for x in range(4)]
    vertical = [mixed(each) for each in reads]
    both = [mixed([column[y] for column in vertical]) for y in range(4)]
    return torch.stack([each.to(tiles.dtype).flatten(0, 2) for row in both for each in row])


def _joined(products: Tensor, bias: Tensor | None, finish: Finish, added: Tensor | None) -> Tensor:
    """Return the results of tiles, (B, H, W, K), from (4, 4, B, rows, columns, K) products."""

    def mixed(of: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return of[0] + of[1] + of[2], of[1] - of[2] - of[3]

    horizontal = [mixed([products[y, x].float() for x in range(4)]) for y in range(4)]
    both = [mixed([row[x] for row in horizontal]) for x in range(2)]
    _, _, batch, rows, columns, channels = products.shape

    def finished(y: int, x: int) -> Tensor:
        result = both[x][y] if bias is None else both[x][y] + bias
        return finish(result, None if added is None else added[:, y::2, x::2]).to(products.dtype)

    found = torch.stack([torch.stack([finished(y, x) for x in range(2)], 3) for y in range(2)], 2)
    return found.view(batch, 2 * rows, 2 * columns, channels)


def _parts_eagerly(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """What `_parts` does, as one product of matrices."""
    batch, _, _, channels = tiles.shape
    image, row, column, channel = tiles.stride()
    shape, strides = (4, 4, batch, rows, columns, channels), (row, column, image, 2 * row, 2 * column, channel)
    return (_OF_WHOLE_TILES.to(tiles.dtype) @ tiles.as_strided(shape, strides).reshape(16, -1)).view(16, -1, channels)


def _joined_eagerly(products: Tensor, bias: Tensor | None, finish: Finish, added: Tensor | None) -> Tensor:
    """What `_joined` does, as one product of matrices."""
    _, _, batch, rows, columns, channels = products.shape
    found = (_OF_WHOLE_RESULTS.to(products.dtype) @ products.reshape(16, -1)).view(2, 2, batch, rows, columns, channels)
    found = found.permute(2, 3, 0, 4, 1, 5).reshape(batch, 2 * rows, 2 * columns, channels)
    return finish(found if bias is None else found + bias, added)
