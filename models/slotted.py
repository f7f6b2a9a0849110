"""Many students of one structure as one network: row b of a batch is judged by the student in slot slots[b].

What differs between two products is the content of tensors, never a shape or the code that runs. So one captured
graph serves every mix of products, and a new version is a copy into a slot.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from models.detector import Detector, Pairs, Student
from models.geometry import Geometry, is_plain
from models.slot_layout import SlotLayout
from models.slotted_conv import slotted_conv2d
from models.teachers import Features


class Rows:
    """Which slot each row of the batch at hand uses; the modules of one network share it.

    Attributes:
        slots: (B,) int64 on the device.
    """

    def __init__(self) -> None:
        self.slots = torch.zeros(0, dtype=torch.long)


class SlottedConv2d(nn.Module):
    """A convolution with weights in slots.

    Args:
        conv: Says how its kernel moves.
        tensors: (N, *shape) by name, its weights in every slot.
        rows: Of the network.
    """

    def __init__(self, conv: nn.Conv2d, tensors: dict[str, Tensor], rows: Rows) -> None:
        super().__init__()
        self._geometry = Geometry.of(conv)
        self._weights, self._bias, self._rows = tensors["weight"], tensors.get("bias"), rows

    def forward(self, x: Tensor) -> Tensor:
        """Convolve each row with its slot's weights, (B, C, H, W) -> (B, O, OH, OW)."""
        return slotted_conv2d(x, self._weights, self._bias, self._rows.slots, self._geometry)


class SlottedModule(nn.Module):
    """Any module with tensors in slots: each row goes through it alone, with its slot's tensors.

    Args:
        module: Takes and gives tensors, or tuples of them, of batches whose rows do not depend on each other.
        tensors: (N, *shape) by name, the module's in every slot.
        rows: Of the network.
    """

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor], rows: Rows) -> None:
        super().__init__()
        # Only its code is used.
        self._module = module.to("meta")
        self._tensors, self._rows = tensors, rows

    def forward(self, *inputs: Any) -> Any:
        """Call the module row by row, as one vectorised call."""
        own = {name: tensor.index_select(0, self._rows.slots) for name, tensor in self._tensors.items()}
        outputs = vmap(self._one)(own, tree_map(lambda each: each.unsqueeze(1), inputs))
        return tree_map(lambda each: each.flatten(0, 1), outputs)

    def _one(self, tensors: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
        return functional_call(self._module, tensors, inputs)


class _Fusing(nn.Module):
    """From one row's maps to its anomaly map and score, by its student's own statistics."""

    def __init__(self, detector: Detector, statistics: nn.Module, size: int) -> None:
        super().__init__()
        self._detector, self._size = detector, size
        self.statistics = statistics

    def forward(self, *maps: Tensor) -> tuple[Tensor, Tensor]:
        fused = self._detector.fuse(maps, self._size, self.statistics)  # type: ignore[arg-type]
        return fused, self._detector.score(fused)


class Slotted(nn.Module):
    """Slots for students of one structure, and the network that computes with all of them.

    Args:
        template: A prepared student of the structure; it is left as it is.
        detector: The method of all of them.
        size: Side of the input and of the anomaly maps, in pixels.
        slots: (N, layout.nbytes) uint8, contiguous, on the device: a row for each student.
    """

    def __init__(self, template: Student, detector: Detector, size: int, slots: Tensor) -> None:
        super().__init__()
        self._rows = Rows()
        self._detector = detector
        tensors = SlotLayout.of(template).views(slots)
        statistics = copy.deepcopy(template.statistics)
        self._fusing = SlottedModule(
            _Fusing(detector, statistics, size), _below(tensors, "statistics", True), self._rows
        )
        self._network = _slotted(copy.deepcopy(template), tensors, self._rows)

    def forward(self, images: Tensor, features: Features, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Judge a batch of any mix.

        Args:
            images: (B, 3, S, S) normalised.
            features: The teacher's of the same images.
            slots: (B,) int64 on the device, each row's student.

        Returns:
            (B, S, S) float32 anomaly maps and (B,) float32 scores.
        """
        return self.anomaly_maps(self.pairs(images, features, slots), slots)

    def pairs(self, images: Tensor, features: Features, slots: Tensor) -> Pairs:
        """Return the pairs of each row's own student, see `Student.forward`."""
        self._rows.slots = slots
        return self._network(images, features)

    def anomaly_maps(self, pairs: Pairs, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return the anomaly maps and scores of pairs by each row's own statistics, see `forward`."""
        self._rows.slots = slots
        return self._fusing(*self._detector.scale_maps(pairs))


Signature = tuple[type[Detector], str, int, SlotLayout]


def signature(student: Student, detector: Detector, input_size: int) -> Signature:
    """Return what students must have in common to share slots: method, options, input size and tensors."""
    return type(detector), detector.model_dump_json(), input_size, SlotLayout.of(student)


def _slotted(module: nn.Module, tensors: dict[str, Tensor], rows: Rows) -> nn.Module:
    """Replace what has tensors of its own, from the outside in; what has none keeps its code."""
    if any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return SlottedConv2d(module, tensors, rows) if is_plain(module) else SlottedModule(module, tensors, rows)  # type: ignore[arg-type]
    for name, child in list(module.named_children()):
        setattr(module, name, _slotted(child, _below(tensors, name), rows))
    return module


def _below(tensors: dict[str, Tensor], name: str, whole: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a child by their names in it, or by their whole names."""
    start = f"{name}."
    return {key if whole else key.removeprefix(start): each for key, each in tensors.items() if key.startswith(start)}
