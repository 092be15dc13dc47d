"""Command lines in Hydra's grammar: one cell, a multirun, or Hydra's own ``--cfg`` and ``--info``.

Hydra parses and composes, and returns. Cells run afterwards, so that Hydra's folders, logs and handling of errors do not affect
them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ptqbench.cell.folders import conf_folder, with_own
from ptqbench.errors import ConfigError
from ptqbench.sweeps.compose import Composer, named, resolved
from ptqbench.sweeps.hydra_compose import jobs, refusal
from ptqbench.sweeps.words import CONFIG_DIR, DRY, check_request, rewrite, split

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

Compose = Callable[[list[str]], dict[str, Any]]


@dataclasses.dataclass
class _Asked:
    """What Hydra made of a command line: a configuration, or the jobs of a multirun and how to compose one."""

    configs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    jobs: list[list[str]] | None = None
    compose: Compose | None = None


_asked = _Asked()


def run_hydra(arguments: list[str]) -> int:
    """Run a command line that is no command of ptqbench: a cell, a multirun, or Hydra's own ``--cfg`` and ``--info``.

    Returns:
        Exit status.

    Raises:
        PtqbenchError: The request is wrong, or the cell failed.
    """
    flags, words = split(arguments)
    with with_own(next((value for flag, value in pairwise(flags) if flag in CONFIG_DIR), None)):
        return _run(arguments, flags, words)


def _run(arguments: list[str], flags: list[str], words: list[str]) -> int:
    check_request(words, flags)
    dry, arguments = DRY in flags, [argument for argument in arguments if argument != DRY]
    asked = _ask(rewrite(arguments), words)
    if asked.jobs is not None and asked.compose is not None:
        return _launch(asked.jobs, asked.compose, dry)
    if not asked.configs:
        return 0
    (config,) = asked.configs
    spec = named(config)  # what is wrong with the one cell ends the command
    if dry:
        return _launch([words], lambda _: config, dry)
    from ptqbench.foreground import run_one

    return run_one(spec)


def _ask(arguments: list[str], words: list[str]) -> _Asked:
    """Let Hydra read a command line.

    Args:
        arguments: As Hydra takes them.
        words: The overrides as they were given, for the message of an error.

    Raises:
        ConfigError: Hydra refuses the command line.
    """
    global _asked  # Hydra makes the sweeper that calls ``note_multirun``
    import hydra
    from omegaconf import DictConfig, OmegaConf

    _asked = _Asked()

    @hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")  # type: ignore[untyped-decorator]
    def task(config: DictConfig) -> None:
        _asked.configs.append(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]

    os.environ["HYDRA_FULL_ERROR"] = (
        "1"  # Hydra raises its errors instead of printing them, so that they become one line
    )
    before, sys.argv = sys.argv, ["ptqbench", *arguments]
    # What Hydra prints on the way is shown only where it accepts the command line.
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            task()
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(
                (said.getvalue().strip().splitlines() or ["Hydra refused the command line"])[-1]
            ) from None
    except Exception as error:
        raise refusal(error, words) from None
    finally:
        sys.argv = before
    sys.stderr.write(said.getvalue())
    return _asked


def note_multirun(overrides: Iterable[Override], compose: Compose) -> None:
    """Keep the jobs of a multirun for ``run_hydra``; called by the Hydra plugin.

    Args:
        overrides: The parsed override words.
        compose: Hydra's composition of a job from its override words.

    Raises:
        ConfigError: As ``jobs``.
    """
    _asked.jobs, _asked.compose = jobs(overrides), compose


def _launch(jobs: list[list[str]], compose: Compose, dry: bool) -> int:
    """Compose the jobs of a multirun and launch their cells; ``dry`` prints the plan instead."""
    from ptqbench.launch.dispatch import launch

    def composed(words: list[str]) -> dict[str, Any]:
        check_request(words)
        try:
            return compose(rewrite(words))
        except Exception as error:
            raise refusal(error, words) from None

    return launch(resolved([(" ".join(words), words) for words in jobs], Composer(composed)), dry=dry)
