"""Dispatch to a real SLURM: what the scheduler sees, what survives, what a user is told. No accounting anywhere."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ptqbench.runs.folder import read_json
from small_sweep import wait_for

pytestmark = pytest.mark.slurm  # every process of a parallel test run has its own cluster

SCRIPT = Path(__file__).parent / "slurm.sh"
KILLS = int(os.environ.get("PTQBENCH_TEST_KILLS", "3"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Environment variables of a client of the running cluster."""
    folder = tmp_path_factory.mktemp("cluster")
    environment = os.environ | {"CLUSTER_DIR": str(folder)}
    if shutil.which("sbatch") is None or shutil.which("slurmctld") is None or shutil.which("munged") is None:
        pytest.skip("no SLURM on this machine: run tests/cluster/slurm.sh install (as root, on Debian or Ubuntu)")
    up = subprocess.run([SCRIPT, "up"], env=environment, capture_output=True, text=True, timeout=300)
    if up.returncode == 3:
        pytest.skip(f"SLURM cannot be started here: {up.stderr.strip()}")
    assert up.returncode == 0, up.stderr
    yield {"SLURM_CONF": str(folder / "slurm.conf"), "CLUSTER_DIR": str(folder)}
    subprocess.run([SCRIPT, "down"], env=environment, check=True, timeout=120)


@pytest.fixture
def slurm(cluster, small, monkeypatch):
    """A small sweep whose commands meet the cluster; the queue is empty before and after."""
    for key, value in cluster.items():
        monkeypatch.setenv(key, value)
    yield small
    subprocess.run(["scancel", "--me"], check=False)
    wait_for(lambda: not queue())


def queue(*options):
    form = "--format=%i|%T|%P|%l|%C|%m|%b|%r|%E|%j"
    done = subprocess.run(["squeue", "--me", "-h", "-r", form, *options], capture_output=True, text=True, check=True)
    keys = ("id", "state", "partition", "limit", "cpus", "memory", "gres", "reason", "dependency", "name")
    return [dict(zip(keys, line.split("|"), strict=True)) for line in done.stdout.splitlines()]


def attempts(path):
    return len(list((path / "attempts").iterdir()))


def test_one_array_per_resource_group_with_the_requests_seen_by_the_scheduler(slurm):
    slurm.grids(
        "{method: [rtn], bitwidth: [w8, w4, w3]}",
        "{method: [gptq], bitwidth: [w4, w3], resources.gpus: [2], resources.time_min: [45]}",
    )
    submit = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true"]
    hold = subprocess.run(submit, capture_output=True, text=True, check=True)
    waits_for = f"+launcher.sbatch.dependency=afterany:{hold.stdout.strip()}"
    done = slurm.command(
        "sweep", slurm.sweep, "launcher=slurm", waits_for, "launcher.partition=spare", "resources.cpus=3"
    )
    assert done.returncode == 0, done.stderr
    assert "5 of 5 cells to run, on SLURM (partition spare)" in done.stdout
    jobs = [job for job in queue() if job["name"].startswith("ptqbench-")]
    assert len(jobs) == 5
    assert {job["partition"] for job in jobs} == {"spare"}
    assert all(job["state"] == "PENDING" and hold.stdout.strip() in job["dependency"] for job in jobs)
    assert sorted(job["limit"] for job in jobs) == ["20:00"] * 3 + ["45:00"] * 2
    assert {job["cpus"] for job in jobs} == {"3"}
    assert {job["memory"] for job in jobs} == {"2G"}
    assert sorted(job["gres"] for job in jobs) == ["N/A"] * 3 + ["gres:gpu:2"] * 2
    assert len({job["id"].partition("_")[0] for job in jobs}) == 2, "one array per group"
    assert "5 queued" in slurm.command("status", slurm.sweep).stdout
    again = slurm.command("sweep", slurm.sweep, "launcher=slurm")
    assert "5 submitted" in again.stdout
    assert len([job for job in queue() if job["name"].startswith("ptqbench-")]) == 5, "a second call submits nothing"
    stopped = slurm.command("cancel", slurm.sweep)
    assert "5 jobs taken out of the queue" in stopped.stdout
    wait_for(lambda: not [job for job in queue() if job["name"].startswith("ptqbench-")])
    assert "5 cancelled" in slurm.command("status", slurm.sweep).stdout


