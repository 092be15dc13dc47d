"""Schema and identity of a cell."""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest

from ptqbench.cell import fingerprint
from ptqbench.cell import spec as spec_module
from ptqbench.cell.spec import EXECUTION, IDENTITY, RunSpec, build, to_dict
from ptqbench.errors import ConfigError
from ptqbench.runs import folder as store
from ptqbench.runs.liveness import HEARTBEAT_EXPIRY_S

CELL = {
    "model": {"name": "m", "digest": "sha256:0", "dtype": "float32"},
    "method": {
        "name": "gptq",
        "transform": {"name": "none", "options": {}},
        "target": {"name": "weight", "options": {}},
        "solver": {"name": "gptq", "options": {"damping": 0.01}},
        "refine": {"name": "none", "options": {}},
        "grid": {"scheme": "asym"},
        "activation": {"clip_ratio": 0.9},
        "true_sequential": True,
    },
    "bitwidth": {"name": "w4", "w_bits": 4, "a_bits": 16, "k_bits": 16, "v_bits": 16},
    "calibration": {"dataset": "tiny", "split": "calibration", "n_samples": 8, "seq_len": 64},
    "evaluation": {"name": "e", "texts": {"t": {"dataset": "tiny", "split": "evaluation", "seq_len": 64}}},
    "seed": 0,
}


def cell(path="", value=None):
    data = copy.deepcopy(CELL)
    *parents, last = path.split(".") if path else [None]
    node = data
    for part in parents:
        node = node[part]
    if last:
        node[last] = value
    return data


def dataclasses_of_spec():
    return [c for c in vars(spec_module).values() if isinstance(c, type) and dataclasses.is_dataclass(c)]


def test_every_field_is_identity_or_execution():
    assert len(dataclasses_of_spec()) >= 10
    for cls in dataclasses_of_spec():
        for field in dataclasses.fields(cls):
            assert field.metadata.get("role") in (IDENTITY, EXECUTION), f"{cls.__name__}.{field.name}"


def test_round_trip():
    spec = build(RunSpec, CELL)
    assert build(RunSpec, to_dict(spec)) == spec


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model.typo", 1, ["model.typo", "dtype"]),
        ("bitwidth.w_bit", 4, ["bitwidth.w_bit", "did you mean 'w_bits'"]),
        ("bitwidth.w_bits", 1, ["bitwidth.w_bits", "greater than or equal to 2", "got 1"]),
        ("bitwidth.w_bits", 17, ["bitwidth.w_bits", "less than or equal to 16", "got 17"]),
        ("bitwidth.w_bits", "four", ["bitwidth.w_bits", "integer", "'four'"]),
        ("bitwidth.w_bits", 4.5, ["bitwidth.w_bits", "4.5"]),
        ("bitwidth.w_bits", True, ["bitwidth.w_bits", "True"]),
        ("calibration.n_samples", 0, ["calibration.n_samples"]),
        ("evaluation.texts.t.seqlen", 5, ["evaluation.texts.t.seqlen", "did you mean 'seq_len'"]),
        ("method.grid.scheme", "asymm", ["method.grid.scheme", "'asym'"]),
        ("seed", -1, ["seed", "-1"]),
        ("seed", float("nan"), ["finite"]),
    ],
)
def test_bad_values_give_one_line_with_place_and_remedy(path, value, words):
    with pytest.raises(ConfigError) as caught:
        build(RunSpec, cell(path, value))
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_missing_value_is_named():
    data = cell()
    del data["bitwidth"]["a_bits"]
    with pytest.raises(ConfigError, match=r"missing value for 'bitwidth\.a_bits': give bitwidth\.a_bits=\.\.\.$"):
        build(RunSpec, data)
    with pytest.raises(
        ConfigError, match=r"missing value for 'spec\.json\.bitwidth\.a_bits'$"
    ):  # a file has no override
        build(RunSpec, data, "spec.json")
    data["bitwidth"]["a_bts"] = 4
    with pytest.raises(ConfigError, match=r"unknown key 'bitwidth\.a_bts' .*did you mean 'a_bits'"):
        build(RunSpec, data)


