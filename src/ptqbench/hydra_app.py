"""The Hydra side of the command line: one cell, or a multirun. Composing itself is in ``ptqbench.sweeps.compose``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from ptqbench.cell.folders import conf_folder
from ptqbench.errors import ConfigError, PtqbenchError
from ptqbench.sweeps.compose import Composer, named, one_line, require_method, resolved, rewrite


def run_hydra(arguments: list[str]) -> int:
    """Run a Hydra command line: one cell, a multirun, or Hydra's own ``--cfg`` and ``--info``."""
    import hydra
    from omegaconf import DictConfig, OmegaConf

    from ptqbench.foreground import run_one

    arguments = rewrite(arguments)
    words = [word for word in arguments if not word.startswith("-")]
    require_method(words, arguments)
    status: list[int] = []
    stopped: list[PtqbenchError] = []

    @hydra.main(config_path=str(conf_folder()), config_name="config", version_base="1.3")  # type: ignore[untyped-decorator]
    def task(config: DictConfig) -> None:
        try:
            status.append(run_one(named(OmegaConf.to_container(config, resolve=True))))  # type: ignore[arg-type]
        except PtqbenchError as error:  # kept from Hydra, which would print the whole command line before it
            stopped.append(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, so that they can be shown as one line
    before, sys.argv = sys.argv, ["ptqbench", *arguments]
    _multirun_status.clear()
    try:
        task()
    except (PtqbenchError, BrokenPipeError):
        raise
    except SystemExit as stop:
        return int(stop.code or 0)
    except Exception as error:  # as in compose_data
        raise ConfigError(one_line(error, words)) from None
    finally:
        sys.argv = before
    if stopped:
        raise stopped[0]
    return max([*status, *_multirun_status], default=0)


def launch_multirun(overrides_of_cells: list[list[str]], compose: Callable[[list[str]], dict[str, Any]]) -> None:
    """Launch what a multirun asks for; called by the Hydra plugin. The exit status is kept for :func:`run_hydra`.

    Args:
        overrides_of_cells: Override words of every cell.
        compose: Hydra's composition of a sweep's job.
    """
    from ptqbench.launch.dispatch import launch

    def composed(words: list[str]) -> dict[str, Any]:
        require_method(words)
        try:
            return compose(rewrite(words))
        except Exception as error:  # as in compose_data
            raise ConfigError(one_line(error, words)) from None

    found = resolved([(" ".join(words), words) for words in overrides_of_cells], Composer(composed))
    _multirun_status.append(launch(found))


_multirun_status: list[int] = []
