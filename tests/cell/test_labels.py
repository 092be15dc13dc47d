"""A label has the names of the files, and the values that differ from those files."""

import dataclasses

import pytest

from ptqbench.cell import labels
from ptqbench.cell.fingerprint import run_id
from ptqbench.cell.spec import BitwidthSpec
from ptqbench.results import tables
from ptqbench.runs.folder import RunFolder, create, folder_of
from ptqbench.sweeps.compose import compose_cell, resolved

TINY = ["model=tiny"]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ((16, 16, 16, 16, None), "fp16"), ((5, 16, 16, 16, None), "w5"), ((4, 16, 16, 16, 32), "w4g32"),
        ((4, 4, 16, 16, None), "w4a4"), ((4, 16, 8, 8, None), "w4kv8"), ((4, 4, 4, 8, 64), "w4a4k4v8g64"),
        ((16, 8, 16, 16, None), "w16a8"),
    ],
)  # fmt: skip
def test_bits_are_named_by_their_values(values, name):
    fields = dict(zip(("w_bits", "a_bits", "k_bits", "v_bits", "group_size"), values, strict=True))
    assert labels.bits_name(BitwidthSpec(name="", **fields)) == name
    assert not labels.says_other_bits(BitwidthSpec(name=name, **fields))
    assert labels.says_other_bits(BitwidthSpec(name="w3a7", **fields))
    assert not labels.says_other_bits(BitwidthSpec(name="mine", **fields))


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["method=rtn"], "tiny rtn w4 seed 0"),
        (["method=rtn", "bitwidth=w4", "bitwidth.w_bits=5"], "tiny rtn w5 seed 0"),
        (["method=rtn", "bitwidth=w4g128", "bitwidth.group_size=32", "bitwidth.k_bits=4"], "tiny rtn w4k4v16g32 seed 0"),
        (["method=gptq", "method.solver.damping=0.1", "seed=7"], "tiny gptq damping=0.1 w4 seed 7"),
        (["method=gptq", "seed=7", "replicate=2"], "tiny gptq w4 seed 7 replicate 2"),
        (["method=gptq", "method.solver.damping=0.01"], "tiny gptq w4 seed 0"),
        (["method=gptq", "method/solver=gptq_act_order"], "tiny gptq act_order=true static_groups=true w4 seed 0"),
        (["method=gptq", "method/solver=gptaq"], "tiny gptq solver=gptaq w4 seed 0"),
        (["method=gptq", "method/solver=gptaq", "method.solver.damping=0.5"], "tiny gptq solver=gptaq damping=0.5 w4 seed 0"),
        (["method=rtn", "method.grid.scheme=sym_gptq"], "tiny rtn grid.scheme=sym_gptq w4 seed 0"),
        (["method=rtn", "model.outlier_channels=2"], "tiny outlier_channels=2 rtn w4 seed 0"),
        (["method=gptq", "calibration.n_samples=8"], "tiny gptq w4 calibration.n_samples=8 seed 0"),
        (["method=gptq", "calibration=tiny"], "tiny gptq w4 seed 0"),
        (["method=rtn", "evaluation.limit=3"], "tiny rtn w4 evaluation.limit=3 seed 0"),
        (["method=fp16", "bitwidth=fp16", "calibration.n_samples=8", "seed=3"], "tiny fp16 fp16 seed 0"),
        (["method=resq"], "tiny resq w4a4kv4 seed 0"),
    ],
)  # fmt: skip
def test_a_name_says_what_is_not_as_in_the_files(words, name):
    spec = compose_cell([*TINY, *words])
    if spec.calibration is None:
        spec = dataclasses.replace(spec, changed=spec.changed)
    assert labels.name(spec) == name
    assert " " not in labels.slug(spec)


def test_a_calibration_file_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} story. " * 4000)
    given = [
        [*TINY, "method=gptq", "calibration=file", f"calibration.path={tmp_path}/{name}.txt", "calibration.seq_len=64"]
        for name in "ab"
    ]
    first, second = (cell.name for cell in resolved([("?", words) for words in given]))
    assert "calibration=file" in first
    assert "calibration.path=a.txt" in first
    assert "calibration.path=b.txt" in second


def test_a_file_without_a_name_of_its_own_is_not_taken_for_the_file_that_it_extends(tmp_path, monkeypatch):
    import shutil

    from ptqbench.cell.folders import conf_folder

    shutil.copytree(conf_folder(), tmp_path / "conf")
    (tmp_path / "conf/bitwidth/mine.yaml").write_text("defaults: [w4, _self_]\nw_bits: 5\n")
    (tmp_path / "conf/bitwidth/other.yaml").write_text("defaults: [w4, _self_]\nname: ours\nw_bits: 6\n")
    (tmp_path / "conf/method/soft.yaml").write_text("defaults: [gptq, _self_]\nsolver: {damping: 0.2}\n")
    monkeypatch.setenv("PTQBENCH_CONF", str(tmp_path / "conf"))
    assert labels.name(compose_cell(["method=rtn", "bitwidth=mine"])) == "tiny rtn w5 seed 0"
    assert labels.name(compose_cell(["method=rtn", "bitwidth=other"])) == "tiny rtn ours seed 0"
    assert labels.name(compose_cell(["method=rtn", "bitwidth=other", "bitwidth.w_bits=7"])) == "tiny rtn w7 seed 0"
    assert labels.name(compose_cell(["method=soft"])) == "tiny gptq damping=0.2 w4 seed 0"


