"""The steps of a training: batches, optimizer, schedule, checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from models.detector import Detector, Student
from models.errors import ModelError, TrainingStoppedError
from models.features import TeacherFeatures
from models.inference import best_dtype
from models.settings import TrainingSettings

Progress = Callable[[int, int, float], None]
ShouldStop = Callable[[], bool]

# Losses are read back from the device, reported and checked once in so many steps.
REPORT_STEPS = 10
# 'best' looks at the held-out normals so many times in a training.
CHECKPOINTS = 20


@dataclass
class Fit:
    """One training under way.

    Attributes:
        settings: How to train.
        detector: Says what the loss is.
        student: float32, on `device`; trained in place.
        normals: Images to train on, with the teacher's features.
        held_out: Images to choose a checkpoint by, likewise.
        device: Where to compute.
    """

    settings: TrainingSettings
    detector: Detector
    student: Student
    normals: TeacherFeatures
    held_out: TeacherFeatures
    device: torch.device

    def __post_init__(self) -> None:
        self._compiled = torch.compile(self.student) if self.settings.compile else None

    def run(self, progress: Progress | None, should_stop: ShouldStop | None) -> list[float]:
        """Take all steps, or fewer on a plateau; return their losses and leave the student that is to be kept."""
        self.student.to(memory_format=torch.channels_last)
        self.student.begin(self.normals)
        settings = self.settings
        optimizer, schedule = self._optimizer()
        losses: list[Tensor] = []
        best, keeps_best = Best(), settings.keep == "best"
        checkpoint_steps = max(1, settings.steps // CHECKPOINTS)
        for step, indices in enumerate(self._batches(), start=1):
            losses.append(self._step(indices, optimizer))
            schedule.step()
            if step % REPORT_STEPS == 0 or step == settings.steps:
                self._report(step, losses, progress)
                if should_stop is not None and should_stop():
                    raise TrainingStoppedError(f"training stopped at step {step} of {settings.steps}")
            if self._looks_at_held_out and (step % checkpoint_steps == 0 or step == settings.steps):
                best.offer(self.held_out_loss(), self.student)
                if settings.patience is not None and best.age >= settings.patience:
                    keeps_best = True  # a step amid the schedule is worth less than the best before
                    break
        if keeps_best and best.state is not None:
            self.student.load_state_dict(best.state)
        return torch.stack(losses).tolist()

    @property
    def _looks_at_held_out(self) -> bool:
        return self.settings.keep == "best" or self.settings.patience is not None

    def _step(self, indices: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        self.student.train()
        inputs, features = self.normals.batch(indices)
        loss = self._loss(inputs, features)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def _loss(self, inputs: Tensor, features: tuple[Tensor, ...]) -> Tensor:
        dtype = training_dtype(self.device)
        student = self._compiled if self._compiled is not None and self.student.training else self.student
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            pairs = student(inputs, features)
        # Outside: a loss needs float32.
        return self.detector.loss(pairs)

    def _report(self, step: int, losses: list[Tensor], progress: Progress | None) -> None:
        recent = float(torch.stack(losses[-REPORT_STEPS:]).mean())
        if not math.isfinite(recent):
            raise ModelError(
                f"training diverged at step {step}: the loss is {recent}; "
                f"lower learning_rate (now {self.settings.learning_rate:g})"
            )
        if progress is not None:
            progress(step, self.settings.steps, recent)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Return the loss of the student as it is on the held-out normals, a mean over images."""
        self.student.eval()
        losses = [float(self._loss(*self.held_out.batch(chunk))) * len(chunk) for chunk in self.held_out.chunks()]
        return sum(losses) / len(self.held_out)

    def _batches(self) -> Iterator[Tensor]:
        """Yield (B,) int64 indices for each step, from one shuffled pass over the images after the other."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        # Two at least, if need be the same one twice: a batch normalisation over a single value is undefined.
        size = max(2, min(self.settings.batch_size, len(self.normals)))
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.settings.steps):
            while len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.normals), generator=generator)])
            yield order[:size]
            order = order[size:]

    def _optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        settings, parameters = self.settings, self.student.parameters()
        rate, decay = settings.learning_rate, settings.weight_decay
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
        factor = _schedule(settings)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass
class Best:
    """The lowest loss on the held-out normals so far.

    Attributes:
        loss: The lowest.
        age: Looks since then.
        state: The student's state dict at that look.
    """

    loss: float = math.inf
    age: int = 0
    state: dict[str, Tensor] | None = None

    def offer(self, loss: float, student: Student) -> None:
        """Take note of a loss, and of the student if it is the best so far."""
        self.age += 1
        if loss < self.loss:
            self.loss, self.age, self.state = loss, 0, copy.deepcopy(student.state_dict())


def _schedule(settings: TrainingSettings) -> Callable[[int], float]:
    """Return the learning rate's factor as a function of the steps taken."""
    rise = max(1, settings.steps // 10) if settings.schedule == "onecycle" else 0

    def factor(step: int) -> float:
        if settings.schedule == "constant":
            return 1.0
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, settings.steps - rise)))

    return factor


def training_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it: it has float32's range, so no loss needs scaling."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return best_dtype(device)
