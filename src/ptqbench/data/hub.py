"""Data sets of the hub at one commit: a branch or tag becomes the commit that it names now, and files are read at that commit.

A commit never changes, so it enters the identity of a cell. With network the hub says which commit a branch names; without
network the reference says so that ``prefetch`` left in the hub cache. Files come from the snapshot of the commit in the hub cache.
They never come from the tables that ``datasets`` caches: without network that library takes the table it prepared last, whatever
the requested revision. Imports neither torch nor datasets.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ptqbench.errors import ConfigError, DataNotHereError, first_line

COMMIT = re.compile(r"[0-9a-f]{40}")
MARKERS = [
    "README.md",
    ".gitattributes",
]  # every repository has one of them, so a snapshot of them records the reference
NOT_DATA = ["*.py", "*.tar"]  # loading scripts, which nothing runs any more, and second copies of the tables
PREFETCH = (
    "run `python -m ptqbench prefetch SWEEP` (or prefetch with the words of this cell) where there is network, "
    "with the same HF_HUB_CACHE"
)


def commit_of(repository: str, revision: str) -> str:
    """Find the commit of a data set that a revision names.

    Args:
        repository: Hub data set, ``ORGANISATION/NAME``.
        revision: A commit (40 hexadecimal digits), which is returned unchanged, or a branch, tag or reference.

    Returns:
        The commit. It is also left in the hub cache, for calls without network.

    Raises:
        DataNotHereError: Neither the hub nor the hub cache knows the commit.
    """
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import constants, snapshot_download

    try:
        found = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=MARKERS)
    except Exception as error:  # the library raises many types for one fact
        place = Path(constants.HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}" / "refs" / revision
        raise DataNotHereError(
            f"hub data set {repository}: revision {revision!r} names no commit here: expected its commit in {place} or from "
            f"the hub, got: {first_line(error)}; {PREFETCH}",
            repository,
        ) from None
    return Path(found).name


def digest(repository: str, commit: str) -> str:
    """The identity of a data set of the hub."""
    return f"hub:{repository}@{commit}"


def is_identity(digest: str | None) -> bool:
    """Whether a digest is the identity of a data set of the hub, whose content cannot change."""
    return digest is not None and digest.startswith("hub:")


def pinned_commit(identity: str | None) -> str | None:
    """Read the commit from the identity of a data set; None if there is no identity yet.

    Raises:
        ConfigError: The identity names no commit, but a revision that can move.
    """
    if identity is None:
        return None
    commit = identity.rpartition("@")[2]
    if not identity.startswith("hub:") or not COMMIT.fullmatch(commit):
        raise ConfigError(
            f"expected data pinned as hub:ORGANISATION/NAME@COMMIT, got {identity!r}: this cell was composed with a "
            f"revision that can move; compose it again"
        )
    return commit


def file_at(repository: str, commit: str, name: str) -> Path:
    """Find one file of a data set in the hub cache; download it if it is not there.

    Args:
        repository: Hub data set.
        commit: 40 hexadecimal digits.
        name: Path of the file in the repository.

    Raises:
        DataNotHereError: It is neither cached nor reachable.
    """
    from huggingface_hub import hf_hub_download

    def look() -> str:
        return hf_hub_download(repository, name, repo_type="dataset", revision=commit)

    return _found(look, repository, f"{repository}@{commit} (file {name})")


def folder_at(repository: str, commit: str) -> Path:
    """Find all files of a data set in the hub cache; download those that are not there.

    Args:
        repository: Hub data set.
        commit: 40 hexadecimal digits.

    Raises:
        DataNotHereError: Files are neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download

    def look() -> str:
        return snapshot_download(repository, repo_type="dataset", revision=commit, ignore_patterns=NOT_DATA)

    return _found(look, repository, f"{repository}@{commit} (all its data)")


def _found(look: Callable[[], str], repository: str, what: str) -> Path:
    try:
        return Path(look())
    except Exception as error:  # as above
        raise DataNotHereError(
            f"hub data set {what} is neither cached nor reachable: {first_line(error)}; {PREFETCH}", repository
        ) from None
