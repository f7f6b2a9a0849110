"""PatchCore: a memory bank of the teacher's own features, the method that trains nothing.

Written from Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly Detection, CVPR
2022, arXiv:2106.08265. It shares teacher and images with the students, so that a comparison is of methods.
"""

import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.inference import best_dtype, pick_device, prepare, to_input
from models.teachers import Teacher

PROJECTED = 128  # dimensions in which the coreset is chosen, as in the authors' code
SHORTLIST = 8  # neighbours found in half precision, then ranked in float32
_CANDIDATES = 2048  # vectors among which one round of the greedy choice is made
_NEIGHBOURS = 9  # b of the paper's equation 7, which names no number
_CHUNK, _ROWS = 16, 4096


@dataclass(frozen=True)
class Settings:
    """What decides a memory bank, beside its teacher and its images.

    Attributes:
        size: Side of the input, pixels.
        coreset: Share of the vectors that the bank keeps.
        sigma: Standard deviation of the map's Gaussian in pixels, 0 for none.
        reweight: Score an image by the paper's equation 7 in place of its map's maximum.
        random: Draw the bank's vectors at random, for measuring speed: the greedy choice takes minutes.
    """

    size: int = 256
    coreset: float = 0.1
    sigma: float = 4.0
    reweight: bool = False
    random: bool = False


