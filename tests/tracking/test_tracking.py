"""Weights & Biases with the real package: its offline files decoded, a host that is not there, a host in this process."""

import dataclasses
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from wandb_file import items, records
from wandb_server import WandbServer

from conftest import random_checkpoint
from ptqbench.cell.fingerprint import identity_fields, run_id
from ptqbench.cell.spec import TrackingSpec
from ptqbench.errors import ConfigError
from ptqbench.results.tables import comparison_sheet, markdown, tidy
from ptqbench.run import run_cell
from ptqbench.runs.folder import RunFolder, all_runs, create, read_json, write_json
from ptqbench.sweeps.compose import cells, compose_cell, compose_data
from ptqbench.sweeps.files import load_sweep
from ptqbench.sweeps.resolve import validated
from ptqbench.tracking import guard
from ptqbench.tracking.projection import config_of, summary_of
from ptqbench.tracking.recorded import runs_frame, sources
from ptqbench.tracking.sync import sync

STORE = Path(__file__).parents[1] / "data_store"
KEY = "a" * 40


def small_words(root: Path) -> list[str]:
    text = root / "text.txt"
    text.write_text(
        "".join(f"The {a} cat saw {b} red birds near house {a * b}.|" for a in range(30) for b in range(30))
    )
    model = random_checkpoint(root / "model")
    return [
        "+method=gptq", "model=local", f"model.path={model}", "bitwidth=w3", "calibration=file", f"calibration.path={text}",
        "calibration.separator='|'", "calibration.portion=[0,0.5]", "calibration.n_samples=2", "calibration.seq_len=32",
        "evaluation=file", f"evaluation.texts.file.path={text}", "evaluation.texts.file.separator='|'",
        "evaluation.texts.file.portion=[0.5,1]", "evaluation.texts.file.seq_len=32", "evaluation.fidelity=true",
        "execution.threads=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A cell that was really run with ``tracking=offline``, and its result without tracking."""
    root = tmp_path_factory.mktemp("cell")
    plain = compose_cell([*small_words(root), f"execution.runs_dir={root / 'plain'}"])
    reference = run_cell(plain, create(plain))
    tracking = TrackingSpec(mode="offline", group="a group", tags=("mine",))
    execution = dataclasses.replace(plain.execution, runs_dir=str(root / "runs"))
    tracked = dataclasses.replace(plain, tracking=tracking, execution=execution)
    folder = create(tracked)
    result = run_cell(tracked, folder)
    return SimpleNamespace(spec=tracked, folder=folder, result=result, reference=reference)


@pytest.fixture
def copied(done, tmp_path):
    """The finished cell in a runs folder of the test, never projected; a function that starts it with other tracking."""
    folder = RunFolder(tmp_path / "runs" / done.folder.path.name)
    shutil.copytree(done.folder.path, folder.path, ignore=shutil.ignore_patterns("wandb*", "synced.json", "attempts"))
    execution = dataclasses.replace(done.spec.execution, runs_dir=str(tmp_path / "runs"))

    def tracked(mode="online", **changes):
        tracking = dataclasses.replace(TrackingSpec(), mode=mode, **changes)
        return dataclasses.replace(done.spec, tracking=tracking, execution=execution)

    return SimpleNamespace(folder=folder, tracked=tracked)


@pytest.fixture
def account(monkeypatch, tmp_path):
    """A function that points wandb to a host, with a key or without."""
    for name in ("HOME", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "home"))

    def point(url, key=KEY):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        if key is None:
            monkeypatch.delenv("WANDB_API_KEY", raising=False)
        else:
            monkeypatch.setenv("WANDB_API_KEY", key)

    return point


def project(spec, folder):
    """Project a cell that does nothing; returns what was recorded."""
    attempt = folder.new_attempt()
    with guard.followed(spec, folder):
        pass
    return read_json(attempt / "tracking.json")


def figures(result):
    return {key: result[key] for key in ("format", "run_id", "model", "method", "bitwidth", "seed", "metrics", "bits")}


