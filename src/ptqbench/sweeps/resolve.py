"""From composed configuration to a cell: fill in defaults that depend on other choices, validate, pin content by digest.

Everything a user can get wrong is found here, before a run folder exists. Imports neither torch nor hydra.
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
from ptqbench.sweeps.pins import pin

SECTIONS = ("calibration", "evaluation")
"""Sections that a model or a method may have a usual choice for."""

DEFAULT_EVALUATION: dict[str, Any] = {
    "name": "wikitext2",
    "texts": {"wikitext2": {"dataset": "wikitext2", "split": "test", "seq_len": 2048}},
    "tasks": [],
    "batch_size": 8,
}


def resolve(config: Mapping[str, Any], known: Known | None = None) -> RunSpec:
    """Turn a composed configuration into a validated cell with content digests.

    Args:
        config: Plain data as Hydra composed it; not modified. ``model`` and ``method`` may carry ``calibration`` and
            ``evaluation`` defaults, used where the top-level sections leave a value null.
        known: Shared by the cells of one command.

    Returns:
        The cell.

    Raises:
        ConfigError: Unknown key, wrong type, impossible value, missing file, overlapping texts.
        UnsupportedError: An architecture or a data type that the code cannot serve.
        NotHereError: A hub model that is not on this machine, or a hub data set whose branch names no commit here.
    """
    return pin(validated(config), known or Known())


def skip_reason(spec: RunSpec, known: Known | None = None) -> str | None:
    """Say why the cell makes no sense (first objection of its four roles), or None."""
    architecture = from_config((known or Known()).config(spec.model))
    members = [create(role, getattr(spec.method, role)) for role in ROLES]
    reasons = (member.skip_reason(spec, architecture) for member in members)
    return next((reason for reason in reasons if reason is not None), None)


def validated(config: Mapping[str, Any]) -> RunSpec:
    """Validate a composed configuration without looking at model or texts: everything of the cell but digests and data type.

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
    """Complete the values of a calibration for which no data set was chosen; windows from a file need none."""
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
    """Complete the values of an evaluation that was not chosen by name.

    Texts that are given complete the usual text of the same label, or stand beside the usual ones; ``{}`` means none at all.
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
    """Take the usual value wherever none is given."""
    return {**usual, **{key: value for key, value in given.items() if value is not None or key not in usual}}
