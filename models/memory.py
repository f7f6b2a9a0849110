"""A memory of normal scenes, and the features that it predicts for an image by attention over the most similar ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.detector import NormalBatches, Pair
from models.matching import unit
from models.packing import ByOperator
from models.statistics import Statistics
from models.teachers import Features

# A scene is told from others by its coarsest features, pooled to so many cells a side.
_CODE_CELLS, _CODE_LENGTH = 4, 128
# Positions attend together in blocks, to the same block of the similar scenes and so many positions around it.
_BLOCK, _MARGIN = 4, 1
_SAMPLED_POSITIONS = 40_000
# A filled-up memory has so many scenes at least. Those that fill it are so far away that nothing comes of them.
_FEWEST, _FAR = 64, 1e6


class SceneMemory(Statistics, ByOperator):
    """Normal scenes as the teacher sees them, compressed; it learns by looking once and has no weights to train.

    A scene is a grid of descriptors: the teacher's features at strides 8 and 16, pooled 3 x 3, joined and reduced to
    their principal components, in 8 bits. For an image the most similar scenes are found by one code for each scene,
    so the time for an image hardly grows with their number. Of these, each block of the grid takes the few whose same
    block has the nearest mean, and each of its positions' descriptors is predicted by softmax attention over those
    blocks and their margins.

    Args:
        channels: The teacher's channels at strides 8 and 16.
        components: Of a descriptor.
        capacity: Scenes at the most; of more, those are kept that are least alike.
        neighbours: Scenes that an image is compared with.
        attended: Of these, scenes that a block attends to.
        temperature: Of the attention, in half squared distance.
    """

    mean: Tensor
    basis: Tensor
    code_mean: Tensor
    code_scale: Tensor
    code_basis: Tensor
    codes: Tensor
    step: Tensor
    keys: Tensor
    lengths: Tensor
    means: Tensor
    absent: Tensor

    def __init__(
        self,
        channels: tuple[int, int],
        components: int,
        capacity: int,
        neighbours: int,
        attended: int,
        temperature: float,
    ) -> None:
        super().__init__()
        self._capacity, self._neighbours = capacity, neighbours
        self._attended, self._temperature = attended, temperature
        self._components = components
        length = channels[1] * _CODE_CELLS**2
        empty = {
            "mean": torch.zeros(sum(channels)),
            "basis": torch.zeros(sum(channels), components),
            "code_mean": torch.zeros(length),
            "code_scale": torch.ones(length),
            "code_basis": torch.zeros(length, 1),
            "codes": torch.zeros(1, 1),
            "step": torch.ones(()),
        }
        for name, value in empty.items():
            self.register_buffer(name, value)
        for name in ("keys", "lengths", "means", "absent"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._keep(torch.zeros(1, 1, 1, components, dtype=torch.int8))

    @property
    def side(self) -> int:
        """Cells along a side of a scene's grid."""
        return math.isqrt(self.means.shape[1]) * self._block

    @property
    def _block(self) -> int:
        return math.isqrt(self.lengths.shape[2]) - 2 * _MARGIN

    @property
    def scenes(self) -> Tensor:
        """(N, side, side, components) int8: the blocks without their margins. They are what a version saves."""
        grid, own = math.isqrt(self.means.shape[1]), slice(_MARGIN, _MARGIN + self._block)
        windows = self.keys.unflatten(2, (self._block + 2 * _MARGIN,) * 2 + (self._components,))[:, :, own, own]
        return windows.unflatten(1, (grid, grid)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    @torch.no_grad()
    def remember(self, source: NormalBatches) -> None:
        """Take the scenes of all normal images, in place of those remembered before."""
        codes = torch.cat([_code_input(source.batch(chunk)[1]) for chunk in source.chunks()])
        self.code_mean, self.code_scale = codes.mean(0), codes.std(0, correction=0).clamp_min(1e-6)
        standard = unit((codes - self.code_mean) / self.code_scale)
        self.code_basis = torch.linalg.svd(standard, full_matrices=False).Vh[:_CODE_LENGTH].T.contiguous()
        projected = standard @ self.code_basis
        kept = _spread(projected, self._capacity)
        self.codes = unit(projected[kept])
        chunks = list(kept.cpu().split(len(source.chunks()[0])))
        self.mean, self.basis = self._principal(source, chunks)
        scenes = torch.cat([self._described(source.batch(chunk)[1]) for chunk in chunks])
        self.step = scenes.abs().amax().clamp_min(1e-6) / 127
        self._keep((scenes / self.step).round().to(torch.int8))

    def _keep(self, scenes: Tensor) -> None:
        """Lay (N, side, side, components) int8 scenes out as attention reads them: by block, with a margin; and what
        blocks are found by.
        """
        grids = scenes.permute(0, 3, 1, 2).float()
        block = math.gcd(scenes.shape[1], _BLOCK)
        keys = _blocks(grids, block, _MARGIN)
        # (N, blocks, positions * components) int8: what has four dimensions is laid out anew when a network goes to
        # channels_last. (N, blocks, positions) float32 and (N, blocks, components) int8.
        self.keys = keys.flatten(2).to(torch.int8)
        self.lengths = keys.square().sum(-1) * (0.5 * self.step.square())
        self.means = F.avg_pool2d(grids, block).round().flatten(2).transpose(1, 2).to(torch.int8)
        # (N,) float32, what is taken off a scene's likeness and added to its distances.
        self.absent = self.step.new_zeros(len(scenes))

    def fill_up(self) -> None:
        """Fill up with scenes that are never recalled, to a power of two or half as much again, and codes
        to their full length. Afterwards it is for judging only.
        """
        power = 1 << (len(self.codes) - 1).bit_length()
        between = power * 3 // 4
        more = max(_FEWEST, between if len(self.codes) <= between else power) - len(self.codes)
        longer = max(0, _CODE_LENGTH - self.codes.shape[1])
        self.code_basis = F.pad(self.code_basis, (0, longer))
        self.codes = F.pad(self.codes, (0, longer, 0, more))
        self.keys, self.means = (F.pad(each, (0, 0, 0, 0, 0, more)) for each in (self.keys, self.means))
        self.lengths = F.pad(self.lengths, (0, 0, 0, 0, 0, more), value=_FAR)
        self.absent = F.pad(self.absent, (0, more), value=_FAR)

    def _principal(self, source: NormalBatches, chunks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return mean and principal components of descriptors, from a sample of all positions."""
        every = max(1, sum(map(len, chunks)) * _positions(source) // _SAMPLED_POSITIONS)
        sample = torch.cat([_descriptors(source.batch(chunk)[1]).flatten(0, 2)[::every] for chunk in chunks])
        mean = sample.mean(0)
        covariance = (sample - mean).T @ (sample - mean) / len(sample)
        vectors = torch.linalg.eigh(covariance.double()).eigenvectors.flip(1)[:, : self._components]
        return mean, vectors.float()

    def _described(self, features: Features) -> Tensor:
        """Return reduced descriptors, (B, h, w, components) float32."""
        return (_descriptors(features) - self.mean) @ self.basis

    def forward(self, features: Features) -> Pair:
        """Return the image's descriptors and those that the memory predicts, (B, components, h, w) float32."""
        found = self._described(features).permute(0, 3, 1, 2)
        if found.shape[-1] != self.side:
            found = F.interpolate(found, (self.side,) * 2, mode="bilinear", align_corners=False)
        recall = torch.ops.proctor.recalled if self.by_operator else partial(_recalled, _attention)
        kept = [self.keys, self.lengths, self.means, self.step, self.absent]
        return Pair(found, recall(found, self._most_similar(features), kept, self._attended, self._temperature))

    def _most_similar(self, features: Features) -> Tensor:
        """Return the indices of the scenes most like each image, (B, K)."""
        code = unit((_code_input(features) - self.code_mean) / self.code_scale) @ self.code_basis
        likeness = unit(code) @ self.codes.T - self.absent
        return likeness.topk(min(self._neighbours, len(self.codes)), dim=1).indices

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if bool(self.absent.any()):
            raise RuntimeError("a memory that was filled up is for judging only: save the one that was trained")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scenes"] = self.scenes

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make room first: how many scenes of what size there are, the saved state says."""
        missing, _, errors = rest[-3:]
        scenes = state_dict.pop(prefix + "scenes", None)
        for name, own in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and own is not None and saved.dim() == own.dim():
                self._buffers[name] = torch.empty_like(saved, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if scenes is None:
            missing.append(prefix + "scenes")
        elif scenes.dim() != 4 or scenes.shape[1] != scenes.shape[2] or scenes.shape[3] != self._components:
            errors.append(f"{prefix}scenes: no grids of {self._components} components, but {tuple(scenes.shape)}")
        elif scenes.dtype != torch.int8 or not 0 < len(scenes) == len(self.codes):
            errors.append(f"{prefix}scenes: {len(scenes)} of {scenes.dtype} do not fit {len(self.codes)} codes")
        else:
            self._keep(scenes.to(self.step.device))


def _attention(queries: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q v^T + mask) v of (..., positions, components) and (..., N, components).

    PyTorch's own attention cannot be vectorised over products but in one of its forms, and which it takes is a switch
    of the whole process.
    """
    return ((queries @ values.transpose(-1, -2)) * scale + mask).softmax(-1) @ values


def _attention_of_the_cpu(queries: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(queries, values, values, attn_mask=mask, scale=scale)


def _recalled(
    attention: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    found: Tensor,
    similar: Tensor,
    kept: list[Tensor],
    attended: int,
    temperature: float,
) -> Tensor:
    """Predict descriptors by attention, (B, components, h, w) float32.

    Args:
        attention: Of queries, values, mask and scale.
        found: (B, components, h, w) float32, the image's own.
        similar: (B, K) int64, the scenes to choose from.
        kept: The memory's `keys`, `lengths`, `means`, `step` and `absent`.
        attended: Scenes that a block attends to.
        temperature: In half squared distance.
    """
    keys, lengths, means, step, absent = kept
    side, blocks = found.shape[-1], means.shape[1]
    block = math.gcd(side, _BLOCK)
    queries = _blocks(found, block, 0)
    # One row of the memory is one block of one scene; from there on it is a plain gather.
    scenes = _nearest(queries, similar, means, step, absent, attended)
    rows = scenes * blocks + torch.arange(blocks, device=found.device).unsqueeze(1)
    values = keys.flatten(0, 1).index_select(0, rows.flatten()).float().view(*rows.shape[:2], -1, found.shape[1])
    # exp(-|q - k|^2 / 2t) is exp((q k - |k|^2 / 2) / t) up to a factor of the query's own.
    bias = lengths.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape[:2], 1, -1).mul(-1 / temperature)
    mask = bias.expand(-1, -1, queries.shape[2], -1)
    # Values stay whole numbers: their step is multiplied with what there is less of.
    predicted = attention(queries * step, values, mask, 1 / temperature) * step
    joined = predicted.unflatten(1, (side // block, side // block)).unflatten(3, (block, block))
    return joined.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).contiguous()


def _nearest(queries: Tensor, similar: Tensor, means: Tensor, step: Tensor, absent: Tensor, count: int) -> Tensor:
    """Return for each block the scenes whose same block has the nearest mean, (B, blocks, count) int64.

    Args:
        queries: (B, blocks, positions, components) float32.
        similar: (B, K) int64, the scenes to choose from; as many as there are if `count` is more.
        means: As `_recalled` has them.
        step: Likewise.
        absent: Likewise.
        count: Scenes to choose.
    """
    wanted = queries.mean(2).unsqueeze(1)
    given = means.flatten(1).index_select(0, similar.flatten()).float().mul(step)
    given = given.view(*similar.shape, *wanted.shape[2:])
    away = absent.index_select(0, similar.flatten()).view(*similar.shape, 1)
    distances = ((given - wanted).square().sum(-1) + away).transpose(1, 2)
    places = distances.topk(min(count, similar.shape[1]), dim=2, largest=False, sorted=False).indices
    return similar.unsqueeze(1).expand(-1, queries.shape[1], -1).gather(2, places)


_OPERATORS = torch.library.Library("proctor", "FRAGMENT")
_OPERATORS.define("recalled(Tensor found, Tensor similar, Tensor[] kept, int attended, float temperature) -> Tensor")
_OPERATORS.impl("recalled", partial(_recalled, _attention_of_the_cpu), "CPU")


def _recalled_shape(found: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(found, memory_format=torch.contiguous_format)


torch.library.register_fake("proctor::recalled", _recalled_shape, lib=_OPERATORS)


def _descriptors(features: Features) -> Tensor:
    """Join the unit features at strides 8 and 16, pooled 3 x 3, at stride 8: (B, h, w, channels) float32."""
    size = features[1].shape[2:]
    parts = [F.interpolate(_pooled(unit(each)), size, mode="bilinear", align_corners=False) for each in features[1:]]
    return torch.cat(parts, dim=1).permute(0, 2, 3, 1) / math.sqrt(len(parts))


def _pooled(features: Tensor) -> Tensor:
    return F.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)


def _positions(source: NormalBatches) -> int:
    _, features = source.batch(torch.zeros(1, dtype=torch.long))
    return features[1].shape[2] * features[1].shape[3]


def _code_input(features: Features) -> Tensor:
    """Return (B, channels * 16) float32: the coarsest features in a 4 x 4 grid."""
    return F.adaptive_avg_pool2d(features[-1].float(), _CODE_CELLS).flatten(1)


def _spread(codes: Tensor, count: int) -> Tensor:
    """Return the indices of `count` codes that are far from each other, farthest first, ascending; all if fewer."""
    if len(codes) <= count:
        return torch.arange(len(codes))
    distances = torch.full((len(codes),), math.inf, device=codes.device)
    chosen = [0]
    for _ in range(count - 1):
        distances = torch.minimum(distances, (codes - codes[chosen[-1]]).square().sum(1))
        chosen.append(int(distances.argmax()))
    return torch.tensor(sorted(chosen))


def _blocks(grids: Tensor, block: int, margin: int) -> Tensor:
    """Cut (N, C, h, w) grids into blocks with a margin: (N, blocks, (block + 2 margin)^2, C)."""
    padded = F.pad(grids, (margin,) * 4, mode="replicate") if margin else grids
    side = block + 2 * margin
    windows = padded.unfold(2, side, block).unfold(3, side, block)
    return windows.permute(0, 2, 3, 4, 5, 1).flatten(3, 4).flatten(1, 2)
