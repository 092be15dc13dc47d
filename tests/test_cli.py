"""The command line as a user meets it: real processes, exit status, one line on standard error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ptqbench.cell.folders import conf_folder, group_names
from ptqbench.errors import ConfigError
from ptqbench.sweeps.compose import Composer, compose_cell, rewrite
from ptqbench.sweeps.resolve import resolve


def ptqbench(*arguments, cwd, timeout=300, **environment):
    command = [sys.executable, "-m", "ptqbench", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"COLUMNS": "200"} | environment,
    )


def small_cell(folder, *more):
    text = Path(folder).parent / "text.txt"
    text.write_text(
        "".join(f"The {a} cat saw {b} red birds near house {a * b}.|" for a in range(30) for b in range(30))
    )
    return [
        "model=local", f"model.path={folder}", "calibration=file", f"calibration.path={text}", "calibration.separator='|'",
        "calibration.portion=[0,0.5]", "calibration.n_samples=4", "calibration.seq_len=32", "evaluation=file",
        f"evaluation.texts.file.path={text}", "evaluation.texts.file.separator='|'", "evaluation.texts.file.portion=[0.5,1]",
        "evaluation.texts.file.seq_len=32", *more,
    ]  # fmt: skip


def test_main_job_runs_and_a_second_call_says_done(checkpoint, tmp_path):
    words = small_cell(checkpoint("qwen2"), "bitwidth=w3")
    first = ptqbench("+method=gptq", *words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "file/perplexity" in first.stdout
    assert "(done)" in first.stdout
    (folder,) = (tmp_path / "runs").glob("*-*")
    assert str(folder.relative_to(tmp_path)) in first.stdout
    written = (folder / "result.json").read_bytes()
    second = ptqbench("method=gptq", *words, cwd=tmp_path)  # without the plus: the same cell
    assert second.returncode == 0, second.stderr
    assert "already done" in second.stdout
    assert (folder / "result.json").read_bytes() == written
    assert second.stdout.split("\n")[1:] == first.stdout.split("\n")[1:]
    assert len(list((folder / "attempts").iterdir())) == 1


def test_multirun_flag_anywhere_runs_every_combination_and_counts(checkpoint, tmp_path):
    words = small_cell(checkpoint())
    done = ptqbench("method=fp16,rtn", "-m", *words, "bitwidth=fp16,w8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped") == 3, done.stdout  # fp16 x w8, rtn x fp16, and the count
    assert "2 done, 2 skipped" in done.stdout
    assert len(list((tmp_path / "runs").glob("*-*"))) == 2
    status = ptqbench("status", cwd=tmp_path)
    assert "2 done" in status.stdout
    table = ptqbench("table", "--format", "md", cwd=tmp_path)
    assert "| local | fp16 | fp16 | 16 | 16.00 |" in table.stdout


BAD = [
    (["+method=gptqq"], ["unknown method 'gptqq'", "did you mean 'gptq'"]),
    (["+method=gptq", "model=tinny"], ["unknown model 'tinny'", "did you mean 'tiny'"]),
    (["+method=gptq", "bitwidth=w5"], ["unknown bitwidth 'w5'", "w4"]),
    (["+method=gptq", "metod=1"], ["unknown key 'metod'", "did you mean 'method'"]),
    (["+method=gptq", "+model.typo=1"], ["unknown key 'model.typo'"]),
    (["+method=gptq", "method.solver.dampign=1"], ["method.solver.dampign", "did you mean 'damping'"]),
    (["+method=gptq", "+method.solver.dampign=1"], ["method.solver.dampign", "did you mean 'damping'"]),
    (["+method=gptq", "method.solver.damping=much"], ["method.solver.damping", "number", "'much'"]),
    (["+method=gptq", "method.solver.column_block=0"], ["method.solver.column_block", "0"]),
    (["+method=gptq", "bitwidth.w_bits=1"], ["bitwidth.w_bits", "greater than or equal to 2", "got 1"]),
    (["+method=gptq", "bitwidth.w_bits=17"], ["bitwidth.w_bits", "less than or equal to 16"]),
    (["+method=gptq", "seed=zero"], ["seed", "integer", "'zero'"]),
    (["+method=gptq", "method/solver=gptqq"], ["unknown method/solver 'gptqq'", "did you mean 'gptq'"]),
    (["+method=resq", "method.transform.high_fraction=0.001"], ["high_fraction"]),
    (["+method=gptq", "model=local"], ["model.path=FOLDER"]),
    (["+method=gptq", "model=local", "model.path=no/such/folder"], ["no/such/folder", "no such folder"]),
    (["+method=gptq", "calibration=file"], ["needs a path"]),
    (["+method=gptq", "calibration=file", "calibration.path=nowhere.txt"], ["nowhere.txt", "does not exist"]),
    (["+method=fp16", "bitwidth=w4"], ["skipped", "rounds nothing"]),
    (["model=tiny"], ["no method given", "gptq"]),
    (["swep", "demo"], ["unknown command 'swep'", "did you mean 'sweep'"]),
    (["sweep", "demoo"], ["no sweep 'demoo'", "did you mean 'demo'"]),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_requests_give_one_line_and_status_2(words, expected, tmp_path, monkeypatch, capfd):
    from ptqbench.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert all(word in output.err for word in expected), output.err
    assert not (tmp_path / "runs").exists()


def damage(folder, how):
    weights = folder / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 5000)
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config not json":
        (folder / "config.json").write_text("{")
    elif how == "foreign architecture":
        (folder / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no weights", "has no weights"),
        ("truncated", "safetensors"),
        ("garbage", "safetensors"),
        ("no config", "has no config.json"),
        ("config not json", "not valid JSON"),
        ("foreign architecture", "'mamba'"),
        ("no tokenizer", "has no tokenizer"),
    ],
)
def test_damaged_checkpoints_are_refused_before_a_run_begins(checkpoint, tmp_path, how, words):
    folder = checkpoint()
    damage(folder, how)
    done = ptqbench("+method=gptq", *small_cell(folder), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert words in done.stderr
    assert not (tmp_path / "runs").exists()


def test_failure_inside_a_run_is_recorded_and_leaves_no_result(checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = checkpoint()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = ptqbench("+method=gptq", *small_cell(folder), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "runs").glob("*-*")
    failure = json.loads((run / "failure.json").read_text())
    assert failure["class"] == "NumericalError"
    assert "model.layers.1.self_attn.o_proj.weight" in failure["message"]
    assert "Traceback" in failure["traceback"]
    assert not (run / "result.json").exists()
    assert "failed" in ptqbench("status", cwd=tmp_path).stdout
    assert "o_proj" in ptqbench("table", cwd=tmp_path).stdout


def test_one_failed_cell_does_not_stop_a_sweep(checkpoint, tmp_path):
    words = small_cell(checkpoint(), "calibration.seq_len=32,900000")
    done = ptqbench("+method=rtn", "-m", *words, cwd=tmp_path)
    assert done.returncode == 1
    assert "1 done, 1 failed" in done.stdout
    assert "900000" in done.stdout


def test_rewrite():
    assert rewrite(["method=gptq", "seed=1,2", "-m"]) == ["-m", "+method=gptq", "seed=1,2"]
    assert rewrite(["+method=gptq", "--cfg", "job", "seed=1"]) == ["--cfg", "job", "+method=gptq", "seed=1"]
    assert rewrite(["method.solver.damping=1"]) == ["method.solver.damping=1"]


def test_help_and_cfg(tmp_path):
    assert "+method=NAME" in ptqbench("--help", cwd=tmp_path).stdout
    shown = ptqbench("+method=gptq", "seed=7", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "seed: 7" in shown.stdout
    assert "damping: 0.01" in shown.stdout


def test_every_method_composes_and_validates_with_every_role_file():
    roles = ("transform", "target", "solver", "refine", "grid", "activation")
    words = [f"method/{role}={choice}" for role in roles for choice in group_names(f"method/{role}")]
    composer = Composer()
    for method in group_names("method"):
        for word in words:
            assert resolve(composer([f"+method={method}", word])).method.name == method


@pytest.mark.parametrize("bitwidth", group_names("bitwidth"))
def test_every_bitwidth_composes(bitwidth):
    assert compose_cell(["+method=gptq", f"bitwidth={bitwidth}"]).bitwidth.name == bitwidth


def test_every_calibration_and_evaluation_validates():
    from ptqbench.sweeps.compose import compose_data
    from ptqbench.sweeps.resolve import validated

    for group in ("calibration", "evaluation"):
        for name in group_names(group):
            cell = validated(compose_data(["+method=gptq", f"{group}={name}"]))
            assert cell.calibration is not None
    assert compose_data(["+method=gptq", "model=llama-3-8b"])["model"]["hub_id"] == "meta-llama/Meta-Llama-3-8B"


def test_defaults_follow_the_model_first_and_the_method_second():
    from ptqbench.sweeps.compose import compose_data
    from ptqbench.sweeps.resolve import validated

    tiny = validated(compose_data(["+method=gptq"]))
    assert (tiny.calibration.dataset, list(tiny.evaluation.texts)) == ("tiny", ["tiny"])
    large = validated(compose_data(["+method=gptq", "model=qwen2.5-7b", "calibration.n_samples=64"]))
    assert (large.calibration.dataset, large.calibration.n_samples, large.calibration.seq_len) == ("c4", 64, 2048)
    assert list(large.evaluation.texts) == ["wikitext2"]
    chosen = validated(compose_data(["+method=gptq", "model=qwen2.5-7b", "calibration=wikitext2"]))
    assert (chosen.calibration.dataset, chosen.calibration.sampling) == ("wikitext2", "joined_random")


def test_unquantized_cell_ignores_what_cannot_matter():
    from ptqbench.cell.fingerprint import run_id

    ids = {
        run_id(compose_cell(["+method=fp16", *words]))
        for words in (["seed=0"], ["seed=3"], ["calibration.n_samples=5"])
    }
    assert len(ids) == 1


def test_hub_model_without_network_says_what_to_do(tmp_path):
    done = ptqbench(
        "+method=gptq", "model=llama-3.2-1b", cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "empty")
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "meta-llama/Llama-3.2-1B" in done.stderr
    assert "model.path=FOLDER" in done.stderr


def test_user_configuration_folder(checkpoint, tmp_path):
    (tmp_path / "mine" / "bitwidth").mkdir(parents=True)
    text = (conf_folder() / "bitwidth" / "w4.yaml").read_text()
    (tmp_path / "mine" / "bitwidth" / "w5.yaml").write_text(
        text.replace("name: w4", "name: w5").replace("w_bits: 4", "w_bits: 5")
    )
    done = ptqbench(
        "+method=rtn", *small_cell(checkpoint(), "bitwidth=w5"), "--config-dir", tmp_path / "mine", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "5." in done.stdout


def test_conf_override_must_hold_a_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("PTQBENCH_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match="PTQBENCH_CONF"):
        conf_folder()
