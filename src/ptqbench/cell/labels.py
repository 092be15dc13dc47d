"""What people call a cell: the names of its files, and every value in it that those files do not say.

``changes`` compares a cell with the files that it is named after; the cell keeps the paths (``RunSpec.changed``), and its labels
repeat the values found there: ``tiny gptq damping=0.1 w5 seed 0``. Bits are named by their values. Pure functions of specs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ptqbench.cell.spec import IDENTITY, ROLES, UNTOUCHED_BITS, BitwidthSpec, RunSpec

PLACES = ("name", "path", "hub_id", "revision", "files")
"""Fields that are not identity but say which checkpoint, text or file was meant."""
FILES = (".path", "_file")
"""Ends of paths whose values are names of files."""
SECTIONS = ("model", "method", "calibration", "evaluation")
SLUG_LENGTH = 180
"""Longest slug: a file name has 255 bytes, of which a run id takes 13; letters outside ASCII take several each."""
_TOKEN = re.compile(r"(fp|kv|w|a|k|v|g)(\d+)")


def bits_name(bits: BitwidthSpec) -> str:
    """Name bits by their values.

    >>> bits_name(BitwidthSpec(name="", w_bits=4, a_bits=4, k_bits=4, v_bits=8, group_size=32))
    'w4a4k4v8g32'
    """
    low = {"a": bits.a_bits, "kv": bits.k_bits} if bits.k_bits == bits.v_bits else {"a": bits.a_bits}
    parts = [f"{name}{n}" for name, n in low.items() if n < UNTOUCHED_BITS]
    parts += [f"k{bits.k_bits}v{bits.v_bits}"] if bits.k_bits != bits.v_bits else []
    parts += [f"g{bits.group_size}"] if bits.group_size is not None else []
    return "fp16" if not parts and bits.w_bits >= UNTOUCHED_BITS else f"w{bits.w_bits}{''.join(parts)}"


def says_other_bits(bits: BitwidthSpec) -> bool:
    """Whether a name reads as bits (``w4``), and they are not the bits there are."""
    said = _TOKEN.findall(bits.name)
    reads_as_bits = bool(said) and "".join(f"{name}{n}" for name, n in said) == bits.name
    return reads_as_bits and sorted(said) != sorted(_TOKEN.findall(bits_name(bits)))


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Lay out identity fields, names and places by dotted path; digests and lists are values."""
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.metadata["role"] == IDENTITY or f.name in PLACES]
        value = {f.name: getattr(value, f.name) for f in fields}
    if not isinstance(value, dict):
        return {prefix: value}
    nested = (flat(item, f"{prefix}.{name}" if prefix else str(name)) for name, item in value.items())
    return {path: item for part in nested for path, item in part.items()}


def changes(spec: RunSpec, named: RunSpec) -> tuple[str, ...]:
    """Paths of the values that differ from what the named files say.

    Args:
        spec: A cell, not modified.
        named: The cell that the files make by themselves.

    Returns:
        Dotted paths such as ``method.solver.options.damping``, section by section. Of a member of a role that the method's file
        does not have, the name alone.
    """
    found: list[str] = []
    for section in SECTIONS:
        ours, theirs = getattr(spec, section), getattr(named, section)
        if ours != theirs:
            found += _changed(flat(ours, section), flat(theirs, section))
    return tuple(found)


def _changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    absent = object()
    paths = [path for path, value in ours.items() if value != theirs.get(path, absent) and not path.endswith("digest")]
    replaced = tuple(path.removesuffix("name") for path in paths if re.fullmatch(r"method\.\w+\.name", path))
    return [path for path in paths if path.endswith(".name") or not path.startswith(replaced or "\0")]


def model(spec: RunSpec) -> str:
    """Name the checkpoint."""
    return " ".join([spec.model.name, *words(spec, _of("model", spec.changed))])


def method(spec: RunSpec) -> str:
    """Name the method, with its options."""
    return " ".join([spec.method.name, *words(spec, _of("method", spec.changed))])


def bitwidth(spec: RunSpec) -> str:
    """Name the bits; from their values where the name says others, as in cells from before names were checked."""
    return bits_name(spec.bitwidth) if says_other_bits(spec.bitwidth) else spec.bitwidth.name


def name(spec: RunSpec) -> str:
    """Name a cell for people, on one line."""
    return f"{' '.join(_parts(spec))} seed {spec.seed}"


def slug(spec: RunSpec) -> str:
    """Name a cell in file names: ``model-method-bitwidth-sSEED``. Not an identifier: the run id that follows it is."""
    parts = [*_parts(spec), f"s{spec.seed}"]
    whole = "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts)
    return whole.encode()[:SLUG_LENGTH].decode(errors="ignore")


def distinct(names: Iterable[str], ids: Iterable[str]) -> list[str]:
    """Append the run id to names that several cells share: they differ in something without a name, such as a file's content."""
    names = list(names)
    counts = Counter(names)
    return [f"{one} {other}" if counts[one] > 1 else one for one, other in zip(names, ids, strict=True)]


def words(spec: RunSpec, paths: Iterable[str]) -> list[str]:
    """Say the values of a cell at some paths, one word each; a path that the cell does not have is left out."""
    paths = list(paths)
    if not paths:
        return []
    values = {path: value for section in SECTIONS for path, value in flat(getattr(spec, section), section).items()}
    values |= {path.replace(".files.", ".options."): file for path, file in values.items() if ".files." in path}
    shared = Counter(option for role in ROLES for option in getattr(spec.method, role).options)
    return [
        f"{_short(path, shared)}={_text(path, values[path])}"
        for path in paths
        if path in values and not (path.endswith(FILES) and values[path] is None)
    ]


def _parts(spec: RunSpec) -> list[str]:
    """Words for the sections of a cell; an unquantized cell has no calibration."""
    rest = words(spec, [path for path in spec.changed if path.startswith(("calibration.", "evaluation."))])
    return [model(spec), method(spec), bitwidth(spec), *([" ".join(rest)] if rest else [])]


def _of(section: str, paths: Iterable[str]) -> list[str]:
    return [path for path in paths if path.startswith(f"{section}.")]


def _short(path: str, shared: Mapping[str, int]) -> str:
    """What a path is called: an option by itself unless several roles have it, another section by its name."""
    section, _, rest = path.partition(".")
    role, _, option = rest.partition(".options.")
    if section == "model":
        return rest
    if section != "method":
        return section if rest in ("name", "dataset") else path
    if option:
        return option if shared.get(option, 1) < 2 else f"{role}.{option}"
    return rest.removesuffix(".name")


def _text(path: str, value: Any) -> str:
    """A value as it would be typed, on one line; of a file its name, of a digest the beginning."""
    if isinstance(value, float):
        return f"{value:g}"
    said = value if isinstance(value, str) else json.dumps(value, default=str)
    if path.endswith("digest"):
        return said.removeprefix("sha256:")[:12]
    if path.endswith(FILES):
        said = said.rstrip("/").rpartition("/")[2]
    return " ".join(said.split())
