"""How a program of this package ends: its JSON document on standard output, and in a file."""

import argparse
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
    """Write a document to standard output and, where a file is named, there too; a file that cannot be written ends the
    program with one line.
    """
    text = json.dumps(document, indent=1) + "\n"
    sys.stdout.write(text)
    if to is not None:
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_text(text)
        except OSError as error:
            sys.exit(f"cannot write {to}: {error.strerror or error}")


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number of at least {least}")
        return int(text)

    return number


def ratio(part: float, whole: float) -> float:
    """Return one figure over another as documents have it."""
    return round(part / whole, 4)
