"""Damaged run folders, places that cannot be written, and terminals that cannot show everything."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from torture.requests import Place, Request

JUNK: tuple[Any, ...] = (None, [], {}, 3, -1, "x", "[/x]", True, 1e300, -1e300, [[]], {"a": {"b": []}}, 10**30, "é∑")
FIELDS = {
    "lease.json": ("pid", "time", "created", "machine", "host", "token", "slurm_job", "slurm_restart"),
    "heartbeat.json": ("time", "stage", "done", "total", "ended"),
    "result.json": (
        "metrics",
        "bits",
        "timings",
        "averages",
        "model",
        "method",
        "flop",
        "run_id",
        "format",
        "shared",
        "n_tokens",
    ),
    "spec.json": ("model", "method", "bitwidth", "seed", "evaluation", "calibration", "execution", "nosuch"),
    "submission.json": ("job", "task", "time", "token", "array", "cluster"),
    "failure.json": ("kind", "message", "class", "attempt", "stage", "time", "traceback", "log_tail"),
    "cancel.json": ("time", "by"),
    "meta.json": ("host", "packages", "git", "gpu", "time", "slurm"),
    "synced.json": ("result", "time", "url"),
}
WHOLE = {
    "empty": b"", "cut off": b'{"time": 17', "binary": bytes(range(256)), "nested deep": b"[" * 2000 + b"]" * 2000,
    "not UTF-8": b'{"a": "\xff"}',
    "nested deep in a field": b'{"time": ' + b"[" * 1500 + b"]" * 1500 + b', "pid": 1}', "zeros": b"\0" * 64,
    "NaN": b'{"time": NaN, "pid": NaN}',
    "Infinity": b'{"time": Infinity, "pid": 1e400}', "huge number": b'{"time": ' + b"9" * 5000 + b', "pid": ' + b"9" * 5000 + b"}",
}  # fmt: skip
WHOLE_VALUES = (None, [], {}, 3, "x", True, [1, 2], {"a": 1})
READERS = (["status"], ["status", "--all"], ["table"], ["report"], ["table", "--check"], ["gc", "--budget-gib", "1"])
SWEEPERS = (["plan"], ["sweep"], ["retry"], ["cancel"], ["status"], ["table"], ["report"])


def _begin(folder: Path, name: str) -> tuple[Path, Any]:
    """Path of a record and what it sensibly holds."""
    now = time.time()
    path = folder / "attempts" / "001" / name if name in ("heartbeat.json", "meta.json") else folder / name
    if path.exists():
        return path, json.loads(path.read_text())
    return path, {
        "lease.json": _lease(now),
        "submission.json": {"job": "1_0", "task": 0, "time": now, "token": "t"},
        "failure.json": {"kind": "disk", "message": "m", "class": "OSError", "attempt": "001", "stage": "load", "time": now,
        "traceback": "", "log_tail": []},
        "cancel.json": {"time": now, "by": {}},
        "synced.json": {"result": "x", "time": now},
    }.get(name, {})  # fmt: skip


def _lease(now: float) -> dict[str, Any]:
    """The lease of a process of this machine that has ended."""
    from ptqbench.runs.liveness import me

    ended = subprocess.Popen(["true"])
    ended.wait()
    return {"token": "t", "time": now, **me(), "pid": ended.pid}


def record(draw: Random, place: Place) -> Request:
    """JSON that is damaged, or that is JSON and nonsense, in one run folder of three: the others must still be shown."""
    runs = place.runs
    method = draw.choice(("rtn", "gptq"))
    (folder,) = runs.glob(f"*-{method}-*")
    name = draw.choice(list(FIELDS))
    path, data = _begin(folder, name)
    if draw.random() < 0.35:
        title = draw.choice(list(WHOLE))
        content = WHOLE[title]
    elif draw.random() < 0.3 or not isinstance(data, dict):
        new = draw.choice(WHOLE_VALUES)
        title, content = f"is {json.dumps(new)}", json.dumps(new).encode()
    else:
        field, new = draw.choice(FIELDS[name]), draw.choice(JUNK)
        gone = draw.random() < 0.2
        data = {key: value for key, value in data.items() if key != field} if gone else data | {field: new}
        title, content = f"{field} {'removed' if gone else '= ' + json.dumps(new)}", json.dumps(data).encode()
    path.write_bytes(content)
    if name == "heartbeat.json" and method == "gptq":  # looked at where a lease is held elsewhere
        (folder / "lease.json").write_text(
            json.dumps(_lease(time.time() - 60) | {"machine": "elsewhere", "host": "elsewhere"})
        )
    if draw.random() < 0.6:
        words = [*draw.choice(READERS), "--runs-dir", str(runs)]
        shows = words[0] in ("status", "table") and words[1:2] != ["--check"]
    else:
        given = "[" + ", ".join(f"'{word}'" for word in place.cell()[1:-1] if "bitwidth" not in word) + "]"
        cal = "calibration.n_samples: 8, calibration.seq_len: 32"
        sweep = place.write(
            "three.yaml",
            f"name: three\ncommon: {given}\ngrids:\n"
            f"  - {{method: fp16, bitwidth: fp16}}\n  - {{method: [rtn, gptq], bitwidth: w3, {cal}}}\n",
        )
        chosen = draw.choice(
            SWEEPERS if name != "lease.json" else [way for way in SWEEPERS if way != ["cancel"]]
        )  # it may signal
        words, shows = [*chosen, str(sweep), "--runs-dir", str(runs)], False
        if words[0] in ("sweep", "retry"):
            words.append("launcher=inline")
    status = (0, 1) if words[0] in ("sweep", "retry") else (0,)
    if words[0] == "report":
        words += ["--output", str(place.here / "page.html")]
    wanted = ("fp16", "1 done", "2 done") if shows else ()
    return Request(f"{name} of {method}: {title}", words, status=status, says=wanted, one_line=False)


def output(draw: Random, place: Place) -> Request:
    """Where a table, a page or a picture is written."""
    runs, here = place.runs, place.here
    command, option, suffix = draw.choice(
        (
            ("table", "--output", draw.choice((".md", ".tex", ".html", ".csv"))),
            ("report", "--output", ".html"),
            ("table", "--picture", draw.choice((".png", ".pdf"))),
        )
    )

    def request(title: str, target: object, status: tuple[int, ...], after: Callable[[], str] = lambda: "") -> Request:
        words = [command, "--runs-dir", str(runs), option, str(target)]
        return Request(f"{command} {option}: {title}", words, status=status, after=after)

    title = draw.choice(
        (
            "folder",
            "below a file",
            "empty",
            "too long",
            "device",
            "full device",
            "link",
            "link to nothing",
            "new folder",
            "unwritable",
            "unknown suffix",
            "pipe",
            "plain",
        )
    )
    target = here / f"out{suffix}"
    if title == "folder":
        target.mkdir()
        return request(title, target, (1, 2))
    if title == "below a file":
        return request(title, place.write("file", "x") / f"a{suffix}", (1, 2))
    if title == "empty":
        return request(title, "", (2,))
    if title == "too long":
        return request(title, here / ("x" * 300 + suffix), (1, 2))
    if title in ("device", "full device"):
        return _device(title, target, request)
    if title in ("link", "link to nothing"):
        real = here / f"real{suffix}"
        if title == "link":
            real.write_text("old")
        target.symlink_to(real)
        kept = lambda: (
            ""
            if target.is_symlink() and real.is_file() and real.stat().st_size > 3
            else "the link was replaced, not followed"
        )
        return request(title, target, (0,), kept)
    if title == "unknown suffix":
        strange = here / f"x.{draw.choice(('docx', 'nosuch', 'p'))}"
        return request(title, strange, (2,) if command == "table" else (0, 2))
    if title == "pipe" and command == "table":
        os.mkfifo(target)
        made = request(title, target, (0, 1, 2), lambda: "" if target.is_fifo() else "the pipe was replaced by a file")
        made.before = lambda: [None, os.open(target, os.O_RDWR)][0]  # somebody reads it
        return made
    if title == "unwritable":
        made = request(title, _unwritable(here / "closed") / f"a{suffix}", (1, 2))
        made.before = _nobody
        return made
    target = here / "new" / "deep" / f"a{suffix}" if title == "new folder" else target
    return request(title, target, (0, 2) if title == "new folder" else (0,))


def _device(title: str, target: Path, request: Callable[..., Request]) -> Request:
    """A copy of the null or the full device, so that nothing of the machine can be replaced."""
    if os.geteuid() != 0:
        return request("a folder", target.parent, (1, 2))
    os.mknod(target, 0o666 | 0o020000, os.makedev(1, 3 if title == "device" else 7))
    kept = lambda: "" if target.is_char_device() else "the device was replaced by a file"
    return request(title, target, (0, 1, 2) if title == "device" else (1, 2), kept)


def _unwritable(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    path.chmod(0o555)
    return path


def _nobody() -> None:
    """Give up what lets root write everywhere: what is left is a plain user who owns the same files."""
    if os.geteuid() == 0:
        head, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(head, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")


def terminal(draw: Random, place: Place) -> Request:
    """Output that cannot show every letter, is full, is closed, or is nowhere to be read."""
    runs = place.runs
    odd = draw.choice(("tiny", "Größe", "量子化", "a[/b]c", "\U0001f600", "[low]"))
    moved = place.here / odd
    moved.parent.mkdir(exist_ok=True)
    runs.rename(moved)
    words = draw.choice(
        (
            ["status", "--all"],
            ["status"],
            ["table"],
            ["table", "--format", "md"],
            ["report", "--output", "x.html"],
            ["doctor"],
            ["--help"],
            ["cell"],
            ["plan"],
        )
    )
    if words == ["cell"]:
        words = [*place.cell(method="fp16")[:-1], f"execution.runs_dir='{moved}'"]
    elif words == ["plan"]:
        words = [
            "plan",
            str(
                place.write(
                    "s.yaml",
                    f"name: s\ntitle: '{odd} ∑'\ncommon: [model=tiny]\ngrids: [{{method: rtn, bitwidth: [w3, w4]}}]\n",
                )
            ),
            "--runs-dir",
            str(moved),
        ]
    elif words != ["--help"]:
        words = [*words, "--runs-dir", str(moved)]
    kind = draw.choice(("ascii", "latin-1", "cp1252", "ascii", "latin-1", "full", "closed", "narrow"))
    status = (0,) if kind in ("ascii", "latin-1", "cp1252", "narrow") else (0, 1, 2)
    return Request(
        f"terminal {kind}, folder {odd}",
        words,
        status=status,
        before=lambda: _terminal(kind),
        one_line=kind != "closed",
    )


def _terminal(kind: str) -> None:
    if kind in ("ascii", "latin-1", "cp1252"):
        os.environ |= {"LC_ALL": "C", "PYTHONIOENCODING": kind, "PYTHONUTF8": "0"}
        sys.stdout.reconfigure(encoding=kind)
        sys.stderr.reconfigure(encoding=kind, errors="backslashreplace")
    elif kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    elif kind == "closed":
        sys.stdout = None  # what the interpreter does when it starts without one
        with contextlib.suppress(OSError):
            os.close(1)
    else:
        os.environ["COLUMNS"] = "20"


def unwritable(draw: Random, place: Place) -> Request:
    """A folder for runs, a working folder or a cache that cannot be written."""
    here = place.here
    file, closed = place.write("file", "x"), _unwritable(here / "closed")
    here.chmod(0o755)
    kind = draw.choice(
        (
            "runs below a file",
            "runs are a file",
            "runs closed",
            "runs inside closed",
            "cell folder is a file",
            "working folder closed",
            "cache is a file",
            "cache closed",
            "no home",
            "run folder closed",
        )
    )
    base = place.cell()[:-1]
    runs = {
        "runs below a file": file / "runs",
        "runs are a file": file,
        "runs closed": closed,
        "runs inside closed": closed / "new",
    }.get(kind)
    door = draw.choice(("cell", "sweep", "multirun"))
    if runs is not None:
        refused = kind.startswith(("runs are", "runs below"))
        return _by(
            door, place, kind, base, runs, (2, 1) if refused else (1, 2), _nobody if "closed" in kind else lambda: None
        )
    if kind in ("cell folder is a file", "run folder closed"):
        return _one_bad_cell(kind, place, base, door)
    sound = here / "sound"
    sound.mkdir()
    sound.chmod(0o777)
    request = _by(door, place, kind, base, sound, (0,), _nobody)
    if kind == "working folder closed":
        request.before = lambda: (os.chdir(closed), _nobody())[1]
    elif kind in ("cache is a file", "cache closed"):
        request.env = {"PTQBENCH_CACHE": str(file if kind == "cache is a file" else closed / "cache")}
        request.before = _nobody
    return request


def _by(
    door: str, place: Place, title: str, base: list[str], runs: Path, status: tuple[int, ...], before: Callable[[], Any]
) -> Request:
    if door == "cell":
        return Request(title, [*base, f"execution.runs_dir='{runs}'"], status=status, before=before)
    if door == "multirun":
        return Request(
            f"{title}, -m",
            [*base, f"execution.runs_dir='{runs}'", "launcher=inline", "-m"],
            status=status,
            before=before,
            one_line=False,
        )
    given = "[" + ", ".join(f"'{word}'" for word in base[1:] if "bitwidth" not in word) + "]"
    sweep = place.write("s.yaml", f"name: s\ncommon: {given}\ngrids: [{{method: rtn, bitwidth: [w3, w4]}}]\n")
    return Request(
        f"{title}, sweep",
        ["sweep", str(sweep), "launcher=inline", "--runs-dir", str(runs)],
        status=status,
        before=before,
        one_line=False,
    )


def _one_bad_cell(kind: str, place: Place, base: list[str], door: str) -> Request:
    """One folder of two cannot be used: the other cell is done all the same."""
    (name,) = [path.name for path in place.runs.glob("*-rtn-*")]
    runs = place.here / "mixed"
    runs.mkdir()
    runs.chmod(0o777)
    if kind == "cell folder is a file":
        (runs / name).write_text("x")
    else:
        _unwritable(runs / name)
    request = _by(
        "cell" if door == "cell" else "sweep", place, kind, base, runs, (1, 2) if door == "cell" else (1,), _nobody
    )
    if door != "cell":
        request.after = lambda: "" if list(runs.glob("*w4*/result.json")) else "the other cell was not done"
    return request
