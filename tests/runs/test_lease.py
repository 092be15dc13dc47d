"""The lease of a run folder: one holder, dead holders lose it, nobody else does."""

import json
import os
import subprocess
import sys
import time

import pytest

from ptqbench.errors import CellBusy
from ptqbench.runs.folder import INTERRUPTED, PENDING, RUNNING, RunFolder, write_json
from ptqbench.runs.lease import drop_stale, lease
from ptqbench.runs.liveness import HEARTBEAT_EXPIRY_S, alive, me


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cell-0123456789ab"
    path.mkdir()
    return RunFolder(path)


def holder(**changes):
    return {"token": "other", "time": time.time(), **me(), **changes}


def test_a_held_lease_refuses_and_a_released_one_is_gone(folder):
    assert folder.state() == PENDING
    with lease(folder) as mine:
        assert folder.state() == RUNNING
        assert json.loads(folder.lease_path.read_text()) == mine.record
        with pytest.raises(CellBusy, match=f"process {os.getpid()} on "), lease(folder):
            pass
        assert folder.lease_path.exists(), "a refused process must not remove the lease of the holder"
    assert not folder.lease_path.exists()
    assert folder.state() == PENDING


def test_an_error_inside_releases(folder):
    with pytest.raises(ZeroDivisionError), lease(folder):
        1 / 0  # noqa: B018
    assert not folder.lease_path.exists()


def test_a_dead_process_of_this_machine_loses_it_at_once(folder):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    write_json(folder.lease_path, holder(pid=gone.pid))
    assert folder.state() != RUNNING
    with lease(folder):
        pass


def test_a_number_that_another_process_has_now_is_a_dead_holder(folder):
    write_json(folder.lease_path, holder(started=me()["started"] - 3600.0))
    with lease(folder):
        pass


def test_a_holder_elsewhere_lives_until_it_is_silent_for_long_enough(folder):
    far = holder(machine="elsewhere:boot:1", host="node7", pid=1, time=1000.0)
    assert alive(far, None, now=1000.0 + HEARTBEAT_EXPIRY_S - 1)
    assert not alive(far, None, now=1000.0 + HEARTBEAT_EXPIRY_S + 1)
    assert alive(far, 1050.0, now=1050.0 + HEARTBEAT_EXPIRY_S - 1), "a heartbeat counts as a sign of life"
    write_json(folder.lease_path, far | {"time": time.time()})
    with pytest.raises(CellBusy, match="on node7"), lease(folder):
        pass
    write_json(folder.lease_path, far)
    with lease(folder):
        pass


@pytest.mark.parametrize("time", [time.time() + 3600, 1e300], ids=["an hour", "for ever"])
def test_a_time_in_the_future_is_no_sign_of_life(folder, time):
    write_json(folder.lease_path, holder(machine="elsewhere:boot:1", time=time))
    write_json(folder.new_attempt() / "heartbeat.json", {"time": time})
    assert folder.state() == INTERRUPTED


def test_a_restarted_slurm_job_takes_over_from_its_previous_incarnation(monkeypatch):
    far = holder(machine="elsewhere:boot:1", slurm_job="42", slurm_restart=0)
    assert alive(far, None)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not alive(far, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert alive(far, None)
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert alive(far, None)


def test_a_lease_that_was_taken_over_is_not_removed_by_its_former_holder(folder):
    with lease(folder):
        write_json(folder.lease_path, holder(token="successor"))
    assert json.loads(folder.lease_path.read_text())["token"] == "successor"


def test_a_damaged_lease_is_no_lease(folder):
    folder.lease_path.write_text('{"token": ')
    with lease(folder):
        pass


RACE = """
import sys, time
from pathlib import Path
from ptqbench.errors import CellBusy
from ptqbench.runs.lease import lease
from ptqbench.runs.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print("ready", flush=True)
while not (folder.path / "go").exists():
    time.sleep(0.001)
try:
    with lease(folder):
        print("mine", flush=True)
        sys.stdin.read()
except CellBusy:
    print("busy", flush=True)
"""


def test_of_many_processes_at_once_one_gets_it_even_from_a_dead_holder(folder):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    write_json(folder.lease_path, holder(pid=gone.pid))
    started = [sys.executable, "-c", RACE, folder.path]
    pipe = subprocess.PIPE
    racers = [subprocess.Popen(started, stdin=pipe, stdout=pipe, text=True) for _ in range(6)]
    assert [racer.stdout.readline().strip() for racer in racers] == ["ready"] * 6
    (folder.path / "go").touch()
    words = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.communicate(timeout=120)
    assert sorted(words) == ["busy"] * 5 + ["mine"]


def test_killed_holder_reads_interrupted(folder):
    script = RACE.replace('print("mine"', 'folder.new_attempt(); print("mine"')
    (folder.path / "go").touch()
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script, folder.path], stdin=pipe, stdout=pipe, text=True)
    assert [process.stdout.readline().strip() for _ in range(2)] == ["ready", "mine"]
    assert folder.state() == RUNNING
    process.kill()
    process.wait()
    assert folder.state() == INTERRUPTED


HALF_WRITTEN = (
    ".layers.parquet.7.tmp",
    ".result.json.7.tmp",
    ".failure.json.7.tmp",
    ".bases.json.7.tmp",
    ".lease.json.7.tmp",
)


def test_what_killed_holders_left_half_written_goes_and_what_commands_write_stays(folder):
    for name in (*HALF_WRITTEN, ".spec.json.7.tmp", ".cancel.json.7.tmp"):
        (folder.path / name).touch()
    with lease(folder):
        assert {path.name for path in folder.path.glob(".*.tmp")} == {".spec.json.7.tmp", ".cancel.json.7.tmp"}


def test_what_killed_holders_left_among_the_finished_blocks_goes(folder):
    folder.state_path.mkdir()
    for name in (
        ".block_0001.safetensors.7.tmp",
        ".tmpkYo3ns",
        "block_0000.safetensors",
    ):  # the second is that of safetensors
        (folder.state_path / name).touch()
    with lease(folder):
        assert [path.name for path in folder.state_path.iterdir()] == ["block_0000.safetensors"]


def test_what_a_holder_left_beside_its_result_goes(folder):
    for name in HALF_WRITTEN:
        (folder.path / name).touch()
    write_json(folder.lease_path, holder(started=me()["started"] - 3600.0))
    drop_stale(folder)
    assert not folder.lease_path.exists()
    assert not list(folder.path.glob(".*.tmp"))


@pytest.mark.parametrize("time", [-1e300, -1.0, 1e300, 253402300800.0, True, "soon"])
def test_a_heartbeat_at_no_time_of_the_calendar_is_none(folder, time):
    write_json(folder.path / "attempts" / "001" / "heartbeat.json", {"time": time})
    assert folder.beat_time() is None
    write_json(folder.path / "attempts" / "001" / "heartbeat.json", {"time": 1.5})
    assert folder.beat_time() == 1.5