def test_tracking_changes_neither_result_nor_identity(done):
    assert figures(done.result) == figures(done.reference)
    for mode in ("none", "offline", "online"):
        tracking = TrackingSpec(mode=mode, project="elsewhere", group="g", tags=("t",), folder="f")
        assert run_id(dataclasses.replace(done.spec, tracking=tracking)) == done.folder.run_id


def test_offline_file_holds_the_whole_cell(done):
    (path,) = done.folder.path.glob("wandb/offline-run-*/*.wandb")
    found = records(path)
    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.run_group, run.job_type, run.project) == (done.folder.run_id, "a group", "gptq", "ptqbench")
    assert list(run.tags) == ["local path=model", "w3", "mine"]
    assert run.display_name.startswith("local_path_model-gptq-w3-")
    config = items(run.config.update)
    assert config["method"]["solver"] == json.loads(json.dumps(identity_fields(done.spec.method.solver)))
    assert config["bitwidth"]["name"] == "w3"
    assert "execution" not in config

    layers = pd.read_parquet(done.folder.layers_path)
    history = [items(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    blocks = [row for row in history if "layers/path" not in row]
    assert [(row["_step"], row["block"]) for row in blocks] == [(0, 0), (1, 1)]
    for row in blocks:
        ours = layers[layers["block"] == row["block"]].set_index("linear")["relative_output_error"]
        assert row["relative_output_error/q_proj"] == pytest.approx(ours["self_attn.q_proj"], rel=1e-12)
        assert row["relative_output_error/mean"] == pytest.approx(ours.mean(), rel=1e-12)
    (table,) = (row["layers/path"] for row in history if "layers/path" in row)
    stored = json.loads((path.parent / "files" / table).read_text())
    assert stored["columns"] == list(layers.columns)
    assert len(stored["data"]) == 14

    summary = {}
    for record in found:
        summary |= items(record.summary.update)
    for name in ("file/perplexity", "file/kl", "file/top1"):
        assert summary[name] == done.result["metrics"][name]["value"]
        assert summary[f"{name}_stderr"] == done.result["metrics"][name]["stderr"]
    assert json.loads(summary["result"])["metrics"]["file/kl"]["noise"] >= 0
    assert summary["spared_s"] == done.result["shared"]["spared_s"]
    assert summary["effective_w_bits"] == done.result["bits"]["effective_w_bits"]
    assert json.loads(summary["result"]) == done.folder.result()
    artifacts = {record.artifact.name: record.artifact for record in found if record.artifact.name}
    artifact = artifacts[f"cell-{done.folder.run_id}"]
    assert artifact.type == "result"
    assert {entry.path for entry in artifact.manifest.contents} == {"result.json", "spec.json", "layers.parquet"}
    assert [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"] == [0]


def test_refused_connection_costs_no_cell_and_is_paid_once(tmp_path, done, account, monkeypatch, capfd):
    monkeypatch.setattr(guard, "ANSWER_S", 2.0)
    monkeypatch.setattr(guard, "SLOW_S", 1.0)
    account("http://127.0.0.1:9")
    spec = dataclasses.replace(
        done.spec,
        execution=dataclasses.replace(done.spec.execution, runs_dir=str(tmp_path / "runs")),
        tracking=TrackingSpec(mode="online"),
    )
    folder = create(spec)
    start = time.monotonic()
    result = run_cell(spec, folder)
    assert time.monotonic() - start < guard.WAIT_S
    assert figures(result) == figures(done.reference)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "not uploaded: " in said
    assert "connection refused" in said
    assert f"python -m ptqbench sync --runs-dir {tmp_path / 'runs'}" in said
    assert "connection refused" in read_json(folder.attempts[-1] / "tracking.json")["reason"]
    assert not folder.synced_path.exists()

    monkeypatch.setattr(guard, "Helper", None)  # nothing is started while the breaker is open
    assert "not tried" in project(spec, folder)["reason"]
    monkeypatch.setattr(guard, "BREAKER_S", 0.0)
    assert "cannot start" in project(spec, folder)["reason"]


def test_no_key_and_no_place_to_write_are_said_plainly(copied, account, tmp_path):
    account("http://127.0.0.1:9", key=None)
    assert "API key" in project(copied.tracked(), copied.folder)["reason"]
    assert not (tmp_path / "runs" / guard.BREAKER).exists()  # that took no time, so the next cell may try
    (tmp_path / "file").write_text("")
    outcome = project(copied.tracked("offline", folder=str(tmp_path / "file")), copied.folder)
    assert "cannot write W&B's files to" in outcome["reason"]
    assert not copied.folder.synced_path.exists()


def test_host_that_never_answers_is_left_after_a_bounded_time(copied, account, monkeypatch):
    monkeypatch.setattr(guard, "WAIT_S", 2.0)
    monkeypatch.setattr(guard, "SLOW_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        account(f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        outcome = project(copied.tracked(), copied.folder)
    assert time.monotonic() - start < 10
    assert outcome["reason"] == "W&B did not take it within 2 s"
    assert (copied.folder.path.parent / guard.BREAKER).exists()


def test_interrupted_cell_goes_on_in_its_run_and_is_uploaded_once(copied, account, monkeypatch, capsys):
    folder, spec = copied.folder, copied.tracked()
    server = WandbServer()
    account(server.url)
    aside = folder.path.parent / "aside"
    aside.mkdir()
    for path in (folder.result_path, folder.layers_path, folder.block_path(1)):
        path.rename(aside / path.name)
    folder.new_attempt()
    monkeypatch.setattr(guard, "HURRY_S", 30.0)
    with pytest.raises(KeyboardInterrupt), guard.followed(spec, folder):
        raise KeyboardInterrupt
    run = server.runs[folder.run_id]
    assert [row["_step"] for row in run["history"]] == [0]
    assert run["exitcode"] == 255
    assert not folder.synced_path.exists()

    for name, path in {"result.json": folder.result_path, "layers.parquet": folder.layers_path}.items():
        (aside / name).rename(path)  # the block's file stays away, as where codes are not kept
    assert sync([(folder, spec)], "online") == 0
    assert "1 uploaded" in capsys.readouterr().out
    assert list(server.runs) == [folder.run_id]
    assert [row["_step"] for row in run["history"]] == [0, 1, 2]
    assert [row["block"] for row in run["history"] if "relative_output_error/mean" in row] == [0, 1]
    assert "layers" in run["history"][2]
    assert run["exitcode"] == 0
    assert run["jobType"] == "gptq"
    assert server.artifacts[f"cell-{folder.run_id}"]["result.json"] == folder.result_path.read_bytes()
    marker = read_json(folder.synced_path)
    assert (marker["project"], marker["entity"]) == ("ptqbench", "me")
    assert marker["result"] == f"sha256:{hashlib.sha256(folder.result_path.read_bytes()).hexdigest()}"

    command = [sys.executable, "-m", "ptqbench", "table", "--from-wandb", "me/ptqbench", "--format", "csv"]
    table = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder.path)
    assert table.stdout == tidy([(folder, spec)]).to_csv(index=False)

    asked = len(server.requests)
    server.stop()
    assert sync([(folder, spec)], "online") == 0
    assert "1 there already" in capsys.readouterr().out
    assert len(server.requests) == asked


def test_marker_counts_for_its_own_target_and_result(copied):
    folder, spec = copied.folder, copied.tracked()
    outcome = {"project": "ptqbench", "entity": "me", "url": None}
    guard.mark(folder, spec.execution.runs_dir, "offline", outcome)
    assert guard.is_marked(folder, guard.towards(spec, "offline", None, None))
    assert not guard.is_marked(folder, guard.towards(spec, "online", None, None))
    guard.mark(folder, spec.execution.runs_dir, "online", outcome)
    assert guard.is_marked(folder, guard.towards(spec, "online", None, None))
    assert guard.is_marked(folder, guard.towards(spec, "online", None, "me"))
    assert not guard.is_marked(folder, guard.towards(spec, "online", None, "team"))
    assert not guard.is_marked(folder, guard.towards(spec, "online", "other", None))
    write_json(folder.result_path, folder.result() | {"attempts": 9})
    assert not guard.is_marked(folder, guard.towards(spec, "online", None, None))


def test_sync_says_what_it_left_and_why(copied, account, capsys, monkeypatch):
    from ptqbench.tracking import sync as sync_module

    account("http://127.0.0.1:9")
    monkeypatch.setattr(sync_module, "SLOW_S", 0.5)
    monkeypatch.setattr(guard, "ANSWER_S", 1.0)
    pending = RunFolder(copied.folder.path.with_name("pending-000000000000"))
    assert sync([(pending, None), *[(copied.folder, copied.tracked("none"))] * 3], "online") == 1
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].startswith("not uploaded: 3 cells: ")
    assert said[1] == "1 not finished, 3 not uploaded"
    assert not copied.folder.synced_path.exists()


def recorded_run(identifier, config, summary, state):
    """What ``wandb.Api`` gives for a run, whose config and summary have been through JSON that turns 1.0 into 1."""
    whole = lambda value: int(value) if isinstance(value, float) and value.is_integer() else value
    walk = lambda value: (
        {k: walk(v) for k, v in value.items()} if isinstance(value, dict)
        else [walk(v) for v in value] if isinstance(value, list) else whole(value)
    )  # fmt: skip
    return SimpleNamespace(id=identifier, config=walk(config), summary=walk(summary), state=state)


def recorded_store():
    """Every cell of the store of the golden tables as it is in W&B, with a run of somebody else among them."""
    found = [SimpleNamespace(id="sunny-sky-1", config={"lr": 1}, summary={"loss": 2}, state="finished")]
    for folder in all_runs(STORE):
        result, failure = folder.result(), folder.failure()
        summary = summary_of(result) if result else {"failure": failure["message"] if failure else None}
        state = "finished" if result else "failed" if failure else "running"
        found.append(recorded_run(folder.run_id, config_of(folder.read_spec()), summary, state))
    return SimpleNamespace(runs=lambda path, **_: found)


def test_frame_from_wandb_equals_that_of_the_store():
    theirs = runs_frame("me/ptqbench", recorded_store())
    ours = tidy((folder, None) for folder in all_runs(STORE))
    unfinished = ours["state"] == "pending"  # W&B has no run of a cell that never began: given as running above
    pd.testing.assert_frame_equal(theirs[~unfinished], ours[~unfinished])
    assert set(theirs[unfinished]["state"]) == {"running"}
    measured = ours["metric"].notna()
    assert markdown(comparison_sheet(theirs[measured])) == markdown(comparison_sheet(ours[measured]))


def test_run_with_a_foreign_identity_is_not_trusted():
    runs = recorded_store().runs("")[1:3]
    runs[0].id = "0123456789ab"
    runs[1].summary["result"] = "{"
    found = sources("me/ptqbench", SimpleNamespace(runs=lambda path, **_: runs))
    assert [(one.state, one.model) for one in found] == [("damaged", "toy-1b")] * 2
    assert "not 0123456789ab" in found[0].reason
    with pytest.raises(ConfigError, match="ENTITY/PROJECT, got 'ptqbench'"):
        sources("ptqbench")


def test_tracking_is_a_group_of_the_configuration(tmp_path):
    composed = compose_data(["+method=rtn", "bitwidth=w4", "tracking=online", "tracking.tags=[a]"])
    assert validated(composed).tracking == TrackingSpec(mode="online", tags=("a",))
    path = tmp_path / "s.yaml"
    grid = {"zip": {"seed": [0, 1], "tracking.group": [None, "given"]}}
    path.write_text(yaml.safe_dump({"name": "my sweep", "common": ["method=rtn"], "grids": [grid]}))
    found = cells(load_sweep(str(path)), ["tracking=offline"])
    assert [(cell.spec.tracking.mode, cell.spec.tracking.group) for cell in found] == [
        ("offline", "my sweep"), ("offline", "given")
    ]  # fmt: skip


def test_cells_do_not_import_wandb():
    code = "import ptqbench.run, ptqbench.tracking.sync, ptqbench.tracking.recorded, sys; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
