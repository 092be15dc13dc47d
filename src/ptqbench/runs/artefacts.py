"""Tensors that many cells need, computed once: calibration windows, second moments, eigenbases.

The name of an artefact holds a hash of its *key*, which is everything that it depends on (content digests, never paths), and of
``PRODUCER``, which is raised when a change of the code changes the numbers of artefacts. An artefact is one safetensors file,
written under a temporary name and renamed. It holds a SHA-256 of its tensors; a file that does not agree with it is removed and
made again. A file lock is held while an artefact is made, so that twenty tasks of an array do not make it twenty times; where a
file system ignores locks, work is wasted and nothing is wrong. A folder has a budget: an artefact that does not fit beside those
in use is not stored.

An artefact never changes a result: a cell computes the same numbers with an empty folder. It holds the seconds that making it
took, so that a cell can say how much work it was spared (``Artefacts.account``).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import Timeout

from ptqbench.cell.fingerprint import canonical_json
from ptqbench.errors import StorageError
from ptqbench.runs.files import (
    abandoned,
    errno_of,
    file_lock,
    is_readable,
    remove_temporaries,
    replacing,
    temporary_prefix,
)

if TYPE_CHECKING:
    from torch import Tensor

PRODUCER = 1
FOLDER = ".artefacts"
IN_USE_S = 3_600.0
"""Seconds for which an artefact that was read or written is not removed to make room for another."""


class Artefacts:
    """A folder of artefacts.

    Attributes:
        root: The folder; created when an artefact is stored.
        budget_bytes: Size up to which the folder may grow; None for no limit.
        found: Number of artefacts that this object found, by kind.
        made: Number of artefacts that it made.
        spared_s: Seconds that others spent on the artefacts found here. An artefact counts once, and not if it was made here.
        waited_s: Seconds that this object waited while others made artefacts.
    """

    def __init__(self, root: Path, budget_bytes: int | None = None) -> None:
        self.root, self.budget_bytes, self.made = root, budget_bytes, 0
        self.found: Counter[str] = Counter()
        self.spared_s = self.waited_s = 0.0
        self._beside_s = 0.0, 0.0
        self._paid: set[Path] = set()
        self._written: set[Path] = set()

    def clock(self) -> float:
        """A clock, in seconds. Its differences are full costs: as if artefacts found had been made here, and without waiting."""
        return time.perf_counter() + self.spared_s - self.waited_s

    def account(self) -> dict[str, Any]:
        """What was found, the work that this spared, and the time that it took to wait, as plain data for ``result.json``.

        The seconds are those of quantizing; what was found ``beside`` it is only counted.
        """
        spared_s, waited_s = self._beside_s
        seconds = {"spared_s": round(self.spared_s - spared_s, 4), "waited_s": round(self.waited_s - waited_s, 4)}
        return {"found": dict(self.found), **seconds}

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Leave the seconds of what is found, and of waiting, inside this context out of the account: they are not quantizing."""
        before = self.spared_s, self.waited_s
        yield
        spared_s, waited_s = self._beside_s
        self._beside_s = spared_s + self.spared_s - before[0], waited_s + self.waited_s - before[1]

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        """The file of an artefact."""
        # 24 hexadecimal digits are 96 bits, too many for two keys to meet.
        named = canonical_json({"producer": PRODUCER, "kind": kind, "key": dict(key)})
        return self.root / f"{kind}-{hashlib.sha256(named.encode()).hexdigest()[:24]}.safetensors"

    def find(self, kind: str, key: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Read an artefact; None where it is missing or damaged. A damaged file is removed.

        Returns:
            Tensors by name, on the CPU.

        Raises:
            StorageError: The file is there and cannot be read now: no permission, a failing file system.
        """
        path = self.path(kind, key)
        read = _read(path)
        if read is None:
            return None
        tensors, seconds = read
        self.found[kind] += 1
        self.spared_s += 0.0 if path in self._paid else seconds
        self._paid.add(path)
        with contextlib.suppress(OSError):
            os.utime(path)  # the least recently used are removed first
        return tensors

    def get(self, kind: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Read an artefact, or make and store it.

        Args:
            kind: First part of the file's name.
            key: Plain data that determines the tensors.
            make: Computes them.

        Returns:
            Tensors by name, on the CPU.
        """
        found = self.find(kind, key)
        if found is not None:
            return found
        with self.held(kind, key):
            found = self.find(kind, key)  # perhaps made by another process while this one waited
            if found is not None:
                return found
            start = self.clock()
            tensors = _stored_form(make())
            self.made += 1
            self.put(kind, key, tensors, self.clock() - start)
            return tensors

    def put(self, kind: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor], seconds: float) -> bool:
        """Store an artefact, unless it does not fit the budget or the disk.

        Args:
            kind: First part of the file's name.
            key: Plain data that determines the tensors.
            tensors: The artefact, not modified.
            seconds: Its full cost, a difference of ``clock``.

        Returns:
            Whether it is stored.
        """
        held, path = _stored_form(tensors), self.path(kind, key)
        self._paid.add(path)
        size = sum(tensor.nbytes for tensor in held.values())
        try:
            # Make room first; where artefacts in use leave too little, this one is not stored.
            if self.budget_bytes is not None:
                left = collect_garbage(self.root, self.budget_bytes - size, IN_USE_S)[2]
                if left + size > self.budget_bytes:
                    return False
            _write(path, held, seconds)
            self._written.add(path)
        except Exception as error:
            if errno_of(error) is None:
                raise
            return False  # on a full disk, or in a folder of others, nothing is shared and the cell goes on
        return True

    def discard(self) -> None:
        """Remove what this object stored: the model or the data changed meanwhile, so that the keys are wrong."""
        for path in self._written:
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self, kind: str, key: Mapping[str, Any]) -> Iterator[None]:
        """Keep other processes from making the same artefact meanwhile. The lock of a killed process is free."""
        path = self.path(kind, key)
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # where this process may not write, nothing is shared
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(file_lock(path.with_suffix(".lock")))
            self.waited_s += time.perf_counter() - start
            yield


