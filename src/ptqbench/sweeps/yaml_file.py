"""Read YAML as people mean it: the core schema of YAML 1.2, no key twice, and a bound on what aliases stand for.

PyYAML follows YAML 1.1, in which ``010`` is eight, ``no`` is false, ``1:30`` is ninety, ``1e-3`` is text, and the last of two
equal keys wins.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ptqbench.errors import ConfigError

LARGEST = 1_000_000
"""Most values in a file, where each alias counts as many as it stands for."""
DEEPEST = 30
"""Most lists and mappings inside each other."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the types of YAML 1.2, in which a key given twice is an error."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} is given twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def truth(self, node: yaml.ScalarNode) -> bool:
        """A bool; other words than true and false can only come from a tag, as in ``!!bool maybe``."""
        word = str(self.construct_scalar(node)).lower()
        if word not in ("true", "false"):
            raise yaml.constructor.ConstructorError(None, None, f"{word!r} is no bool", node.start_mark)
        return word == "true"

    def whole(self, node: yaml.ScalarNode) -> int:
        """A number without a fraction, always decimal."""
        return int(self.construct_scalar(node))

    def number(self, node: yaml.ScalarNode) -> float | str:
        """A number with a fraction or an exponent. One that is too large for a float, such as the commit 12e4567, is text."""
        word = str(self.construct_scalar(node))
        return float(word) if math.isfinite(float(word)) else word


TYPES: dict[str, tuple[str, list[str], Any]] = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], yaml.SafeLoader.construct_yaml_null),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF"), _Loader.truth),
    "int": (r"[-+]?[0-9]+", list("-+0123456789"), _Loader.whole),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789"), _Loader.number),
    "merge": (r"<<", ["<"], yaml.SafeLoader.construct_yaml_str),
}
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first, _construct) in TYPES.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), _first)
    _Loader.add_constructor(_tag, _construct)
for _name in ("str", "seq", "map"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_name}", getattr(yaml.SafeLoader, f"construct_yaml_{_name}"))
_Loader.yaml_constructors[None] = yaml.SafeLoader.construct_undefined


def read_yaml(path: Path) -> Any:
    """Read a YAML file to plain data: None, bool, int, float, str, list, dict.

    Raises:
        ConfigError: The file is not UTF-8 or not YAML, gives a key twice, is nested too deep, or is too large with its aliases.
        OSError: The file cannot be read.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
        size, depth = _extent(data, {})
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        size, depth = 0.0, math.inf
    except ValueError as error:  # an integer of more digits than Python converts
        raise ConfigError(f"{path}: {error}") from None
    if depth > DEEPEST and size < math.inf:
        raise ConfigError(f"{path}: nested too deep, expected at most {DEEPEST} lists and mappings inside each other")
    if size == math.inf:
        raise ConfigError(f"{path}: an alias stands for a value that contains it; expected none that does")
    if size > LARGEST:
        raise ConfigError(f"{path}: its aliases stand for {size:.3g} values, expected at most {LARGEST:,}")
    return data


def read_mapping(path: Path, keys: str) -> dict[Any, Any]:
    """Read a YAML file that is a mapping; ``keys`` says of what, for the error.

    Raises:
        ConfigError: As for ``read_yaml``, or the file is not a mapping.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        given = "nothing" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{path}: expected a mapping with {keys}, got {given}")
    return data


def _extent(value: Any, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Number of values with every alias written out, and the depth; infinite where an alias contains itself."""
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if id(value) not in known:
        known[id(value)] = math.inf, math.inf  # until all members are counted
        found = [_extent(member, known) for member in members]
        known[id(value)] = 1 + sum(size for size, _ in found), 1 + max((depth for _, depth in found), default=0.0)
    return known[id(value)]
