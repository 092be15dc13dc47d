"""Small cells of every method, what an undisturbed run of each gives, and how a disturbed one is compared with it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet

from torture.kit import Outcome, Running, World, command

ROOT = Path(__file__).parents[2]
VOLATILE = {"timings", "peak_host_gib", "peak_gpu_gib", "attempts", "shared"}
IN_ATTEMPT = {"meta.json", "log.txt", "heartbeat.json", "failure.json"}
WORDS = (
    "model=tiny", "evaluation=tiny", "++evaluation.texts.tiny.portion=[0,0.02]", "evaluation.texts.tiny.seq_len=64",
    "evaluation.limit=8", "execution.threads=1", "execution.progress=false",
)  # fmt: skip


@functools.cache
def methods() -> tuple[str, ...]:
    """Every shipped method."""
    return tuple(sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")))


@functools.cache
def words(method: str) -> tuple[str, ...]:
    """Overrides of the cell of a method, without the folder."""
    text = (ROOT / "conf" / "method" / f"{method}.yaml").read_text()
    given = [f"+method={method}", *WORDS]
    if "override /bitwidth" not in text and method != "fp16":
        given.append("bitwidth=w3")
    if method == "fp16":
        return (*given, "bitwidth=fp16")
    given += ["calibration.n_samples=8", "calibration.seq_len=32"]
    if "transform: subspace" in text:
        given.append("method.transform.n_samples=16")
    if "learned_rotation" in text:
        given.append("method.transform.steps=3")
    return tuple(given)


@dataclasses.dataclass(frozen=True)
class Reference:
    """What an undisturbed run left: the stable part of its result, and the bytes of every file but those of attempts."""

    name: str
    result: dict[str, Any]
    files: dict[str, str]
    seconds: float


def left(folder: Path) -> dict[str, str]:
    """Digest of every file of a run folder outside attempts and logs; of the result, of its stable part."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(("attempts/", "logs/")) and name not in ("spec.json", ".lock"):
            found[name] = hashlib.sha256(_timeless(path)).hexdigest()[:16]
    return found


def _timeless(path: Path) -> bytes:
    """The content of a file without the times that were measured."""
    if path.name == "result.json":
        return stable(path).encode()
    if path.name == "layers.parquet":
        table = pyarrow.parquet.read_table(path)
        return str(table.select([name for name in table.column_names if not name.endswith("_s")]).to_pylist()).encode()
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    reports = json.loads(header.get("__metadata__", {}).pop("reports", "[]"))
    rows = [{key: value for key, value in row.items() if not key.endswith("_s")} for row in reports]
    return json.dumps([header, rows], sort_keys=True).encode() + data[8 + size :]


def stable(path: Path) -> str:
    """The part of a result that may not depend on how often a cell was disturbed, as bytes would show it."""
    data = json.loads(path.read_text())
    return json.dumps({key: value for key, value in data.items() if key not in VOLATILE}, sort_keys=True)


def refer(world: World, method: str) -> Reference:
    """Run the cell of a method undisturbed; once per world."""
    kept = world.folder / "references" / f"{method}.json"
    if not kept.exists():
        runs = world.folder / "references" / method
        ended = Running(command(*words(method), f"execution.runs_dir={runs}"), world.folder).end()
        if ended.status != 0:
            raise SystemExit(f"torture: the undisturbed cell of {method} fails: {ended}")
        (folder,) = runs.glob("tiny-*")
        data = {
            "name": folder.name, "result": json.loads(stable(folder / "result.json")), "files": left(folder),
            "seconds": ended.seconds,
        }  # fmt: skip
        kept.write_text(json.dumps(data))
    return Reference(**json.loads(kept.read_text()))


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Finished work in a run folder, with what changes when it is done again (inode and time)."""
    found = {}
    for path in [*folder.glob("state/*.safetensors"), *folder.glob("records/*/*.parquet"), folder / "result.json"]:
        if path.is_file() and "progress" not in path.name:
            status = path.stat()
            found[path.relative_to(folder).as_posix()] = (status.st_ino, status.st_mtime_ns)
    return found


def check_kept(outcome: Outcome, before: dict[str, tuple[int, int]], folder: Path, may_go: bool = False) -> None:
    """Finished work is not done again."""
    after = finished(folder)
    redone = [name for name, mark in before.items() if after.get(name, mark) != mark]
    lost = [] if may_go else [name for name in before if name not in after]
    outcome.check(not redone and not lost, "redone", f"done again: {redone}, lost: {lost}, in {folder}")


def check_end(outcome: Outcome, folder: Path, reference: Reference, keep_codes: bool = True) -> None:
    """The result and every other file are those of an undisturbed run, and nothing else is left."""
    if not outcome.check((folder / "result.json").is_file(), "result", f"no result.json in {folder}"):
        return
    here, there = json.loads(stable(folder / "result.json")), reference.result
    differ = [key for key in there if here.get(key) != there[key]] + [key for key in here if key not in there]
    outcome.check(not differ, "bytes", f"result.json differs in {differ} from an undisturbed run, in {folder}")
    wanted = {name: value for name, value in reference.files.items() if keep_codes or not name.startswith("state/")}
    now = left(folder)
    stray = [name for name in now if name not in wanted] + strays(folder.parent)
    if not keep_codes and (folder / "state").exists():
        stray.append("state/")
    missing = [name for name in wanted if name not in now]
    unequal = [name for name in wanted if name in now and now[name] != wanted[name] and name != "result.json"]
    outcome.check(not stray, "stray", f"left in {folder}: {stray}")
    outcome.check(not missing and not unequal, "bytes", f"missing: {missing}, other bytes: {unequal}, in {folder}")


def strays(runs: Path) -> list[str]:
    """Files that belong to nothing: temporary ones anywhere, unknown ones in attempts and among shared artefacts."""
    found = []
    for path in runs.rglob("*"):
        name = path.relative_to(runs).as_posix()
        attempt = re.search(r"/attempts/\d+/([^/]+)$", f"/{name}")
        shared = name.startswith(".artefacts/") and path.suffix not in (".safetensors", ".lock", ".json")
        if path.is_file() and (path.suffix == ".tmp" or shared or (attempt and attempt[1] not in IN_ATTEMPT)):
            found.append(name)
    return found


def records(runs: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Every recorded failure below a folder."""
    found = []
    for path in runs.rglob("failure.json"):
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            data = None
        found.append((path, data if isinstance(data, dict) else {"kind": "unreadable"}))
    return found


def check_records(outcome: Outcome, runs: Path, kinds: tuple[str, ...]) -> None:
    """Recorded failures are of these kinds."""
    for path, data in records(runs):
        seen = f"{data.get('kind')}: {data.get('class')}: {data.get('message')} in {path}"
        outcome.check(data.get("kind") in kinds, "kind", f"expected {' or '.join(kinds) or 'no record'}, got {seen}")
