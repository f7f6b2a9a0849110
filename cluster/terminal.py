"""What all commands share: the terminal, the options before the command, and the forms of common options."""

import json
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.config import ProctorConfig, load_config

_PIPE_WIDTH = 160  # what goes into a file or a pipe is not cut to a terminal's width
out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")]
Product = Annotated[str, typer.Option("--product", "-p", help="Product's name.")]
OneProduct = Annotated[str | None, typer.Option("--product", "-p", help="Only this product's.")]


@dataclass
class _Chosen:
    """Options before the command; a process runs one command."""

    config_file: Path | None = None
    home: Path | None = None


_chosen = _Chosen()


def choose(config: Path | None, home: Path | None) -> None:
    """Keep the options before the command for it."""
    _chosen.config_file, _chosen.home = config, home


def config_file() -> Path | None:
    """The configuration file of the command line, None if it names none."""
    return _chosen.config_file


def load() -> ProctorConfig:
    """The configuration that the options before the command choose.

    Raises:
        ConfigError: one line with file or variable, key, what was found and what is allowed.
    """
    return load_config(_chosen.config_file, _chosen.home)


def print_json(document: Any) -> None:
    """Write one JSON document to standard output."""
    sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")


def say(step: str) -> None:
    """Tell a step of something long."""
    err.print(f"[dim]· {step}[/dim]")


def stop_on_signal() -> threading.Event:
    """An event that SIGINT and SIGTERM set, so that a command ends in order."""
    import signal

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def user() -> str:
    """Who gives the command."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no entry for this user id, as in some containers
        return "unknown"
