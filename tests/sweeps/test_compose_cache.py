"""Compositions remembered between commands: the same data, no Hydra, and nothing out of date."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from ptqbench.cell.folders import conf_folder
from ptqbench.sweeps.compose import Composer, compose_data
from ptqbench.sweeps.compose_cache import Compositions

LINES = [
    ["method=gptq", "model=tiny", "bitwidth=w3", "seed=1"],
    ["method=coquant", "method/target=loaq", "method.transform.n_samples=16"],
    ["method=rtn", "bitwidth.w_bits=5", "execution.runs_dir=/x"],
]
SCRIPT = (
    "import json, sys\nfrom ptqbench.sweeps.compose import resolved\n"
    "found = resolved([('x', words) for words in json.loads(sys.argv[1])])\n"
    "print(json.dumps([[cell.folder.run_id if cell.folder else str(cell.problem) for cell in found], 'hydra' in sys.modules]))"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PTQBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compositions"


def fresh(lines):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(lines)], capture_output=True, text=True, check=True, env=os.environ
    )
    return json.loads(done.stdout)


def test_a_second_command_finds_the_same_cells_without_hydra(cache):
    lines = [line for line in LINES if not any("seed" in word for word in line)]
    ids, with_hydra = fresh(lines)
    assert with_hydra
    assert fresh(lines) == [ids, False]


def test_what_is_remembered_is_what_would_be_composed(cache):
    for _ in range(2):
        composer = Composer()
        for line in LINES:
            assert composer(line) == compose_data(line)
        composer.save()
    assert len(list(cache.iterdir())) == 1


def test_an_edited_configuration_is_composed_anew(cache, tmp_path, monkeypatch):
    line = ["method=gptq", "model=tiny", "bitwidth=w3"]
    conf = tmp_path / "conf"
    shutil.copytree(conf_folder(), conf)
    monkeypatch.setenv("PTQBENCH_CONF", str(conf))
    first = Composer()
    assert first(line)["bitwidth"]["w_bits"] == 3
    first.save()
    path = conf / "bitwidth" / "w3.yaml"
    path.write_text(path.read_text().replace("w_bits: 3", "w_bits: 5"))
    assert Composer()(line)["bitwidth"]["w_bits"] == 5


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"[\\"x\\"]": 3}', "null"])
def test_a_damaged_memory_counts_as_empty(cache, content):
    line = ["method=gptq", "model=tiny", "bitwidth=w3"]
    composer = Composer()
    expected = composer(line)
    composer.save()
    (path,) = cache.iterdir()
    path.write_text(content)
    assert Composer()(line) == expected


def test_two_commands_lose_nothing_of_each_other(cache):
    first, second = Compositions({"code": ""}), Compositions({"code": ""})
    first.put(["a"], {"x": 1})
    second.put(["b"], {"x": 0.1})
    first.save()
    second.save()
    both = Compositions({"code": ""})
    assert (both.get(["a"]), both.get(["b"]), both.get(["c"])) == ({"x": 1}, {"x": 0.1}, None)
    both.get(["a"])["x"] = 2
    assert both.get(["a"]) == {"x": 1}, "somebody's change reached the memory"
    assert Compositions({"code": "changed"}).get(["a"]) is None


def test_what_json_cannot_say_is_not_remembered(cache):
    memory = Compositions({})
    for data in ({"x": (1, 2)}, {"x": object()}, {1: 2}):
        memory.put(["a"], data)
        assert memory.get(["a"]) is None


def remembered(state):
    memory = Compositions(state)
    memory.put(["a"], {"damping": 0.01})
    memory.save()
    return memory.path


def test_what_was_changed_in_the_cache_is_not_believed(cache):
    path = remembered({})
    assert Compositions({}).get(["a"]) == {"damping": 0.01}
    path.write_text(path.read_text().replace("0.01", "0.99"))
    assert Compositions({}).get(["a"]) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_cache_that_others_may_write_is_not_believed(cache, mode):
    path = remembered({})
    path.chmod(mode)
    assert Compositions({}).get(["a"]) is None


def test_a_cache_of_somebody_else_is_not_believed(cache, monkeypatch):
    path = remembered({})
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    theirs = Compositions({})
    assert theirs.path != path, "each user has a file of their own"
    theirs.path.write_bytes(path.read_bytes())  # put there by the first user
    assert Compositions({}).get(["a"]) is None


def test_the_cache_is_used_under_any_umask(cache):
    before = os.umask(0o002)
    try:
        remembered({})
    finally:
        os.umask(before)
    assert Compositions({}).get(["a"]) == {"damping": 0.01}
