"""How a student is trained: the settings, and the recipes they come in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from models.errors import ModelError, unknown_name


def checked_device(name: str) -> str:
    """Return a device's name if it may be one; whether this machine has it is another matter.

    Raises:
        ValueError: It is none.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"unknown device '{name}'; allowed: auto, cpu, cuda, cuda:N")
    return name


DeviceName = Annotated[str, AfterValidator(checked_device)]


class TrainingSettings(BaseModel):
    """Everything that decides what a training yields, beside the images.

    Attributes:
        detector: Key in `models.detectors.DETECTORS`.
        detector_options: The detector's own options.
        teacher: Key in `models.teachers.TEACHERS`.
        weights: The teacher's local weights file; None takes its own source.
        input_size: Side of the network's square input, pixels.
        steps: Gradient steps.
        batch_size: Images a step.
        optimizer: AdamW, or SGD with momentum.
        learning_rate: Largest learning rate of the schedule.
        momentum: SGD's momentum; AdamW keeps its own.
        weight_decay: Weight decay of either optimizer.
        schedule: 'constant'; 'cosine' falls to zero; 'onecycle' rises for the first tenth, then falls to
            zero.
        keep: 'last' keeps the student of the last step, 'best' that of the lowest loss on the held-out
            normals.
        patience: A training ends early, with its best student, when the loss on the held-out normals has not fallen
            for so many of the 20 looks that it takes; None takes all steps. No defect is ever looked at.
        augment: 'none', or 'camera' for what varies before a fixed camera: brightness, contrast and a shift of up to
            two pixels, drawn anew for each step. Then the teacher's features cannot be cached.
        compile: Whether the student's training step is compiled, which takes a minute before it is faster.
        seed: Of the student's first weights and of the batches' order.
        holdout: Share of the images kept out of training, for calibration.
        false_reject_rate: Share of normal images that may be judged `fail`; sets the threshold.
        device: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        threads: CPU threads; None takes half the cores. The others judge frames meanwhile, and threads that
            wait at each operation for one that lost its core train several times slower than one thread alone.
        cache_bytes: Teacher features are computed once and kept when they need no more than this.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    detector: str = "associative"
    detector_options: dict[str, Any] = Field(default_factory=dict)
    teacher: str = "efficientnet_lite0"
    weights: str | None = None
    input_size: int = Field(default=128, ge=64, le=1024, multiple_of=32)
    steps: int = Field(default=400, ge=1)
    batch_size: int = Field(default=8, ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=3e-3, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    schedule: Literal["constant", "cosine", "onecycle"] = "onecycle"
    keep: Literal["last", "best"] = "last"
    patience: int | None = Field(default=None, ge=1)
    augment: Literal["none", "camera"] = "none"
    compile: bool = False
    seed: int = Field(default=0, ge=0, lt=2**32)
    holdout: float = Field(default=0.3, gt=0, lt=1)
    false_reject_rate: float = Field(default=0.01, gt=0, lt=1)
    device: DeviceName = "auto"
    threads: int | None = Field(default=None, ge=1)
    cache_bytes: int = Field(default=2**30, ge=0)

    def changed(self, changes: Mapping[str, Any]) -> TrainingSettings:
        """Return these settings with some of them changed, and checked.

        Options belong to one detector, and a weights file to one teacher: where another is chosen without any, it has
        its own defaults.

        Raises:
            pydantic.ValidationError: A change is no setting or out of range.
        """
        merged = self.model_dump() | dict(changes)
        if merged["detector"] != self.detector and "detector_options" not in changes:
            merged["detector_options"] = {}
        if merged["teacher"] != self.teacher and "weights" not in changes:
            merged["weights"] = None
        return TrainingSettings.model_validate(merged)


RECIPES: dict[str, TrainingSettings] = {
    # For two CPU cores: the fastest that is within a point of `accurate`, see docs/detectors.md. Three tenths held out
    # cost little accuracy and make the false-reject rate far steadier.
    "fast": TrainingSettings(),
    # The same detector on more pixels: better on small defects, see docs/detectors.md. Few steps, since the network's
    # overlap with defects falls again with longer training.
    "accurate": TrainingSettings(input_size=192, steps=300, holdout=0.1),
    # Wang et al., BMVC 2021, section 3: conv2_x to conv4_x of ResNet-18, 256 x 256, SGD 0.4, an 80/20 split
    # and the checkpoint of the lowest validation loss.
    "paper": TrainingSettings(
        detector="stfpm",
        detector_options={"width": 1.0, "hardest": 1.0},
        teacher="resnet18",
        input_size=256,
        steps=800,
        batch_size=32,
        optimizer="sgd",
        learning_rate=0.4,
        schedule="constant",
        keep="best",
        holdout=0.2,
    ),
}


# What belongs to a machine, a product or a single training rather than to a way of training.
_NOT_OF_A_RECIPE = frozenset({"weights", "device", "threads", "cache_bytes", "false_reject_rate", "seed"})


def recipe_changes(name: str) -> dict[str, Any]:
    """Return what a recipe changes in a product's settings.

    Raises:
        ModelError: No such recipe.
    """
    return recipe(name).model_dump(exclude=set(_NOT_OF_A_RECIPE))


def recipe(name: str) -> TrainingSettings:
    """Return the settings called `name`.

    Raises:
        ModelError: No such recipe.
    """
    if name not in RECIPES:
        raise ModelError(unknown_name(name, RECIPES, "recipe"))
    return RECIPES[name]
