"""One cell from its folder, with no Hydra; attempts and their records."""

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from ptqbench import run
from ptqbench.errors import CellBusy, ConfigError, RunFailed, StorageError
from ptqbench.launch.dispatch import launch
from ptqbench.launch.summary import Summary
from ptqbench.run import run_folder
from ptqbench.runs import attempt as attempt_module
from ptqbench.runs import folder as store
from ptqbench.runs.attempt import Silent, attempt
from ptqbench.runs.lease import lease
from ptqbench.sweeps.compose import compose_cell, resolved

SMALL = ["bitwidth=w3", "calibration.n_samples=2", "calibration.seq_len=32", "evaluation.tasks=[]"]
SMALL += ["+evaluation.texts.tiny.portion=[0,0.02]"]


def make(tmp_path, *words):
    return store.create(compose_cell(["+method=gptq", *SMALL, f"execution.runs_dir={tmp_path}", *words]))


def test_run_folder_reruns_with_no_configuration(tmp_path):
    folder = make(tmp_path)
    done = subprocess.run([sys.executable, "-m", "ptqbench.run", str(folder.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiny/perplexity = " in done.stdout
    result = json.loads(folder.result_path.read_text())
    assert result["run_id"] == folder.run_id
    assert 3 < result["bits"]["effective_w_bits"] < 4
    assert result["peak_host_gib"] > 0
    assert {"forward_s", "moment_s", "round_s", "perplexity_s"} <= set(result["timings"])
    (first,) = folder.attempts
    meta = json.loads((first / "meta.json").read_text())
    assert meta["packages"]["torch"] != "not installed"
    assert json.loads((first / "heartbeat.json").read_text())["ended"] == "done"
    assert "stage quantize" in (first / "log.txt").read_text()
    import pandas

    layers = pandas.read_parquet(folder.layers_path)
    assert len(layers) == 7 * layers["block"].nunique()


def test_codes_are_dropped_only_once_the_result_is_written(tmp_path, monkeypatch):
    folder = make(tmp_path, "execution.keep_codes=false")
    blocks = lambda: sorted(path.name for path in folder.state_path.glob("block_*.safetensors"))

    def killed(path, data):
        assert len(blocks()) == 4
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            run.run_cell(folder.read_spec(), folder)
    assert len(blocks()) == 4
    run.run_cell(folder.read_spec(), folder)
    assert folder.state() == store.DONE
    assert blocks() == []
    assert not folder.state_path.exists()


def test_misuse_of_the_run_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "ptqbench.run", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_failed_attempt_is_recorded_and_a_later_success_clears_it(tmp_path):
    folder = make(tmp_path)
    with pytest.raises(RunFailed, match=r"ValueError: two lines.*failure\.json"), attempt(folder, Silent()):
        raise ValueError("two\nlines")
    assert folder.state() == store.FAILED
    assert folder.failure()["class"] == "ValueError"
    assert folder.failure()["expected"] is False
    with attempt(folder, Silent()):
        pass
    assert not folder.failure_path.exists()
    assert len(folder.attempts) == 2


def test_heartbeat_beats_and_says_where_the_cell_is(tmp_path, monkeypatch):
    monkeypatch.setattr(attempt_module, "HEARTBEAT_INTERVAL_S", 0.02)
    folder = make(tmp_path)
    with lease(folder), attempt(folder, Silent()) as current:
        current.stage("quantize", 4)
        current.advance()
        first = folder.heartbeat()["time"]
        deadline = time.time() + 20
        while folder.heartbeat()["time"] == first or folder.heartbeat()["stage"] != "quantize":
            assert time.time() < deadline
            time.sleep(0.01)
        assert folder.state() == store.RUNNING
        assert (folder.heartbeat()["done"], folder.heartbeat()["total"]) == (1, 4)


def test_interrupted_attempt_is_neither_failed_nor_running(tmp_path):
    folder = make(tmp_path)
    with pytest.raises(KeyboardInterrupt), attempt(folder, Silent()):
        raise KeyboardInterrupt
    assert not folder.failure_path.exists()
    assert folder.state() == store.INTERRUPTED


@pytest.mark.parametrize(("given", "expected"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_products_on_a_gpu_are_asked_for_in_a_fixed_order(tmp_path, monkeypatch, given, expected):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", given or "")
    if given is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    run._configure(make(tmp_path).read_spec())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == expected
    assert torch.are_deterministic_algorithms_enabled()


def test_threads_are_as_many_as_the_model_keeps_busy_and_the_process_may_use(checkpoint, tmp_path, monkeypatch):
    """Narrow models get one thread; a wide one all that are given, and one cell's choice does not bind the next."""
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(run, "_threads_given", lambda: 12)
    widths = {"tiny": [], 576: ["model=local"], 1024: ["model=local"]}
    for width, words in widths.items():
        if words:
            folder = checkpoint(
                "llama", hidden_size=width, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256
            )
            words += [f"model.path={folder}", "calibration=tiny", "evaluation=tiny"]
        run._configure(compose_cell(["+method=gptq", *SMALL, *words]))
    run._configure(compose_cell(["+method=gptq", *SMALL, "execution.threads=5"]))
    assert asked == [1, 9, 12, 5]


def test_a_missing_gpu_is_said_before_there_is_a_run_folder(tmp_path, monkeypatch):
    from ptqbench import foreground
    from ptqbench.launch import dispatch
    from ptqbench.sweeps.compose import resolved

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    words = ["+method=gptq", *SMALL, f"execution.runs_dir={tmp_path}/runs", "execution.device=cuda"]
    with pytest.raises(ConfigError, match="expected a GPU on this machine"):
        foreground.run_one(compose_cell(words))
    with pytest.raises(ConfigError, match="expected a GPU on this machine"):
        dispatch.launch(resolved([("cell", [*words, "launcher=inline"])]))
    assert not (tmp_path / "runs").exists()
    folder = store.create(compose_cell(words))  # as where a job is queued, to run on another machine
    with pytest.raises(RunFailed, match="expected a GPU on this machine"):
        run_folder(folder)
    assert folder.failure()["kind"] == "config"


def lose_a_signal(then):
    """What safetensors does now and then: the exception of a signal is lost, and something else follows."""
    with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    then()


@pytest.mark.parametrize("follows", ["an error", "the next step"])
def test_whatever_follows_a_signal_is_an_interruption(tmp_path, follows):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may start us with it ignored
    folder = make(tmp_path)
    with pytest.raises(KeyboardInterrupt), attempt(folder, Silent()) as current:
        lose_a_signal(current.advance if follows == "the next step" else lambda: int("UntypedStorage"))
    assert folder.state() == store.INTERRUPTED
    assert not folder.failure_path.exists()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_holder_that_was_taken_over_ends_without_a_result_or_a_failure(tmp_path, monkeypatch):
    from ptqbench import run

    folder = make(tmp_path)

    def lose_the_lease(current):
        store.write_json(folder.lease_path, {"token": "successor"})
        current.advance()

    def overtaken(spec, folder, observer):
        store.write_json(folder.lease_path, {"token": "successor"})
        return {"run_id": folder.run_id, "bits": {"packed_bytes": 0}}

    monkeypatch.setattr(run, "_work", overtaken)
    with pytest.raises(CellBusy, match="taken over"):
        run.run_cell(folder.read_spec(), folder)
    folder.lease_path.unlink()
    with lease(folder) as held, pytest.raises(CellBusy), attempt(folder, Silent(), held) as current:
        lose_the_lease(current)
    assert json.loads(folder.lease_path.read_text()) == {"token": "successor"}
    assert not folder.result_path.exists()
    assert not folder.failure_path.exists()


def test_a_log_that_cannot_be_written_costs_its_lines_only(tmp_path, capsys):
    folder = make(tmp_path)
    with attempt(folder, Silent()) as current:
        (handler,) = [h for h in logging.getLogger().handlers if isinstance(h, attempt_module._Log)]
        handler.setStream(open("/dev/full", "w"))  # noqa: SIM115 - closed by the handler
        current.stage("quantize", 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [(errno.EIO, 1, "Input/output error"), (errno.EACCES, 2, "Permission denied"), (None, 1, "a defect")],
)
def test_what_stops_a_cell_before_its_attempt_is_one_line(tmp_path, monkeypatch, capsys, number, status, words):
    def refused(folder):
        if number is None:
            raise IndexError("7")
        try:
            raise OSError(number, os.strerror(number))
        except OSError as error:
            raise StorageError.of(error, "the run folder cannot be written") from error

    monkeypatch.setattr(run, "run_folder", refused)
    assert run.main([str(tmp_path)]) == status
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("ptqbench: ")
    assert said.count("\n") == 1


def test_values_are_printed_as_in_tables(tmp_path, monkeypatch, capsys):
    metrics = {"tiny/perplexity": {"value": 1e300}, "far/perplexity": {"value": None, "mean_loss": 1e300}}
    monkeypatch.setattr(run, "run_folder", lambda folder: {"metrics": metrics})
    assert run.main([str(tmp_path)]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) < 40


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), IndexError("7")])
def test_inline_one_cell_that_cannot_begin_stops_no_other(tmp_path, monkeypatch, error):
    done = []

    def run_cell(spec, folder, shown):
        done.append(spec.seed)
        if spec.seed == 0:
            raise error
        return {}

    monkeypatch.setattr(run, "run_cell", run_cell)
    words = ["+method=rtn", "model=tiny", *SMALL, "launcher=inline", f"execution.runs_dir={tmp_path}"]
    monkeypatch.setattr(Summary, "finished", lambda self, cell: None)
    found = resolved([(f"seed {seed}", [*words, f"seed={seed}"]) for seed in (0, 1)])
    assert launch(found) == 1
    assert done == [0, 1]