def test_a_model_under_a_name_of_ones_own_keeps_what_else_differs(checkpoint):
    own = ["model=local", f"model.path={checkpoint('llama')}", "model.name=mine", "evaluation=tiny", "calibration=tiny"]
    own += ["calibration.seq_len=64", "evaluation.texts.tiny.seq_len=64", "evaluation.tasks=[]"]
    plain, aimed = (labels.name(compose_cell([*own, "method=gptq", word])) for word in ("seed=0", "method/target=loaq"))
    assert plain.startswith("mine gptq w4 ")
    assert aimed == plain.replace("gptq", "gptq target=loaq")
    assert labels.name(compose_cell([*own, "method=gptq", "model.dtype=bfloat16"])).startswith(
        "mine dtype=bfloat16 gptq"
    )


def test_cells_that_share_a_name_are_told_apart_by_their_run_ids():
    assert labels.distinct(["a", "b", "a"], ["1", "2", "3"]) == ["a 1", "b", "a 3"]


def test_labels_do_not_change_the_identity_and_folders_with_old_slugs_are_found(tmp_path):
    words = [*TINY, "method=gptq", "method.solver.damping=0.1", f"execution.runs_dir={tmp_path}"]
    spec = compose_cell(words)
    plain = dataclasses.replace(spec, changed=())
    assert run_id(plain) == run_id(spec)
    old = create(plain, RunFolder(tmp_path / f"tiny-gptq-w4-s0-{run_id(spec)}"))
    assert folder_of(spec) == old


def test_a_slug_fits_a_file_name(tmp_path):
    spec = compose_cell([*TINY, "method=rtn"])
    long = dataclasses.replace(spec, model=dataclasses.replace(spec.model, name="é" * 300))
    assert len(labels.slug(long).encode()) <= labels.SLUG_LENGTH
    create(dataclasses.replace(long, execution=dataclasses.replace(long.execution, runs_dir=str(tmp_path))))


def frame_of(*requests):
    specs = [compose_cell([*TINY, *words]) for words in requests]
    return tables.tidy([(folder_of(spec), spec) for spec in specs])


def test_rows_are_grouped_by_bits_and_not_by_names():
    """A 5-bit cell named w4 is not among the 4-bit rows; a 4-bit cell of another name is."""
    w4 = compose_cell([*TINY, "method=rtn"])
    lying = compose_cell([*TINY, "method=gptq", "bitwidth.w_bits=5"])
    lying = dataclasses.replace(lying, bitwidth=dataclasses.replace(lying.bitwidth, name="w4"))
    other = compose_cell([*TINY, "method=qep"])
    other = dataclasses.replace(other, bitwidth=dataclasses.replace(other.bitwidth, name="mine"))
    frame = tables.tidy([(folder_of(spec), spec) for spec in (w4, lying, other)])
    assert frame["bitwidth"].tolist() == ["w4", "w5", "w4"]


def test_models_of_one_name_are_two_models():
    spec = compose_cell([*TINY, "method=rtn"])
    twin = dataclasses.replace(spec, model=dataclasses.replace(spec.model, digest="sha256:0123456789abcdef"))
    frame = tables.tidy([(folder_of(one), one) for one in (spec, twin)])
    assert len(set(frame["model"])) == 2
    assert frame["model"].iloc[1] == "tiny digest=0123456789ab"


def test_neighbours_say_an_option_in_which_they_differ():
    frame = frame_of(["method=gptq"], ["method=gptq", "method.solver.damping=0.1"], ["method=rtn"])
    assert frame["method"].tolist() == ["gptq damping=0.01", "gptq damping=0.1", "rtn"]


def test_rotation_seeds_share_a_row():
    frame = frame_of(["method=resq"], ["method=resq", "method.transform.rotation_seed=3"])
    assert frame["method"].tolist() == ["resq", "resq"]
    assert frame["rotation_seed"].tolist() == [0, 3]
    assert frame["variant"].nunique() == 1


def test_a_calibration_that_all_rows_share_is_in_no_name():
    shared = frame_of(["method=gptq", "calibration.n_samples=8"], ["method=qep", "calibration.n_samples=8"])
    assert shared["method"].tolist() == ["gptq", "qep"]
    unequal = frame_of(["method=gptq", "calibration.n_samples=8"], ["method=qep"])
    assert unequal["method"].tolist() == ["gptq calibration.n_samples=8", "qep"]
