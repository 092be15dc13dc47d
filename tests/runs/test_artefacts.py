"""Shared artefacts: found only under their own key, verified, made once, removed by age."""

import os
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import warm
from ptqbench.runs.artefacts import Artefacts, collect_garbage

KEY = {"model": "sha256:1", "n_samples": 4}


def tensors():
    return {
        "a": torch.arange(6, dtype=torch.int64).reshape(2, 3),
        "b": torch.randn(3, dtype=torch.float64),
        "c": torch.empty(0),
    }


def test_made_once_and_read_back_exactly(tmp_path):
    store, value = Artefacts(tmp_path / "x"), tensors()
    first = store.get("windows", KEY, lambda: value)
    second = Artefacts(tmp_path / "x").get("windows", KEY, lambda: pytest.fail("made twice"))
    for found in (first, second):
        assert found.keys() == value.keys()
        assert all(torch.equal(found[name], value[name]) and found[name].dtype == value[name].dtype for name in value)
    assert (store.found.total(), store.made) == (0, 1)


@pytest.mark.parametrize("change", [{"model": "sha256:2"}, {"n_samples": 5}, {"extra": None}])
def test_another_key_is_another_artefact(tmp_path, change):
    store = Artefacts(tmp_path)
    store.get("windows", KEY, tensors)
    assert store.find("windows", KEY | change) is None
    assert store.find("moments", KEY) is None


def test_a_new_producer_forgets_the_old(tmp_path, monkeypatch):
    store = Artefacts(tmp_path)
    store.get("windows", KEY, tensors)
    monkeypatch.setattr("ptqbench.runs.artefacts.PRODUCER", 10**6)
    assert store.find("windows", KEY) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty"])
def test_a_damaged_artefact_is_made_again(tmp_path, damage):
    store, value = Artefacts(tmp_path), tensors()
    store.get("windows", KEY, lambda: value)
    path = store.path("windows", KEY)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-60] ^= 1
    path.write_bytes({"truncate": content[:-9], "flip": content, "empty": b""}[damage])
    again = store.get("windows", KEY, lambda: value)
    assert store.made == 2
    assert torch.equal(again["a"], value["a"])


