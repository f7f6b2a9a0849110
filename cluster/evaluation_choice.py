"""What `proctor evaluate` is asked to compare, from its options to settings that were checked."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from cluster.config import ProctorConfig
from cluster.errors import ConfigError
from models.detectors import make_detector
from models.settings import TrainingSettings, recipe


def base_settings(config: ProctorConfig, recipe_name: str | None, product: str | None) -> TrainingSettings:
    """The settings that an evaluation starts from: a recipe's, by default `fast`, or those of a product's trainings.

    Raises:
        ConfigError: both are given.
        ModelError: the recipe is unknown.
    """
    if product is None:
        return recipe(recipe_name or "fast")
    if recipe_name is not None:
        raise ConfigError("--product has settings of its own: leave out --recipe, or --product")
    return config.training_for(product)


def chosen_settings(
    base: TrainingSettings,
    detectors: Sequence[str],
    options: Sequence[str],
    overrides: dict[str, Any],
    teachers: Mapping[str, str],
) -> list[TrainingSettings]:
    """The settings of each detector to evaluate, checked before anything is trained.

    Args:
        base: the settings to start from.
        detectors: names, in order; none takes the base's. The base's options are its own detector's only.
        options: `name=value` for every detector, see `parse_options`.
        overrides: other settings that differ.
        teachers: local weights files by teacher, for what names none.

    Raises:
        ConfigError: a setting is wrong.
        ModelError: detector or option is unknown.
    """
    extra = parse_options(options)
    teacher = overrides.get("teacher", base.teacher)
    weights = overrides.get("weights") or (base.weights if teacher == base.teacher else None) or teachers.get(teacher)
    chosen = []
    for name in dict.fromkeys(detectors or [base.detector]):
        own = base.detector_options if name == base.detector else {}
        update = {"detector": name, "detector_options": _merged(own, extra), "weights": weights}
        try:
            settings = TrainingSettings.model_validate(base.model_dump() | overrides | update)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(str(part) for part in first["loc"]).replace("_", "-")
            raise ConfigError(f"--{option} {first['input']}: {first['msg']}") from None
        make_detector(settings.detector, settings.detector_options)
        chosen.append(settings)
    return chosen


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Nested options from `name=value`: dots lead inwards; a value is JSON, or else the string as it stands.

    Raises:
        ConfigError: one has no name or no `=`, or two contradict each other.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        path, equals, text = option.partition("=")
        names = path.split(".")
        if not equals or not all(names):
            raise ConfigError(f"--option {option}: expected name=value, or outer.inner=value")
        inner = parsed
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--option {option}: {name} was given a value of its own before")
        inner[names[-1]] = _json_or_text(text)
    return parsed


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _merged(outer: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A copy of `outer` with what `over` says, table by table."""
    merged = dict(outer)
    for name, value in over.items():
        before = merged.get(name)
        merged[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged
