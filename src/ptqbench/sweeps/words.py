"""Override words, ``key=value`` in Hydra's grammar: writing values so that they arrive unchanged, and arranging command lines.

Imports neither torch nor hydra.
"""

from __future__ import annotations

import re
import shlex
from typing import Any

from ptqbench.cell.folders import group_names
from ptqbench.cell.spec import nearest
from ptqbench.errors import ConfigError

DRY = "--dry-run"
"""The one flag of ptqbench's own: print the plan, and do nothing else."""

CONFIG_DIR = ("--config-dir", "-cd")
"""The flag of Hydra whose value is a folder of configuration files of one's own."""

FLAGS = {
    DRY: "",
    "--help": "", "-h": "", "--hydra-help": "", "--resolve": "", "--run": "", "-r": "", "--multirun": "", "-m": "",
    "--shell-completion": "", "-sc": "", "--cfg": "job|hydra|all", "-c": "job|hydra|all", "--package": ".+", "-p": ".+",
    "--config-path": ".+", "-cp": ".+", "--config-name": ".+", "-cn": ".+", "--config-dir": ".+", "-cd": ".+",
    "--info": "all|config|defaults|defaults-tree|plugins|searchpath", "-i": "all|config|defaults|defaults-tree|plugins|searchpath",
}  # fmt: skip
"""Flags of a command line in Hydra's grammar, each with a pattern of the value that follows it; empty where none does."""

WITHOUT_VALUE = ("--info", "-i")
"""Flags whose value may be left out."""

ASKS_HYDRA = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--help", "-h", "-sc", "--shell-completion"}
"""Flags with which Hydra prints something and runs nothing."""

_BARE = re.compile(r"[A-Za-z_][\w/.+-]*", re.ASCII)
_RESERVED = {"null", "true", "false", "inf", "nan"}
_KEY = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)
_AXIS = re.compile(r"\+{0,2}[A-Za-z_]\w*([./][\w$-]+)*(@[\w.:]+)?", re.ASCII)
_SIMPLE = re.compile(r"\+{0,2}\w+([./][\w-]+)*=([\w./+-]+|'[^'\\$]*')|~\w+([./][\w-]+)*", re.ASCII)


