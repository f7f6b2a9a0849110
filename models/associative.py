"""Two students of one teacher: a network that predicts features from the image, and a memory of whole scenes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from models.backbones import ResNetBackbone
from models.detector import Detector, NormalBatches, Pair, Pairs, Student
from models.fusion import MapFusion
from models.matching import cosine_distance, sum_of_means
from models.memory import SceneMemory
from models.snc import SNC
from models.students import ForwardStudent
from models.teachers import Features, Teacher

_CODES = {"softmax": SNC(form="softmax", place="map"), "uniform": SNC(form="uniform", place="map")}


class Associative(Detector):
    """STFPM's student beside a memory of normal scenes: what neither can predict is a defect.

    The network learns what details look like anywhere; the memory knows what belongs where in a scene like this one.

    Attributes:
        width: The network's width as a fraction of ResNet-18's.
        hardest: As STFPM's, of the network's training.
        components: Of a descriptor in the memory.
        capacity: Scenes in the memory at the most.
        neighbours: Scenes that an image is compared with.
        attended: Of these, scenes that each block of 4 x 4 positions attends to.
        temperature: Of the attention over them.
        snc: How the maps code the network's features by their neighbours, see `models.snc`.
    """

    name: ClassVar[str] = "associative"
    revision: ClassVar[int] = 2
    width: float = Field(default=0.25, gt=0, le=2)
    hardest: float = Field(default=0.03, gt=0, le=1)
    components: int = Field(default=64, ge=4, le=128)
    capacity: int = Field(default=1024, ge=1)
    neighbours: int = Field(default=48, ge=1, le=256)
    attended: int = Field(default=4, ge=1, le=256)
    temperature: float = Field(default=0.01, gt=0)
    snc: Literal["none", "softmax", "uniform"] = "uniform"
    fusion: MapFusion = MapFusion(kind="geometric", weights=(2, 4, 2, 3), score="top", top=0.01)

    def build_student(self, teacher: Teacher) -> Student:
        """Return an untrained network and an empty memory, see the interface."""
        return AssociativeStudent(teacher.channels, self)

    def loss(self, pairs: Pairs) -> Tensor:
        """Return STFPM's loss of the network; the memory is not trained."""
        return sum_of_means(tuple(cosine_distance(pair) for pair in pairs[:-1]), self.hardest)

    def scale_maps(self, pairs: Pairs) -> tuple[Tensor, ...]:
        """Return the network's maps of coded features, then half the squared distance to what the memory predicts."""
        network, (found, predicted) = pairs[:-1], pairs[-1]
        coded = _CODES[self.snc].aggregated(network) if self.snc in _CODES else network
        remembered = (found.float() - predicted.float()).square().sum(dim=1).mul(0.5)
        return (*(cosine_distance(pair) for pair in coded), remembered)


class AssociativeStudent(Student):
    """Network and memory.

    Args:
        channels: The teacher's channels.
        options: Of the detector.
    """

    def __init__(self, channels: tuple[int, ...], options: Associative) -> None:
        super().__init__(channels, maps=len(channels) + 1)
        self.forwards = ForwardStudent(channels, ResNetBackbone(channels, options.width))
        self.memory = SceneMemory(
            (channels[-2], channels[-1]),
            options.components,
            options.capacity,
            options.neighbours,
            options.attended,
            options.temperature,
        )

    def begin(self, source: NormalBatches) -> None:
        """Remember the normal images' scenes."""
        self.memory.remember(source)

    def round_up(self) -> None:
        """Fill the memory up to one of few sizes, see the interface."""
        self.memory.fill_up()

    def forward(self, images: Tensor, features: Features) -> Pairs:
        """Return the network's pairs, then the memory's; in training the memory is left out of the work."""
        pairs = self.forwards(images, features)
        if self.training:
            empty = features[-1].new_zeros(1, 1, 1, 1)
            return (*pairs, Pair(empty, empty))
        return (*pairs, self.memory(features))
