"""Labels of a cell for people: the names of its files, and every value that differs from those files.

``changes`` compares a cell with the files that it is named after. The cell keeps the paths of the values that differ
(``RunSpec.changed``), and its labels show the values at these paths: ``tiny gptq damping=0.1 w5 seed 0``. Bits are named by their
values. Pure functions of specs.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ptqbench.cell.formats import INTEGER
from ptqbench.cell.spec import IDENTITY, KV_CHOICES, ROLES, UNTOUCHED_BITS, BitwidthSpec, RunSpec

PLACES = ("name", "path", "hub_id", "revision", "files")
"""Execution fields that say which checkpoint, text or file was meant."""
FILES = (".path", "_file")
"""Ends of the paths whose values are names of files."""
SECTIONS = ("model", "method", "calibration", "evaluation")
SLUG_LENGTH = 180
"""Longest slug in bytes. A file name may have 255, of which the run id takes 13."""
CHANGES = re.compile(r" (?:calibration|evaluation)[^ ]*=.* seed ")
"""The part of a name between its bits and its seed."""
_TOKEN = re.compile(r"(fp|kv|w|a|k|v|g)(\d+)")


def counted(count: int, noun: str) -> str:
    """A number with its noun: ``1 cell``, ``2 cells``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def tallied(counts: Mapping[str, int]) -> str:
    """Numbers by state in words: ``2 done, 1 failed``; empty where there are none."""
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))


def bits_name(bits: BitwidthSpec) -> str:
    """Name bits by their values.

    >>> bits_name(BitwidthSpec(name="", w_bits=4, a_bits=4, k_bits=4, v_bits=8, group_size=32))
    'w4a4k4v8g32'
    >>> bits_name(BitwidthSpec(name="", w_bits=4, a_bits=16, k_bits=16, v_bits=16, w_format="nvfp4"))
    'nvfp4a16'
    >>> bits_name(BitwidthSpec(name="", w_bits=4, a_bits=16, k_bits=4, v_bits=4, kv_measure="activation", kv_choices=(2, 4)))
    'w4kv4_activation_2_4'
    """
    floats = bits.w_format != INTEGER
    weights = bits.w_format if floats else f"w{bits.w_bits}"
    parts = [_input_name(bits, floats)]
    if bits.kv_format != INTEGER:
        parts.append(f"_kv{bits.kv_format}")
    elif bits.k_bits != bits.v_bits:
        parts.append(f"k{bits.k_bits}v{bits.v_bits}")
    elif bits.k_bits < UNTOUCHED_BITS:
        parts.append(f"kv{bits.k_bits}")
    parts += [f"g{bits.group_size}"] if bits.group_size is not None else []
    parts += [f"_{bits.mx_scale}"] if bits.mx_scale != "even" else []
    parts += [f"_{bits.nv_input_scale}"] if bits.nv_input_scale != "static" else []
    parts += [f"_{bits.kv_measure}"] if bits.kv_measure is not None else []
    parts += [f"_{choice}" for choice in bits.kv_choices if bits.kv_choices != KV_CHOICES]
    rest = "".join(parts)
    return "fp16" if not rest and not floats and bits.w_bits >= UNTOUCHED_BITS else weights + rest


def _input_name(bits: BitwidthSpec, floats: bool) -> str:
    """Inputs of linears: nothing where a format of weights is that of inputs, too."""
    if bits.a_format == INTEGER:
        return f"a{bits.a_bits}" if floats or bits.a_bits < UNTOUCHED_BITS else ""
    if bits.a_format == bits.w_format:
        return ""
    usual = bits.w_format.startswith("mxfp") and bits.a_format == "mxfp8"
    return f"a{bits.a_bits}" if usual else f"_a{bits.a_format}"


