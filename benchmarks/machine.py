"""What a result was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "timm", "redis", "pyarrow", "deltalake", "opencv-python-headless", "numpy")


def describe_machine() -> dict[str, Any]:
    """Processor, cores, GPU and versions, for a benchmark's document."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None  # a measurement that needs it fails by itself


def _processor() -> str:
    """Name, family and model: virtual machines give many processors one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    first = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if "model name" not in first:
        return platform.machine()
    numbers = [f"{kind} {first[key]}" for kind, key in (("family", "cpu family"), ("model", "model")) if key in first]
    return ", ".join([first["model name"], *numbers])
