"""Compose configurations with Hydra.

Hydra ends here: what leaves is a validated ``RunSpec``. Hydra's own errors are rewritten as one line with the nearest valid
name. ``method`` is absent from the primary defaults list, so that ``+method=x`` works; the plus is added where it is missing,
and flags may stand anywhere on the line.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ptqbench.cell import labels
from ptqbench.cell.folders import conf_folder, group_names
from ptqbench.cell.spec import RunSpec, nearest
from ptqbench.errors import ConfigError, NotHereError, PtqbenchError
from ptqbench.sweeps.cells import Cell, with_folders
from ptqbench.sweeps.compose_cache import Compositions
from ptqbench.sweeps.files import Sweep, describe, expand, load_sweep, overrides
from ptqbench.sweeps.naming import Naming
from ptqbench.sweeps.resolve import Known, pin, skip_reason, validated

VALUE_FLAGS = (
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--info",
    "-i",
)


HYDRA_GROUPS = tuple(
    f"hydra/{name}"
    for name in "output help hydra_help env hydra_logging job_logging sweeper launcher".split()  # noqa: SIM905
)


def rewrite(arguments: list[str]) -> list[str]:
    """Put flags first and write ``method=x`` as ``+method=x``, as Hydra 1.3 needs both.

    >>> rewrite(["method=gptq", "-m", "seed=0,1"])
    ['-m', '+method=gptq', 'seed=0,1']
    """
    flags: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        if word.startswith("-"):
            flags.append(word)
            if word in VALUE_FLAGS:
                flags += [value for value in [next(rest, None)] if value is not None]
        else:
            words.append("+" + word if word.startswith("method=") else word)
    return flags + words


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


def compose_data(words: list[str], read: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compose overrides to plain data, unvalidated; what is read goes to ``read``, if given, and is not read again."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    require_method(words)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="ptqbench"):
            if read is not None:
                _Remembering.install(GlobalHydra.instance().config_loader(), read)
            data = OmegaConf.to_container(hydra.compose("config", rewrite(words)), resolve=True)
    except PtqbenchError:
        raise
    except Exception as error:  # hydra and omegaconf raise a dozen types, all of them about the request
        raise ConfigError(one_line(error, words)) from None
    assert isinstance(data, dict)
    return data  # type: ignore[return-value]


class _Remembering:
    """Hydra's repository of configuration files, each read once: Hydra itself forgets between compositions.

    Stands in for an attribute of Hydra's loader that is not documented. Where it is not found, files are read again: half of
    the time of a composition.
    """

    def __init__(self, repository: Any, read: dict[str, Any]) -> None:
        self._repository, self._read = repository, read

    @classmethod
    def install(cls, loader: Any, read: dict[str, Any]) -> None:
        if hasattr(loader, "repository"):
            loader.repository = cls(loader.repository, read)

    def load_config(self, config_path: str) -> Any:
        if config_path not in self._read:
            self._read[config_path] = self._repository.load_config(config_path)
        return copy.copy(self._read[config_path])  # whose fields Hydra replaces

    def __deepcopy__(self, memo: dict[int, Any]) -> _Remembering:
        return self  # Hydra copies the repository for every composition

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repository, name)


def require_method(words: list[str], arguments: list[str] | None = None) -> None:
    """Refuse override words without a method, unless the arguments ask Hydra itself for something.

    Raises:
        ConfigError: No method is given.
    """
    hydra_only = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--help", "-sc", "--shell-completion"}
    if arguments is not None and hydra_only & set(arguments):
        return
    if not any(re.match(r"\+*method=", word) for word in words):
        raise ConfigError(f"no method given: say +method=NAME; known: {', '.join(group_names('method'))}")


def one_line(error: Exception, words: list[str]) -> str:
    """Rewrite an error of Hydra or OmegaConf as one line that names the nearest valid word."""
    text = " ".join(str(error).split())
    missing_choice = re.search(r"Could not find '([^']+)'", text)
    if missing_choice:
        group, _, name = missing_choice[1].rpartition("/")
        return f"unknown {group or 'configuration'} {name!r}; {nearest(name, group_names(group))}"
    override = re.search(r"Could not override '([^']+)'", text)
    if override and "/" in override[1]:
        groups = sorted(
            path.relative_to(conf_folder()).as_posix() for path in conf_folder().rglob("*") if path.is_dir()
        )
        return f"unknown group {override[1]!r}; {nearest(override[1], groups)}"
    bad_key = re.search(r"Key '([^']+)' (?:is not in struct|not in)", text)
    full = re.search(r"full_key: (\S+)", text)
    place = override[1] if override else full[1] if full else bad_key[1] if bad_key else None
    if place is not None:
        return f"unknown key {place!r}; {nearest(place.rpartition('.')[2], _siblings(place, words))}"
    grammar = re.sub(r" See https?://\S+ for details", "", text).removesuffix(".")
    return f"{grammar} (in: {' '.join(words)})"


def _siblings(place: str, words: list[str]) -> list[str]:
    """Keys that exist beside a mistyped one, from the configuration without the override that names it."""
    parent = place.rpartition(".")[0]
    kept = [word for word in words if place not in word]
    try:
        node: Any = compose_data(kept)
        for part in parent.split(".") if parent else []:
            node = node[part]
        return sorted({*map(str, node), *([] if parent else ["method"])})
    except (PtqbenchError, KeyError, TypeError):
        return []


class Composer:
    """Compose many cells that share words: every section of the configuration is composed once per set of words about it.

    Right because a configuration file of ptqbench writes only its own section, with one exception: a method may choose the
    bitwidth where no word does. Whatever this does not cover (Hydra's own settings, deletions, packages, interpolations) is
    composed whole.
    """

    def __init__(self, compose: Callable[[list[str]], dict[str, Any]] | None = None) -> None:
        """Start with nothing composed.

        Args:
            compose: Composes override words; None is :func:`compose_data`.
        """
        read: dict[str, Any] = {}
        self._trims = compose is None  # else Hydra composes a job of a multirun, and wants its settings
        self._compose_words = compose or self._remembering(read)
        self._sections: dict[tuple[str, tuple[str, ...]], bytes] = {}
        self._whole: dict[str, Any] | None = None
        folder = conf_folder()
        files = {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.yaml")}
        self._interpolates = any("${" in text for text in files.values())
        self._before = None if compose or self._interpolates else Compositions(files, Path(__file__))

    def __call__(self, words: list[str]) -> dict[str, Any]:
        """Compose override words to plain data, as :func:`compose_data` does."""
        words = [word.removeprefix("+") if re.match(r"\+method=", word) else word for word in words]
        owners = [_section(word) for word in words]
        if self._interpolates or None in owners or words.count("method") > 1:
            return self._compose_words(words)
        require_method(words)
        choice = [word for word in words if word.startswith("method=")]
        try:
            data = self._by_sections(words, owners, choice)
        except ConfigError:  # composing the whole says what is wrong in view of all words
            return self._compose_words(words)
        unknown = next((word for word, owner in zip(words, owners, strict=True) if owner not in data), None)
        return self._compose_words(words) if unknown is not None else data

    def _remembering(self, read: dict[str, Any]) -> Callable[[list[str]], dict[str, Any]]:
        """Compose what no command composed before with the same files."""

        def compose(words: list[str]) -> dict[str, Any]:
            data = None if self._before is None else self._before.get(words)
            if data is None:
                data = compose_data(words, read)
                if self._before is not None:
                    self._before.put(words, data)
            return data

        return compose

    def save(self) -> None:
        """Leave what was composed to later commands."""
        if self._before is not None:
            self._before.save()

    def _by_sections(self, words: list[str], owners: list[str | None], choice: list[str]) -> dict[str, Any]:
        data = {}
        for section in self._usual(choice):
            about = [word for word, owner in zip(words, owners, strict=True) if owner == section]
            if section == "bitwidth" and not any(word.startswith("bitwidth=") for word in about):
                about = choice + about
            data[section] = pickle.loads(self._compose(section, about, choice))
        return data

    def _usual(self, choice: list[str]) -> dict[str, Any]:
        """Every section as it is without words about it."""
        if self._whole is None:
            self._whole = self._compose_words(choice)
        return self._whole

    def _compose(self, section: str, about: list[str], choice: list[str]) -> bytes:
        """Compose a section and freeze it: every cell gets a copy of its own, and unpickling is the fastest way to one."""
        key = (section, tuple(about))
        if key not in self._sections:
            self._sections[key] = pickle.dumps(self._compose_section(section, about, choice))
        return self._sections[key]

    def _compose_section(self, section: str, about: list[str], choice: list[str]) -> Any:
        usual = self._usual(choice)
        if not about:
            return usual[section]
        if len(about) == 1 and about[0].startswith(f"{section}=") and not isinstance(usual[section], dict):
            return _value(about[0])  # such as the seed
        has_method = any(word.startswith("method=") for word in about)
        given = about if has_method else [*choice, *about]
        others = [name for name, value in usual.items() if isinstance(value, dict) and name not in (section, "method")]
        return self._compose_words([*given, *self._without(others)])[section]

    def _without(self, sections: list[str]) -> list[str]:
        """Words that leave sections and Hydra's own settings out of a composition, which halves its time."""
        return [f"~{name}" for name in (*sections, *HYDRA_GROUPS)] if self._trims else []


def _value(word: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(word).value()


def _section(word: str) -> str | None:
    """The section that an override word writes to; None where that cannot be said from the word alone."""
    match = re.match(r"\+{0,2}(\w+)((/\w+)*|(\.\w+)*)=", word)
    return None if match is None or match[1] == "hydra" or "${" in word else match[1]


def cells(sweep: Sweep, extra: list[str]) -> list[Cell]:
    """Compose and resolve every cell of a sweep, with extra overrides for all of them, in the sweep's order.

    A cell that cannot be composed carries its error and stops no other. Tracking groups cells by the sweep unless told otherwise.
    """
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
    found = [validated(composer(overrides(sweep, point) + words[1:])) for point in expand(sweep)]
    composer.save()
    return found


def resolved(requests: list[tuple[str, list[str]]], composer: Composer | None = None) -> list[Cell]:
    """Compose and resolve cells from (name for people, override words); what they share is looked up once."""
    files, known, found = Composer(), Known(), []
    composer, naming = composer or files, Naming(files)
    for name, words in requests:
        try:
            draft = naming(validated(composer(words)))
            spec = pin(draft, known)
            found.append(Cell(labels.name(spec), spec, skipped=skip_reason(spec, known)))
        except NotHereError as error:
            found.append(Cell(labels.name(draft), None, problem=error, draft=draft))
        except PtqbenchError as error:
            found.append(Cell(name, None, problem=error))
    files.save()
    return with_folders(found)
