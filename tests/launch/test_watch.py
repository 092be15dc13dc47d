"""``status --watch``: what a look reads, what is printed, and how it ends."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from ptqbench.launch import watch as watching
from ptqbench.launch.watch import Watcher, watch, watch_sweep
from ptqbench.runs.folder import DONE, FAILED, PENDING, RUNNING, RunFolder, create, write_json
from ptqbench.runs.liveness import me
from ptqbench.runs.queue import QUEUED, Job, Queue
from ptqbench.sweeps.compose import resolved


@pytest.fixture
def folders(tmp_path):
    found = [RunFolder(tmp_path / f"cell-{index:012x}") for index in range(4)]
    for folder in found:
        folder.path.mkdir()
        folder.spec_path.touch()
    return found


def finish(folder):
    write_json(folder.result_path, {"run_id": folder.run_id})


def fail(folder):
    write_json(folder.failure_path, {"kind": "code", "message": "it broke"})


def age(folders, seconds):
    for folder in folders:
        os.utime(folder.path, (time.time() - seconds,) * 2)


def test_a_look_reads_only_what_has_changed_or_runs(folders, monkeypatch):
    read = []
    monkeypatch.setattr(watching, "describe", lambda folder, queue: read.append(folder) or describe(folder, queue))
    from ptqbench.sweeps.plan import describe

    finish(folders[0])
    write_json(folders[1].lease_path, me())
    monkeypatch.setattr(watching, "RACY_S", 100)
    age(folders, 1000)
    watcher = Watcher()
    assert [look.state for look in watcher.look(folders)] == [DONE, RUNNING, PENDING, PENDING]
    assert read == folders
    read.clear()
    watcher.look(folders)
    assert read == [folders[1]]
    read.clear()
    fail(folders[2])
    assert [look.state for look in watcher.look(folders)] == [DONE, RUNNING, FAILED, PENDING]
    assert read == [folders[1], folders[2]]
    read.clear()
    watcher.look(folders)
    assert read == [folders[1], folders[2]], (
        "written so short a time ago that the folder's time may hide another change"
    )


def test_the_queue_is_asked_once_and_only_while_a_submitted_cell_has_not_ended(folders, monkeypatch):
    asked = []
    jobs = {("t", 0): Job("17_0", "PENDING", "Priority"), ("t", 1): Job("17_1", "PENDING", "BadConstraints")}
    monkeypatch.setattr(watching, "ask", lambda *_: asked.append(1) or Queue(jobs))
    monkeypatch.setattr(watching.shutil, "which", lambda _: "squeue")
    watcher = Watcher()
    watcher.look(folders)
    assert not asked
    for task, folder in enumerate(folders[:2]):
        write_json(folder.submission_path, {"launcher": "slurm", "token": "t", "task": task})
    looks = watcher.look(folders)
    assert [look.state for look in looks] == [QUEUED, QUEUED, PENDING, PENDING]
    assert [look.stuck for look in looks] == [False, True, False, False]
    assert len(asked) == 1
    for folder in folders[:2]:
        finish(folder)
    watcher.look(folders)
    assert len(asked) == 1


def changing(folders, *steps):
    """Finds the folders, and does one thing before each look."""
    left = iter(steps)
    return lambda: [next(left, int)(), folders][1]


def test_on_a_pipe_every_change_is_a_line(folders, capsys):
    finish(folders[3])
    find = changing(
        folders,
        int,
        lambda: write_json(folders[0].lease_path, me()),
        lambda: [finish(folder) for folder in folders[1:3]],
        lambda: [folders[0].lease_path.unlink(), fail(folders[0])],
    )
    assert watch(find, 0.01) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "1 done, 3 pending; nothing runs or waits now: start what is left with ptqbench sweep"
    names = [folder.path.name for folder in folders]
    changes = [line.partition(" ")[2] for line in said[1:-1]]
    assert changes[0] == f"{names[0]}: running: start 0/0"
    assert sorted(changes[1:3]) == [f"{names[1]}: done", f"{names[2]}: done"]
    assert changes[3:] == [f"{names[0]}: failed: code: it broke"]
    assert said[-1] == "3 done, 1 failed"


@pytest.mark.parametrize(
    ("prepare", "status"),
    [
        ([finish, finish], 0),
        ([finish, lambda folder: write_json(folder.cancel_path, {})], 130),
        ([fail, lambda folder: write_json(folder.cancel_path, {})], 1),
    ],
)
def test_where_all_cells_have_ended_it_leaves_at_once_with_the_status_of_a_sweep(folders, prepare, status):
    for folder, make in zip(folders, prepare, strict=False):
        make(folder)
    assert watch(lambda: folders[:2], 100) == status


def test_a_job_that_can_never_start_ends_the_watch(folders, monkeypatch, capsys):
    write_json(folders[0].submission_path, {"launcher": "slurm", "token": "t", "task": 0})
    monkeypatch.setattr(watching, "ask", lambda *_: Queue({("t", 0): Job("17_0", "PENDING", "BadConstraints")}))
    monkeypatch.setattr(watching.shutil, "which", lambda _: "squeue")
    monkeypatch.setattr(watching, "STUCK_S", 0.3)
    assert watch(lambda: folders[:1], 0.1) == 1


def test_cells_that_cannot_run_count(tmp_path):
    words = ["+method=rtn", f"execution.runs_dir={tmp_path}/runs"]
    cells = resolved([(bits, [*words, f"bitwidth={bits}"]) for bits in ("w4", "fp16", "nosuch")])
    finish(RunFolder(create(cells[0].spec).path))
    assert watch_sweep(cells[:2], 100) == 0, "a combination without sense is no failure"
    assert watch_sweep(cells, 100) == 1


COMMAND = [sys.executable, "-m", "ptqbench", "status", "--watch", "0.2", "--runs-dir"]


def test_ctrl_c_leaves_with_130_and_no_escape_codes_go_to_a_pipe(folders, tmp_path):
    heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    assert process.stdout.readline().startswith("4 pending")
    finish(folders[0])
    assert f"{folders[0].path.name}: done\n" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "\x1b" not in out
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_on_a_terminal_the_view_is_drawn_again_in_place_and_torch_is_not_imported(folders, tmp_path):
    write_json(folders[0].failure_path, {"kind": "code", "message": "boom"})
    for folder in folders[1:3]:
        finish(folder)
    shown, terminal = pty.openpty()
    code = "import sys; from ptqbench.cli import main; s = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(s)"
    words = [sys.executable, "-c", code, *COMMAND[3:], str(tmp_path)]
    given = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(words, stdout=terminal, stderr=subprocess.PIPE, env=given, close_fds=True)
    os.close(terminal)
    seen = b""
    while b"1 failed, 1 pending" not in seen:
        seen += os.read(shown, 4096)
    finish(folders[3])
    assert process.wait(timeout=30) == 1, process.stderr.read()
    while True:
        try:
            seen += os.read(shown, 4096)
        except OSError:
            break
    os.close(shown)
    said = seen.decode()
    assert "3 done, 1 failed" in said
    assert "code: boom" in said
    assert "\x1b[1A" in said, "the cursor goes up to draw over what is there"
    assert json.loads(folders[0].failure_path.read_text())["message"] == "boom"