def test_a_full_disk_costs_only_the_sharing(tmp_path, monkeypatch):
    def full(path, tensors, seconds):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ptqbench.runs.artefacts._write", full)
    store = Artefacts(tmp_path)
    assert torch.equal(store.get("windows", KEY, tensors)["a"], tensors()["a"])
    assert store.find("windows", KEY) is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless it is moved."""
    now = SimpleNamespace(seconds=100.0)
    fake = SimpleNamespace(perf_counter=lambda: now.seconds, time=time.time)
    monkeypatch.setattr("ptqbench.runs.artefacts.time", fake)
    return now


def taking(clock, seconds):
    def make():
        clock.seconds += seconds
        return tensors()

    return make


def test_an_artefact_carries_what_it_cost_and_who_finds_it_is_spared_that_once(tmp_path, clock):
    maker, finder = Artefacts(tmp_path), Artefacts(tmp_path)
    for _ in range(2):
        maker.get("windows", KEY, taking(clock, 5))
    assert maker.account() == {"found": {"windows": 1}, "spared_s": 0.0, "waited_s": 0.0}, "it paid for it"
    for _ in range(2):
        finder.get("windows", KEY, taking(clock, 7))
    assert finder.account() == {"found": {"windows": 2}, "spared_s": 5.0, "waited_s": 0.0}


def test_what_the_evaluation_finds_is_no_cost_of_quantizing(tmp_path, clock):
    for kind, seconds in (("windows", 5), ("reference", 100)):
        Artefacts(tmp_path).get(kind, KEY, taking(clock, seconds))
    finder = Artefacts(tmp_path)
    finder.find("windows", KEY)
    start = finder.clock()
    with finder.beside():
        finder.find("reference", KEY)
    assert finder.account() == {"found": {"windows": 1, "reference": 1}, "spared_s": 5.0, "waited_s": 0.0}
    assert finder.clock() - start == 100, "an artefact made from it costs it all the same"


def test_the_cost_of_what_is_made_from_something_found_includes_that(tmp_path, clock):
    Artefacts(tmp_path).get("moments", KEY, taking(clock, 5))
    second = Artefacts(tmp_path)
    start = second.clock()
    second.get("moments", KEY, taking(clock, 7))
    second.put("bases", KEY, taking(clock, 2)(), second.clock() - start)
    third = Artefacts(tmp_path)
    third.find("bases", KEY)
    assert third.spared_s == 7.0


def test_waiting_for_another_process_is_no_cost(tmp_path, clock, monkeypatch):
    @contextmanager
    def contended(path):
        clock.seconds += 30
        yield

    monkeypatch.setattr("ptqbench.runs.artefacts.file_lock", contended)
    store = Artefacts(tmp_path)
    start = store.clock()
    store.get("windows", KEY, taking(clock, 5))
    assert store.account() == {"found": {}, "spared_s": 0.0, "waited_s": 30.0}
    assert store.clock() - start == 5
    other = Artefacts(tmp_path)
    other.find("windows", KEY)
    assert other.spared_s == 5


@pytest.mark.parametrize("said", [{}, {"seconds": "dear"}])
def test_an_artefact_that_does_not_say_its_cost_is_made_again(tmp_path, said):
    from safetensors.torch import load_file, safe_open, save_file

    store = Artefacts(tmp_path)
    store.get("windows", KEY, tensors)
    path = store.path("windows", KEY)
    with safe_open(path, framework="pt") as stored:
        digest = stored.metadata()["sha256"]
    save_file(load_file(path), path, metadata={"sha256": digest} | said)
    store.get("windows", KEY, tensors)
    assert (store.found.total(), store.made) == (0, 2)


def make_once(root):
    def make():
        (root / f"made-{time.time_ns()}").touch()
        time.sleep(1)
        return {"a": torch.ones(2)}

    while not (root / "go").exists():
        time.sleep(0.01)
    assert Artefacts(root / "x").get("windows", {"k": 1}, make)["a"].sum() == 2


def test_many_processes_at_once_make_it_once(tmp_path):
    makers = [warm.call(make_once, tmp_path) for _ in range(4)]
    time.sleep(1)
    (tmp_path / "go").touch()
    for maker in makers:
        maker.join(timeout=200)
    assert [maker.exitcode for maker in makers] == [0] * 4
    assert len(list(tmp_path.glob("made-*"))) == 1


def test_garbage_goes_by_age_until_the_budget_is_kept(tmp_path):
    store = Artefacts(tmp_path)
    for age, name in enumerate("abcd"):
        store.get("windows", {"k": name}, lambda: {"a": torch.zeros(1000)})
        stamp = time.time() - 1000 + age
        os.utime(store.path("windows", {"k": name}), (stamp, stamp))
    assert store.find("windows", {"k": "a"}) is not None  # used just now: the youngest
    size = store.path("windows", {"k": "a"}).stat().st_size
    old = tmp_path / ".windows-x.safetensors.1.tmp"
    old.write_bytes(b"x" * 10)
    os.utime(old, (0, 0))
    assert collect_garbage(tmp_path, 2 * size) == (3, 2 * size + 10, 2 * size)
    assert [store.find("windows", {"k": name}) is not None for name in "abcd"] == [True, False, False, True]
    assert collect_garbage(tmp_path / "absent", 0) == (0, 0, 0)


def test_what_is_in_use_makes_no_room_for_another(tmp_path):
    store = Artefacts(tmp_path, budget_bytes=10_000)
    value = {"a": torch.zeros(1000)}
    for name in "abc":  # two fit
        assert torch.equal(store.get("windows", {"k": name}, lambda: value)["a"], value["a"])
    assert [store.find("windows", {"k": name}) is not None for name in "abc"] == [True, True, False]
    os.utime(store.path("windows", {"k": "a"}), (0, 0))
    assert store.put("windows", {"k": "c"}, value, 1.0)
    assert [store.find("windows", {"k": name}) is not None for name in "abc"] == [False, True, True]
    assert not Artefacts(tmp_path / "none", budget_bytes=0).put("windows", KEY, value, 1.0)


def test_cells_share_calibration_windows_and_an_empty_folder_gives_the_same(tmp_path, monkeypatch):
    import json

    from safetensors import safe_open

    from ptqbench.data import windows
    from ptqbench.run import run_cell
    from ptqbench.runs.folder import create
    from ptqbench.sweeps.compose import compose_cell

    drawn, real = [], windows.calibration_windows
    monkeypatch.setattr(windows, "calibration_windows", lambda *a: drawn.append(1) or real(*a))
    words = ["bitwidth=w3", "calibration.n_samples=2", "calibration.seq_len=32", "evaluation.tasks=[]"]
    words += ["+evaluation.texts.tiny.portion=[0,0.02]", "evaluation.fidelity=true"]
    found = {}
    for runs, methods in (("shared", ["gptq", "rtn"]), ("alone", ["rtn"])):
        for method in methods:
            spec = compose_cell([f"+method={method}", *words, f"execution.runs_dir={tmp_path / runs}"])
            folder = create(spec)
            run_cell(spec, folder)
            result = json.loads(folder.result_path.read_text())
            found[runs, method] = {key: result[key] for key in ("metrics", "bits")}
            second = (runs, method) == ("shared", "rtn")
            # The noise floor is measured against the reference, so a cell finds its own too.
            all_found = {"calibration": 1, "reference": 1, "noise": 1} if second else {"reference": 1}
            assert result["shared"]["found"] == all_found
            (path,) = (tmp_path / runs / ".artefacts").glob("calibration-*.safetensors")
            with safe_open(path, "pt") as stored:
                seconds = float(stored.metadata()["seconds"])
            spared = seconds if second else 0.0
            assert result["shared"]["spared_s"] == pytest.approx(spared, abs=1e-4), (
                "what the evaluation found is no part of it"
            )
            assert "windows_s" in result["timings"], "who draws them pays for them"
    assert len(drawn) == 2, "once per folder of runs"
    assert found["shared", "rtn"] == found["alone", "rtn"]
    assert found["shared", "gptq"] != found["shared", "rtn"]


def test_safetensors_writes_into_a_folder_that_says_whose_it_is(tmp_path, monkeypatch):
    """Its file without a name would stay behind a killed maker for ever."""
    seen = []
    monkeypatch.setattr("safetensors.torch.save_file", lambda tensors, path, metadata: seen.append(path) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Artefacts(tmp_path).get("windows", KEY, tensors)
    assert seen[0].parent.parent == tmp_path
    assert f"-{os.getpid()}." in seen[0].parent.name
    assert not list(tmp_path.glob(".*"))
