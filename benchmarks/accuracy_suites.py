"""What `benchmarks.accuracy` trains and judges: suites of ways, each with its settings and its views.

A view is another detector that judges by the same trained student, so that a choice which training does not see
(fusion, smoothing, a neighbours' code in the map alone) costs no training of its own.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from models.cards import DetectorRecord
from models.detectors import make_detector
from models.settings import RECIPES, TrainingSettings

TEACHERS = ("efficientnet_lite0", "resnet18")
# One training for all: what a table compares is the method.
_SAME = {"input_size": 128, "steps": 150, "batch_size": 8, "learning_rate": 3e-3, "schedule": "onecycle"}
# Contextual blocks learn more slowly, and what neighbours' codes add shows in students that have learned.
_LONGER = {"steps": 600}
_LONGEST = {"steps": 1500}
_NETWORK = {"width": 0.25, "hardest": 0.03}
_DENSE = {"width": 0.5, "bottleneck": "dense", "scales": 2, "fusion": {"kind": "normalised", "score": "top"}}
_CONTROL = {"fusion.smoothing": 4.0}


@dataclass(frozen=True)
class Way:
    """One way of training and judging.

    Attributes:
        suite: The table it belongs to.
        name: Its row there.
        settings: Of the training, without teacher, weights and seed.
        views: Options of the detector that differ, dotted, by the view's name; '' is the detector as trained.
        teachers: The teachers to try.
        sets: The sets to try, None for all.
    """

    suite: str
    name: str
    settings: TrainingSettings
    views: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    teachers: tuple[str, ...] = TEACHERS
    sets: tuple[str, ...] | None = None

    @property
    def described(self) -> dict[str, Any]:
        """Return all that decides what is trained but teacher, weights and seed, with the detector's defaults."""
        own = self.settings.model_dump(mode="json", exclude={"weights", "seed", "teacher", "threads", "device"})
        record = DetectorRecord.of(make_detector(self.settings.detector, self.settings.detector_options))
        return own | {"detector_options": record.options, "revision": record.revision}

    @property
    def fingerprint(self) -> str:
        """Return what tells this way's journal lines and rows from those of another one under its name."""
        text = json.dumps([self.described, self.views], sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def suite(name: str) -> list[Way]:
    """Return the ways of a suite: table, asymts, fcl, recommended or paper."""
    return {"table": _table, "asymts": _asymts, "fcl": _fcl, "recommended": _recommended, "paper": _paper}[name]()


SUITES = ("table", "asymts", "fcl", "recommended", "paper")


def _same(detector: str, options: dict[str, Any], **changes: Any) -> TrainingSettings:
    values = _SAME | {"detector": detector, "detector_options": options} | changes
    return TrainingSettings.model_validate(values)


def _table() -> list[Way]:
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "stfpm": ("stfpm", _NETWORK),
        "asymts": ("asymts", _NETWORK),
        "fcl on stfpm": ("fcl", {"host": "stfpm", "host_options": _NETWORK}),
        "reverse": ("reverse", {"width": 0.25, "hardest": 0.1}),
        "efficientad": ("efficientad", {"width": 0.25, "hard": 0.01}),
        "reverse, dense": ("reverse", _DENSE),
        "associative": ("associative", {"width": 0.25, "hardest": 0.03}),
    }
    return [Way("table", name, _same(detector, options)) for name, (detector, options) in ways.items()]


def _asymts() -> list[Way]:
    """The three parts of AsymTS, each left out in turn; the fusion is left out by a view. STFPM has none of them."""
    one = ("efficientnet_lite0",)
    views: dict[str, dict[str, Any]] = {"": {}, "sum fusion": {"fusion.kind": "sum"}, "smoothed 4": _CONTROL}
    parts: dict[str, dict[str, Any]] = {
        "asymts": {},
        "plain blocks": {"blocks": "plain"},
        "no moving average": {"momentum": None},
        "plain blocks, no moving average": {"blocks": "plain", "momentum": None},
    }
    stfpm = Way("asymts", "stfpm", _same("stfpm", _NETWORK, **_LONGEST), {"": {}, "smoothed 4": _CONTROL}, one)
    return [stfpm] + [
        Way("asymts", name, _same("asymts", _NETWORK | changes, **_LONGEST), views, one)
        for name, changes in parts.items()
    ]


