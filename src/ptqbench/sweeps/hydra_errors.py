"""Errors of Hydra and OmegaConf as one line that says what was given, what is known, and how to write it.

Imports neither of them: errors are recognized by their text.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

from ptqbench.cell.folders import group_names, groups, own_folders
from ptqbench.cell.spec import ROLES, RunSpec, may_hold, nearest
from ptqbench.errors import PtqbenchError
from ptqbench.sweeps.words import key_of, quoted_word

COMPUTED = ("digest", "digests")
"""Ends of the keys whose values ptqbench computes."""

Compose = Callable[[list[str]], dict[str, Any]]


def explain(error: Exception, words: list[str], compose: Compose) -> str:
    """Rewrite an error as one line.

    Args:
        error: What Hydra or OmegaConf raised.
        words: The override words.
        compose: Composes words to data, to find which keys exist.
    """
    text = " ".join(str(error).split())
    word = getattr(error, "override", None)  # of Hydra's OverrideParseException
    if isinstance(word, str):
        return bad_grammar(word, text)
    several = re.search(r"Ambiguous value for argument '(.+?)' 1\.", text)
    if several:
        return several_values(several[1])
    unnamed = [word for word in words if re.search(r"=(null|true|false|[\d.+[{-])", word) and group_names(key_of(word))]
    if unnamed and text.startswith("Config group override must be"):
        return f"{unnamed[-1]}: expected the name of a choice; known: {', '.join(group_names(key_of(unnamed[-1])))}"
    missing = re.search(r"Interpolation key '([^']+)' not found", text)
    if missing:
        return _unknown_key(missing[1], words, compose, "an interpolation names ")
    # An unknown file of a group, an unknown group, an unknown key.
    choice = re.search(r"Could not find '([^']+)'", text)
    if choice:
        group, _, name = choice[1].rpartition("/")
        searched = "".join(f"; searched {folder / group} too" for folder in own_folders())
        searched = searched or "; files of your own: --config-dir FOLDER"
        return f"unknown {group or 'configuration'} {name!r}; {nearest(name, group_names(group))}{searched}"
    override = re.search(r"Could not override '([^']+)'", text)
    if override and "/" in override[1]:
        return f"unknown group {override[1]!r}; {nearest(override[1], groups())}"
    # OmegaConf names the last part of a key, and beside it the key as a whole.
    bad_key = re.search(r"Key '([^']+)' (?:is not in struct|not in)", text)
    full = re.search(r"full_key: (\S+)", text)
    place = override[1] if override else full[1] if full and bad_key else bad_key[1] if bad_key else None
    if place is not None:
        return _unknown_key(place, words, compose)
    said = re.sub(r" See https?://\S+ for details", "", text).removesuffix(".")
    return f"{said or type(error).__name__} (in: {' '.join(words)})"


def several_values(word: str) -> str:
    """The message for a word with several values where one is expected."""
    key = key_of(word)
    return (
        f"{word}: several values where one is expected; combinations are asked for with -m, or in the grids of a sweep file "
        f"({key}: [...]); a list is written {key}=[...]; a comma that belongs to the value is quoted: {quoted_word(word)}"
    )


def bad_grammar(word: str, why: str) -> str:
    """The message for a word that is not in Hydra's grammar: where it stops, and how to quote it."""
    if "=" not in word:
        return f"{word!r}: expected key=value, such as seed=1"
    shown, quoted = (word, quoted_word(word)) if len(word) <= 300 else (f"{word[:100]}...", f"\"{key_of(word)}='...'\"")
    stopped = re.search(r"(?:input|character|symbol) '(.+?)'", why)
    where = f" (it stops at {stopped[1][:20]!r})" if stopped else ""
    return f"{shown}: not in Hydra's grammar{where}; to give the value as text, quote it: {quoted}"


def _unknown_key(place: str, words: list[str], compose: Compose, before: str = "") -> str:
    """The message for an unknown key: the keys that exist beside it, or what to choose where its parent is empty."""
    *parents, last = place.split(".")
    # The schema knows more keys than the files give; but not those of a role, which its member has.
    allowed = may_hold(RunSpec, parents) if parents and not set(parents) & {*ROLES} else set()
    allowed = allowed and {name for name in allowed if not name.endswith(COMPUTED)}
    missing = not before and (allowed is None or last in allowed)
    word = next((word for word in words if key_of(word) == place), f"{place}=VALUE")
    add = f"{place} has no value yet that could be replaced: add it with {shlex.quote('++' + word.lstrip('+'))}"
    node: Any = _without(place, words, compose)
    for depth, part in enumerate(parents):
        node = node.get(part) if isinstance(node, dict) else None
        if node is None and depth and missing:
            return f"{add}{_example(parents[0], place, ', or write ')}"
        if node is None and depth:
            return f"{before}unknown key {place!r}; {_empty('.'.join(parents[: depth + 1]), parents[0], place)}"
    if missing:
        return add
    known = {*map(str, node), *([] if parents else ["method"])} if isinstance(node, dict) else set()
    return f"{before}unknown key {place!r}; {nearest(last, known | (allowed or set()))}"


def _empty(part: str, section: str, place: str) -> str:
    choices, example = ", ".join(group_names(section)), _example(section, place, ", such as ")
    return f"{part} is empty here: choose one with {section}=NAME{example}; known: {choices}"


def _example(section: str, place: str, before: str) -> str:
    """How a key is given beside the choice that has it, where a choice has the name of a part of the key; else nothing."""
    named = [name for name in group_names(section) if name in place.split(".")]
    return f"{before}{section}={named[0]} {place}=..." if named else ""


def _without(place: str, words: list[str], compose: Compose) -> dict[str, Any]:
    """The configuration without the words about a key; where other words are wrong too, with the choices of groups alone."""
    others = [word for word in words if key_of(word) != place and "${" not in word]
    chosen = [word for word in others if re.match(r"\+*[a-z_/]+=[\w.-]+$", word) and group_names(key_of(word))]
    for kept in (others, chosen):
        try:
            return compose(kept if any(key_of(word) == "method" for word in kept) else [*kept, "method=rtn"])
        except PtqbenchError:
            continue
    return {}