def test_golden_run_id():
    """Pins the scheme: if an id changes, stored results are no longer found, which a new FORMAT must announce."""
    assert fingerprint.FORMAT == 1
    assert fingerprint.run_id(build(RunSpec, CELL)) == "8fe70f8c1421"


def change(node, path):
    """Every variant of a value that differs in one leaf."""
    for key, value in node.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            yield from change(value, here)
        elif isinstance(value, bool):
            yield here, not value
        elif isinstance(value, int | float):
            yield here, value + 1 if key != "w_bits" else value - 1
        elif isinstance(value, str):
            yield here, value + "x"


def test_identity_fields_change_the_id_and_execution_fields_do_not():
    base = fingerprint.run_id(build(RunSpec, CELL))
    labels = {"model.name", "method.name", "bitwidth.name", "evaluation.name"}
    choices = {
        "model.dtype": "bfloat16",
        "method.grid.scheme": "sym_gptq",
        "method.activation.clip_ratio": 0.8,
        "bitwidth.a_bits": 8,
        "bitwidth.k_bits": 8,
        "bitwidth.v_bits": 8,
    }
    seen = set()
    for path, value in change(CELL, ""):
        identifier = fingerprint.run_id(build(RunSpec, cell(path, choices.get(path, value))))
        assert (identifier == base) == (path in labels), path
        seen.add(path)
    assert {"seed", "method.solver.options.damping", "calibration.n_samples", "evaluation.texts.t.seq_len"} <= seen
    assert fingerprint.run_id(build(RunSpec, cell("execution", {"device": "cuda", "runs_dir": "elsewhere"}))) == base
    assert fingerprint.run_id(build(RunSpec, cell("model.path", "/moved"))) == base
    replicates = [fingerprint.run_id(build(RunSpec, CELL | {"replicate": number})) for number in (0, 1, 2)]
    assert replicates[0] == base
    assert len(set(replicates)) == 3


def test_id_does_not_depend_on_key_order_or_int_for_float():
    reordered = json.loads(json.dumps({key: CELL[key] for key in reversed(CELL)}))
    assert fingerprint.run_id(build(RunSpec, reordered)) == fingerprint.run_id(build(RunSpec, CELL))
    whole = fingerprint.run_id(build(RunSpec, cell("model.outlier_factor", 1)))
    assert whole == fingerprint.run_id(build(RunSpec, cell("model.outlier_factor", 1.0)))


def make_folder(tmp_path):
    spec = build(RunSpec, cell("execution", {"runs_dir": str(tmp_path)}))
    return spec, store.create(spec)


def test_state_is_derived_from_files(tmp_path):
    spec, folder = make_folder(tmp_path)
    assert folder.state() == store.PENDING
    attempt = folder.new_attempt()
    store.write_json(folder.lease_path, {"machine": "another", "pid": 1, "time": 900.0})
    store.write_json(attempt / "heartbeat.json", {"time": 1000.0})
    assert folder.state(now=1000.0 + HEARTBEAT_EXPIRY_S / 2) == store.RUNNING
    assert folder.state(now=1001.0 + HEARTBEAT_EXPIRY_S) == store.INTERRUPTED
    folder.lease_path.unlink()
    store.write_json(folder.cancel_path, {})
    assert folder.state() == store.CANCELLED
    store.write_json(attempt / "heartbeat.json", {"time": 1000.0, "ended": "failed"})
    store.write_json(folder.failure_path, {"message": "no"})
    assert folder.state() == store.FAILED
    store.write_json(folder.result_path, {"run_id": folder.run_id})
    assert folder.state() == store.DONE
    folder.result_path.write_text('{"run_id"')
    assert folder.state() == store.DAMAGED
    assert folder.result() is None
    assert store.folder_of(spec) == folder
    assert list(store.all_runs(tmp_path)) == [folder]


