"""The command line as a user meets it: real processes, exit status, one line on standard error."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import warm
from ptqbench.cell.folders import conf_folder, group_names
from ptqbench.cli import main
from ptqbench.errors import CalibrationError, ConfigError, RunFailed
from ptqbench.runs.places import write_output
from ptqbench.sweeps.compose import Composer, compose_cell, compose_data
from ptqbench.sweeps.pins import Known, pin
from ptqbench.sweeps.resolve import validated
from ptqbench.sweeps.words import rewrite


def ptqbench(*arguments, cwd):
    return warm.run(*arguments, cwd=cwd, COLUMNS="200")


def interpreter(*arguments, cwd, **environment):
    """The same from the start of Python."""
    command, given = [sys.executable, "-m", "ptqbench", *arguments], os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, timeout=300)


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
    assert second.stdout.split("metric", 1)[1] == first.stdout.split("metric", 1)[1]
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
    assert "| fp16 | fp16 | 16 | 16.00 |" in table.stdout


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
    (["+method=gptq", "model=tiny", "model.outlier_channels=129"], ["expected 0 to 128", "hidden size"]),
    (["gptq"], ["unknown command 'gptq'", "+method=NAME"]),
    (["swep", "demo"], ["unknown command 'swep'", "did you mean 'sweep'"]),
    (["sweep", "demoo"], ["no sweep 'demoo'", "did you mean 'demo'"]),
]


TOO_LONG = "a" * 500
BAD += [
    (["plan"], ["plan", "required: SWEEP"]),
    (["plan", "demo", "--nosuch"], ["unrecognized arguments: --nosuch"]),
    (["plan", "demo", "seed=["], ["seed=[", "quote"]),
    (["plan", "demo", "foo"], ["expected key=value", "'foo'"]),
    (["prefetch", "+method=rtn", "seed=["], ["seed=[", "quote"]),
    (["gc", "--budget-gib", "nan"], ["--budget-gib", "'nan'"]),
    (["gc", "--budget-gib", "inf"], ["--budget-gib"]),
    (["gc", "--budget-gib", "-1"], ["--budget-gib"]),
    (["report", "--output", ""], ["--output", "name of a file"]),
    (["report", "--output", "/tmp"], ["--output", "a folder"]),
    (["report", "--output", "/dev/null/x"], ["--output", "'/dev/null', which is a file"]),
    (["table", "--output", TOO_LONG], ["--output", "too long"]),
    (["table", "--picture", "x.nosuch"], ["--picture", ".png"]),
    *[([*command, "--runs-dir", "nosuch"], ["--runs-dir", "no such folder 'nosuch'"])
      for command in (["status"], ["table"], ["report"], ["sync"], ["gc", "--budget-gib", "1"])],
    (["plan", "demo", "--runs-dir", ""], ["--runs-dir", "expected a folder"]),
    (["prefetch", "demo", "--runs-dir", "/dev/null"], ["--runs-dir", "expected a folder"]),
    (["+method=rtn", "execution.runs_dir="], ["execution.runs_dir"]),
    (["+method=rtn", "--package", "nosuch", "--cfg", "job"], ["package 'nosuch' not found"]),
    (["+method=rtn", "--package", "model"], ["--package", "--cfg"]),
    (["+method=rtn", "metod=1", "--cfg", "job"], ["unknown key 'metod'", "did you mean 'method'"]),
    (["+method=rtn", "--cfg", "jb"], ["--cfg", "job|hydra|all", "'jb'"]),
    (["+method=rtn", "--config-dir", "nosuch"], ["no folder of configuration files", "nosuch"]),
    (["+method=rtn", "seed=${nosuch}"], ["unknown key 'nosuch'"]),
    (["+method=rtn", "seed=0,1"], ["seed=0,1: several values", "-m"]),
    (["+method=rtn", "-m", "seed=range(0,1000000)"], ["more than 100,000 cells"]),
    (["+method=rtn", "-m", "seed=interval(0,1)"], ["seed=interval(0,1)"]),
    (["+method=rtn", "-m", "seed=["], ["seed=[", "quote"]),
    (["+method=rtn", "model.path=/a=b"], ["\"model.path='/a=b'\""]),
    (["+method=rtn", "hydra/launcher=basic"], ["launcher=local"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_bad_requests_give_one_line_and_status_2(words, expected, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert all(word in output.err for word in expected), output.err
    assert not (tmp_path / "runs").exists()


def after_an_interruption(error):
    """What a library raises while it cleans up after a signal."""
    try:
        try:
            raise KeyboardInterrupt
        finally:
            raise error
    except type(error) as raised:
        return raised


WRONG = [
    (OSError(28, "No space left on device", "runs/x"), 1, ["No space left on device (runs/x)", "free space"]),
    (OSError(5, "Input/output error", "runs/x"), 1, ["Input/output error (runs/x)"]),
    (PermissionError(13, "Permission denied", "runs"), 2, ["'runs' may not be read or written"]),
    (NotADirectoryError(20, "Not a directory", "f/x"), 2, ["'f/x' lies below a file"]),
    (MemoryError(), 1, ["out of memory"]),
    (KeyError("x"), 1, ["defect", "KeyError: 'x'", "cli.py:"]),
    (ValueError("two\nlines"), 1, ["two lines"]),
    (RunFailed("it failed"), 1, ["it failed"]),
    (ConfigError("wrong"), 2, ["wrong"]),
    (CalibrationError("too short"), 2, ["too short"]),
    (KeyboardInterrupt(), 130, ["interrupted"]),
    (after_an_interruption(UnboundLocalError("cleaning up")), 130, ["interrupted"]),
]


@pytest.mark.parametrize("words", [["status"], ["+method=rtn"]], ids=["command", "cell"])
@pytest.mark.parametrize(("error", "status", "expected"), WRONG, ids=[repr(error) for error, *_ in WRONG])
def test_every_exception_is_one_line_with_the_right_status(
    error, status, expected, words, tmp_path, monkeypatch, capfd
):
    def fail(*_):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ptqbench.results.terminal.print_status", fail)
    monkeypatch.setattr("ptqbench.foreground.run_one", fail)
    assert main(words) == status
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("ptqbench: ")
    assert all(word in said for word in expected), said


def test_output_follows_links_and_writes_to_devices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "page.html").write_text("old")
    (tmp_path / "link.html").symlink_to("there/page.html")
    assert main(["report", "--output", "link.html"]) == 0
    assert (tmp_path / "link.html").is_symlink()
    assert "<html" in (tmp_path / "there" / "page.html").read_text()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(str(tmp_path / "pipe"), "some text")
    assert os.read(reader, 100) == b"some text"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match="No space left"):
        write_output("/dev/full", "some text")
    assert not Path("/dev/full").is_file()


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8"])
def test_any_terminal_can_be_printed_to(encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr("ptqbench.results.terminal.print_status", lambda *_: print("1 ± 2 … é 本 \udce9"))
    assert main(["status"]) == 0
    said = terminal.buffer.getvalue().decode(encoding)
    assert said.startswith({"ascii": "1 +- 2 ... ", "iso-8859-1": "1 ± 2 ... é ", "utf-8": "1 ± 2 … é 本 "}[encoding])


def test_a_full_output_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ptqbench", "--help"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["plan", "demo"],
        ["status", "--all"],
        ["table"],
        ["table", "--format", "csv"],
        ["doctor"],
        ["+method=rtn", "--cfg", "job"],
    ],
)
def test_a_reader_that_goes_away_ends_a_command_quietly(words, tmp_path, monkeypatch, capfd):
    """As ``| head`` does, whatever prints: Python, rich or Hydra."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-rtn-w4-s0-0123456789ab").mkdir(parents=True)
    (tmp_path / "runs" / "tiny-rtn-w4-s0-0123456789ab" / "spec.json").write_text("{}")
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert main(words) == 141
    assert capfd.readouterr().err == ""