class PatchCore:
    """A memory bank of normal patches.

    Args:
        teacher: float32, on the CPU.
        images: (N, S, S, 3) uint8 RGB, normal.
        settings: How to build the bank and the maps.
        seed: Of the projection and of the first vector.

    Attributes:
        bank: (M, C) in the dtype of inference, centred.
    """

    def __init__(self, teacher: Teacher, images: np.ndarray, settings: Settings, seed: int) -> None:
        self._device = pick_device()
        self._dtype = best_dtype(self._device)
        self._teacher = prepare(teacher, self._device, self._dtype)
        self._reweight = settings.reweight
        patches = torch.cat([self._patches(images[at : at + _CHUNK]) for at in range(0, len(images), _CHUNK)])
        self._enlarge = enlarging(patches.shape[1], settings.size, settings.sigma).to(self._device)
        vectors = patches.flatten(0, 2)
        # Distances stay what they are, and products of smaller numbers lose less in half precision.
        self._centre = vectors.mean(dim=0)
        vectors -= self._centre
        generator = torch.Generator().manual_seed(seed)
        projected = vectors
        if vectors.shape[1] > PROJECTED:
            matrix = torch.randn(vectors.shape[1], PROJECTED, generator=generator) / math.sqrt(PROJECTED)
            projected = vectors @ matrix.to(self._device)
        first = int(torch.randint(len(vectors), (1,), generator=generator))
        count = max(1, round(settings.coreset * len(vectors)))
        if settings.random:
            chosen = torch.randperm(len(vectors), generator=generator)[:count].to(self._device)
        else:
            chosen = greedy_coreset(projected, count, first)
        self.bank = vectors[chosen].to(self._dtype)
        self._half_square = self.bank.float().square().sum(dim=1).mul(0.5)

    @torch.inference_mode()
    def judge(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Judge images as serving would.

        Args:
            images: (B, S, S, 3) uint8 RGB.

        Returns:
            (B, S, S) float32 anomaly maps and (B,) float32 scores.
        """
        patches = self._patches(images) - self._centre
        queries = patches.flatten(0, 2).to(self._dtype)
        distances, nearest = (found[:, 0] for found in self.nearest(queries, 1))
        maps = self._enlarge @ distances.view(patches.shape[:3]) @ self._enlarge.T
        scores = maps.amax(dim=(1, 2))
        if self._reweight:
            scores = self._reweighted(queries, distances.view(len(images), -1), nearest)
        return maps.cpu().numpy(), scores.cpu().numpy()

    def nearest(self, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Find neighbours: a shortlist by a matrix product in half precision, ranked by exact distances.

        Args:
            queries: (Q, C) centred, in the bank's dtype.
            count: Neighbours of each query.

        Returns:
            (Q, count) float32 Euclidean distances, ascending, and (Q, count) int64 rows of the bank.
        """
        bias = -self._half_square.to(self._dtype)
        width = min(max(SHORTLIST, 2 * count), len(self.bank))
        parts = []
        for rows in queries.split(max(1, 2**26 // len(self.bank))):
            shortlist = torch.addmm(bias, rows, self.bank.T).topk(width, dim=1, sorted=False).indices
            offsets = self.bank[shortlist].float() - rows.float().unsqueeze(1)
            exact, order = offsets.square().sum(dim=2).sort(dim=1)
            parts.append((exact[:, :count].sqrt(), shortlist.gather(1, order[:, :count])))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def _patches(self, images: np.ndarray) -> Tensor:
        """Return the (B, h, w, C) float32 locally aware features at stride 8 (the paper's section 3.1)."""
        with torch.inference_mode():
            inputs = to_input(torch.from_numpy(images).to(self._device), self._teacher, self._dtype)
            fine, coarse = (F.avg_pool2d(tap.float(), 3, 1, 1) for tap in self._teacher(inputs)[1:])
            coarse = F.interpolate(coarse, fine.shape[2:], mode="bilinear", align_corners=False)
            return torch.cat([fine, coarse], dim=1).permute(0, 2, 3, 1).contiguous()

    def _reweighted(self, queries: Tensor, distances: Tensor, nearest: Tensor) -> Tensor:
        """Return the (B,) scores of equation 7, each from its image's worst patch."""
        worst = distances.argmax(dim=1) + torch.arange(len(distances), device=self._device) * distances.shape[1]
        around = self.nearest(self.bank[nearest[worst]], min(_NEIGHBOURS, len(self.bank)))[1]
        return reweighted(distances.flatten()[worst], queries[worst].float(), self.bank[around].float())


def reweighted(distances: Tensor, patches: Tensor, around: Tensor) -> Tensor:
    """Return the scores of equation 7: less where the nearest neighbour's own neighbours are as near.

    Args:
        distances: (B,) of the patches to their nearest neighbours.
        patches: (B, C).
        around: (B, b, C) the nearest neighbours' own neighbours, themselves among them.
    """
    to_all = (around - patches.unsqueeze(1)).norm(dim=2)
    return (1 - (distances - to_all.logsumexp(dim=1)).exp()) * distances


@torch.inference_mode()
def greedy_coreset(vectors: Tensor, count: int, first: int) -> Tensor:
    """Choose vectors one by one, each the farthest from those chosen before (the paper's algorithm 1), exactly.

    A vector's distance to the chosen ones only ever falls. So among the candidates, those that were farthest when a
    round began, the farthest is the farthest of all as long as it lies no nearer than any vector outside did. A
    round chooses until that ends, and one matrix product then brings all distances up to date.

    Args:
        vectors: (N, D) float32; distances are exact to float32 when centred.
        count: Vectors to choose, 1..N.
        first: The one to begin with.

    Returns:
        (count,) int64 rows in the order chosen, on the vectors' device.
    """
    squares = vectors.square().sum(dim=1)
    nearest = torch.full_like(squares, torch.inf)
    chosen, picks, started = [first], [first], time.perf_counter()
    while True:
        rows = torch.tensor(picks, device=vectors.device)
        centres, own = vectors[rows], squares[rows]
        for at in range(0, len(vectors), _ROWS):
            part = slice(at, at + _ROWS)
            found = torch.addmm(own, vectors[part], centres.T, alpha=-2).amin(dim=1).add_(squares[part]).clamp_(min=0)
            torch.minimum(nearest[part], found, out=nearest[part])
        nearest[rows] = -torch.inf
        if len(chosen) == count:
            return torch.tensor(chosen, device=vectors.device)
        far, candidates = nearest.topk(min(_CANDIDATES, len(vectors)))
        among = torch.cdist(vectors[candidates], vectors[candidates]).square_().cpu().numpy()
        picks = candidates.cpu()[_farthest(among, far.cpu().numpy(), count - len(chosen))].tolist()
        if len(chosen) // 1000 != (len(chosen) + len(picks)) // 1000:
            seconds = time.perf_counter() - started
            print(f"coreset: {len(chosen) + len(picks)} of {count}, {seconds:.0f} s", file=sys.stderr)
        chosen += picks


def _farthest(among: np.ndarray, nearest: np.ndarray, limit: int) -> list[int]:
    """Choose greedily from (K, K) squared distances and (K,) descending ones to the vectors chosen before."""
    floor, nearest = nearest[-1], nearest.copy()
    picks: list[int] = []
    while len(picks) < limit:
        pick = int(nearest.argmax())
        if nearest[pick] < floor or nearest[pick] == -np.inf:
            break
        picks.append(pick)
        np.minimum(nearest, among[pick], out=nearest)
        nearest[pick] = -np.inf
    return picks


def enlarging(side: int, size: int, sigma: float) -> Tensor:
    """Return the (size, side) matrix that enlarges one axis bilinearly and smooths it by a Gaussian.

    Both steps are linear and separable: with it on the left and transposed on the right a map needs no filter.
    """
    matrix = F.interpolate(torch.eye(side).unsqueeze(0), size, mode="linear", align_corners=False)
    if sigma > 0:
        reach = min(math.ceil(4 * sigma), size - 1)
        kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma).square())
        padded = F.pad(matrix, (reach, reach), mode="reflect").transpose(0, 1)
        matrix = F.conv1d(padded, (kernel / kernel.sum()).view(1, 1, -1)).transpose(0, 1)
    return matrix[0].T.contiguous()