def test_folder_is_found_by_identity_whatever_its_name(tmp_path):
    spec, folder = make_folder(tmp_path)
    renamed = dataclasses.replace(spec, method=dataclasses.replace(spec.method, name="other"))
    assert store.folder_of(renamed) == folder
    assert folder.read_spec() == spec


def test_edited_spec_is_refused(tmp_path):
    _, folder = make_folder(tmp_path)
    data = store.read_json(folder.spec_path)
    data["seed"] = 5
    store.write_json(folder.spec_path, data)
    with pytest.raises(ConfigError, match="edited or copied"):
        folder.read_spec()


def test_attempts_are_numbered_and_never_shared(tmp_path):
    _, folder = make_folder(tmp_path)
    assert [folder.new_attempt().name for _ in range(3)] == ["001", "002", "003"]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    store.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        store.write_json(path, {"a": float("nan")})
    assert store.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "module",
    [
        "cell.spec",
        "cell.fingerprint",
        "cell.registry",
        "runs.folder",
        "sweeps.files",
        "sweeps.resolve",
        "results.tables",
        "cli",
        "sweeps.compose",
        "methods.solvers",
        "data.texts",
    ],
)
def test_planning_modules_do_not_import_torch(module):
    code = f"import ptqbench.{module}, sys; assert not {{'torch', 'transformers', 'lm_eval'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_added_field_enters_the_identity_only_where_it_differs_from_its_default():
    @dataclasses.dataclass(frozen=True)
    class Part:
        old: int = spec_module.identity(default=1)
        new: str = spec_module.added("as before")

    assert fingerprint.identity_fields(Part()) == {"old": 1}
    assert fingerprint.identity_fields(Part(new="other")) == {"old": 1, "new": "other"}


def test_an_added_option_of_a_member_enters_the_identity_only_where_it_differs(monkeypatch):
    from ptqbench.cell import registry

    @dataclasses.dataclass(frozen=True)
    class Solver:
        old: int = 1
        new: str = spec_module.added("as before")

    monkeypatch.setattr(registry, "member_class", lambda role, name: Solver)
    assert registry.complete("solver", {"name": "s"}).options == {"old": 1}
    assert registry.complete("solver", {"name": "s", "new": "other"}).options == {"old": 1, "new": "other"}


def test_a_revision_changes_the_run_ids_of_the_cells_that_use_the_part_alone(monkeypatch):
    used, unused = build(RunSpec, cell("method.grid.scheme", "sym_gptq")), build(RunSpec, CELL)
    before = fingerprint.run_id(used), fingerprint.run_id(unused)
    monkeypatch.setitem(fingerprint.REVISIONS, "part", (2, lambda spec: spec.method.grid.scheme == "sym_gptq"))
    assert fingerprint.run_id(used) != before[0]
    assert fingerprint.run_id(unused) == before[1]


@pytest.mark.parametrize(
    ("scheme", "w_bits", "revised"), [("sym_gptq", 4, True), ("sym_gptq", 16, False), ("asym", 4, False)]
)
def test_cells_that_round_weights_to_sym_gptq_are_revised(monkeypatch, scheme, w_bits, revised):
    data = cell("method.grid.scheme", scheme)
    data["bitwidth"]["w_bits"] = w_bits
    now = fingerprint.run_id(build(RunSpec, data))
    monkeypatch.delitem(fingerprint.REVISIONS, "sym_gptq_ties")
    assert (now != fingerprint.run_id(build(RunSpec, data))) == revised


@pytest.mark.parametrize(("task", "revised"), [("gpqa_main_zeroshot/acc", True), ("piqa/acc", False)])
def test_cells_whose_task_shuffles_choices_are_revised(monkeypatch, task, revised):
    data = cell("evaluation.tasks", [task])
    now = fingerprint.run_id(build(RunSpec, data))
    monkeypatch.delitem(fingerprint.REVISIONS, "shuffled_choices")
    assert (now != fingerprint.run_id(build(RunSpec, data))) == revised
