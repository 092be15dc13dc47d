"""What can be composed: files of ``conf/``, members of the roles with their options, tasks, sweeps. Made from code and files.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ptqbench.cell.folders import group_files, own_folders, sweep_folder
from ptqbench.cell.registry import MEMBERS, member_class
from ptqbench.cell.spec import Role, nearest, to_dict
from ptqbench.errors import ConfigError

ROLE: dict[str, Role] = {"transforms": "transform", "targets": "target", "solvers": "solver", "refinements": "refine"}
GROUP = {
    "methods": "method", "models": "model", "bitwidths": "bitwidth", "calibrations": "calibration", "evaluations": "evaluation",
    "launchers": "launcher", "grids": "method/grid", "activations": "method/activation",
}  # fmt: skip
KINDS = (
    "methods",
    "models",
    "bitwidths",
    *ROLE,
    "grids",
    "activations",
    "calibrations",
    "evaluations",
    "tasks",
    "launchers",
    "sweeps",
)
SIGNS = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing that can be composed.

    Attributes:
        name: Its name.
        about: One sentence on it; empty where its file says none.
        file: Its configuration file; None for a member of a role, a task.
        own: Whether it is the user's.
    """

    name: str
    about: str
    file: Path | None = None
    own: bool = False


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a member: name, the values it takes, its default, and what it does."""

    name: str
    takes: str
    default: str
    meaning: str


def kind_of(word: str) -> str:
    """The kind that a word of the command line means: ``methods``, ``method``, ``refine``.

    Raises:
        ConfigError: No kind has this name.
    """
    words = (
        {name: name for name in KINDS} | {name.removesuffix("s"): name for name in KINDS} | {"refine": "refinements"}
    )
    if word not in words:
        raise ConfigError(f"list: no kind {word!r}; {nearest(word, KINDS)}")
    return words[word]


def usage(kind: str) -> str:
    """How an entry of a kind is given on the command line."""
    if kind == "sweeps":
        return "python -m ptqbench sweep NAME"
    if kind == "tasks":
        return "evaluation.tasks=[NAME/METRIC]"
    return f"{'+' * (kind == 'methods')}{_group(kind)}=NAME"


def entries(kind: str) -> list[Entry]:
    """The entries of a kind. Files of a role give a member with other options; they stand behind the members.

    Raises:
        OSError: A file cannot be read.
    """
    if kind == "tasks":
        return list(_tasks())
    if kind == "sweeps":
        return [Entry(path.stem, _title(path), path) for path in sorted(sweep_folder().glob("*.yaml"))]
    role = ROLE.get(kind)
    members = [Entry(name, _summary(member_class(role, name))) for name in MEMBERS[role]] if role else []
    files = [
        Entry(name, _header(path), path, any(path.is_relative_to(folder) for folder in own_folders()))
        for name, path in group_files(_group(kind)).items()
    ]
    return members + [entry for entry in files if role is None or entry.name not in MEMBERS[role]]


def options(role: Role, name: str) -> list[Option]:
    """The options of a member, in the order of its class.

    Raises:
        ConfigError: The role has no member of this name.
    """
    cls = member_class(role, name)
    hints, meanings = get_type_hints(cls, include_extras=True), _meanings(cls)
    given = to_dict(cls())
    return [
        Option(field.name, _takes(hints[field.name]), _shown(given[field.name]), meanings.get(field.name, ""))
        for field in dataclasses.fields(cls)
    ]


def print_kinds(kind: str | None, name: str | None) -> None:
    """Print every kind, the entries of one, or one entry.

    Raises:
        ConfigError: There is no such kind or entry.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    if kind is None:
        for one in KINDS:
            table.add_row(one, escape(", ".join(entry.name for entry in entries(one))))
        console.print(table)
        console.print("\none kind: python -m ptqbench list methods; one entry: python -m ptqbench list solver gptq")
        return
    kind = kind_of(kind)
    found = entries(kind)
    if name is not None:
        _print_entry(kind, name, found, console.print)
        return
    for own in (False, True):
        listed = [entry for entry in found if entry.own == own]
        if listed and own:
            table.add_row("", "")
            table.add_row("[bold]your own[/bold]", escape(", ".join(map(str, own_folders()))))
        for entry in listed:
            table.add_row(escape(entry.name), escape(entry.about))
    console.print(table)
    console.print(
        f"\ngiven as {escape(usage(kind))}; one of them: python -m ptqbench list {kind.removesuffix('s')} NAME"
    )


