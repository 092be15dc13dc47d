"""A job that is requeued: when going on is pointless."""

import json
import os

import pytest

from ptqbench.errors import TimeLimitTooShort
from ptqbench.launch.job import CellJob, stalled
from ptqbench.runs.folder import RunFolder

WORK_S = 100.0


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "x-0123456789ab")


def add_attempt(folder, start, lasted, job="7"):
    path = folder.new_attempt()
    for name, content, at in (
        ("meta.json", {"slurm": {"SLURM_JOB_ID": job}}, start),
        ("heartbeat.json", {"stage": "quantize", "done": 0, "total": 3, "ended": "interrupted"}, start + lasted),
    ):
        (path / name).write_text(json.dumps(content))
        os.utime(path / name, (at, at))
    (path / "log.txt").write_text("stage quantize\n")


def finish_block(folder, index, at):
    path = folder.state_path / f"block_{index:04d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (at, at))


def test_two_whole_attempts_without_a_finished_block(folder):
    assert not stalled(folder, WORK_S, "7")
    finish_block(folder, 0, 500)
    add_attempt(folder, 1000, 90)
    assert not stalled(folder, WORK_S, "7"), "one attempt is not enough"
    add_attempt(folder, 1200, 95)
    assert stalled(folder, WORK_S, "7")
    assert not stalled(folder, WORK_S, "8"), "another job, perhaps with another limit"
    assert not stalled(folder, WORK_S, None), "no job at all"
    finish_block(folder, 1, 1205)
    assert not stalled(folder, WORK_S, "7"), "a block was finished"


@pytest.mark.parametrize("lasted", [(10, 95), (95, 10)])
def test_preemption_is_no_time_limit(folder, lasted):
    add_attempt(folder, 1000, lasted[0])
    add_attempt(folder, 1200, lasted[1])
    assert not stalled(folder, WORK_S, "7")


def test_an_attempt_that_finished_a_block_counts_until_two_more_have_not(folder):
    add_attempt(folder, 1000, 95)
    finish_block(folder, 0, 1050)
    add_attempt(folder, 1200, 95)
    assert not stalled(folder, WORK_S, "7")
    add_attempt(folder, 1400, 95)
    assert stalled(folder, WORK_S, "7")


def test_the_job_fails_with_advice_instead_of_being_requeued_for_ever(folder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    add_attempt(folder, 1000, 95)
    add_attempt(folder, 1200, 95)
    with pytest.raises(TimeLimitTooShort, match=r"ran for their 1\.7 min .* raise resources\.time_min"):
        CellJob(str(folder.path), WORK_S)()
    assert folder.failure()["kind"] == "time_limit"
    assert folder.failure()["attempt"] == "002"
