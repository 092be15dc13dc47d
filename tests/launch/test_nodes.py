"""Which nodes the next submission leaves out: two cells must speak against a node, and nothing for it."""

import json
import os
import time

import pytest

from ptqbench.launch import nodes
from ptqbench.launch.nodes import failing, say_left_out
from ptqbench.runs.failures import speaks_of_node
from ptqbench.runs.folder import RunFolder

ECC = {"kind": "code", "message": "CUDA error: uncorrectable ECC error encountered"}


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Adds attempts at cells."""
    monkeypatch.setattr(nodes, "_nodes", lambda: None)

    def add(cell, node, failure=None, ended="failed", hours=0.0, stage="quantize"):
        folder = RunFolder(tmp_path / f"x-{cell:012x}")
        folder.path.mkdir(exist_ok=True)
        (folder.path / "spec.json").touch()
        path, at = folder.new_attempt(), time.time() - 3600 * hours
        beat = {"time": at, "stage": stage, "done": 0, "total": 1} | ({"ended": ended} if ended else {})
        (path / "meta.json").write_text(
            json.dumps({"host": "h", "slurm": {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": node}})
        )
        (path / "heartbeat.json").write_text(json.dumps(beat))
        if failure:
            (path / "failure.json").write_text(json.dumps(failure))
        return folder, path

    return add


def test_two_cells_speak_against_a_node_and_one_does_not(attempt, tmp_path):
    attempt(1, "a", ECC)
    attempt(1, "a", ECC)
    attempt(2, "b", ECC)
    assert failing(tmp_path, 24) == {}
    attempt(3, "b", {"kind": "disk", "message": "[Errno 5] Input/output error: '/scratch/x'"})
    (node,) = failing(tmp_path, 24).items()
    assert node[0] == "b"
    line = say_left_out(dict([node]))
    assert line.startswith("left out: b: 2 cells failed there, the last at ")
    assert "launcher.forgive_h=0" in line
    assert "\n" not in line
    assert failing(tmp_path, 0) == {}
    attempt(4, "b", ended="done")
    assert failing(tmp_path, 24) == {}, "a cell was finished there later"


def test_time_forgives(attempt, tmp_path):
    for cell in (1, 2):
        attempt(cell, "a", ECC, hours=5)
    assert list(failing(tmp_path, 6)) == ["a"]
    assert failing(tmp_path, 4) == {}


def test_a_cell_that_fails_everywhere_speaks_of_itself(attempt, tmp_path):
    for cell in (1, 2):
        for node in ("a", "b"):
            attempt(cell, node, ECC)
    assert failing(tmp_path, 24) == {}


def test_killed_before_anything_was_finished(attempt, tmp_path):
    for cell in (1, 2, 3):
        attempt(cell, "a", ended=None)
    folder, path = attempt(4, "b", ended=None)
    attempt(5, "b", ended=None)
    folder.state_path.mkdir()
    (folder.state_path / "block_0000.safetensors").touch()
    cancelled, _ = attempt(6, "b", ended=None)
    cancelled.cancel_path.touch()
    assert list(failing(tmp_path, 24)) == ["a"]
    assert "3 cells failed there" in failing(tmp_path, 24)["a"]
    old = path.stat().st_mtime - 100
    os.utime(folder.state_path / "block_0000.safetensors", (old, old))  # of an earlier attempt
    assert sorted(failing(tmp_path, 24)) == ["a", "b"]


def test_a_living_process_is_no_evidence(attempt, tmp_path):
    from ptqbench.runs.liveness import me

    attempt(1, "a", ended=None)
    folder, _ = attempt(2, "a", ended=None)
    folder.lease_path.write_text(json.dumps(me()))
    assert failing(tmp_path, 24) == {}


def test_interruptions_and_nodes_that_slurm_does_not_know_are_no_reason(attempt, tmp_path, monkeypatch):
    for cell in (1, 2):
        attempt(cell, "a", ended="interrupted")
        attempt(cell + 2, "gone", ECC)
    assert list(failing(tmp_path, 24)) == ["gone"]
    monkeypatch.setattr(nodes, "_nodes", lambda: {"a", "b"})
    assert failing(tmp_path, 24) == {}


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("code", "CUDA error: an illegal memory access was encountered", True),
        ("code", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", True),
        ("config", "No CUDA GPUs are available", True),
        ("config", "Found no NVIDIA driver on your system", True),
        ("gpu_memory", "CUDA out of memory. Tried to allocate 2 GiB", False),
        ("code", "CUDA error: device-side assert triggered", False),
        ("config", "Torch not compiled with CUDA enabled", False),
        ("config", "execution.device: expected cpu", False),
        ("numerical", "block 3 holds NaN", False),
        ("code", "IndexError: list index out of range", False),
        ("network", "ConnectionError", False),
        ("disk", "[Errno 28] No space left on device: '/tmp/x'", True),
        ("disk", "[Errno 28] No space left on device: '/shared/runs/x/state'", False),
        ("disk", "the run folder /shared/runs/x cannot be written: Input/output error", False),
        ("disk", "I/O error: No space left on device (os error 28)", False),
        ("disk", "[Errno 30] Read-only file system: '/scratch/y'", True),
    ],
)
def test_what_speaks_of_a_node(kind, message, expected):
    assert speaks_of_node({"kind": kind, "message": message}, "/shared/runs") == expected
