"""Composing many cells by sections is composing them one by one; a plan says what will be done and changes nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ptqbench.cell.folders import sweep_folder
from ptqbench.cell.labels import counted
from ptqbench.errors import ConfigError, DataNotHereError
from ptqbench.launch.summary import print_plan
from ptqbench.runs.folder import DONE, FAILED, PENDING, create, write_json
from ptqbench.runs.queue import QUEUED, Job, Queue
from ptqbench.sweeps import plan as planning
from ptqbench.sweeps.cells import INVALID, SKIPPED
from ptqbench.sweeps.compose import Composer, cells, compose_data, resolved
from ptqbench.sweeps.files import load_sweep
from ptqbench.sweeps.plan import groups, plan

LINES = [
    "+method=gptq model=tiny bitwidth=w3 seed=1",
    "method=gptq model=tiny bitwidth=w3 seed=2",
    "+method=coquant model=tiny",
    "+method=coquant model=tiny bitwidth=w4",
    "+method=coquant method/target=loaq method/refine=null_space model=tiny seed=3",
    "+method=coquant method/target=loaq method.transform.n_samples=16 method.solver.damping=0.05 bitwidth=w4a4kv4",
    "+method=fp16 model=tiny-outlier",
    "+method=q2n calibration=file calibration.path=x calibration.n_samples=3 evaluation=file evaluation.texts.file.path=y",
    "+method=rtn execution.threads=1 execution.runs_dir=/x launcher=local launcher.workers=3 resources.gpus=0",
    "+method=rtn +launcher.sbatch.exclude=node7 bitwidth.w_bits=5",
    "+method=rtn ~seed +seed=3 model=tiny",
]


def test_composing_by_sections_is_composing_whole():
    composer = Composer()
    for _ in range(2):  # the second time everything is remembered
        for line in LINES:
            words = line.split()
            assert composer(words) == compose_data(words), line


def test_sections_are_not_shared_between_cells():
    composer = Composer()
    first = composer(["+method=gptq"])
    first["method"]["solver"]["damping"] = 99.0
    assert composer(["+method=gptq"])["method"]["solver"]["damping"] != 99.0


@pytest.mark.parametrize("bad", ["metod=1", "method=gptqq", "method.solver.dampign=1", "bitwidth=w5", "nosuch.key=1"])
def test_errors_are_those_of_composing_whole(bad):
    words = [bad] if bad.startswith("method=") else ["+method=gptq", bad]
    with pytest.raises(ConfigError) as whole:
        compose_data(words)
    with pytest.raises(ConfigError) as by_section:
        Composer()(words)
    assert str(by_section.value) == str(whole.value)


def test_cells_whose_model_is_not_here_are_estimated_but_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = [["+method=rtn", f"model={model}", "bitwidth=w4"] for model in ("llama-3-8b", "llama-65b")]
    rows = plan(resolved([(" ".join(line), line) for line in [*words, [*words[0], "model.hub_id=some/other"]]]))
    assert [row.state for row in rows] == [INVALID] * 3
    assert not groups(rows)
    small, large = (row.needs for row in rows[:2])
    assert 0 < small.estimate_min < large.estimate_min
    print_plan(rows)
    said = " ".join(capsys.readouterr().out.split())
    for count, row in ((2, rows[0]), (1, rows[1])):
        where = f"whose models or data are not on this machine ({row.cell.draft.model.name})"
        assert f"{counted(count, 'cell')} {where}: {row.needs.describe()}" in said
    assert said.count("python -m ptqbench prefetch") == 1


def test_groups_alone_are_printed_with_each_reason_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    models = {"tiny": ("w4", "w3", "fp16"), "llama-3-8b": ("w4", "w3"), "llama-3.2-1b": ("w4",), "nosuch": ("w4", "w3")}
    lines = [
        ["+method=rtn", f"model={model}", f"bitwidth={bits}", f"execution.runs_dir={tmp_path}/runs"]
        for model, widths in models.items()
        for bits in widths
    ]
    rows = plan(resolved([(" ".join(line), line) for line in lines]))
    assert [len(found) for found in groups(rows, absent=True).values()] == [2, 1]
    print_plan(rows, every_cell=False)
    said = capsys.readouterr().out.splitlines()
    for beginning in (
        "2 invalid: meta-llama/Meta-Llama-3-8B is neither in the hub cache nor reachable",
        "1 invalid: meta-llama/Llama-3.2-1B is neither in the hub cache nor reachable",
        "2 invalid: unknown model 'nosuch'",
        "1 skipped: ",
        "2 cells: CPU",
        "2 cells whose models or data are not on this machine (llama-3-8b): 1 GPU",
        "1 cell whose models or data are not on this machine (llama-3.2-1b): 1 GPU",
        "load what is not on this machine with",
    ):
        assert sum(line.startswith(beginning) for line in said) == 1, beginning


def test_cells_whose_data_are_not_here_are_estimated_but_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    common = ["+method=rtn", "bitwidth=w4", f"execution.runs_dir={tmp_path}"]
    wanted = {
        "here": [*common, "evaluation=tiny"],
        "text": [*common, "evaluation=ptb"],
        "task": [*common, "evaluation=tiny", "evaluation.tasks=[race/acc]"],
    }
    found = resolved([*wanted.items(), ("again", wanted["task"])])
    assert [cell.state() for cell in found] == [PENDING, INVALID, INVALID, INVALID]
    rows = plan(found)
    assert [row.todo for row in rows] == [True, False, False, False]
    assert all(row.needs is not None and row.needs.estimate_min > 0 for row in rows)
    assert "ptb-text-only/ptb_text_only" in rows[1].detail
    assert "EleutherAI/race" in rows[2].detail
    print_plan(rows)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "3 cells whose models or data are not on this machine (EleutherAI/race, ptb-text-only/ptb_text_only): CPU"
        in said
    )


def test_a_branch_is_looked_up_once_for_all_cells(tmp_path, monkeypatch):
    looks = []

    def look(repository, revision):
        looks.append((repository, revision))
        raise DataNotHereError("not here", repository)

    monkeypatch.setattr("ptqbench.data.hub.commit_of", look)
    words = ["+method=rtn", "evaluation=tiny", "evaluation.tasks=[race/acc]", f"execution.runs_dir={tmp_path}"]
    found = resolved([(bits, [*words, f"bitwidth={bits}"]) for bits in ("w4", "w3", "w2")])
    assert [str(cell.problem) for cell in found] == [str(found[0].problem)] * 3
    assert looks == [("EleutherAI/race", "main")]
    monkeypatch.setattr("ptqbench.data.hub.commit_of", lambda repository, revision: looks.append(revision) or 40 * "a")
    found = resolved([(bits, [*words, f"bitwidth={bits}"]) for bits in ("w4", "w3", "w2")])
    assert {cell.spec.evaluation.task_digests["race"] for cell in found} == {f"hub:EleutherAI/race@{40 * 'a'}"}
    assert len(looks) == 2
    texts = ["calibration=file", "calibration.dataset=ptb", "calibration.split=train", "evaluation=ptb"]
    words.append("execution.beyond_context=true")
    (cell,) = resolved([("texts", [*words[:1], *texts, "bitwidth=w4", *words[-2:]])])
    assert cell.spec.calibration.digest == cell.spec.evaluation.texts["ptb"].digest
    assert looks[2:] == ["refs/convert/parquet"], "two splits, one look"


def test_a_bad_cell_stops_no_other_and_duplicates_count_once(tmp_path):
    runs = f"execution.runs_dir={tmp_path}"
    found = resolved(
        [
            ("good", ["+method=rtn", "bitwidth=w4", runs]),
            ("bad", ["+method=rtn", "model=nosuch", runs]),
            ("same", ["method=rtn", "bitwidth=w4", "seed=0", "execution.threads=1", runs]),
            ("senseless", ["+method=rtn", "bitwidth=fp16", runs]),
        ]
    )
    assert [cell.state() for cell in found] == [PENDING, INVALID, SKIPPED]
    assert "nosuch" in str(found[1].problem)
    rows = plan(found)
    assert [row.todo for row in rows] == [True, False, False]
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


def test_states_and_groups(tmp_path, monkeypatch):
    runs = [f"execution.runs_dir={tmp_path}", "resources.time_min=30"]
    found = resolved([(str(b), ["+method=rtn", f"bitwidth=w{b}", *runs]) for b in (2, 3, 4, 8)])
    for cell in found[:3]:
        create(cell.spec)
    write_json(found[0].folder.result_path, {"run_id": found[0].folder.run_id})
    write_json(found[1].folder.failure_path, {"kind": "host_memory", "message": "too little"})
    write_json(found[2].folder.submission_path, {"launcher": "slurm", "token": "t", "task": 5})
    monkeypatch.setattr(
        planning, "look", lambda folders, patient: Queue({("t", 5): Job("17_5", "PENDING", "Resources")})
    )
    rows = plan(found)
    assert [row.state for row in rows] == [DONE, FAILED, QUEUED, PENDING]
    assert [row.todo for row in rows] == [False, True, False, True]
    assert "17_5 pending (Resources)" in rows[2].detail
    assert rows[1].needs.host_mem_gib == 2 * rows[3].needs.host_mem_gib, "more memory after running out of it"
    assert sorted(len(members) for members in groups(rows).values()) == [1, 1]


def test_every_shipped_sweep_of_the_embedded_model_plans(tmp_path):
    rows = plan(cells(load_sweep("demo"), [f"execution.runs_dir={tmp_path}"]))
    assert {row.state for row in rows} == {PENDING}
    assert {row.needs.gpus for row in rows} == {0}


def test_finished_cells_correct_the_estimates_of_the_others(tmp_path, capsys):
    words = [["+method=rtn", f"bitwidth=w{b}", f"execution.runs_dir={tmp_path}"] for b in (2, 3, 4, 8)]
    before = plan(resolved([(" ".join(line), line) for line in words]))
    for row, seconds in zip(before[:3], (50.0, 90.0, 1000.0), strict=True):
        folder = create(row.cell.spec)
        timings = {"forward_s": seconds - 10, "perplexity_s": 0.0}
        peaks = {"peak_gpu_gib": None, "peak_host_gib": seconds / 100}
        write_json(folder.result_path, {"run_id": folder.run_id, "timings": timings, **peaks})
    after = plan(resolved([(" ".join(line), line) for line in words]))
    factor = 90.0 / (60 * before[1].needs.estimate_min)
    assert after[3].needs.estimate_min == pytest.approx(factor * before[3].needs.estimate_min)
    assert after[3].needs.time_min >= before[3].needs.time_min
    print_plan(after)
    said = " ".join(capsys.readouterr().out.split())
    asked = f"{before[0].needs.host_mem_gib:g}"
    assert f"x {factor:.2f}, what 3 finished cells took (median); peak memory 10 of {asked} GiB asked for" in said


README = (Path(__file__).parents[2] / "README.md").read_text()
REPRODUCED = re.findall(r"^\|[^|]*\| `(\w+)` \| (\d+) \|[^|]*\| ([\d.]+) \|", README, re.MULTILINE)


@pytest.mark.parametrize(("name", "n_cells", "hours"), REPRODUCED)
def test_the_readme_says_what_plan_estimates(name, n_cells, hours, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    rows = plan(cells(load_sweep(name), [f"execution.runs_dir={tmp_path}"]))
    assert len(rows) == int(n_cells)
    assert f"{sum(row.needs.estimate_min for row in rows) / 60:.1f}" == hours


def test_the_readme_has_every_shipped_sweep():
    assert {name for name, _, _ in REPRODUCED} == {path.stem for path in sweep_folder().glob("*.yaml")}


def test_plan_and_status_import_no_torch(tmp_path):
    script = (
        "import sys, ptqbench.cli\n"
        "for line in (['plan', 'demo'], ['status', 'demo'], ['status']):\n"
        "    assert ptqbench.cli.main(line) == 0\n"
        "print(sorted({'torch', 'transformers', 'submitit'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_literal_command_of_the_readme_says_what_it_needs(tmp_path):
    """Without the model and without network the command ends with one line that says how to get it."""
    command = [sys.executable, "-m", "ptqbench", "+method=coquant", "model=qwen2.5-7b", "-m", "launcher=local"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Qwen/Qwen2.5-7B" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_the_queue_is_asked_once_and_only_if_something_was_submitted(tmp_path, monkeypatch):
    from ptqbench.runs import queue as squeue

    calls = []
    monkeypatch.setattr(
        squeue, "_squeue", lambda *_: calls.append(1) or ["9_0|ptqbench-t|RUNNING|None", "10|other|RUNNING|None"]
    )
    monkeypatch.setattr(squeue.shutil, "which", lambda name: name)
    (cell,) = resolved([("x", ["+method=rtn", f"execution.runs_dir={tmp_path}"])])
    assert not squeue.look([cell.folder]).jobs
    assert not calls
    create(cell.spec)
    write_json(cell.folder.submission_path, {"launcher": "slurm", "token": "t", "task": 0, "time": time.time()})
    queue = squeue.look([cell.folder])
    assert len(calls) == 1
    assert queue.job_of(cell.folder).job_id == "9_0"
    sent = json.loads(cell.folder.submission_path.read_text())
    write_json(cell.folder.submission_path, sent | {"task": 1})
    assert queue.job_of(cell.folder) is None


def test_auto_is_slurm_only_where_there_is_a_cluster(tmp_path, monkeypatch):
    from ptqbench.cell.spec import LauncherSpec
    from ptqbench.launch import slurm
    from ptqbench.launch.dispatch import choose

    for name in ("SLURM_CONF", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(slurm, "CONFIG_FILES", ())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose(LauncherSpec()) == "local", "no sbatch"
    for name, status in (("sbatch", 0), ("scontrol", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    assert choose(LauncherSpec()) == "local", "programs without a cluster"
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 0\n")
    assert choose(LauncherSpec()) == "slurm"
    assert choose(LauncherSpec(kind="local")) == "local"
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("SLURM_CONF", "somewhere")
    assert choose(LauncherSpec()) == "slurm", "a cluster whose controller is down"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert choose(LauncherSpec()) == "local", "inside a job"


def test_a_dry_run_prints_the_plan_and_does_nothing(tmp_path, monkeypatch, capsys):
    from ptqbench.cli import main

    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ncommon: [model=tiny]\ngrids:\n  - {method: [rtn, gptq], bitwidth: [w4, w3]}\n"
    )
    more = ["launcher=slurm", f"launcher.on_done='touch {tmp_path}/told'"]
    for words in (["plan", *more], ["sweep", *more, "--dry-run"], ["sweep", "launcher=print"]):
        assert main([words[0], "mine.yaml", *words[1:]]) == 0
    planned, *dry = re.split(r"(?=^cell )", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    assert dry == [planned, planned]
    grid = ["+method=rtn,gptq", "model=tiny", "bitwidth=w4,w3", *more]
    assert main([*grid, "-m", "--dry-run"]) == 0
    assert capsys.readouterr().out == planned
    assert main(["method=rtn", "model=tiny", "bitwidth=w3", "--dry-run"]) == 0
    (alone,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")]
    assert alone in [line.split() for line in planned.splitlines()]
    assert main(["method=rtn", "model=nosuch", "--dry-run"]) == 2
    assert main(["retry", "mine.yaml", "--dry-run"]) == 0
    assert "no cells" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "mine.yaml"]
