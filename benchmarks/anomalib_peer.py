"""What anomalib makes of the same images and the same teacher; it runs in an environment of its own.

    python3 -m venv PEER && PEER/bin/pip install torch torchvision anomalib openvino
    PEER/bin/python benchmarks/anomalib_peer.py --data DIR --weights FILE --out FOLDER

`benchmarks.peers` starts it; nothing of Proctor is imported here. Networks, losses, optimisers, samplers and
preprocessing are anomalib's, as its release defines them, in float32 as it runs by default. Where OpenVINO is
installed, its way to serve from a CPU, speed is measured in that too, at the precision OpenVINO chooses. Only the
teacher's weights are loaded from a file, since anomalib would download them. Its published recipe for STFPM is 100
epochs in batches of 32; its early stopping is left out, because it watches the test images. On a CPU both methods
need smaller budgets (`--steps`, `--train-images`): the document then says so.
"""

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import cv2
import numpy as np
import torch
from anomalib.models.components import TimmFeatureExtractor  # type: ignore[import-not-found]
from anomalib.models.image import Patchcore, Stfpm  # type: ignore[import-not-found]
from anomalib.models.image.patchcore.torch_model import PatchcoreModel  # type: ignore[import-not-found]
from anomalib.models.image.stfpm.loss import STFPMLoss  # type: ignore[import-not-found]
from anomalib.models.image.stfpm.torch_model import STFPMModel  # type: ignore[import-not-found]
from safetensors.torch import load_file
from torch import Tensor, nn

_EPOCHS, _BATCH, _CORESET = 100, 32, 0.1  # of anomalib's configuration files for the two
_SIZE, _BATCHES = 256, (1, 8)
_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"})
_WARM_UP, _TIMED, _TIMED_S = 2, 10, 3.0


def main() -> None:
    """Train, judge and time; one JSON document on standard output, maps and scores beneath `--out`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="one set each, in MVTec AD's layout")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors of a ResNet-18 up to layer3")
    parser.add_argument("--methods", nargs="+", choices=("stfpm", "patchcore"), default=["stfpm", "patchcore"])
    parser.add_argument("--steps", type=int, help="STFPM's gradient steps; else its 100 epochs")
    parser.add_argument("--train-images", type=int, help="PatchCore learns from at most so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder for <set>-<method>.npz")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = [_measure(folder, method, options, device) for folder in options.data for method in options.methods]
    packages = ["anomalib", "torch", "torchvision", "timm"] + ["openvino"] * _has_openvino()
    versions = {package: version(package) for package in packages}
    document = {"versions": versions, "device": str(device), "dtype": "float32", "threads": options.threads}
    print(json.dumps(document | {"results": results}))


def _measure(folder: Path, method: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    transform = {"stfpm": Stfpm, "patchcore": Patchcore}[method].configure_pre_processor((_SIZE, _SIZE)).transform
    train = _images(folder / "train" / "good")
    weights = load_file(options.weights)
    started = time.perf_counter()
    if method == "stfpm":
        published = _EPOCHS * math.ceil(len(train) / _BATCH)
        steps = options.steps or published
        model = train_stfpm(_read(train, transform), weights, steps, device)
        budget = {"train_images": len(train), "steps": steps, "published_steps": published, "batch": _BATCH}
    else:
        if options.train_images and options.train_images < len(train):
            drawn = np.random.default_rng(options.seed).choice(len(train), options.train_images, replace=False)
            train = [train[index] for index in sorted(drawn)]
        model = _fit_patchcore(_read(train, transform), weights, device)
        budget = {"train_images": len(train), "coreset": _CORESET, "bank_vectors": len(model.memory_bank)}
    fit_seconds = time.perf_counter() - started
    tested = [path for kind in sorted((folder / "test").iterdir()) if kind.is_dir() for path in _images(kind)]
    judge = partial(_judge, model.eval(), device)
    images = _read(tested, transform)
    judged = [judge(part) for part in images.split(_BATCHES[-1])]
    np.savez(
        options.out / f"{folder.name}-{method}.npz",
        images=[str(path.relative_to(folder)) for path in tested],
        maps=np.concatenate([maps for maps, _ in judged]),
        scores=np.concatenate([scores for _, scores in judged]),
    )
    ways: dict[str, Callable[[Tensor], object]] = {"frames_per_s": judge}
    if _has_openvino():
        ways["frames_per_s_openvino"] = openvino = _OpenVino(model, options.threads)
    speeds: dict[str, Any] = {
        way: {str(size): _frames_per_s(call, images[:size]) for size in _BATCHES} for way, call in ways.items()
    }
    if _has_openvino():
        speeds["openvino_dtype"] = openvino.dtype
    return {"name": folder.name, "method": method, **budget, "fit_seconds": round(fit_seconds, 1), **speeds}


def train_stfpm(images: Tensor, weights: dict[str, Tensor], steps: int, device: torch.device) -> nn.Module:
    """Train anomalib's STFPM on (N, 3, S, S) normalised images."""
    extractor = "anomalib.models.image.stfpm.torch_model.TimmFeatureExtractor"
    # The teacher alone asks for weights, by a download that the file replaces.
    with mock.patch(extractor, lambda **given: TimmFeatureExtractor(**given | {"pre_trained": False})):
        model = STFPMModel(layers=("layer1", "layer2", "layer3"))
    model.teacher_model.feature_extractor.load_state_dict(weights)
    model.to(device).train()
    # The method reads nothing but `self.model`: so the optimiser is this release's.
    optimizer = Stfpm.configure_optimizers(mock.Mock(model=model))
    criterion = STFPMLoss()
    order: list[Tensor] = []
    for step in range(steps):
        order = order or list(torch.randperm(len(images)).split(_BATCH))
        teacher, student = model(images[order.pop(0)].to(device))
        loss = criterion(teacher, student)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            print(f"anomalib stfpm: step {step + 1} of {steps}, loss {loss.item():.3f}", file=sys.stderr)
    return model


