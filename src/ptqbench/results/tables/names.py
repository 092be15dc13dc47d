"""Names of the rows of a table: equal cells have one name; cells that differ have names that say how they differ.

Bits and models are compared by value, whatever their files are called, so that rows are grouped and ranked with their equals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from ptqbench.cell import labels
from ptqbench.cell.fingerprint import canonical_json, identity_fields
from ptqbench.cell.spec import ROLES, RunSpec

KEYS = ["model", "method", "bitwidth"]
AVERAGED = "method.transform.options.rotation_seed"
Row = dict[str, Any]


def settle(rows: Sequence[Row]) -> None:
    """Name model, method and bitwidth of the rows that have a ``spec``.

    Args:
        rows: As ``tidy`` collects them, changed in place; a row with a ``variant`` is a cell with a run id.
    """
    # One part per cell: rows of a cell, one per metric, hold the same spec.
    known = [row for row in rows if "spec" in row]
    parts: dict[int, Part] = {}
    for row in known:
        parts.setdefault(id(row["spec"]), Part(row["spec"], row.get("variant")))
    cells = list(parts.values())
    # Bits and models first, because methods are told apart within a model and its bits.
    bits = _agreed(cells, lambda cell: _bits(cell.spec), lambda cell: labels.bitwidth(cell.spec), _bits_names)
    pinned = [cell for cell in cells if cell.variant is not None]
    models = _agreed(pinned, lambda cell: _model(cell.spec), lambda cell: labels.model(cell.spec), _model_names)
    groups: dict[tuple[str, ...], list[Part]] = {}
    for cell in cells:
        cell.bitwidth = bits[_bits(cell.spec)]
        cell.model = models.get(_model(cell.spec), labels.model(cell.spec))
        groups.setdefault((cell.model, cell.spec.method.name, cell.bitwidth), []).append(cell)
    # What the calibration of all cells shares is not said in any name.
    calibrations = [_identity(cell.spec, ("calibration",)) for cell in cells if cell.spec.calibration is not None]
    common = {AVERAGED, *(path for fields in calibrations for path in fields)} - set(_differing(calibrations))
    common |= {f"calibration.{place}" for place in labels.PLACES} if "calibration.digest" in common else set()
    for together in groups.values():
        _name_methods(together, common)
    for row in known:
        cell = parts[id(row["spec"])]
        row |= {key: getattr(cell, key) for key in KEYS}


@dataclasses.dataclass
class Part:
    """A cell and the names that it gets; ``variant`` is None for a cell without a run id."""

    spec: RunSpec
    variant: str | None
    model: str = ""
    method: str = ""
    bitwidth: str = ""


def _bits(spec: RunSpec) -> tuple[Any, ...]:
    bits = spec.bitwidth
    return bits.w_bits, bits.a_bits, bits.k_bits, bits.v_bits, bits.group_size, bits.kv_measure, bits.kv_choices


def _model(spec: RunSpec) -> str:
    return canonical_json(identity_fields(spec.model))


def _agreed(
    cells: Iterable[Part],
    value: Callable[[Part], Hashable],
    name: Callable[[Part], str],
    rename: Callable[[str, Sequence[Part]], Sequence[str]],
) -> dict[Any, str]:
    """One name per value: that of the first cell with this value, or a new one where two values would share a name."""
    first: dict[Hashable, Part] = {}
    for cell in cells:
        first.setdefault(value(cell), cell)
    sharing: dict[str, list[Part]] = {}
    for cell in first.values():
        sharing.setdefault(name(cell), []).append(cell)
    found: dict[Any, str] = {}
    for one, several in sharing.items():
        names = [one] if len(several) == 1 else rename(one, several)
        found |= {value(cell): new for cell, new in zip(several, names, strict=True)}
    return found


def _bits_names(_: str, cells: Sequence[Part]) -> list[str]:
    return [labels.bits_name(cell.spec.bitwidth) for cell in cells]


def _model_names(name: str, cells: Sequence[Part]) -> list[str]:
    paths = _differing([_identity(cell.spec, ("model",)) for cell in cells])
    new = [path for path in paths if path not in cells[0].spec.changed]
    return [" ".join([name, *labels.words(cell.spec, new)]) for cell in cells]


def _name_methods(cells: Sequence[Part], common: AbstractSet[str]) -> None:
    """Name methods that share a file, a model and bits: by what differs from the file, and by what differs among them."""
    first: dict[str, RunSpec] = {}
    for cell in cells:
        if cell.variant is not None:
            first.setdefault(cell.variant, cell.spec)
    flats = {variant: _identity(spec, ("method", "calibration")) for variant, spec in first.items()}
    names = [_method_name(spec, list(flats.values()), common, flats[variant]) for variant, spec in first.items()]
    unique = dict(zip(first, labels.distinct(names, first), strict=True))
    for cell in cells:  # a cell without a run id is named among the others, but does not change their names
        cell.method = unique.get(cell.variant or "") or _method_name(cell.spec, list(flats.values()), common)


def _method_name(
    spec: RunSpec, flats: Sequence[Mapping[str, Any]], common: AbstractSet[str], own: Mapping[str, Any] | None = None
) -> str:
    """A method's name with the options that tell it apart, without those that are ``common`` to the whole table.

    An option of a role is compared only among cells with the same members of roles.
    """
    own = own or _identity(spec, ("method", "calibration"))
    differing = _differing(flats)
    # Members that differ, then what else differs; options only if they differ among cells of the same members.
    members = [f"method.{role}.name" for role in ROLES if f"method.{role}.name" in differing]
    alike = [fields for fields in flats if all(fields.get(path) == own.get(path) for path in members)]
    within = _differing(alike)
    found = [*members, *(p for p in differing if p not in members and (p in within or ".options." not in p))]
    # What the cell changed in the files that it is named after comes first.
    changed = [path for path in spec.changed if path.startswith(("method.", "calibration.")) and path not in common]
    paths = list(dict.fromkeys([*changed, *found]))
    return " ".join([spec.method.name, *labels.words(spec, sorted(paths, key=_place))])


def _place(path: str) -> tuple[bool, bool]:
    """Sort key: a method before its calibration, members of roles before their options."""
    return path.startswith("calibration"), not path.endswith(".name")


def _identity(spec: RunSpec, sections: Sequence[str]) -> dict[str, Any]:
    """Identity fields of some sections by dotted path, without the seed of rotations, over which tables average."""
    fields = {name: identity_fields(getattr(spec, name)) for name in sections}
    return {path: value for path, value in labels.flat(fields).items() if path != AVERAGED}


def _differing(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths whose values are not the same in all cells."""
    paths = sorted({path for fields in cells for path in fields})
    return [path for path in paths if len({str(fields.get(path)) for fields in cells}) > 1]
