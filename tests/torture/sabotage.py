"""Proof that the checks can fail: break the code under test in one way at a time, and see that its check notices.

``make torture PROVE=1``. Each break is a change to the imported modules, made before the trials are forked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from torture.kit import World

MAIN, CLASSIFY = "ptqbench.cli.main", "ptqbench.runs.attempt.classify"
BLOCKS = "ptqbench.engine.blocks_on_disk.BlockState"
SPOILED = "status bytes redone"
TRIALS = 64  # of one part, until its check notices


@dataclasses.dataclass(frozen=True)
class Break:
    """One way to break the code: where, how, and which check of which part must notice."""

    part: str
    check: str
    what: str
    target: str
    change: Callable[[Any], Any]


@contextlib.contextmanager
def _in_place(path: Path) -> Iterator[Path]:
    """Write in place: what a kill leaves is a part of the file under its final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    yield path


def _swallowing(real: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function and say nothing of what it raises."""

    def quiet(*arguments: Any, **named: Any) -> Any:
        with contextlib.suppress(Exception):
            return real(*arguments, **named)
        return None

    return quiet


def _kind_code(real: Callable[..., Any]) -> Callable[..., Any]:
    from ptqbench.runs.failures import KINDS

    return lambda *given: KINDS["code"]


def _raising(real: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*arguments: Any, **named: Any) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'broken on purpose'")

    return wrong


def _two_lines(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda error: "first line\nsecond line"


@contextlib.contextmanager
def _no_lease(folder: Any) -> Iterator[Any]:
    yield SimpleNamespace(check=lambda: None, is_mine=lambda: True, confirmed=contextlib.nullcontext)


def _left_lease(real: Callable[..., Any]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def keeping(folder: Any) -> Iterator[Any]:
        with real(folder) as mine:
            yield mine
        (folder.path / "left-behind.json").write_text("{}")

    return keeping


def _interrupt_as_failure(real: Callable[..., Any]) -> Callable[..., Any]:
    """Record what a signal ended as a failure."""

    @contextlib.contextmanager
    def recording(folder: Any, *more: Any) -> Iterator[Any]:
        from ptqbench.runs.attempt import record_failure

        try:
            with real(folder, *more) as current:
                yield current
        except KeyboardInterrupt as error:
            record_failure(folder, error)
            raise

    return recording


BREAKS: Sequence[Break] = (
    Break(
        "kills", "redone", "finished blocks are not recognised", f"{BLOCKS}.has", lambda real: lambda self, index: False
    ),
    Break("kills", "stray", "a file is left in the run folder", "ptqbench.run.lease", _left_lease),
    Break(
        "kills",
        "kind",
        "an interrupted attempt is recorded as a failure",
        "ptqbench.run.attempt",
        _interrupt_as_failure,
    ),
    Break(
        "kills",
        "frozen",
        "the holder of a lease counts as gone",
        "ptqbench.runs.folder.alive",
        lambda real: lambda *given: False,
    ),
    Break(
        "operations",
        SPOILED,
        "records are written in place",
        "ptqbench.evaluate.records.replacing",
        lambda real: _in_place,
    ),
    Break("operations", SPOILED, "JSON is written in place", "ptqbench.runs.files.replacing", lambda real: _in_place),
    Break("disk", "kind", "a full disk is a defect of the code", CLASSIFY, _kind_code),
    Break("disk", "kind bytes resume", "an error while a block is saved is swallowed", f"{BLOCKS}.save", _swallowing),
    Break("races", "ten: once", "there is no lease", "ptqbench.run.lease", lambda real: _no_lease),
    Break("requests", "traceback", "an error that nobody expects", "ptqbench.sweeps.files.load_sweep", _raising),
    Break("requests", "lines", "an error of two lines", "ptqbench.runs.outcome.one_line", _two_lines),
    Break(
        "requests", "nonsense accepted", "every exit status is 0", MAIN, lambda real: lambda words: real(words) and 0
    ),
    Break(
        "requests", "status", "a wrong request ends with status 1", MAIN, lambda real: lambda words: min(real(words), 1)
    ),
    Break("requests", "hang", "a request takes long", MAIN, lambda real: lambda words: time.sleep(60.0)),
    Break(
        "requests",
        "words",
        "status shows nothing",
        "ptqbench.results.terminal.print_status",
        lambda real: lambda *given: None,
    ),
    Break("requests", "kind", "every failure is a defect of the code", CLASSIFY, _kind_code),
)


def prove(world: World, parts: Sequence[str]) -> int:
    """Break, run, and look; returns 0 where every check noticed."""
    missed = 0
    for broken in [one for one in BREAKS if one.part in parts]:
        module = importlib.import_module(f"torture.{broken.part}")
        here = dataclasses.replace(world, part=broken.part)
        module.prepare(here)
        found = _first(module, here, broken)
        missed += found is None
        print(
            f"{'noticed' if found else 'MISSED '} {broken.part}/{broken.check}: {broken.what}{f' ({found})' if found else ''}",
            flush=True,
        )
    print(f"{missed} of the breaks were missed")
    return int(missed > 0)


def _first(module: Any, world: World, broken: Break) -> str | None:
    """Run trials of a part with the code broken until its check finds what it does not find in the code as it is."""
    owner, name = _owner(broken.target)
    change = broken.change(getattr(owner, name))
    for number in range(TRIALS):
        with mock.patch.object(owner, name, change):
            found = [one for one in module.trial(world, number).findings if _is(broken, one[0])]
        if found:
            usual = {check for check, _ in module.trial(world, number).findings}
            new = [(check, seen) for check, seen in found if check not in usual]
            if new:
                return f"trial {number}: {new[0][0]}: {new[0][1][:80]}"
    return None


def _is(broken: Break, check: str) -> bool:
    return check == broken.check or any(check.endswith(word) for word in broken.check.split(" "))


def _owner(target: str) -> tuple[Any, str]:
    """Find the object that holds a dotted name."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ImportError):
            owner: Any = importlib.import_module(".".join(parts[:cut]))
            for part in parts[cut:-1]:
                owner = getattr(owner, part)
            return owner, parts[-1]
    raise ImportError(target)
