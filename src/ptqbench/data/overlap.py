"""Refuse cells that evaluate on text of their calibration. Imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptqbench.cell.spec import TextSpec
from ptqbench.data import hub
from ptqbench.data.texts import documents_of
from ptqbench.errors import ConfigError


def check_disjoint(calibration: TextSpec, evaluation: TextSpec, label: str) -> None:
    """Refuse to evaluate on text that calibration may have read.

    If two texts are divided into documents in the same way, their portions are compared. Otherwise the characters of the content
    that their documents cover are compared (the rows, if it is Parquet).

    Raises:
        ConfigError: The texts have the same content and split, and their portions overlap.
    """
    if calibration.digest != evaluation.digest:
        return
    if hub.is_identity(calibration.digest) and calibration.split != evaluation.split:
        return  # two files of one repository
    if _reader(calibration) == _reader(evaluation):
        (start, stop), (first, last) = calibration.portion, evaluation.portion
        overlap = max(start, first) < min(stop, last)
    else:
        overlap = _share(_places(calibration), _places(evaluation))
    if overlap:
        raise ConfigError(
            f"evaluation.texts.{label} overlaps the calibration text (portions {list(calibration.portion)} and "
            f"{list(evaluation.portion)} of the same content); give disjoint portions, e.g. calibration.portion=[0,0.8] "
            f"evaluation.texts.{label}.portion=[0.8,1], and the same separator for both"
        )


def _reader(spec: TextSpec) -> tuple[Any, ...]:
    """The values that decide how content is divided into documents."""
    return spec.dataset, spec.separator or None, Path(spec.path or "").suffixes


def _places(spec: TextSpec) -> list[tuple[int, int]]:
    """Start and stop of every document in the content, in order."""
    return [(start, stop) for start, stop, _ in documents_of(spec)]


def _share(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> bool:
    """Whether an interval of one ordered list meets one of the other."""
    i = j = 0
    while i < len(left) and j < len(right):
        if max(left[i][0], right[j][0]) < min(left[i][1], right[j][1]):
            return True
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    return False
