"""What is done with SLURM's answers, with programs that answer as SLURM can."""

import dataclasses
import json
import os
import signal
import subprocess
import threading
import time

import pytest

from ptqbench.errors import ConfigError
from ptqbench.launch import slurm
from ptqbench.launch.dispatch import cancel, launch
from ptqbench.launch.summary import Summary, print_plan
from ptqbench.runs import queue as squeue
from ptqbench.runs.folder import create
from ptqbench.runs.queue import QUEUED, Job
from ptqbench.sweeps.compose import resolved
from ptqbench.sweeps.plan import Row, plan

TAKE = """#!/bin/sh
grep -o "ptqbench-[0-9a-f]*" "$1" > "$QUEUE/name"; echo x >> "$QUEUE/calls"
cp "$1" "$QUEUE/script"
"""
SQUEUE = """#!/bin/sh
[ -s "$QUEUE/name" ] || exit 0
for task in 0 1; do echo "17_$task|$(head -1 $QUEUE/name)|PENDING|${REASON:-Priority}"; done
"""
LAST = (
    """#!/bin/sh
case "$*" in *--dependency=*) echo "$@" >> "$QUEUE/last"; cat > "$QUEUE/last_script"; echo "19;cluster"; exit;; esac
"""
    + TAKE.partition("\n")[2]
    + "echo Submitted batch job 17\n"
)
TIMED_OUT = 'echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1\n'
REFUSED = 'echo "sbatch: error: Batch job submission failed: Invalid qos specification" >&2; exit 1\n'


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Write programs that come first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("QUEUE", str(tmp_path))
    monkeypatch.setenv("SLURM_CONF", "somewhere")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for module, name, value in (
        (slurm, "LOOK_S", 0),
        (slurm, "FOLLOW_S", 0),
        (slurm, "STUCK_S", 0),
        (squeue, "PAUSE_S", 0),
    ):
        monkeypatch.setattr(module, name, value)

    def write(**scripts):
        for name, script in {"squeue": SQUEUE, "srun": "#!/bin/sh", "scontrol": "#!/bin/sh", **scripts}.items():
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)

    return write


@pytest.fixture
def cells(tmp_path):
    words = ["launcher=slurm", "resources.host_mem_gib=2", f"execution.runs_dir={tmp_path}/runs"]
    return resolved([(f"w{b}", ["+method=rtn", f"bitwidth=w{b}", *words]) for b in (3, 4)])


def taken_by_jobs(tmp_path, count):
    """Run the batch script as SLURM does, one task after another; the run folders that submitit then finds."""
    from submitit.core.utils import DelayedSubmission, JobPaths

    logs = next((tmp_path / "runs/.slurm").iterdir())
    found = []
    for task in range(count):
        array = {"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": str(task)} if count > 1 else {}
        environment = os.environ | {"SLURM_JOB_ID": str(17 + task)} | array
        subprocess.run(["bash", tmp_path / "script"], env=environment, check=True)
        path = JobPaths(logs, job_id=f"17_{task}" if array else "17").submitted_pickle
        found.append(DelayedSubmission.load(path))
    assert all(delayed._timeout_min > 0 and delayed._timeout_countdown == 50 for delayed in found)
    return [delayed.function.folder for delayed in found]


@pytest.mark.parametrize("count", [1, 2])
def test_a_submitter_killed_during_the_submission_leaves_sound_jobs_and_submits_nothing_twice(
    programs, cells, tmp_path, count
):
    programs(sbatch=TAKE + "kill -9 $PPID; sleep 0.5\n")
    if not (child := os.fork()):
        try:
            launch(cells[:count])
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert taken_by_jobs(tmp_path, count) == [str(cell.folder.path) for cell in cells[:count]]
    assert launch(cells[:count]) == 0
    assert (tmp_path / "calls").read_text().count("x") == 1


def test_a_requeued_job_keeps_its_count_of_requeues_and_can_be_requeued_again(programs, cells, tmp_path):
    programs(sbatch=TAKE + "echo Submitted batch job 17\n")
    launch(cells[:1])
    (path,) = tmp_path.glob("runs/.slurm/*/17_submitted.pkl")
    path.write_text("written when the job was put back into the queue")
    half = path.with_suffix(".pkl.save_tmp")
    half.write_text("half written by a process that was killed")
    subprocess.run(["bash", tmp_path / "script"], env=os.environ | {"SLURM_JOB_ID": "17"}, check=True)
    assert path.read_text().startswith("written when")
    assert not half.exists()