def test_nothing_is_left_in_the_working_folder(checkpoint, tmp_path, monkeypatch, capfd):
    """A cell and a multirun, of whatever outcome, write to the runs folder alone, and need no working folder to write to."""
    words = [*small_cell(checkpoint(), "bitwidth=w8"), f"execution.runs_dir={tmp_path / 'runs'}", "launcher=inline"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert main(["+method=rtn", *words]) == 0
    assert main(["+method=fp16,rtn", "bitwidth=fp16", *words, "-m"]) == 0
    assert main(["+method=rtn", *words, "seed=a,b", "-m"]) == 1
    assert main(["status", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert list((tmp_path / "empty").iterdir()) == []
    monkeypatch.chdir("/proc")  # where nobody can write
    capfd.readouterr()
    assert main(["+method=rtn", *words]) == 0
    assert main(["+method=rtn", *words, "seed=0,1", "-m"]) == 0
    assert "already done" in capfd.readouterr().out


def test_values_of_a_multirun_arrive_as_they_are(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name in ("x=1", "it's"):
        (tmp_path / name).mkdir()
    paths = ",".join(f'"{tmp_path / name}"' for name in ("x=1", "it's"))
    assert main(["+method=rtn", "model=local", f"model.path={paths}", "-m"]) == 1
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("failed +method")]
    for name, line in zip(("x=1", "it's"), said, strict=True):
        assert f"model folder {tmp_path / name} has no config.json" in line


def test_runs_dir_of_any_name(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text("name: two\ncommon: [model=tiny]\ngrids: [{method: [rtn, gptq]}]\n")
    assert main(["plan", "two.yaml", "--runs-dir", "é = ${x}, #1 [it's]"]) == 0
    assert "2 pending" in capfd.readouterr().out


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
    assert "usage: python -m ptqbench plan" in ptqbench("help", "plan", cwd=tmp_path).stdout
    assert "+method=NAME" in interpreter("--help", cwd=tmp_path).stdout
    shown = interpreter("+method=gptq", "seed=7", "--cfg", "job", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "seed: 7" in shown.stdout
    assert "damping: 0.01" in shown.stdout


@pytest.mark.parametrize("method", group_names("method"))
def test_every_method_composes_and_validates_with_every_role_file(method):
    """A composition chooses a file for each role; there are as many as the role with most files needs."""
    choices = {
        role: group_names(f"method/{role}")
        for role in ("transform", "target", "solver", "refine", "grid", "activation")
    }
    composer = Composer()
    for i in range(max(map(len, choices.values()))):
        chosen = {role: names[i % len(names)] for role, names in choices.items()}
        words = [f"+method={method}", *(f"method/{role}={name}" for role, name in chosen.items())]
        cell = pin(validated(composer(words)), Known())
        assert cell.method.name == method
        for role, name in chosen.items():
            written = yaml.safe_load((conf_folder() / "method" / role / f"{name}.yaml").read_text())
            assert "name" not in written or getattr(cell.method, role).name == written["name"]


@pytest.mark.parametrize("bitwidth", group_names("bitwidth"))
def test_every_bitwidth_composes(bitwidth):
    assert compose_cell(["+method=gptq", f"bitwidth={bitwidth}"]).bitwidth.name == bitwidth


def test_every_calibration_and_evaluation_validates():
    composer = Composer()
    for group in ("calibration", "evaluation"):
        for name in group_names(group):
            cell = validated(composer(["+method=gptq", f"{group}={name}"]))
            assert cell.calibration is not None
    assert compose_data(["+method=gptq", "model=llama-3-8b"])["model"]["hub_id"] == "meta-llama/Meta-Llama-3-8B"


def test_defaults_follow_the_model_first_and_the_method_second():
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
    done = interpreter(
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
