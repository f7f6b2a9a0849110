"""The errors of this package: each class says whose fault it is, each message is one line for a user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModelError(Exception):
    """Something about a model is wrong: a name, an option, a training that diverged."""


class TrainingDataError(ModelError):
    """The user's images cannot be trained on or evaluated."""


class TeacherError(ModelError):
    """A teacher's weights are missing or are not what they should be; the message says what to do."""


class VersionError(ModelError):
    """The registry has no such version, or has one that is incomplete, unreadable or for another teacher."""


class TrainingStoppedError(ModelError):
    """The caller asked a training to stop before its last step."""


def unknown_name(name: str, known: Iterable[str], kind: str) -> str:
    """Return the line that says so of a name that is none of the known ones, with the nearest of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean "{near[0]}"? ' if near else ""
    return f'unknown {kind}: "{name}"; {hint}Known: {", ".join(known)}'