@pytest.mark.parametrize("ending", [TIMED_OUT, "kill -9 $$\n", "echo Accepted: seventeen\n"])
def test_a_job_that_slurm_took_and_reported_as_failed_is_recognised(programs, cells, tmp_path, ending, capsys):
    programs(sbatch=TAKE + ending)
    assert launch(cells) == 0
    assert "submitted job 17: 2 cells" in capsys.readouterr().out
    assert [row.state for row in plan(cells)] == [QUEUED, QUEUED]
    sent = [json.loads(cell.folder.submission_path.read_text()) for cell in cells]
    assert [record["job"] for record in sent] == ["17", "17"]
    assert taken_by_jobs(tmp_path, 2) == [str(cell.folder.path) for cell in cells]
    assert launch(cells) == 0
    assert (tmp_path / "calls").read_text().count("x") == 1


@pytest.mark.parametrize(("ending", "kept"), [(TIMED_OUT, True), (REFUSED, False)])
def test_the_token_goes_only_where_slurm_has_refused(programs, cells, ending, kept):
    programs(sbatch="#!/bin/sh\n" + ending)
    with pytest.raises(ConfigError, match="sbatch refused 2 cells"):
        launch(cells)
    assert all(cell.folder.submission_path.exists() == kept for cell in cells)


def test_where_nobody_answers_nothing_is_concluded(programs, cells):
    programs(sbatch=TAKE + TIMED_OUT, squeue="#!/bin/sh\nexit 1\n")
    with pytest.raises(ConfigError, match="it is not known whether SLURM has taken them"):
        launch(cells)
    programs(sbatch="#!/bin/sh\n" + REFUSED)
    assert [row.state for row in plan(cells)] == [QUEUED, QUEUED], "found once SLURM is back"


def test_sweeps_at_the_same_moment_submit_every_cell_once(programs, cells, tmp_path):
    programs(sbatch=TAKE + "sleep 0.3; echo Submitted batch job 17\n")
    sweeps = [threading.Thread(target=launch, args=(cells,)) for _ in range(3)]
    for sweep in sweeps:
        sweep.start()
    for sweep in sweeps:
        sweep.join()
    assert (tmp_path / "calls").read_text().count("x") == 1


@pytest.mark.parametrize(
    "reason", ["PartitionTimeLimit", "PartitionConfig", "BadConstraints", "DependencyNeverSatisfied"]
)
def test_waiting_ends_for_jobs_that_can_never_start_and_says_why(programs, cells, monkeypatch, reason, capsys):
    programs(sbatch=TAKE + "echo Submitted batch job 17\n")
    monkeypatch.setenv("REASON", reason)
    assert launch(cells, wait=True) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert f"({reason}): can never start: " in out
    assert "2 failed" in out


@pytest.mark.parametrize(
    ("reason", "stuck", "said"),
    [
        ("Resources", False, "pending (Resources)"),
        ("AssocMaxJobsLimit", False, "a limit of the account"),
        ("QOSMaxWallDurationPerJobLimit", True, "can never start"),
        ("launch failed requeued held", True, "can never start"),
    ],
)
def test_what_a_reason_means(reason, stuck, said):
    job = Job("17_0", "PENDING", reason)
    assert (job.obstacle is not None) == stuck
    assert said in job.describe()


def test_with_the_controller_down_the_disk_is_shown_at_once(programs, cells, monkeypatch, tmp_path):
    programs(sbatch=TAKE + "echo Submitted batch job 17\n")
    launch(cells)
    programs(squeue='#!/bin/sh\necho x >> "$QUEUE/asked"; echo "slurm_load_jobs error: no controller" >&2; exit 1\n')
    rows = plan(cells)
    assert {row.state for row in rows} == {"pending"}
    assert all("submitted as job 17, but squeue does not answer (slurm_load_jobs error" in row.detail for row in rows)
    assert (tmp_path / "asked").read_text().count("x") == 1, "one short try"
    with pytest.raises(ConfigError, match="squeue does not answer"):
        launch(cells)


