"""From override words and sweep files to cells. No object of Hydra leaves this module: a cell is a ``RunSpec`` or has an error."""

from __future__ import annotations

import dataclasses
from typing import Any

from ptqbench.cell import labels
from ptqbench.cell.folders import with_own
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
        ConfigError: Hydra refuses the words, or the cell is not valid.
        PtqbenchError: As ``pin``.
    """
    return named(compose_data(words))


def named(data: dict[str, Any]) -> RunSpec:
    """Validate, label and pin a composed configuration; raises as ``compose_cell``."""
    composer = Composer()
    spec = pin(Naming(composer)(validated(data)), Known())
    composer.save()
    return spec


def cells(sweep: Sweep, extra: list[str]) -> list[Cell]:
    """Compose and resolve every cell of a sweep, with extra overrides for all of them, in the sweep's order.

    A cell that cannot be composed carries its error and stops no other. The tracking group is the name of the sweep unless one is
    given.

    Raises:
        ConfigError: A word that all cells share is not in Hydra's grammar, or the sweep's folder of configuration files is wrong.
    """
    with with_own(sweep.config_dir):
        check_grammar([*sweep.common, *extra])
        found = resolved([(describe(point), overrides(sweep, point) + extra) for point in expand(sweep)])
    return [_grouped(cell, sweep.name) for cell in found]


def _grouped(cell: Cell, group: str) -> Cell:
    if cell.spec is None or cell.spec.tracking.group:
        return cell
    tracking = dataclasses.replace(cell.spec.tracking, group=group)
    return dataclasses.replace(cell, spec=dataclasses.replace(cell.spec, tracking=tracking))


def requested(words: list[str]) -> list[Cell]:
    """Validate cells without looking at models or texts: those of a sweep (its name first), or the one of a line of overrides.

    Returns:
        Cells with a draft. A cell of a sweep that cannot be validated has a problem instead, and stops no other.

    Raises:
        ConfigError: The sweep, a word that its cells share, or the one line of overrides is wrong.
    """
    if "=" in words[0]:
        return [Cell(" ".join(words), None, draft=validated(compose_data(words)))]
    sweep = load_sweep(words[0])
    with with_own(sweep.config_dir):
        composer = Composer()
        check_grammar([*sweep.common, *words[1:]])
        found = [_drafted(describe(point), overrides(sweep, point) + words[1:], composer) for point in expand(sweep)]
        composer.save()
    return found


def _drafted(name: str, words: list[str], composer: Composer) -> Cell:
    try:
        return Cell(name, None, draft=validated(composer(words)))
    except PtqbenchError as error:
        return Cell(name, None, problem=error)


def resolved(requests: list[tuple[str, list[str]]], composer: Composer | None = None) -> list[Cell]:
    """Compose and resolve cells. What they share is looked up once; whatever goes wrong with one cell becomes its ``problem``.

    Args:
        requests: Name for people and override words of each cell.
        composer: Composes the words; None for one that remembers across commands.
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
    except Exception as error:  # an unusual checkpoint or an unreadable file concerns this cell alone
        return Cell(name, None, problem=as_problem(error))