def test_chunks_no_larger_than_the_cluster_allows(slurm, monkeypatch):
    from ptqbench.launch import slurm as module

    assert module._largest_array() == 1000
    monkeypatch.setattr(module, "_largest_array", lambda: 2)
    from ptqbench.launch.dispatch import launch
    from ptqbench.sweeps.compose import cells
    from ptqbench.sweeps.files import load_sweep

    monkeypatch.chdir(slurm.folder)
    slurm.grids("{method: [rtn], bitwidth: [w8, w4, w3]}")
    found = cells(load_sweep(str(slurm.sweep)), ["launcher=slurm", "+launcher.sbatch.begin=now+1hour"])
    assert launch(found) == 0
    assert sorted(int(job["id"].partition("_")[2] or 0) for job in queue()) == [0, 0, 1], (
        "an array of two, a single job"
    )


def test_a_sweep_with_a_failing_cell_is_honest_on_both_sides(slurm):
    damaged = slurm.damaged_model()
    slurm.grids("{method: [rtn], bitwidth: [w4, w3]}", f"{{method: [gptq], bitwidth: [w4], model.path: ['{damaged}']}}")
    done = slurm.command("sweep", slurm.sweep, "launcher=slurm", "--wait")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 done" in done.stdout
    assert "1 failed" in done.stdout
    (row,) = [line for line in done.stdout.split("failed cells")[1].splitlines() if "gptq" in line]
    assert "numerical: " in row
    assert "log.txt" in re.sub(r"[\s│]", "", done.stdout.split("failed cells")[1])  # a narrow terminal folds the path
    number = re.findall(r"submitted job (\d+)", done.stdout)[0]

    def ended():
        shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout
        states = sorted(re.findall(r"JobState=(\w+)", shown))
        return states if not {"RUNNING", "COMPLETING"} & set(states) else None

    assert wait_for(ended) == ["COMPLETED", "COMPLETED", "FAILED"]  # a result is there before its job has ended
    pool = slurm.command("sweep", slurm.sweep, "launcher=local", "--runs-dir", "pool")
    assert pool.returncode == 1
    slurm.grids("{method: [rtn], bitwidth: [w4, w3]}")
    for path in slurm.folder.glob("runs/*-gptq-*"):
        path.rename(slurm.folder / path.name)
    on_slurm = slurm.results()
    (slurm.folder / "runs").rename(slurm.folder / "slurm-runs")
    (slurm.folder / "pool").rename(slurm.folder / "runs")
    for path in slurm.folder.glob("runs/*-gptq-*"):
        path.rename(slurm.folder / f"pool-{path.name}")
    assert slurm.results() == on_slurm


def killed_and_submitted_again(slurm, *words):
    """Kill the worker of the one cell of a sweep while a command waits for it, to the end of that; the cell's run folder."""
    process = slurm.start("sweep", slurm.sweep, "launcher=slurm", *words, "--wait")
    wait_for(slurm.heartbeats)
    (folder,) = slurm.runs
    os.kill(json.loads((folder / "lease.json").read_text())["pid"], 9)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    assert "whose jobs ended without a result" in out
    return folder


def test_a_killed_worker_is_submitted_again_by_the_waiting_command(slurm):
    slurm.grids("{method: [gptq], bitwidth: [w4]}")
    assert attempts(killed_and_submitted_again(slurm)) == 2


def test_preemption_requeues_and_the_cell_goes_on(slurm):
    """The spare partition loses its nodes to the main one; SLURM requeues, the cell resumes behind its finished blocks."""
    slurm.grids("{method: [gptq], bitwidth: [w4]}")
    process = slurm.start(
        "sweep", slurm.sweep, "launcher=slurm", "launcher.partition=spare", "resources.cpus=16", "--wait"
    )
    wait_for(slurm.heartbeats)
    urgent = ["sbatch", "-p", "main", "-N", "2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2"]
    subprocess.run(urgent, capture_output=True, text=True, check=True)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    (folder,) = slurm.runs
    assert attempts(folder) == 2
    metas = [json.loads(path.read_text()) for path in sorted(folder.glob("attempts/*/meta.json"))]
    assert len({meta["slurm"]["SLURM_JOB_ID"] for meta in metas}) == 1, "the same job, requeued"
    assert "again" not in out


