"""The folders of the package, in a wheel, an editable install and a checkout alike: ``conf/``, ``sweeps/``, the papers' figures.

Users keep configuration files of their own in folders of the same form as ``conf/`` (``with_own``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from ptqbench.errors import ConfigError

PACKAGE = Path(__file__).parents[1]
_OWN: ContextVar[tuple[Path, ...]] = ContextVar("own", default=())


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


def own_folders() -> tuple[Path, ...]:
    """The folders of the user in which configuration files are looked up beside ``conf_folder``."""
    return _OWN.get()


@contextlib.contextmanager
def with_own(folder: str | Path | None) -> Iterator[None]:
    """Look configuration files up in a folder of the user too, such as ``FOLDER/method/mine.yaml``.

    Args:
        folder: The folder; None adds none.

    Raises:
        ConfigError: There is no such folder, it has no file of a group, or a file of it is not UTF-8 or has a name that is taken.
    """
    own = _OWN.get()
    if folder is not None and (path := Path(folder).absolute()) not in own:
        _check_own(path)
        own = (*own, path)
    token = _OWN.set(own)
    try:
        yield
    finally:
        _OWN.reset(token)


def _check_own(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"no folder of configuration files {str(folder)!r}")
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*.yaml"))]
    for file in files:
        try:
            (folder / file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{folder / file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        for other in (conf_folder(), *_OWN.get()):
            if (other / file).exists():
                raise ConfigError(
                    f"{folder / file}: expected a name of its own, but {other / file} exists; rename yours"
                )
    if not any(str(file.parent) in groups() for file in files):
        raise ConfigError(f"{folder}: expected files such as method/mine.yaml or bitwidth/mine.yaml, got none")


def groups() -> list[str]:
    """The groups of configuration files, e.g. ``method`` and ``method/solver``."""
    return sorted(path.relative_to(conf_folder()).as_posix() for path in conf_folder().rglob("*") if path.is_dir())


def group_files(group: str) -> dict[str, Path]:
    """The files of a configuration group by the names of its choices, those of the user included."""
    folders = (conf_folder(), *_OWN.get())
    return {path.stem: path for folder in folders for path in sorted((folder / group).glob("*.yaml"))}


def group_names(group: str) -> list[str]:
    """Names of the choices of a configuration group, e.g. ``group_names("method")``."""
    return sorted(group_files(group))


def conf_texts() -> dict[str, str]:
    """The text of every configuration file, those of the user included, by its path in its folder."""
    folders = (conf_folder(), *_OWN.get())
    return {
        str(path.relative_to(folder)): path.read_text(encoding="utf-8")
        for folder in folders
        for path in folder.rglob("*.yaml")
    }


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
