"""FCL: feature consistency learning (Li and Hu, IEEE TIM 2024), reconstructed from its abstract.

Low-level consistency compares features element by element, coded by their neighbourhoods (SNC); high-level
consistency compares what features say of the image as a whole. Both go round any host that matches features.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from models.asymts import AsymTS
from models.detector import Detector, NormalBatches, Pair, Pairs, Student
from models.fusion import MapFusion
from models.matching import FeatureMatching, cosine_distance, sum_of_means, unit
from models.reverse import Reverse
from models.snc import SNC, MaskedCentre
from models.stfpm import STFPM
from models.teachers import Features, Teacher

HOSTS: dict[str, type[FeatureMatching]] = {each.name: each for each in (STFPM, AsymTS, Reverse)}
_AFFINITY_CELLS = 4


class FCL(Detector):
    """A host detector with spatial neighbouring coding and high-level consistency.

    Attributes:
        host: The detector whose student and distances are used.
        host_options: Its own options, without a fusion.
        snc: The neighbours' coding.
        flattened: Weight of 1 - cosine of a scale's whole map of features.
        affinity: Weight of the squared difference of the cosines between a 4 x 4 grid's pooled features.
        embedding: Weight of 1 - cosine of a scale's mean feature.
        fusion: Of the host's maps and those that SNC adds.
    """

    name: ClassVar[str] = "fcl"
    revision: ClassVar[int] = 2
    host: Literal["stfpm", "asymts", "reverse"] = "stfpm"
    host_options: dict[str, Any] = Field(default_factory=dict, validate_default=True)
    snc: SNC = SNC(form="uniform", place="map")
    flattened: float = Field(default=0.1, ge=0)
    affinity: float = Field(default=0.1, ge=0)
    embedding: float = Field(default=0.1, ge=0)
    fusion: MapFusion = MapFusion(kind="product")

    @field_validator("host_options")
    @classmethod
    def _all_of_the_hosts_options(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Write down the defaults too: a version must not change when they do."""
        if "fusion" in value:
            raise ValueError("the host's fusion counts for nothing: set fusion beside host_options")
        if "host" not in info.data:
            return value  # the host is no host, which is said of that field
        try:
            return HOSTS[info.data["host"]].model_validate(value).model_dump(exclude={"fusion"})
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    @model_validator(mode="after")
    def _predictors_are_trained(self) -> FCL:
        if self.snc.form == "masked" and not self.snc.in_loss:
            raise ValueError("snc.form 'masked' has predictors to train: snc.place must be 'loss' or 'both'")
        return self

    @cached_property
    def _host(self) -> FeatureMatching:
        return HOSTS[self.host].model_validate(self.host_options)

    def build_student(self, teacher: Teacher) -> Student:
        """Return the host's untrained student, with predictors of masked centres where SNC has that form."""
        student = self._host.build_student(teacher)
        return FCLStudent(student, self.snc)

    def loss(self, pairs: Pairs) -> Tensor:
        """Return the host's loss of the coded features, SNC's own and the high-level terms, summed."""
        plain, masked = self._parted(pairs)
        coded = self.snc.aggregated(plain) if self.snc.in_loss and self.snc.aggregates else plain
        total = self._host.loss(coded)
        added = self._added_maps(plain, masked) if self.snc.in_loss else ()
        if added:
            total = total + sum_of_means(added, self._host.hardest)
        return total + self._high_level(plain)

    def scale_maps(self, pairs: Pairs) -> tuple[Tensor, ...]:
        """Return the host's maps of the coded features, then those that SNC adds."""
        plain, masked = self._parted(pairs)
        if not self.snc.in_map:
            return self._host.scale_maps(plain)
        coded = self.snc.aggregated(plain) if self.snc.aggregates else plain
        return self._host.scale_maps(coded) + self._added_maps(plain, masked)

    def _parted(self, pairs: Pairs) -> tuple[Pairs, Pairs]:
        """Part the host's pairs from those of masked centres, which follow them."""
        count = len(pairs) // 2 if self.snc.form == "masked" else len(pairs)
        return pairs[:count], pairs[count:]

    def _added_maps(self, plain: Pairs, masked: Pairs) -> tuple[Tensor, ...]:
        if self.snc.form == "relation":
            return tuple(self.snc.relation_map(pair) for pair in plain)
        return tuple(cosine_distance(pair) for pair in masked)

    def _high_level(self, pairs: Pairs) -> Tensor:
        total = pairs[0].prediction.new_zeros((), dtype=torch.float32)
        for pair in pairs:
            if self.flattened:
                # Not normalised at each position: strong features weigh more, unlike in the low-level distance.
                theirs, own = (features.float().flatten(1) for features in pair)
                total = total + self.flattened * (1 - F.cosine_similarity(theirs, own)).mean()
            if self.affinity:
                total = total + self.affinity * (affinity(pair.target) - affinity(pair.prediction)).square().mean()
            if self.embedding:
                means = [features.float().mean(dim=(2, 3)) for features in pair]
                total = total + self.embedding * (1 - F.cosine_similarity(means[0], means[1])).mean()
        return total


def affinity(features: Tensor) -> Tensor:
    """Return the cosines between the cells of a 4 x 4 grid of pooled features, (B, 16, 16) float32."""
    cells = unit(F.adaptive_avg_pool2d(features.float(), _AFFINITY_CELLS)).flatten(2)
    return cells.transpose(1, 2) @ cells


class FCLStudent(Student):
    """A host's student, with predictors of masked centres where SNC has that form.

    Args:
        host: Untrained.
        snc: The neighbours' coding.
    """

    def __init__(self, host: Student, snc: SNC) -> None:
        scales = len(host.statistics.scale)
        added = snc.in_map and not snc.aggregates
        super().__init__(host.channels, maps=2 * scales if added else scales)
        self.host = host
        channels = host.channels[-scales:] if snc.form == "masked" else ()
        self.masked = nn.ModuleList(MaskedCentre(count, snc.radius) for count in channels)

    def begin(self, source: NormalBatches) -> None:
        """Let the host look at the normal images."""
        self.host.begin(source)

    def forward(self, images: Tensor, features: Features) -> Pairs:
        """Return the host's pairs, then one of each masked centre."""
        pairs = self.host(images, features)
        centres = tuple(
            Pair(pair.target, predict(pair.prediction)) for predict, pair in zip(self.masked, pairs, strict=False)
        )
        return pairs + centres
