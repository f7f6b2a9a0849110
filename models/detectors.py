"""The table of detectors, and the way from a name and options to one of them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from models.associative import Associative
from models.asymts import AsymTS
from models.detector import Detector
from models.efficientad import EfficientAD
from models.errors import ModelError, unknown_name
from models.fcl import FCL
from models.reverse import Reverse
from models.stfpm import STFPM

__all__ = ["DETECTORS", "Detector", "make_detector"]

DETECTORS: dict[str, type[Detector]] = {
    each.name: each for each in (STFPM, AsymTS, FCL, Reverse, EfficientAD, Associative)
}


def make_detector(name: str, options: dict[str, Any] | None = None) -> Detector:
    """Build a detector from its name and options.

    Raises:
        ModelError: Unknown name, unknown option or a value out of range.
    """
    if name not in DETECTORS:
        raise ModelError(unknown_name(name, DETECTORS, "detector"))
    try:
        return DETECTORS[name].model_validate(options or {})
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            known = DETECTORS[name].model_fields
            raise ModelError(f"detector {name}: {unknown_name(option, known, 'option')}") from None
        where = f", option '{option}'" if option else ""
        found = f", found {first['input']!r}" if option else ""
        raise ModelError(f"detector {name}{where}: {first['msg']}{found}") from None