def collect_garbage(root: Path, budget_bytes: int, in_use_s: float = 0.0) -> tuple[int, int, int]:
    """Remove the least recently used artefacts until the rest fits a budget; temporary files of killed processes go first.

    Args:
        root: Folder of artefacts.
        budget_bytes: Bytes that may stay.
        in_use_s: Artefacts used within so many seconds stay in any case. One that is being made stays too.

    Returns:
        Number of files removed, bytes removed, and bytes that stay.
    """
    if not root.is_dir():
        return 0, 0, 0
    now, removed, freed = time.time(), 0, 0
    # Files and folders half written by processes that were killed.
    for path in abandoned(root):
        with contextlib.suppress(OSError):  # another process removes it too, or it belongs to another user
            size = sum(part.stat().st_size for part in (path, *path.rglob("*")))
            remove_temporaries([path])
            freed, removed = freed + size, removed + 1
    # Artefacts, the least recently used first.
    files = []
    for path in root.glob("*.safetensors"):
        with contextlib.suppress(FileNotFoundError):
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    files.sort()
    total = sum(size for _, size, _ in files)
    for used, size, path in files:
        if total <= budget_bytes or now - used < in_use_s:
            break
        try:
            # A lock that is held belongs to a process that is making this very artefact.
            with file_lock(path.with_suffix(".lock"), timeout=0):
                path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
        except (Timeout, OSError):
            continue
        total, removed, freed = total - size, removed + 1, freed + size
    return removed, freed, total


def _stored_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As they are read back: detached, on the CPU, contiguous."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in hexadecimal."""
    import torch

    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], float] | None:
    """Read tensors and the seconds that they cost; None without the file. A damaged file, or one without seconds, is removed.

    Raises:
        StorageError: The file is there and cannot be read now.
    """
    from safetensors import SafetensorError, safe_open

    if not is_readable(path):
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a dict
            said = stored.metadata() or {}
        seconds = float(said["seconds"])
    except FileNotFoundError:  # another process has just removed it
        return None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        # An error of the system says nothing about the content, which may be sound.
        if errno_of(error) is not None:
            raise StorageError(f"{path} cannot be read: {error}") from error
        path.unlink(missing_ok=True)
        return None
    if _digest(tensors) != said.get("sha256"):
        path.unlink(missing_ok=True)
        return None
    return tensors, seconds


def _write(path: Path, tensors: dict[str, Tensor], seconds: float) -> None:
    from safetensors.torch import save_file

    # safetensors first writes a file of a random name beside its target. Here that is in a folder whose name says who writes it,
    # so that it can be removed after a kill.
    with replacing(path) as temporary, tempfile.TemporaryDirectory(".tmp", temporary_prefix(path), path.parent) as own:
        save_file(tensors, Path(own) / "new", metadata={"sha256": _digest(tensors), "seconds": f"{seconds:.6f}"})
        (Path(own) / "new").replace(temporary)
