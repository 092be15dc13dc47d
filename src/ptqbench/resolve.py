"""From composed configuration to a cell: fill in defaults that depend on other choices, validate, pin content by digest.

Everything a user can get wrong is found here, before a run folder exists. Imports neither torch nor hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ptqbench.data.texts import check_disjoint, text_digest
from ptqbench.errors import ConfigError, UnsupportedError
from ptqbench.models import source
from ptqbench.models.architecture import from_config
from ptqbench.registry import complete, create
from ptqbench.spec import ROLES, RunSpec, build, nearest

DEFAULT_EVALUATION: dict[str, Any] = {
    "name": "wikitext2",
    "texts": {"wikitext2": {"dataset": "wikitext2", "split": "test", "seq_len": 2048}},
    "tasks": [],
    "batch_size": 8,
}
DTYPES = ("float32", "bfloat16", "float16")


def resolve(config: Mapping[str, Any]) -> RunSpec:
    """Turn a composed configuration into a validated cell with content digests.

    Args:
        config: Plain data as Hydra composed it; not modified. ``model`` and ``method`` may carry ``calibration`` and
            ``evaluation`` defaults, used where the top-level sections leave a value null.

    Returns:
        The cell.

    Raises:
        ConfigError: Unknown key, wrong type, impossible value, missing file, overlapping texts.
        UnsupportedError: An architecture or a data type that the code cannot serve.
    """
    return _pin(_validated(config))


def skip_reason(spec: RunSpec) -> str | None:
    """Say why the cell makes no sense (first objection of its four roles), or None."""
    architecture = from_config(source.locate(spec.model, weights=False).config)
    members = [create(role, getattr(spec.method, role)) for role in ROLES]
    reasons = (member.skip_reason(spec, architecture) for member in members)
    return next((reason for reason in reasons if reason is not None), None)


def _validated(config: Mapping[str, Any]) -> RunSpec:
    data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in config.items()}
    for section in ("model", "method", "bitwidth", "calibration", "evaluation"):
        if not isinstance(data.get(section), dict):
            raise ConfigError(f"section {section!r} is missing or not a mapping: choose one with {section}=NAME")
    model, method = data["model"], data["method"]
    defaults = {key: model.pop(key, None) or {} for key in ("calibration", "evaluation")}
    fallback = {key: method.pop(key, None) or {} for key in ("calibration", "evaluation")}
    data["calibration"] = _fill(data["calibration"], "dataset", defaults["calibration"] or fallback["calibration"])
    evaluation = defaults["evaluation"] or fallback["evaluation"] or DEFAULT_EVALUATION
    data["evaluation"] = _fill(data["evaluation"], "texts", evaluation)
    for role in ROLES:
        given = method.get(role)
        if not isinstance(given, Mapping):
            raise ConfigError(
                f"method.{role}: expected a mapping with a name, got {given!r}; choose one with method/{role}=NAME"
            )
        method[role] = dataclasses.asdict(complete(role, given))
    unknown = sorted(set(data) - {f.name for f in dataclasses.fields(RunSpec)})
    if unknown:
        raise ConfigError(
            f"unknown key {unknown[0]!r}; {nearest(unknown[0], [f.name for f in dataclasses.fields(RunSpec)])}"
        )
    return build(RunSpec, data)


def _fill(given: dict[str, Any], witness: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a section whose ``witness`` value is null from defaults; values that were given stay."""
    base = {} if given.get(witness) is not None else defaults
    return {**base, **{key: value for key, value in given.items() if value is not None or key not in base}}


def _pin(spec: RunSpec) -> RunSpec:
    """Fill in content digests and the data type, and drop what cannot matter to an unquantized cell."""
    found = source.locate(spec.model, weights=False)
    stored = str(found.config.get("dtype") or found.config.get("torch_dtype") or "float32")
    dtype = spec.model.dtype if spec.model.dtype != "auto" else stored
    if dtype not in DTYPES:
        raise UnsupportedError(
            f"the checkpoint stores {dtype!r}; expected one of {', '.join(DTYPES)}: give model.dtype=..."
        )
    model = dataclasses.replace(spec.model, digest=source.digest(spec.model), dtype=dtype)  # type: ignore[arg-type]
    calibration = None
    if spec.quantizes and spec.calibration is not None:
        calibration = dataclasses.replace(spec.calibration, digest=text_digest(spec.calibration))
    texts = {
        label: dataclasses.replace(text, digest=text_digest(text)) for label, text in spec.evaluation.texts.items()
    }
    for label, text in texts.items():
        if calibration is not None:
            check_disjoint(calibration, text, label)
    return dataclasses.replace(
        spec,
        model=model,
        calibration=calibration,
        evaluation=dataclasses.replace(spec.evaluation, texts=texts),
        seed=spec.seed if spec.quantizes else 0,
    )
