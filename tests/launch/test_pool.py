"""The local pool, from outside: real processes, real crashes, real kills."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import ptqbench
import warm
from ptqbench.cell.spec import ModelSpec
from ptqbench.launch.local import Pool, Task, Worker
from ptqbench.runs.folder import PENDING, RunFolder
from small_sweep import wait_for

KILLS = int(os.environ.get("PTQBENCH_TEST_KILLS", "3"))
CELLS = int(os.environ.get("PTQBENCH_TEST_CELLS", "12"))

# Injected into the server that workers are forked from by Python's own start-up hook: the product has no switch for failing.
HOOK = """
import os, sys
if "forkserver" in " ".join(sys.orig_argv):
    import ptqbench.run
    run_folder = ptqbench.run.run_folder
    def failing(folder):
        if os.environ["TEST_CRASH"] in folder.path.name:
            import signal
            os.kill(os.getpid(), signal.SIGSEGV)
        if os.environ["TEST_HUNGRY"] in folder.path.name:
            import torch
            import ptqbench.engine.pipeline
            ptqbench.engine.pipeline.quantize = lambda *a, **k: torch.empty(1 << 55)
        return run_folder(folder)
    ptqbench.run.run_folder = failing
"""


def test_one_process_per_cell_and_a_second_call_does_nothing(small):
    first = small.command("sweep", small.sweep, "launcher=local", "launcher.workers=2")
    assert first.returncode == 0, first.stderr
    assert "4 of 4 cells to run, on this machine" in first.stdout
    assert "4 done" in first.stdout
    pids = {json.loads((path / "attempts/001/meta.json").read_text())["pid"] for path in small.runs}
    assert len(pids) == 4
    written = {path: (path / "result.json").stat().st_mtime_ns for path in small.runs}
    second = small.command("sweep", small.sweep, "launcher=local")
    assert second.returncode == 0
    assert "4 already done" in second.stdout
    assert written == {path: (path / "result.json").stat().st_mtime_ns for path in small.runs}
    assert all(len(list((path / "attempts").iterdir())) == 1 for path in small.runs)


def test_pool_and_inline_give_the_same_results(small):
    assert small.command("sweep", small.sweep, "launcher=local").returncode == 0
    pooled = small.results()
    inline = small.command("sweep", small.sweep, "launcher=inline", "--runs-dir", "inline")
    assert inline.returncode == 0, inline.stderr
    assert small.results_of("inline") == pooled


def test_bad_cells_stop_no_other_and_are_listed_with_class_reason_and_log(small, tmp_path):
    small.grids(
        "{method: [rtn], bitwidth: [w4, w3, w2]}",
        "{method: [rtn], bitwidth: [w8], model: [local, no-such-model]}",
        f"{{method: [gptq], bitwidth: [w4], model.path: ['{small.damaged_model()}']}}",
    )
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    source = str(Path(ptqbench.__file__).parents[1])
    environment = {
        "PYTHONPATH": f"{hook}:{source}",
        "TEST_CRASH": "-rtn-w3-",
        "TEST_HUNGRY": "-rtn-w2-",
        "COLUMNS": "400",
    }
    command = [sys.executable, "-m", "ptqbench", "sweep", small.sweep, "launcher=local", "launcher.workers=2"]
    done = subprocess.run(command, cwd=small.folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 failed, 2 done" in done.stdout or "2 done, 4 failed" in done.stdout, done.stdout
    listed = done.stdout.split("failed cells")[1]
    for cell, kind in (
        ("rtn w3", "SIGSEGV"),
        ("rtn w2", "host_memory"),
        ("gptq w4", "numerical"),
        ("no-such-model", "config"),
    ):
        (row,) = [line for line in listed.splitlines() if cell in line]
        assert kind in row, row
    assert listed.count("/attempts/") == 2, "the log of what failed inside an attempt"
    assert listed.count("/logs/") == 1, "the output of what was killed"
    failures = [json.loads(path.read_text()) for path in (small.folder / "runs").glob("*/failure.json")]
    assert sorted(failure["kind"] for failure in failures) == ["host_memory", "killed", "numerical"]
    status = small.command("status")
    assert "3 failed" in status.stdout
    again = small.command("retry", small.sweep, "launcher=local")  # without the hook: two of them heal
    assert again.returncode == 1
    assert "2 done" in again.stdout


def children(process):
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers_of(process):
    """Grandchildren: the launcher's only children are the server that forks workers and its helper."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [child for child in children(process) if child.ppid() != process.pid]
    return []


