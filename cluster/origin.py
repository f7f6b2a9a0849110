"""Refuses to run when a stranger's package hides one of ours.

`models`, `workers`, `producers` and `cluster` are common names: such a folder in the current directory or on
PYTHONPATH would be imported in place of Proctor's and fail later in ways that nobody understands.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from cluster.errors import ProctorError

PACKAGES = ("producers", "models", "workers", "cluster")


def check_origin(packages: tuple[str, ...] = PACKAGES) -> None:
    """Check, without importing anything, that the packages come from one installation: this file's.

    Raises:
        ProctorError: one of them is missing or lies elsewhere; the line names both places and the remedy.
    """
    home = Path(__file__).resolve().parents[1]
    for package in packages:
        expected, found = home / package, _location(package)
        if found is None:
            raise ProctorError(f"the package {package} is missing at {expected}: install Proctor again")
        if found != expected:
            raise ProctorError(
                f"{found} hides Proctor's own package at {expected}: run from another directory, "
                f"take {found.parent} from PYTHONPATH, or rename it"
            )


def _location(package: str) -> Path | None:
    """Return the folder or file that `import package` uses, or would use."""
    try:
        spec = find_spec(package)
    except ValueError:  # imported already, by something that left no spec
        origin = getattr(sys.modules[package], "__file__", None)
        return Path(origin).resolve().parent if origin else None
    if spec is None:
        return None
    folders = list(spec.submodule_search_locations or [])
    if folders:
        return Path(folders[0]).resolve()
    return Path(spec.origin).resolve() if spec.origin else None