def _fcl() -> list[Way]:
    """SNC's forms in loss, map and both, radius 1 and 2, on three hosts; the control is plain smoothing."""
    hosts: dict[str, tuple[str, dict[str, Any]]] = {
        "stfpm": ("stfpm", _NETWORK),
        "reverse": ("reverse", {"width": 0.25, "hardest": 0.1, "scales": 2, "bottleneck": "dense"}),
        "asymts": ("asymts", _NETWORK),
    }
    off = dict.fromkeys(("flattened", "affinity", "embedding"), 0.0)
    one = ("efficientnet_lite0",)
    ways, trained = [], []
    for host, (kind, options) in hosts.items():
        base = {"host": kind, "host_options": options}
        none = {"snc": {"form": "none"}}
        ways.append(Way("fcl", f"{host}: none", _fcl_settings(base | off | none), _map_views(), one))
        ways.append(Way("fcl", f"{host}: high-level", _fcl_settings(base | none), _map_views(), one))
        for form, radius in itertools.product(("softmax", "uniform", "relation", "masked"), (1, 2)):
            snc = {"form": form, "radius": radius, "place": "both"}
            views: dict[str, dict[str, Any]] = {"both": {}, "loss": {"snc.place": "loss"}, "both, smoothed 4": _CONTROL}
            settings = _fcl_settings(base | off | {"snc": snc})
            trained.append(Way("fcl", f"{host}: {form} r{radius}", settings, views, one, ("magtile",)))
    # Codes in the map alone cost no training, so they are tried on every set; what is trained, where there are masks.
    return ways + trained


def _fcl_settings(options: dict[str, Any]) -> TrainingSettings:
    return _same("fcl", options, **_LONGER)


def _map_views() -> dict[str, dict[str, Any]]:
    """Views of a student that was trained without neighbours' codes: the codes in the map, and the control."""
    views: dict[str, dict[str, Any]] = {"none": {}, "smoothed 2": {"fusion.smoothing": 2.0}, "smoothed 4": _CONTROL}
    for form, radius in (("uniform", 1), ("uniform", 2), ("softmax", 1), ("relation", 1)):
        views[f"map {form} r{radius}"] = {"snc.form": form, "snc.radius": radius, "snc.place": "map"}
    views["map uniform r1, normalised"] = views["map uniform r1"] | {"fusion.kind": "normalised"}
    views["map uniform r1, smoothed 4"] = views["map uniform r1"] | _CONTROL
    return views


def _recommended() -> list[Way]:
    """The recipes, with their parts and choices as views; what else was tried for them."""
    one = ("efficientnet_lite0",)
    views: dict[str, dict[str, Any]] = {
        "": {},
        "network alone": {"fusion.weights": (2, 4, 2, 0)},
        "memory alone": {"fusion.weights": (0, 0, 0, 1)},
        "without codes": {"snc": "none"},
        "softmax codes": {"snc": "softmax"},
        "maximum": {"fusion.score": "max"},
        "smoothed 4": _CONTROL,
    }
    stfpm = TrainingSettings(detector="stfpm", detector_options={"width": 0.5, "hardest": 0.03})
    wide = {"detector_options": {"width": 0.5}}
    dense = TrainingSettings.model_validate(
        {"detector": "reverse", "detector_options": _DENSE, "input_size": 128, "learning_rate": 2e-3}
        | {"steps": 1000, "batch_size": 16}
    )
    return [
        Way("recommended", "accurate", RECIPES["accurate"], views, one),
        Way("recommended", "fast", RECIPES["fast"], views, one),
        Way("recommended", "accurate, width 0.5", RECIPES["accurate"].changed(wide), views, one),
        Way("recommended", "fast, width 0.5", RECIPES["fast"].changed(wide), views, one),
        Way("recommended", "reverse dense, 128", dense, {"": {}, "maximum": {"fusion.score": "max"}}, one),
        Way("recommended", "stfpm, width 0.5, 128", stfpm, {"": {}}, one),
    ]


def _paper() -> list[Way]:
    return [Way("paper", "stfpm", RECIPES["paper"], {"": {}, "smoothed 4": _CONTROL}, ("resnet18",))]