@pytest.mark.parametrize("name", ["%u", "a%A", "a\\b", "%"])
def test_folders_that_slurm_would_rename_are_refused_before_anything_is_submitted(programs, cells, tmp_path, name):
    programs(sbatch=TAKE)
    words = ["+method=rtn", "launcher=slurm", "execution.runs_dir='" + f"{tmp_path}/{name}".replace("\\", "\\\\") + "'"]
    with pytest.raises(ConfigError, match="in the names of output files"):
        launch(resolved([("x", words)]))
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("option", ["job-name", "job_name", "array"])
def test_options_by_which_jobs_are_recognised_are_refused(programs, cells, tmp_path, option):
    programs(sbatch=TAKE)
    words = ["+method=rtn", "launcher=slurm", f"+launcher.sbatch.{option}=x", f"execution.runs_dir={tmp_path}/runs"]
    with pytest.raises(ConfigError, match=r"launcher\.sbatch: expected no job-name or array"):
        launch(resolved([("x", words)]))
    assert not (tmp_path / "calls").exists()


def test_nothing_to_cancel_is_said(cells):
    assert cancel(cells) == "no cell runs or waits"


def test_a_folder_that_cannot_be_made_fails_alone(programs, cells, tmp_path, capsys):
    programs(sbatch=TAKE + "echo Submitted batch job 17\n")
    cells[0].folder.path.parent.mkdir()
    cells[0].folder.path.write_text("a file where a run folder belongs")
    assert launch(cells) == 1
    out = capsys.readouterr().out
    assert "1 submitted, 1 failed" in out
    assert "cannot be written" in out


def test_brackets_are_no_markup_and_a_repeated_reason_is_said_once(cells, capsys):
    reason = "this [/b] reason [low] is said of many cells and is longer than a line of a table should be"
    rows = [Row(cell, "skipped", None, reason) for cell in cells]
    with Summary(rows, live=False) as summary:
        summary.failed(cells[0], "config", "[/x] [low]", "runs[/b]c")
    assert summary.finish() == 1
    assert "[/x] [low]" in capsys.readouterr().out
    print_plan(rows)
    assert capsys.readouterr().out.count(reason) == 1


def test_one_of_the_cells_that_cannot_be_written_stops_no_other_in_this_process(tmp_path, monkeypatch, capsys):
    from ptqbench import run

    cells = resolved(
        [
            (b, ["+method=rtn", f"bitwidth={b}", "launcher=inline", f"execution.runs_dir={tmp_path}"])
            for b in ("w3", "w4")
        ]
    )
    for cell in cells:
        create(cell.spec, cell.folder)
    (cells[0].folder.path / ".lock").mkdir()
    began = []
    monkeypatch.setattr(run, "_attempt", lambda spec, folder, *_: began.append(folder) or {})
    assert launch(cells) == 1
    assert began == [cells[1].folder]
    assert "cannot be written" in capsys.readouterr().out


def test_nodes_are_left_out_of_the_submission_and_named(programs, tmp_path, capsys):
    from ptqbench.runs.provenance import collect

    programs(sbatch=TAKE + "echo Submitted batch job 17\n", sinfo="#!/bin/sh\nprintf 'node1\\nnode2\\n'\n")
    words = [
        "launcher=slurm",
        "launcher.exclude=[node7]",
        "+launcher.sbatch.exclude=node8",
        f"execution.runs_dir={tmp_path}/runs",
    ]
    cells = resolved([(f"w{b}", ["+method=rtn", f"bitwidth=w{b}", *words]) for b in (3, 4)])
    for cell in cells:
        attempt = create(cell.spec).new_attempt()
        os.environ["SLURMD_NODENAME"], os.environ["SLURM_JOB_ID"] = "node2", "5"
        try:
            (attempt / "meta.json").write_text(json.dumps(collect()))
        finally:
            del os.environ["SLURMD_NODENAME"], os.environ["SLURM_JOB_ID"]
        (attempt / "heartbeat.json").write_text(json.dumps({"time": time.time(), "ended": "failed"}))
        failure = {"kind": "code", "message": "CUDA error: unspecified launch failure"}
        for place in (attempt, cell.folder.path):
            (place / "failure.json").write_text(json.dumps(failure))
    assert launch(cells, dry=True) == 0
    assert not (tmp_path / "script").exists()
    line = capsys.readouterr().out.splitlines()[-1]
    assert launch(cells) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert line in said
    assert "nodes left out: node2: 2 cells failed there" in said
    assert "CUDA error: unspecified launch failure; launcher.forgive_h=0 forgives" in said
    assert "#SBATCH --exclude=node8,node7,node2\n" in (tmp_path / "script").read_text()