def test_the_warning_before_the_time_limit_requeues_and_the_cell_goes_on(slurm):
    slurm.grids("{method: [gptq], bitwidth: [w4]}")
    process = slurm.start("sweep", slurm.sweep, "launcher=slurm", "--wait")
    wait_for(slurm.heartbeats)
    (job,) = [job for job in queue() if job["name"].startswith("ptqbench-")]
    subprocess.run(["scancel", "--signal=USR2", job["id"]], check=True)  # what SLURM itself sends ahead of the limit
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    (folder,) = slurm.runs
    assert attempts(folder) == 2
    first = json.loads(sorted(folder.glob("attempts/*/heartbeat.json"))[0].read_text())
    assert first["ended"] == "interrupted"


def sleep_through_the_warning(folder, seconds):
    """Stop a worker until its job's warning has come, then let it handle that."""
    pid = json.loads((folder / "lease.json").read_text())["pid"]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_the_real_time_limit(slurm):
    """SLURM itself warns ahead of the limit; the cell is requeued and goes on behind its finished blocks."""
    slurm.grids("{method: [gptq], bitwidth: [w4], calibration.n_samples: [400]}")
    process = slurm.start("sweep", slurm.sweep, "launcher=slurm", "resources.time_min=2", "--wait")
    wait_for(lambda: list(slurm.folder.glob("runs/*/state/block_*.safetensors")))
    (folder,) = slurm.runs
    block = min(folder.glob("state/block_*.safetensors"))
    stamp = block.stat().st_mtime_ns
    sleep_through_the_warning(folder, 95)  # the warning comes after 90 s
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, out + err
    first = json.loads(sorted(folder.glob("attempts/*/heartbeat.json"))[0].read_text())
    assert first["ended"] == "interrupted"
    assert attempts(folder) == 2
    assert block.stat().st_mtime_ns == stamp, "a finished block is not computed again"


def test_the_controller_restarts_while_cells_wait_and_run(slurm, cluster):
    process = slurm.start("sweep", slurm.sweep, "launcher=slurm", "--wait")
    wait_for(lambda: queue())
    subprocess.run([SCRIPT, "restart"], env=os.environ | cluster, check=True, timeout=120)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "4 done" in out
    assert [attempts(path) for path in slurm.runs] == [1] * 4


def test_a_submitter_killed_during_the_submission_leaves_sound_jobs_and_submits_nothing_twice(slurm):
    slurm.grids("{method: [rtn], bitwidth: [w8, w4]}")
    programs = slurm.folder / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"; kill -9 $PPID\n')
    (programs / "sbatch").chmod(0o755)
    killed = slurm.command("sweep", slurm.sweep, "launcher=slurm", PATH=f"{programs}:{os.environ['PATH']}")
    assert killed.returncode == -9
    assert [json.loads((path / "submission.json").read_text())["job"] for path in slurm.runs] == [None, None]
    again = slurm.command("sweep", slurm.sweep, "launcher=slurm", "--wait")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 done" in again.stdout.replace("already ", "")
    assert "submitted job" not in again.stdout
    assert [attempts(path) for path in slurm.runs] == [1, 1]
    assert len({path.name for path in slurm.folder.glob("runs/.slurm/*")}) == 1


