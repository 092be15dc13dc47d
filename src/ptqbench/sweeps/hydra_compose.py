"""Hydra's compose API: override words in, plain data out. Every error of Hydra becomes a ``ConfigError`` of one line."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ptqbench.cell.folders import conf_folder, own_folders
from ptqbench.errors import ConfigError, PtqbenchError
from ptqbench.sweeps.files import MOST_CELLS
from ptqbench.sweeps.hydra_errors import bad_grammar, explain, several_values
from ptqbench.sweeps.words import check_request, is_simple, literal, rewrite

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def compose_data(words: list[str], read: dict[str, Any] | None = None) -> dict[str, Any]:
    """Compose overrides to plain data, unvalidated.

    Args:
        words: Override words.
        read: Configuration files that were read, kept by the caller so that no file is read twice; None keeps nothing.

    Raises:
        ConfigError: No method is given, or Hydra or OmegaConf refuse the words.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    check_request(words)
    check_grammar(words)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="ptqbench"):
            if read is not None:
                _Remembering.install(GlobalHydra.instance().config_loader(), read)
            searched = (
                [f"hydra.searchpath={literal([f'file://{one}' for one in own])}"] if (own := own_folders()) else []
            )
            data = OmegaConf.to_container(hydra.compose("config", rewrite(words) + searched), resolve=True)
    except Exception as error:
        raise refusal(error, words) from None
    assert isinstance(data, dict)
    return data  # type: ignore[return-value]


def refusal(error: Exception, words: list[str]) -> Exception:
    """What to raise for an exception met while Hydra composed words.

    Hydra and OmegaConf raise a dozen types, all of them about the request. Only failures of disk and memory are not.
    """
    if isinstance(error, PtqbenchError | MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        return error
    return ConfigError(explain(error, words, compose_data))


def value_of(word: str) -> Any:
    """The value of an override word.

    Raises:
        ConfigError: The word is not in Hydra's grammar, or it gives several values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
    except (HydraException, RecursionError) as error:
        raise ConfigError(bad_grammar(word, str(error))) from None
    if override.is_sweep_override():
        raise ConfigError(several_values(word))
    return override.value()


def check_grammar(words: Iterable[str]) -> None:
    """Refuse words that Hydra cannot parse, or that give several values; the error says how to quote."""
    for word in words:
        if not is_simple(word):
            value_of(word)


def combinations(words: list[str]) -> list[list[str]]:
    """Every combination of the values of override words, as in a multirun: ``seed=0,1`` has two.

    Raises:
        ConfigError: A word is not in Hydra's grammar, or as ``jobs``.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found = []
    for word in words:
        try:
            found.append(OverridesParser.create().parse_override(word))
        except (HydraException, RecursionError) as error:
            raise ConfigError(bad_grammar(word, str(error))) from None
    return jobs(found)


def jobs(overrides: Iterable[Override]) -> list[list[str]]:
    """The override words of every combination of the values of parsed overrides.

    Raises:
        ConfigError: There are more than ``MOST_CELLS``, or a word has no values that can be listed.
    """
    # The product is counted before it is formed.
    choices = {override.get_key_element(): values(override) for override in overrides}
    if math.prod(map(len, choices.values())) > MOST_CELLS:
        raise ConfigError(f"the command line asks for more than {MOST_CELLS:,} cells, which is the most that are taken")
    pairs = [[f"{key}={value}" for value in given] for key, given in choices.items()]
    return [list(job) for job in itertools.product(*pairs)]


def values(override: Override) -> list[str]:
    """The values of a parsed override word, as written."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise ConfigError(
            f"{override.input_line}: expected values that can be listed, such as seed=0,1,2 or seed=range(3)"
        )
    found = list(itertools.islice(override.sweep_string_iterator(), MOST_CELLS + 1))
    if not found:
        raise ConfigError(f"{override.input_line}: no values, so no cells")
    return found


class _Remembering:
    """Hydra's repository of configuration files, but each file is read once. Hydra itself reads them for every composition.

    This replaces an undocumented attribute of Hydra's loader. Should a version of Hydra lack it, files are read every time.
    ``plan demo`` takes 1.7 s instead of 2.5 s while nothing is in the cache.
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