def test_the_end_of_a_sweep_is_one_last_job_that_waits_for_all_others(programs, cells, tmp_path, capsys):
    """A later command that submits more moves it; where it has started meanwhile, there is another one."""
    programs(
        sbatch=LAST, scontrol='#!/bin/sh\n[ "$1" = update ] && echo "$@" >> "$QUEUE/moved"; [ -e "$QUEUE/movable" ]\n'
    )
    launcher = {
        "mail": "me@example.org",
        "on_done": "touch x",
        "partition": "gpu",
        "sbatch": {"reservation": "r", "gres": "gpu:1"},
    }
    asked = [
        dataclasses.replace(
            cell, spec=dataclasses.replace(cell.spec, launcher=dataclasses.replace(cell.spec.launcher, **launcher))
        )
        for cell in cells
    ]
    assert launch(asked, name="my sweep") == 0
    last = (tmp_path / "last").read_text()
    for part in (
        "--dependency=afterany:17", "--mail-user=me@example.org", "--mail-type=END,FAIL", "--job-name=ptqbench sweep my sweep",
        "--partition=gpu", "--reservation=r", "--requeue",
    ):  # fmt: skip
        assert part in last
    assert "gres" not in last
    record = tmp_path / "runs/.slurm/end-my_sweep.json"
    assert f"-m ptqbench.launch.ending {record}" in (tmp_path / "last_script").read_text()
    written = json.loads(record.read_text())
    assert written["job"] == "19"
    assert written["folders"] == [str(cell.folder.path) for cell in cells]
    (tmp_path / "movable").touch()
    assert launch(cells, name="my sweep") == 0, "without the words: those of the first command hold on"
    moved = (tmp_path / "moved").read_text()
    assert moved == "update JobId=19 Dependency=afterany:17 MailUser=me@example.org MailType=END,FAIL\n"
    assert json.loads(record.read_text()) == written
    (tmp_path / "movable").unlink()
    assert launch(cells, name="my sweep") == 0
    assert (tmp_path / "last").read_text().count("--dependency") == 1, "the words of a sweep that has ended are over"
    assert launch(asked, name="my sweep") == 0
    assert (tmp_path / "last").read_text().count("--dependency") == 2
    assert launch(cells, name="another") == 0
    assert (tmp_path / "last").read_text().count("--dependency") == 2, "a sweep that asked for no word"
    assert "warning" not in capsys.readouterr().out


def test_a_last_job_that_slurm_refuses_concerns_no_cell(programs, cells, tmp_path, capsys):
    programs(sbatch=LAST.replace('echo "19;cluster"; exit', 'echo "sbatch: error: no CPU jobs here" >&2; exit 1'))
    spec = dataclasses.replace(cells[0].spec, launcher=dataclasses.replace(cells[0].spec.launcher, on_done="true"))
    assert launch([dataclasses.replace(cells[0], spec=spec), cells[1]]) == 0
    said = capsys.readouterr().out
    assert "warning no word will come when the sweep ends: sbatch: error: no CPU jobs here" in said
    assert "2 submitted" in said


def test_the_last_job_says_how_the_sweep_ended(programs, cells, tmp_path, monkeypatch, capsys):
    from ptqbench.launch import ending

    programs(scontrol='#!/bin/sh\necho "$@" >> "$QUEUE/asked"; exit 1\n')
    monkeypatch.setenv("SLURM_JOB_ID", "19")
    for cell in cells:
        create(cell.spec)
    sweep = ending.Sweep.of(
        "mine", cells, dataclasses.replace(cells[0].spec.launcher, on_done=f"touch {tmp_path}/told")
    )
    record = tmp_path / "end.json"
    record.write_text(json.dumps(dataclasses.asdict(sweep) | {"job": "20"}))
    assert ending.main([str(record)]) == 0
    assert (tmp_path / "asked").read_text() == "update JobId=19 MailType=NONE\n"
    assert not (tmp_path / "told").exists(), "another job is the last one"
    record.write_text(json.dumps(dataclasses.asdict(sweep) | {"job": "19"}))
    assert ending.main([str(record)]) == 1
    assert (tmp_path / "asked").read_text().endswith("requeue 19\n"), "looks again once, since cells are left"
    assert (tmp_path / "told").exists()
    assert "2 pending" in capsys.readouterr().out