def says_other_bits(bits: BitwidthSpec) -> bool:
    """Whether the name reads as bits, such as ``w4``, but not as the bits that the values give."""
    said = _TOKEN.findall(bits.name)
    reads_as_bits = bool(said) and "".join(f"{name}{n}" for name, n in said) == bits.name
    others = bits.kv_measure is not None or sorted(said) != sorted(_TOKEN.findall(bits_name(bits)))
    return reads_as_bits and others


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten identity fields, names and places to dotted path -> value. Digests and lists are values."""
    if dataclasses.is_dataclass(value):
        fields = [f for f in dataclasses.fields(value) if f.metadata["role"] == IDENTITY or f.name in PLACES]
        value = {f.name: getattr(value, f.name) for f in fields}
    if not isinstance(value, dict):
        return {prefix: value}
    nested = (flat(item, f"{prefix}.{name}" if prefix else str(name)) for name, item in value.items())
    return {path: item for part in nested for path, item in part.items()}


def changes(spec: RunSpec, named: RunSpec) -> tuple[str, ...]:
    """Find the paths of the values that differ from those in the named files.

    Args:
        spec: A cell, not modified.
        named: The cell that the files give without any change.

    Returns:
        Dotted paths such as ``method.solver.options.damping``, section by section. Where a member of a role was replaced, the
        path of its name stands for all its options.
    """
    found: list[str] = []
    for section in SECTIONS:
        ours, theirs = getattr(spec, section), getattr(named, section)
        if ours != theirs:
            found += _changed(flat(ours, section), flat(theirs, section))
    return tuple(found)


def _changed(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    absent = object()
    # A digest alone says nothing to people.
    paths = [path for path, value in ours.items() if value != theirs.get(path, absent) and not path.endswith("digest")]
    # A replaced member of a role: its name says enough, so its options are left out.
    replaced = tuple(path.removesuffix("name") for path in paths if re.fullmatch(r"method\.\w+\.name", path))
    return [path for path in paths if path.endswith(".name") or not path.startswith(replaced or "\0")]


def model(spec: RunSpec) -> str:
    """Name the checkpoint."""
    return _named(spec, "model")


def method(spec: RunSpec) -> str:
    """Name the method, with its options."""
    return _named(spec, "method")


def bitwidth(spec: RunSpec) -> str:
    """Name the bits: as the file is named, or by their values where that name says other bits (older cells were not checked)."""
    return bits_name(spec.bitwidth) if says_other_bits(spec.bitwidth) else spec.bitwidth.name


def name(spec: RunSpec) -> str:
    """Name a cell for people, on one line."""
    replicate = f" replicate {spec.replicate}" if spec.replicate else ""
    return f"{' '.join(_parts(spec))} seed {spec.seed}{replicate}"


def slug(spec: RunSpec) -> str:
    """Name a cell in file names: ``model-method-bitwidth-sSEED[rREPLICATE]``. It need not be unique; the run id behind it is."""
    parts = [*_parts(spec), f"s{spec.seed}" + (f"r{spec.replicate}" if spec.replicate else "")]
    whole = "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts)
    return whole.encode()[:SLUG_LENGTH].decode(errors="ignore")


def brief(names: Sequence[str]) -> list[str]:
    """Leave the changes of calibration and evaluation out of names, where these are not what tells the names apart."""
    short = [CHANGES.sub(" seed ", name) for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)


def distinct(names: Iterable[str], ids: Iterable[str]) -> list[str]:
    """Append the run id to names that several cells share, which differ in something unnamed, such as the content of a file."""
    names = list(names)
    counts = Counter(names)
    return [f"{one} {other}" if counts[one] > 1 else one for one, other in zip(names, ids, strict=True)]


def words(spec: RunSpec, paths: Iterable[str]) -> list[str]:
    """Write the values of a cell at some paths as words, ``damping=0.1``. A path that the cell does not have is left out."""
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
    """The words of a cell by section: model, method, bits, and changes of calibration and evaluation if there are any."""
    rest = words(spec, [path for path in spec.changed if path.startswith(("calibration.", "evaluation."))])
    return [model(spec), method(spec), bitwidth(spec), *([" ".join(rest)] if rest else [])]


def _named(spec: RunSpec, section: str) -> str:
    """The name of a section, and the values in it that differ from the file of that name."""
    changed = [path for path in spec.changed if path.startswith(f"{section}.")]
    return " ".join([getattr(spec, section).name, *words(spec, changed)])


def _short(path: str, shared: Mapping[str, int]) -> str:
    """A short name for a path: an option without its role, unless several roles have an option of that name."""
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
    """A value as a user would type it, on one line. A path of a file becomes its name, a digest its first 12 digits."""
    if isinstance(value, float):
        return f"{value:g}"
    said = value if isinstance(value, str) else json.dumps(value, default=str)
    if path.endswith("digest"):
        return said.removeprefix("sha256:")[:12]
    if path.endswith(FILES):
        said = said.rstrip("/").rpartition("/")[2]
    return " ".join(said.split())