def test_a_killed_launcher_leaves_no_worker_behind(small):
    process = small.start("sweep", small.sweep, "launcher=local", "launcher.workers=2")
    workers = wait_for(lambda: found if len(found := workers_of(process)) == 2 else None, step=0.05)
    process.kill()
    process.communicate()
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left


def test_a_killed_worker_is_started_again(small):
    process = small.start("sweep", small.sweep, "launcher=local", "launcher.workers=1")
    wait_for(small.heartbeats, step=0.02)
    (worker,) = workers_of(process)
    worker.kill()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "ended by SIGKILL" in out
    assert "4 done" in out
    assert max(len(list((path / "attempts").iterdir())) for path in small.runs) == 2


def strike(process, dice):
    """Kill the launcher or one of its processes at some moment; whether there was one to kill."""
    if dice.random() < 0.7:  # while cells are worked on, which is a small part of the time
        wait_for(lambda: workers_of(process) or process.poll() is not None, step=0.01)
        time.sleep(dice.uniform(0.0, 1.5))
    else:
        time.sleep(dice.uniform(0.1, 4.0))
    workers = workers_of(process)
    likely = workers if workers and dice.random() < 0.7 else [process, *children(process)]
    if process.poll() is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(dice.choice(likely).pid, signal.SIGKILL)
        return True
    return False


@pytest.mark.slow
def test_killed_at_random_points_the_same_command_finishes_with_the_same_results(small):
    """The launcher or one of its processes is killed, again and again; nothing finished is done twice."""
    dice = random.Random(0)
    small.outlive(KILLS, 2, lambda process: strike(process, dice), "launcher=local", "launcher.workers=2")


