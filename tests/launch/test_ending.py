"""The last word of a sweep: said once, by whoever sees the end first."""

import threading
from collections import Counter

import pytest

from ptqbench.errors import ConfigError
from ptqbench.launch.dispatch import launch
from ptqbench.launch.ending import Sweep, conclude, status_of
from ptqbench.runs.folder import CANCELLED, DONE, FAILED, RUNNING, create, write_json
from ptqbench.runs.liveness import me
from ptqbench.sweeps.cells import INVALID, SKIPPED
from ptqbench.sweeps.compose import compose_cell, resolved


@pytest.fixture
def cells(tmp_path):
    words = ["+method=rtn", f"execution.runs_dir={tmp_path}/runs", "launcher=local"]
    found = resolved([(bits, [*words, f"bitwidth={bits}"]) for bits in ("w4", "w3", "w2", "fp16", "nosuch")])
    for cell in found[:3]:
        create(cell.spec)
    return found


def finish(cell):
    write_json(cell.folder.result_path, {"run_id": cell.folder.run_id})


def fail(cell):
    write_json(cell.folder.failure_path, {"kind": "code", "message": "x"})


def told(cells, tmp_path, more=""):
    """A sweep whose command notes what it learns, and the notes so far."""
    notes = tmp_path / "notes"
    names = ["NAME", "STATUS", "CELLS", "DONE", "FAILED", "SKIPPED", "CANCELLED", "LEFT"]
    command = f"echo {' '.join(f'$PTQBENCH_SWEEP_{name}' for name in names)} >> {notes}{more}"
    sweep = Sweep.of("mine", cells, compose_cell(["+method=rtn", "launcher=local"]).launcher)
    return Sweep(sweep.name, sweep.folders, sweep.skipped, sweep.invalid, command), notes


def test_the_command_learns_how_the_sweep_ended(cells, tmp_path):
    sweep, notes = told(cells, tmp_path)
    finish(cells[0])
    fail(cells[1])
    write_json(cells[2].folder.cancel_path, {})
    counts = conclude(sweep, pytest.fail)
    assert counts == {DONE: 1, FAILED: 1, CANCELLED: 1, SKIPPED: 1, INVALID: 1}
    assert notes.read_text() == "mine 1 5 1 2 1 1 0\n"


def test_it_is_run_once_for_each_end(cells, tmp_path):
    sweep, notes = told(cells, tmp_path, "; sleep 0.2")
    for cell in cells[:3]:
        finish(cell)
    at_once = [threading.Thread(target=conclude, args=(sweep, pytest.fail)) for _ in range(4)]
    for thread in at_once:
        thread.start()
    for thread in at_once:
        thread.join()
    conclude(sweep, pytest.fail)
    assert notes.read_text().count("\n") == 1
    cells[0].folder.result_path.unlink()
    fail(cells[0])
    conclude(sweep, pytest.fail)
    assert notes.read_text().splitlines() == ["mine 1 5 3 1 1 0 0", "mine 1 5 2 2 1 0 0"]


def test_a_sweep_with_a_cell_that_another_process_runs_has_not_ended(cells, tmp_path):
    sweep, notes = told(cells, tmp_path)
    for cell in cells[:2]:
        finish(cell)
    write_json(cells[2].folder.lease_path, me() | {"token": "x"})
    assert conclude(sweep, pytest.fail)[RUNNING] == 1
    assert not notes.exists()
    cells[2].folder.lease_path.unlink()
    conclude(sweep, pytest.fail)
    assert notes.read_text() == "mine 1 5 2 1 1 0 1\n", "one cell is left that nobody runs"


def test_a_command_that_fails_is_one_warning(cells, tmp_path):
    sweep, warnings = told(cells, tmp_path, "; exit 3")[0], []
    conclude(sweep, warnings.append)
    assert warnings == [f"launcher.on_done ended with status 3: {sweep.on_done}"]
    (tmp_path / "runs" / ".ended").rename(tmp_path / "ended")
    (tmp_path / "runs" / ".ended").touch()
    conclude(sweep, warnings.append)
    assert "was not run" in warnings[1]
    assert "cannot be written" in warnings[1]


def test_a_launch_that_ends_says_so_and_the_next_one_does_not(tmp_path, capfd):
    words = [
        "+method=rtn", "bitwidth=w4", f"execution.runs_dir={tmp_path}/runs", "launcher=inline", "launcher.mail=me@example.org",
        "launcher.on_done='echo ended $PTQBENCH_SWEEP_NAME $PTQBENCH_SWEEP_STATUS; false'",
    ]  # fmt: skip
    (cell,) = resolved([("one", words)])
    create(cell.spec)
    finish(cell)
    for expected in (1, 0):
        assert launch([cell], name="mine") == 0
        said = capfd.readouterr().out
        assert said.count("ended mine 0\n") == expected
        assert said.count("warning launcher.on_done ended with status 1") == expected
        assert "launcher.mail: only SLURM sends a mail" in said


@pytest.mark.parametrize(
    ("counts", "status"),
    [({DONE: 2, SKIPPED: 1}, 0), ({}, 0), ({DONE: 1, CANCELLED: 1}, 130), ({CANCELLED: 1, FAILED: 1}, 1), ({"pending": 1}, 1)],
)  # fmt: skip
def test_the_status_is_that_of_a_sweep(counts, status):
    assert status_of(Counter(counts)) == status


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launcher.mail=me", "launcher.mail: expected one address, such as name@example.org, got 'me'"),
        ("launcher.mail='a@b.c,d@e.f'", "launcher.mail: expected one address"),
        ('launcher.on_done="notify \'"', "launcher.on_done: expected a shell command"),
        ("launcher.on_done='  '", "launcher.on_done: expected a shell command, got nothing"),
        ("launcher.exclude=[a b]", "launcher.exclude: expected names of nodes, such as node7 or node[1-3], got 'a b'"),
        ("launcher.forgive_h=-1", "launcher.forgive_h: input should be greater than or equal to 0"),
    ],
)
def test_what_would_be_found_wrong_at_the_end_is_refused_at_the_beginning(word, said):
    with pytest.raises(ConfigError) as refused:
        compose_cell(["+method=rtn", word])
    assert said in str(refused.value)


def test_the_new_options_name_no_cell_anew():
    from ptqbench.cell.fingerprint import run_id

    words = [
        "launcher.mail=a@b.c",
        "launcher.on_done='true'",
        "launcher.exclude=[node7,'gpu[1-3,7]']",
        "launcher.forgive_h=0",
    ]
    assert run_id(compose_cell(["+method=rtn", *words])) == run_id(compose_cell(["+method=rtn"]))
