"""A memory of normal scenes, and the features that it predicts for an image by attention over the most similar ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from models.detector import NormalBatches, Pair
from models.matching import unit
from models.statistics import Statistics
from models.teachers import Features

# A scene is told from others by its coarsest features, pooled to so many cells a side.
_CODE_CELLS, _CODE_LENGTH = 4, 128
# Positions attend together in blocks, to the same block of the similar scenes and so many positions around it.
_BLOCK, _MARGIN = 4, 1
_SAMPLED_POSITIONS = 40_000


class SceneMemory(Statistics):
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
    scenes: Tensor
    step: Tensor
    keys: Tensor
    lengths: Tensor
    means: Tensor

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
        self._attended_scenes, self._temperature = attended, temperature
        self._components = components
        length = channels[1] * _CODE_CELLS**2
        empty = {
            "mean": torch.zeros(sum(channels)),
            "basis": torch.zeros(sum(channels), components),
            "code_mean": torch.zeros(length),
            "code_scale": torch.ones(length),
            "code_basis": torch.zeros(length, 1),
            "codes": torch.zeros(1, 1),
            "scenes": torch.zeros(1, 1, 1, components, dtype=torch.int8),
            "step": torch.ones(()),
        }
        for name, value in empty.items():
            self.register_buffer(name, value)
        for name in ("keys", "lengths", "means"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self._arrange()

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
        self.scenes = (scenes / self.step).round().to(torch.int8)
        self._arrange()

    def _arrange(self) -> None:
        """Lay the scenes out as attention reads them: by block, with a margin; and what blocks are found by."""
        side = self.scenes.shape[1]
        grids = self.scenes.permute(0, 3, 1, 2).float()
        block = math.gcd(side, _BLOCK)
        keys = _blocks(grids, block, min(_MARGIN, side))
        self.keys = keys.to(torch.int8)
        self.lengths = keys.square().sum(-1) * (0.5 * self.step.square())
        self.means = F.avg_pool2d(grids, block).round().flatten(2).transpose(1, 2).to(torch.int8)

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
        side = self.scenes.shape[1]
        if found.shape[-1] != side:
            found = F.interpolate(found, (side, side), mode="bilinear", align_corners=False)
        return Pair(found, self._recalled(found, self._most_similar(features)))

    def _most_similar(self, features: Features) -> Tensor:
        """Return the indices of the scenes most like each image, (B, K)."""
        code = unit((_code_input(features) - self.code_mean) / self.code_scale) @ self.code_basis
        likeness = unit(code) @ self.codes.T
        return likeness.topk(min(self._neighbours, len(self.codes)), dim=1).indices

    def _recalled(self, found: Tensor, similar: Tensor) -> Tensor:
        """Predict by attention.

        Args:
            found: (B, components, h, w) float32.
            similar: (B, K) int64, the scenes to choose from.
        """
        side = found.shape[-1]
        block, blocks = math.gcd(side, _BLOCK), self.keys.shape[1]
        queries = _blocks(found, block, 0)
        # One row of the memory is one block of one scene; from there on it is a plain gather.
        rows = self._nearest(queries, similar) * blocks + torch.arange(blocks, device=found.device).unsqueeze(1)
        keys = self.keys.flatten(2).flatten(0, 1).index_select(0, rows.flatten()).float().mul(self.step)
        keys = keys.view(*rows.shape[:2], -1, found.shape[1])
        # exp(-|q - k|^2 / 2t) is exp((q k - |k|^2 / 2) / t) up to a factor of the query's own.
        bias = self.lengths.flatten(0, 1).index_select(0, rows.flatten()).view(*rows.shape[:2], 1, -1)
        predicted = F.scaled_dot_product_attention(
            queries,
            keys,
            keys,
            attn_mask=bias.mul(-1 / self._temperature).expand(-1, -1, queries.shape[2], -1),
            scale=1 / self._temperature,
        )
        joined = predicted.unflatten(1, (side // block, side // block)).unflatten(3, (block, block))
        return joined.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _nearest(self, queries: Tensor, similar: Tensor) -> Tensor:
        """Return for each block the scenes whose same block has the nearest mean, (B, blocks, k) int64.

        Args:
            queries: (B, blocks, positions, components) float32.
            similar: (B, K) int64, the scenes to choose from.
        """
        wanted = queries.mean(2).unsqueeze(1)
        means = self.means.flatten(1).index_select(0, similar.flatten()).float().mul(self.step)
        means = means.view(*similar.shape, *wanted.shape[2:])
        distances = (means - wanted).square().sum(-1).transpose(1, 2)
        places = distances.topk(min(self._attended_scenes, similar.shape[1]), dim=2, largest=False, sorted=False)
        return similar.unsqueeze(1).expand(-1, queries.shape[1], -1).gather(2, places.indices)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make room first: how many scenes of what size there are, the saved state says."""
        for name, own in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and own is not None and saved.dim() == own.dim():
                self._buffers[name] = torch.empty_like(saved, device=own.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._arrange()


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