def test_two_commands_on_one_cell_one_runs_and_the_other_says_so(small):
    both = [small.start("+method=gptq", "bitwidth=w3", *small.words()) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    (folder,) = small.runs
    assert len(list((folder / "attempts").iterdir())) == 1
    said = sorted("being worked on by process" in out for out, _ in outputs)
    assert said == [False, True] or all("perplexity" in out for out, _ in outputs), outputs


def test_four_pools_on_the_same_sweep_do_every_cell_once(small):
    small.seeds(CELLS // 4)
    pools = [small.start("sweep", small.sweep, "launcher=local", "launcher.workers=1") for _ in range(4)]
    outputs = [pool.communicate(timeout=900) for pool in pools]
    assert [pool.returncode for pool in pools] == [0] * 4, outputs
    assert len(small.results()) == CELLS // 4 * 4
    assert all(len(list((path / "attempts").iterdir())) == 1 for path in small.runs)


def in_background(small, *words):
    """Start a command as a shell does with ``&``: SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return small.start(*words)
    finally:
        signal.signal(signal.SIGINT, before)


def test_cancel_stops_workers_even_in_the_background_and_the_sweep_goes_on_later(small):
    long = "{method: [gptq], bitwidth: [w4], calibration.n_samples: [1000]}"  # longer than the second command takes to start
    small.grids(long, "{method: [rtn], bitwidth: [w4]}")
    process = in_background(small, "sweep", small.sweep, "launcher=local", "launcher.workers=1")
    wait_for(small.heartbeats, step=0.02)
    stop = small.command("cancel", small.sweep)
    assert stop.returncode == 0, stop.stderr
    assert "asked 1 cell to stop" in stop.stdout
    out, err = process.communicate(timeout=300)
    assert "1 cancelled" in out, out + err
    again = small.command("sweep", small.sweep, "launcher=local")
    assert again.returncode == 0, again.stderr
    assert len(small.results()) == 2


def test_editing_a_file_after_the_folder_was_made_changes_nothing(small, tmp_path):
    from ptqbench.runs.folder import RunFolder

    small.grids("{method: [gptq], bitwidth: [w4]}")
    assert small.command("sweep", small.sweep, "launcher=local").returncode == 0
    (path,) = small.runs
    before = json.loads((path / "result.json").read_text())
    (path / "result.json").unlink()
    small.grids("{method: [rtn], bitwidth: [w2]}")
    assert warm.run(path, module="ptqbench.run", cwd=small.folder).returncode == 0
    after = json.loads((path / "result.json").read_text())
    assert RunFolder(path).read_spec().method.name == "gptq"
    assert {k: before[k] for k in ("run_id", "metrics", "bits")} == {k: after[k] for k in ("run_id", "metrics", "bits")}


class Ended:
    """A worker that has ended."""

    def __init__(self, status):
        self.status = lambda: status


@pytest.mark.parametrize(
    ("status", "said", "kind"),
    [
        (1, "ptqbench: Input/output error", "disk"),
        (2, "noise\nptqbench: no such folder", "config"),
        (1, "libgomp: Out of memory", None),
        (-9, "ptqbench: busy", None),
    ],
)
def test_a_worker_that_said_why_it_could_not_begin_did_not_die(tmp_path, status, said, kind):
    folder, log, failed = RunFolder(tmp_path / "cell-0123456789ab"), tmp_path / "log", []
    folder.path.mkdir()
    log.write_text(said + "\n")
    summary = SimpleNamespace(failed=lambda *seen: failed.append(seen[1:3]), say=lambda *_: None)
    pool = Pool([], [], summary)
    pool._ended(Worker(Task(SimpleNamespace(name="cell"), folder), None, Ended(status), log))
    assert failed == ([] if kind is None else [(kind, said.rpartition("ptqbench: ")[2])])
    assert len(pool._waiting) == (kind is None)


@pytest.mark.parametrize(
    ("needed", "workers", "expected"),
    [([1, 1], None, ["0", "1", "2", "3", "4"]), ([1, 2], None, ["0,1", "2,3"]), ([3, 0], 2, ["0,1,2"]), ([9], None, ["0,1,2,3,4"])],
)  # fmt: skip
def test_a_worker_gets_as_many_gpus_as_the_largest_cell_needs(monkeypatch, needed, workers, expected):
    from ptqbench.launch.local import slots
    from ptqbench.sweeps.cells import Cell
    from ptqbench.sweeps.plan import Row
    from ptqbench.sweeps.resources import Needs

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    rows = [Row(Cell("x", None), PENDING, Needs(gpus, 80.0, 16.0, 8, 30, 1.0)) for gpus in needed]
    assert [slot.gpu for slot in slots(rows, workers)] == expected


@pytest.mark.parametrize(("width", "asked", "workers"), [(64, None, 8), (1024, None, 2), (1024, 1, 8), (64, 3, 2)])
def test_workers_on_cpus_get_the_cores_that_their_models_keep_busy(checkpoint, monkeypatch, width, asked, workers):
    from ptqbench.launch import local
    from ptqbench.runs import provenance
    from ptqbench.sweeps.cells import Cell
    from ptqbench.sweeps.plan import Row
    from ptqbench.sweeps.resources import Needs

    folder = checkpoint("llama", hidden_size=width, num_attention_heads=4, num_key_value_heads=4)
    spec = SimpleNamespace(model=ModelSpec("m", path=str(folder)), execution=SimpleNamespace(threads=asked))
    monkeypatch.setattr(provenance, "cores", lambda: 8)
    monkeypatch.setattr(local, "_memory_gib", lambda: 1000.0)
    rows = [Row(Cell("x", spec), PENDING, Needs(0, 0.0, 1.0, 1, 30, 1.0)) for _ in range(20)]
    slots = local.slots(rows, None)
    assert [slot.threads for slot in slots] == [8 // workers] * workers