def test_settings_of_a_surrounding_job_do_not_leak(slurm):
    slurm.grids("{method: [rtn], bitwidth: [w8]}")
    done = slurm.command(
        "sweep", slurm.sweep, "launcher=slurm", "+launcher.sbatch.begin=now+1hour",
        SBATCH_PARTITION="spare", SLURM_JOB_ID="77", SBATCH_TIMELIMIT="3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (job,) = queue()
    assert (job["partition"], job["limit"]) == ("main", "20:00")


def test_what_sbatch_refuses_is_said_in_one_line(slurm):
    done = slurm.command("sweep", slurm.sweep, "launcher=slurm", "launcher.partition=nowhere")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "invalid partition" in done.stderr.lower()
    assert "4 pending" in slurm.command("status", slurm.sweep).stdout


def test_one_mail_and_one_command_when_the_sweep_has_ended(slurm, cluster):
    """The last job waits for all arrays, also for those that are submitted later."""
    told = slurm.folder / "told"
    command = f"echo $PTQBENCH_SWEEP_NAME $PTQBENCH_SWEEP_DONE $PTQBENCH_SWEEP_FAILED $PTQBENCH_SWEEP_STATUS >> {told}"
    words = [
        "launcher.mail=me@example.org",
        f"launcher.on_done='{command}'",
        "launcher.exclude=[node2]",
    ]
    slurm.grids("{method: [rtn], bitwidth: [w8]}")
    later = "+launcher.sbatch.begin=now+30"  # seconds: time to submit the other cell
    assert slurm.command("sweep", slurm.sweep, *words, later).returncode == 0
    (last,) = [job for job in queue() if job["name"] == "ptqbench sweep small"]
    slurm.grids("{method: [rtn], bitwidth: [w8]}", f"{{method: [gptq], model.path: ['{slurm.damaged_model()}']}}")
    more = slurm.command("sweep", slurm.sweep, "launcher=slurm")
    assert "1 running" in more.stdout or "2 submitted" in more.stdout, more.stdout + more.stderr
    (same,) = [job for job in queue() if job["name"] == "ptqbench sweep small"]
    assert same["id"] == last["id"]
    assert {job["state"] for job in queue()} >= {"PENDING"}
    wait_for(told.exists)
    wait_for(lambda: not queue())
    assert told.read_text() == "small 1 1 1\n"
    shown = subprocess.run(["scontrol", "show", "job", last["id"]], capture_output=True, text=True, check=True).stdout
    assert "MailUser=me@example.org MailType=END,FAIL" in shown
    mails = (Path(cluster["CLUSTER_DIR"]) / "log" / "mail").read_text().splitlines()
    assert len(mails) == 1
    assert "Name=ptqbench sweep small Failed" in mails[0]
    metas = [json.loads(path.read_text())["slurm"] for path in slurm.folder.glob("runs/*/attempts/*/meta.json")]
    assert metas[0]["SLURMD_NODENAME"] == "node1"


def test_the_last_job_looks_again_after_a_cell_was_killed(slurm, cluster):
    """A waiting command may submit the cell again: that is not the end, and no mail is sent yet."""
    log, told = Path(cluster["CLUSTER_DIR"]) / "log" / "mail", slurm.folder / "told"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    slurm.grids("{method: [gptq], bitwidth: [w4]}")
    words = [
        "launcher.mail=me@example.org",
        f"launcher.on_done='echo $PTQBENCH_SWEEP_LEFT >> {told}'",
    ]
    killed_and_submitted_again(slurm, *words)
    wait_for(lambda: not queue())
    assert "not over yet" in (slurm.folder / "runs/.slurm/end-small.log").read_text()
    assert told.read_text() == "0\n"
    mails = log.read_text().splitlines()[before:]
    assert len(mails) == 1
    assert "Ended" in mails[0]
    assert "ExitCode 0" in mails[0]


def test_a_node_that_failed_two_cells_gets_no_more_of_them(slurm):
    slurm.grids("{method: [rtn], bitwidth: [w8, w4]}", "{method: [gptq], bitwidth: [w4]}")
    plan = slurm.command("sweep", slurm.sweep, "launcher=slurm", "+launcher.sbatch.begin=now+1hour")
    assert plan.returncode == 0, plan.stderr
    slurm.command("cancel", slurm.sweep)
    wait_for(lambda: not queue())
    for folder in slurm.runs[:2]:
        attempt = folder / "attempts" / "001"
        attempt.mkdir(parents=True)
        (attempt / "meta.json").write_text('{"slurm": {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "node1"}}')
        (attempt / "heartbeat.json").write_text(f'{{"time": {time.time()}, "ended": "failed"}}')
        (attempt / "failure.json").write_text('{"kind": "code", "message": "CUDA error: uncorrectable ECC error"}')
    done = slurm.command("sweep", slurm.sweep, "launcher=slurm", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: node1: 2 cells failed there" in done.stdout
    nodes = [json.loads(path.read_text())["slurm"] for path in slurm.folder.glob("runs/*/attempts/*/meta.json")]
    assert sorted(slurm["SLURMD_NODENAME"] for slurm in nodes) == ["node1", "node1", "node2", "node2", "node2"]


def strike(process, dice, folder):
    """Kill a running task or the waiting command at some moment; whether there was one to kill."""
    time.sleep(dice.uniform(1.0, 12.0))
    leases = map(read_json, folder.glob("runs/*/lease.json"))
    victims = [lease["pid"] for lease in leases if lease] + [process.pid] * (dice.random() < 0.3)
    if not victims or process.poll() is not None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(dice.choice(victims), 9)
        return True
    return False


@pytest.mark.slow
def test_killed_at_random_points_the_same_command_finishes_with_the_same_results(slurm):
    """Running tasks or the waiting command are killed, again and again; nothing finished is done twice."""
    dice = random.Random(1)
    slurm.outlive(KILLS, 1, lambda process: strike(process, dice, slurm.folder), "launcher=slurm", "--wait")
