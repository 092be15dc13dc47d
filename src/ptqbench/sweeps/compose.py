"""From override words and sweep files to cells. Hydra ends here: what leaves is a validated ``RunSpec`` or an error of a cell."""

from __future__ import annotations

import dataclasses
from typing import Any

from ptqbench.cell import labels
from ptqbench.cell.spec import RunSpec
from ptqbench.errors import NotHereError, PtqbenchError
from ptqbench.runs.outcome import as_problem
from ptqbench.sweeps.cells import Cell, with_folders
from ptqbench.sweeps.composer import Composer
from ptqbench.sweeps.files import Sweep, describe, expand, load_sweep, overrides
from ptqbench.sweeps.hydra_compose import check_grammar, compose_data
from ptqbench.sweeps.naming import Naming
from ptqbench.sweeps.pins import Known, pin
from ptqbench.sweeps.resolve import skip_reason, validated

__all__ = ["Composer", "cells", "compose_cell", "compose_data", "requested", "resolved"]


def compose_cell(words: list[str]) -> RunSpec:
    """Compose and validate one cell from override words, e.g. ``["+method=gptq", "model=tiny"]``.

    Raises:
        ConfigError: As ``resolve``; also whatever Hydra objects to.
    """
    return named(compose_data(words))


def named(data: dict[str, Any]) -> RunSpec:
    """Resolve one composed cell and label it; raises as ``resolve``."""
    composer = Composer()
    spec = pin(Naming(composer)(validated(data)), Known())
    composer.save()
    return spec


def cells(sweep: Sweep, extra: list[str]) -> list[Cell]:
    """Compose and resolve every cell of a sweep, with extra overrides for all of them, in the sweep's order.

    A cell that cannot be composed carries its error and stops no other. Tracking groups cells by the sweep unless told otherwise.

    Raises:
        ConfigError: A word that all cells share is not in Hydra's grammar.
    """
    check_grammar([*sweep.common, *extra])
    found = resolved([(describe(point), overrides(sweep, point) + extra) for point in expand(sweep)])
    return [
        cell if cell.spec is None else dataclasses.replace(cell, spec=_grouped(cell.spec, sweep.name)) for cell in found
    ]


def _grouped(spec: RunSpec, group: str) -> RunSpec:
    tracking = dataclasses.replace(spec.tracking, group=spec.tracking.group or group)
    return dataclasses.replace(spec, tracking=tracking)


def requested(words: list[str]) -> list[RunSpec]:
    """Validate, without looking at models or texts, the cells of a sweep (its name first) or of one line of overrides."""
    if "=" in words[0]:
        return [validated(compose_data(words))]
    sweep, composer = load_sweep(words[0]), Composer()
    check_grammar([*sweep.common, *words[1:]])
    found = [validated(composer(overrides(sweep, point) + words[1:])) for point in expand(sweep)]
    composer.save()
    return found


def resolved(requests: list[tuple[str, list[str]]], composer: Composer | None = None) -> list[Cell]:
    """Compose and resolve cells from (name for people, override words); what they share is looked up once.

    Whatever goes wrong with one cell becomes its ``problem``.
    """
    files, known = Composer(), Known()
    naming = Naming(files)
    found = [_cell(name, words, composer or files, naming, known) for name, words in requests]
    files.save()
    return with_folders(found)


def _cell(name: str, words: list[str], composer: Composer, naming: Naming, known: Known) -> Cell:
    try:
        draft = naming(validated(composer(words)))
        try:
            spec = pin(draft, known)
        except NotHereError as error:
            return Cell(labels.name(draft), None, problem=error, draft=draft)
        return Cell(labels.name(spec), spec, skipped=skip_reason(spec, known))
    except PtqbenchError as error:
        return Cell(name, None, problem=error)
    except Exception as error:  # a strange checkpoint, a file that cannot be read: the cell's trouble, not the sweep's
        return Cell(name, None, problem=as_problem(error))
