"""How a program of this package ends: its JSON document on standard output, and in a file."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[[str], None]


def say(step: str) -> None:
    """Tell a step of something long on standard error, so that standard output holds the document alone."""
    print(f"· {step}", file=sys.stderr, flush=True)


def write(document: dict[str, Any], to: Path | None) -> None:
    """Write a document to standard output and, where a file is named, there too."""
    text = json.dumps(document, indent=1) + "\n"
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text)
    sys.stdout.write(text)


def ratio(part: float, whole: float) -> float:
    """Return one figure over another as documents have it."""
    return round(part / whole, 4)
