"""Files that several people and processes share: permissions, damage, what cannot be read now."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from ptqbench.engine.blocks_on_disk import BlockState
from ptqbench.errors import StorageError
from ptqbench.runs import files
from ptqbench.runs.artefacts import Artefacts
from ptqbench.runs.files import number, read_json, replacing, temporary_prefix
from ptqbench.runs.folder import DAMAGED, PENDING, RUNNING, UNREADABLE, RunFolder
from ptqbench.runs.lease import lease
from ptqbench.runs.queue import Queue
from ptqbench.sweeps.plan import describe

DEEP = "[" * 100_000 + "]" * 100_000
STRANGE = [None, "now", -1, 0, True, [], {}, 1e300, float("inf"), 10**400]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "cell-0123456789ab"
    path.mkdir()
    return RunFolder(path)


@pytest.fixture
def unreadable(monkeypatch):
    """Make files unreadable by a number of the system, for root too."""

    def make(path, number):
        import builtins
        import io
        import pathlib

        plain = builtins.open

        def refusing(file, *args, **kwargs):
            if not isinstance(file, int) and os.fspath(file) == str(path):
                raise OSError(number, os.strerror(number), str(file))
            return plain(file, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", refusing)
        monkeypatch.setattr(io, "open", refusing)
        monkeypatch.setattr(pathlib.io, "open", refusing)

    return make


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_files_and_locks_follow_the_umask_whatever_the_writer_does(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "x.safetensors") as temporary:
            save_file({"a": torch.zeros(1)}, temporary)
        with files.file_lock(tmp_path / ".lock"):
            pass
    finally:
        os.umask(before)
    for name in ("x.safetensors", ".lock"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", DEEP.encode(), b"null"])
def test_damaged_json_is_none(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") is None


@pytest.mark.parametrize("value", STRANGE)
def test_only_finite_numbers_are_numbers(value):
    assert number({"x": value}, "x") == (
        value if value in (-1, 0, 1e300) and value is not True and value != [] else None
    )


@pytest.mark.parametrize("field", ["pid", "time", "started", "machine", "slurm_restart"])
@pytest.mark.parametrize("value", STRANGE)
def test_no_field_of_a_lease_or_heartbeat_stops_a_command(folder, field, value):
    import json

    from ptqbench.runs.liveness import me

    folder.lease_path.write_text(json.dumps({"token": "x", **me(), field: value}))
    (folder.new_attempt() / "heartbeat.json").write_text(json.dumps({"time": value}))
    folder.submission_path.write_text(json.dumps({"launcher": "slurm", "token": value, "task": value}))
    assert describe(folder, Queue({}))[0] in ("running", "interrupted")


@pytest.mark.parametrize("code", [13, 5, 116])
def test_a_result_that_cannot_be_read_is_not_damaged(folder, unreadable, code):
    folder.result_path.write_text("{}")
    assert folder.state() == DAMAGED
    unreadable(folder.result_path, code)
    state, why = describe(folder, Queue({}))
    assert state == UNREADABLE
    assert os.strerror(code) in why
    with pytest.raises(StorageError, match=r"result\.json cannot be read"):
        folder.result()


@pytest.mark.parametrize("code", [13, 5, 116])
def test_a_shared_file_that_cannot_be_read_is_an_error_and_stays(tmp_path, unreadable, code):
    store, state = Artefacts(tmp_path), BlockState(tmp_path / "state", "0123456789ab")
    store.get("windows", {"a": 1}, lambda: {"a": torch.ones(2)})
    state.save(0, {"a": torch.ones(2)}, [])
    for path, find in (
        (store.path("windows", {"a": 1}), lambda: store.find("windows", {"a": 1})),
        (tmp_path / "state" / "block_0000.safetensors", lambda: state.has(0)),
    ):
        unreadable(path, code)
        with pytest.raises(StorageError, match=os.strerror(code)):
            find()
        assert path.exists()


def test_the_next_holder_removes_what_killed_ones_left_half_written(folder):
    left = [folder.state_path / ".block_0000.safetensors.99.tmp", folder.records_path / "windows" / ".x.parquet.99.tmp"]
    for path in left:
        path.parent.mkdir(parents=True)
        path.touch()
    young = folder.path / ".cancel.json.99.tmp"  # perhaps being written by another command
    young.touch()
    assert folder.state() == PENDING
    with lease(folder):
        assert folder.state() == RUNNING
    assert not any(path.exists() for path in left)
    assert young.exists()


def test_what_a_dead_process_of_this_machine_left_anywhere_goes_with_the_next_holder(folder):
    """Beside the cell and among shared artefacts, where others may be at work: the name says whose file it is."""
    shared = folder.path.parent / ".artefacts"
    shared.mkdir()
    script = (
        "import pathlib, sys; from ptqbench.runs.files import temporary_prefix\n"
        "for path in map(pathlib.Path, sys.argv[1:]): path.with_name(temporary_prefix(path) + 'tmp').touch()"
    )
    targets = [folder.path / "spec.json", shared / "bases-1.safetensors"]
    subprocess.run([sys.executable, "-c", script, *targets], check=True)
    dead = [found for path in targets for found in path.parent.glob(f".{path.name}.*tmp")]
    assert len(dead) == 2
    living = [path.with_name(temporary_prefix(path) + "tmp") for path in targets]
    unknown = [shared / ".windows-1.safetensors.7.tmp", shared / ".windows-2.safetensors.01234567-7.tmp"]
    for path in (*living, *unknown):
        path.touch()
    old = shared / ".windows-3.safetensors.01234567-7.tmp"
    old.mkdir()
    os.utime(old, (0, 0))
    with lease(folder):
        assert not any(path.exists() for path in (*dead, old))
        assert all(path.exists() for path in (*living, *unknown)), "a writer elsewhere may live"