def _print_entry(kind: str, name: str, found: list[Entry], show: Callable[..., None]) -> None:
    """Print a member with its options, or a file."""
    from rich.markup import escape
    from rich.table import Table

    entry = next((one for one in found if one.name == name), None)
    if entry is None:
        raise ConfigError(f"list: no {kind.removesuffix('s')} {name!r}; {nearest(name, [one.name for one in found])}")
    if entry.file is not None:
        show(escape(f"# {entry.file}"))
        show(escape(entry.file.read_text(encoding="utf-8").rstrip()))
        return
    show(escape(f"{entry.name}: {entry.about}"))
    if kind not in ROLE:
        return
    role = ROLE[kind]
    show(escape(f"method/{role}={name}, options as method.{role}.OPTION=VALUE; {member_class(role, name).__module__}"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("option", "takes", "default", "meaning"):
        table.add_column(heading)
    for option in options(role, name):
        table.add_row(*map(escape, dataclasses.astuple(option)))
    show(table if table.row_count else "it has no options")


def _group(kind: str) -> str:
    return f"method/{ROLE[kind]}" if kind in ROLE else GROUP[kind]


def _tasks() -> Iterator[Entry]:
    from ptqbench.data.task_sizes import SIZES
    from ptqbench.data.tasks import TASKS

    for name, task in TASKS.items():
        count = f"{SIZES[name].examples:,} examples; " if name in SIZES else ""
        where = task.repository or "comes with ptqbench"
        yield Entry(name, f"{count}{', '.join(f'{name}/{metric}' for metric in task.metrics)}; {where}")


def _title(path: Path) -> str:
    from ptqbench.sweeps.yaml_file import read_yaml

    data = read_yaml(path)
    return str(data.get("title", "")) if isinstance(data, dict) else ""


def _header(path: Path) -> str:
    """The first sentence of the comment at the top of a file; without a comment, the checkpoint that it names."""
    lines, comment = path.read_text(encoding="utf-8").splitlines(), []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    hub = next((line.partition(":")[2].strip() for line in lines if line.startswith("hub_id:")), "")
    return _sentence(" ".join(comment)) or hub


def _summary(cls: type) -> str:
    return _sentence((inspect.getdoc(cls) or "").partition("\n\n")[0])


def _sentence(text: str) -> str:
    """The first sentence of a text, without its full stop."""
    return re.split(r"\.(?=\s+[A-Z`])|\.$", " ".join(text.split()), maxsplit=1)[0]


def _meanings(cls: type) -> dict[str, str]:
    """What a class and its bases say of their attributes, by name."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        text = inspect.cleandoc(one.__doc__ or "").partition("Attributes:\n")[2]
        for name, meaning in re.findall(r"^ {4}(\w+): (.+(?:\n {5,}.+)*)", text, re.MULTILINE):
            found[name] = " ".join(meaning.split())
    return found


def _takes(hint: Any) -> str:
    """The values of a type in words: ``int >= 1``, ``raise | retry``."""
    if get_origin(hint) is Annotated:
        inner, *rules = get_args(hint)
        bounds = [one for rule in rules for one in getattr(rule, "metadata", (rule,))]
        limits = [
            f" {SIGNS[type(one).__name__]} {getattr(one, type(one).__name__.lower())}"
            for one in bounds
            if type(one).__name__ in SIGNS
        ]
        return _takes(inner) + ",".join(limits)
    if get_origin(hint) is Literal:
        return " | ".join(map(_shown, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_takes(part) for part in get_args(hint))
    if hint is type(None):
        return "null"
    if get_origin(hint) is tuple or hint is tuple:
        return "a list"
    words = {str: "text", bool: "true | false", float: "number"}
    return words[hint] if hint in words else str(getattr(hint, "__name__", hint))


def _shown(value: Any) -> str:
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        if isinstance(value, bool | None)
        else str(value)
    )
