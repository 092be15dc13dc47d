"""The folders of the package, in a wheel, an editable install and a checkout alike: ``conf/``, ``sweeps/``, the papers' figures."""

from __future__ import annotations

import os
from pathlib import Path

from ptqbench.errors import ConfigError

PACKAGE = Path(__file__).parents[1]


def conf_folder() -> Path:
    """The folder with ``config.yaml``: ``PTQBENCH_CONF`` if set, else the packaged copy, else that of the repository.

    Raises:
        ConfigError: ``PTQBENCH_CONF`` is another folder, or the installation is damaged.
    """
    return _given("PTQBENCH_CONF", "config.yaml") or _shipped("conf", "config.yaml")


def sweep_folder() -> Path:
    """The folder with the sweep files that ship with ptqbench."""
    return _shipped("sweeps", "demo.yaml")


def reported_folder() -> Path:
    """The folder with the figures that papers print: ``PTQBENCH_REPORTED`` if set, else that of ptqbench.

    Raises:
        ConfigError: ``PTQBENCH_REPORTED`` is another folder, or the installation is damaged.
    """
    return _given("PTQBENCH_REPORTED", "reported.csv") or _shipped("analysis/reported", "reported.csv")


def claims_file() -> Path:
    """The file with the claims of papers."""
    return _shipped("analysis", "claims.yaml") / "claims.yaml"


def group_names(group: str) -> list[str]:
    """Names of the choices of a configuration group, e.g. ``group_names("method")``."""
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


def cache_folder() -> Path:
    """The folder of what can be computed again, such as digests of large files: ``PTQBENCH_CACHE``, else ``~/.cache/ptqbench``."""
    return Path(os.environ.get("PTQBENCH_CACHE", Path.home() / ".cache" / "ptqbench"))


def _given(variable: str, witness: str) -> Path | None:
    """The folder that an environment variable names; None where it is not set."""
    override = os.environ.get(variable)
    if override and not (Path(override) / witness).is_file():
        raise ConfigError(f"{variable}={override!r}: expected a folder with {witness}")
    return Path(override).resolve() if override else None


def _shipped(name: str, witness: str) -> Path:
    for folder in (PACKAGE / "shipped" / name, PACKAGE.parents[1] / name):
        if (folder / witness).is_file():
            return folder
    raise ConfigError(
        f"{name}/ was found neither in the package ({PACKAGE}) nor beside it: the installation is damaged"
    )
