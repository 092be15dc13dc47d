"""From a composed configuration to a validated cell, and whether that cell makes sense.

Defaults that depend on other choices are filled in here. ``sweeps.pins`` then looks at models and data, so that whatever is wrong
with a request is found before a run folder exists. Imports neither torch nor hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ptqbench.cell.registry import complete, create
from ptqbench.cell.spec import ROLES, Role, RunSpec, build, nearest
from ptqbench.data.window_files import WINDOWS
from ptqbench.errors import ConfigError
from ptqbench.models.architecture import from_config
from ptqbench.sweeps.pins import Known as Known

SECTIONS = ("calibration", "evaluation")
"""Sections for which a model or a method may have defaults."""

DEFAULT_EVALUATION: dict[str, Any] = {
    "name": "wikitext2",
    "texts": {"wikitext2": {"dataset": "wikitext2", "split": "test", "seq_len": 2048}},
    "tasks": [],
    "batch_size": 8,
}


def skip_reason(spec: RunSpec, known: Known | None = None) -> str | None:
    """Why the combination of a cell makes no sense, by the first of its four roles that refuses it; None if it does make sense."""
    architecture = from_config((known or Known()).config(spec.model))
    members = [create(role, getattr(spec.method, role)) for role in ROLES]
    reasons = (member.skip_reason(spec, architecture) for member in members)
    return next((reason for reason in reasons if reason is not None), None)


def validated(config: Mapping[str, Any]) -> RunSpec:
    """Validate a composed configuration without looking at model or texts. Only digests and the data type are not filled in.

    Raises:
        ConfigError: A section is missing, a key is unknown, or a value is impossible.
    """
    data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for section in ("model", "method", "bitwidth", "calibration", "evaluation"):
        if not isinstance(data.get(section), dict):
            raise ConfigError(f"section {section!r} is missing or not a mapping: choose one with {section}=NAME")
    fields = [field.name for field in dataclasses.fields(RunSpec)]
    unknown = next((key for key in sorted(data) if key not in fields), None)
    if unknown is not None:
        raise ConfigError(f"unknown key {unknown!r}; {nearest(unknown, fields)}")
    # Defaults: the model's own, else the method's.
    of_model, of_method = ({key: data[s].pop(key, None) for key in SECTIONS} for s in ("model", "method"))
    usual = {key: of_model[key] or of_method[key] or {} for key in SECTIONS}
    data["calibration"] = _calibration(data["calibration"], usual["calibration"])
    data["evaluation"] = _evaluation(data["evaluation"], usual["evaluation"] or DEFAULT_EVALUATION)
    for role in ROLES:
        data["method"][role] = _member(role, data["method"].get(role))
    return build(RunSpec, data)


def _member(role: Role, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"method.{role}: expected a mapping with a name, got {given!r}; choose one with method/{role}=NAME"
        )
    return dataclasses.asdict(complete(role, given))


def _calibration(given: dict[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of a calibration without a data set. Windows from a file need neither."""
    if given.get("windows") is None:
        return given if given.get("dataset") is not None else _filled(given, usual)
    useless = next((key for key, value in given.items() if value is not None and key != "windows"), None)
    if useless is not None:
        raise ConfigError(
            f"calibration.{useless}={given[useless]} is not used beside calibration.windows, which gives the windows "
            f"themselves: leave it out"
        )
    return {"dataset": WINDOWS, "windows": given["windows"]}


def _evaluation(given: dict[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of an evaluation that was not chosen by name.

    A text that is given is completed by the default text of its label, and is added to the others; ``{}`` stands for no text.
    """
    texts = given.get("texts")
    if given.get("name") is not None and texts is not None:
        return given
    filled = _filled(given, usual)
    if texts:
        labels = dict(usual.get("texts") or {})
        filled["texts"] = labels | {
            label: {**labels.get(label, {}), **text} if isinstance(text, Mapping) else text
            for label, text in texts.items()
        }
    return filled


def _filled(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The default wherever no value is given."""
    return {**usual, **{key: value for key, value in given.items() if value is not None or key not in usual}}