def literal(value: Any) -> str:
    r"""Write a value in Hydra's grammar such that a cell gets exactly this value, whatever characters it has.

    >>> literal("w4"), literal("a=1, it's"), literal([None, True, "1e10"])
    ('w4', "'a=1, it\\'s'", "[null,true,'1e10']")

    Args:
        value: None, a bool, a number, text, or a list or mapping of these.

    Raises:
        ConfigError: A value of another type, or a mapping with a key that the grammar cannot hold.
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) and value.lower() not in _RESERVED else _quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_mapping_key(key)}:{literal(member)}" for key, member in value.items()) + "}"
    raise ConfigError(f"expected text, a number, true, false, null, a list or a mapping, got {value!r}")


def _quoted(text: str) -> str:
    # OmegaConf: a backslash keeps "${" from being an interpolation; backslashes before it are doubled.
    text = re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)
    # Hydra: a backslash keeps a quote from ending the value; backslashes before a quote (the last one too) are doubled.
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), text) + "'"


def _mapping_key(key: Any) -> str:
    if not isinstance(key, str) or not _KEY.fullmatch(key) or key.lower() in _RESERVED:
        raise ConfigError(f"expected a key of letters, digits and any of _ . / - in a mapping, got {key!r}")
    return key


def assign(key: str, value: Any) -> list[str]:
    """Override words that give a key this value. What is there is emptied first where Hydra would merge the value into it."""
    return [*([f"{key}=null"] if isinstance(value, dict | list) else []), f"{key}={literal(value)}"]


def is_axis(name: str) -> bool:
    """Whether a name can stand before the ``=`` of an override word."""
    return bool(_AXIS.fullmatch(name))


def is_simple(word: str) -> bool:
    """Whether a word is ``key=value`` with one plain value, or ``~key``; Hydra need not be asked about such a word."""
    return bool(_SIMPLE.fullmatch(word))


def key_of(word: str) -> str:
    """The key of an override word, without ``+`` and ``~``."""
    return word.partition("=")[0].lstrip("+~")


def quoted_word(word: str) -> str:
    """An override word, typed into a shell such that its value is taken as text."""
    key, _, value = word.partition("=")
    quoted = f"{key}={_quoted(value)}"
    return shlex.quote(quoted) if set('"$`\\!') & set(quoted) else f'"{quoted}"'


def section_of(word: str) -> str | None:
    """The section that an override word writes to; None where the word alone does not tell."""
    match = re.match(r"\+{0,2}(\w+)((/\w+)*|(\.\w+)*)=", word)
    return None if match is None or match[1] == "hydra" or "${" in word else match[1]


def rewrite(arguments: list[str]) -> list[str]:
    """Arrange a command line as Hydra 1.3 needs it: flags first, ``+method=x`` for ``method=x``.

    ``key={}`` becomes two words, since Hydra merges mappings and an empty one would change nothing.

    >>> rewrite(["method=gptq", "-m", "seed=0,1"])
    ['-m', '+method=gptq', 'seed=0,1']
    """
    flags, words = split(arguments)
    arranged = list(flags)
    for word in words:
        if word.endswith("={}") and not word.startswith("~"):
            arranged.append(word.removesuffix("{}") + "null")
        arranged.append("+" + word if word.startswith("method=") else word)
    return arranged


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate Hydra's flags, with their values, from override words.

    Raises:
        ConfigError: An unknown flag, or one without the value that it needs.
    """
    flags: list[str] = []
    words: list[str] = []
    rest = list(reversed(arguments))
    while rest:
        word = rest.pop()
        if word.startswith("="):
            raise ConfigError(f"{word!r}: expected key=value, such as seed=1")
        if not word.startswith("-"):
            words.append(word)
            continue
        # A flag: --flag=value, or --flag value in two words.
        flag, joined, value = word.partition("=")
        if flag not in FLAGS:
            raise ConfigError(f"unknown flag {flag!r}; {nearest(flag, FLAGS)}")
        flags.append(flag)
        wanted = FLAGS[flag]
        if not wanted and not joined:
            continue
        following = value if joined else rest[-1] if rest else ""
        if wanted and re.fullmatch(wanted, following):
            flags.append(value if joined else rest.pop())
        elif flag not in WITHOUT_VALUE or joined:
            raise ConfigError(f"{flag}: expected {wanted.replace('.+', 'a value') or 'no value'}, got {following!r}")
    return flags, words


def check_request(words: list[str], flags: list[str] | None = None) -> None:
    """Refuse what Hydra would accept and ptqbench cannot serve: no method, or another launcher.

    Args:
        words: Override words.
        flags: Hydra's flags. With one of ``ASKS_HYDRA`` no method is needed.

    Raises:
        ConfigError: No method is given, Hydra's own launcher or sweeper is chosen, or a flag lacks the one that it belongs to.
    """
    for word in words:
        if re.match(r"\+*hydra[./](launcher|sweeper)\b", word):
            known = [f"launcher={name}" for name in group_names("launcher")]
            wanted = f"launcher={word.partition('=')[2]}"
            raise ConfigError(
                f"{word}: ptqbench launches cells itself, without Hydra's launchers; {nearest(wanted, known)}"
            )
    if {"--package", "-p"} & set(flags or ()) and not {"--cfg", "-c"} & set(flags or ()):
        raise ConfigError("--package: expected --cfg beside it, of whose output it shows a part")
    if ASKS_HYDRA & set(flags or ()):
        return
    if not any(re.match(r"\+*method=", word) for word in words):
        raise ConfigError(f"no method given: say +method=NAME; known: {', '.join(group_names('method'))}")