def _fit_patchcore(images: Tensor, weights: dict[str, Tensor], device: torch.device) -> PatchcoreModel:
    model = PatchcoreModel(layers=("layer2", "layer3"), backbone="resnet18", pre_trained=False)
    model.feature_extractor.feature_extractor.load_state_dict(weights)
    model.to(device).train()
    for part in images.split(_BATCH):
        model(part.to(device))
    model.subsample_embedding(_CORESET)
    return model


@torch.inference_mode()
def _judge(model: nn.Module, device: torch.device, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return (B, S, S) maps and (B,) scores of (B, 3, S, S) normalised images."""
    found = model(images.to(device))
    return found.anomaly_map.squeeze(1).cpu().numpy(), found.pred_score.flatten().cpu().numpy()


class Outputs(nn.Module):
    """A model whose result a compiler can follow: map and score alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, 1, S, S) maps and (B, 1) scores of (B, 3, S, S) normalised images."""
        found = self._model(images)
        return found.anomaly_map, found.pred_score


class _OpenVino:
    """A model compiled for the CPU, once for each size of batch, as fixed shapes are fastest.

    Attributes:
        dtype: The precision that OpenVINO chose, after the first call.
    """

    def __init__(self, model: nn.Module, threads: int) -> None:
        self._model = Outputs(model.cpu()).eval()
        self._threads = threads
        self.dtype: str | None = None
        self._compiled: dict[int, Callable[[list[np.ndarray]], object]] = {}

    def __call__(self, images: Tensor) -> object:
        import openvino  # type: ignore[import-not-found]

        if len(images) not in self._compiled:
            network = openvino.convert_model(self._model, example_input=images, input=[images.shape])
            options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self._threads}
            compiled = openvino.compile_model(network, "CPU", options)
            self.dtype = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
            self._compiled[len(images)] = compiled
        return self._compiled[len(images)]([images.numpy()])


def _has_openvino() -> bool:
    return find_spec("openvino") is not None


def _frames_per_s(judge: Callable[[Tensor], object], batch: Tensor) -> float:
    seconds: list[float] = []
    while len(seconds) < _WARM_UP + _TIMED or sum(seconds[_WARM_UP:]) < _TIMED_S:
        started = time.perf_counter()
        judge(batch)
        seconds.append(time.perf_counter() - started)
    return round(len(batch) / statistics.median(seconds[_WARM_UP:]), 2)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def _read(paths: list[Path], transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (N, 3, S, S) float32, normalised."""
    images = (cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) for path in paths)
    return torch.stack([transform(torch.from_numpy(image).permute(2, 0, 1).float() / 255) for image in images])


if __name__ == "__main__":
    main()
