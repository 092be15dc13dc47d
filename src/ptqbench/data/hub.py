"""Data sets of the hub at one commit: a branch or tag becomes the commit that it names now, and files are read at that commit.

A commit never changes, so it is what enters the identity of a cell. With network the hub says which commit a branch names;
without, the reference that ``prefetch`` left in the hub cache. Files come from the snapshot of the commit in the hub cache,
never from the cache of prepared tables that ``datasets`` keeps: without network that library takes the table it prepared last,
whatever revision it is asked for. Imports neither torch nor datasets.
"""

from __future__ import annotations

import re
from pathlib import Path

from ptqbench.errors import ConfigError, DataNotHereError

COMMIT = re.compile(r"[0-9a-f]{40}")
MARKERS = ["README.md", ".gitattributes"]  # every repository has one, so that a snapshot stands for the reference
NOT_DATA = ["*.py", "*.tar"]  # loading scripts, which nothing runs any more, and second copies of what tables hold
PREFETCH = (
    "run `python -m ptqbench prefetch SWEEP` (or prefetch with the words of this cell) where there is network, "
    "with the same HF_HUB_CACHE"
)


def commit_of(repository: str, revision: str) -> str:
    """Say which commit of a data set a revision names.

    Args:
        repository: Hub data set, ``ORGANISATION/NAME``.
        revision: A commit (40 hexadecimal digits), which is returned as it is, or a branch, tag or reference.

    Returns:
        The commit; also left in the hub cache, for calls without network.

    Raises:
        DataNotHereError: Neither the hub nor the hub cache says which commit it is.
    """
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import constants, snapshot_download

    try:
        found = snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=MARKERS)
    except Exception as error:  # the library raises many types for one fact: it cannot say
        place = Path(constants.HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}" / "refs" / revision
        raise DataNotHereError(
            f"hub data set {repository}: revision {revision!r} names no commit here: expected its commit in {place} or from "
            f"the hub, got: {_reason(error)}; {PREFETCH}",
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
    """Read the commit back from the identity of a data set; None if there is no identity yet.

    Raises:
        ConfigError: The identity names a revision that can move.
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
    """Find one file of a data set in the hub cache, downloading it if it is not there.

    Args:
        repository: Hub data set.
        commit: 40 hexadecimal digits.
        name: Path of the file in the repository.

    Raises:
        DataNotHereError: It is neither cached nor reachable.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=commit))
    except Exception as error:  # as above
        raise _absent(repository, commit, f"file {name}", error) from None


def folder_at(repository: str, commit: str) -> Path:
    """Find all data of a data set in the hub cache, downloading what is not there.

    Args:
        repository: Hub data set.
        commit: 40 hexadecimal digits.

    Raises:
        DataNotHereError: Files are neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, repo_type="dataset", revision=commit, ignore_patterns=NOT_DATA))
    except Exception as error:  # as above
        raise _absent(repository, commit, "all its data", error) from None


def _absent(repository: str, commit: str, what: str, error: Exception) -> DataNotHereError:
    return DataNotHereError(
        f"hub data set {repository}@{commit} ({what}) is neither cached nor reachable: {_reason(error)}; {PREFETCH}",
        repository,
    )


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
