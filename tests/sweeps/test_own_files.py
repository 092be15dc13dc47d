"""Configuration files of the user: beside the command line, in sweep files, in labels and errors."""

import dataclasses
import shutil

import pytest
import yaml

from ptqbench.cell.folders import conf_folder, group_names, own_folders, with_own
from ptqbench.cli import main
from ptqbench.errors import ConfigError
from ptqbench.sweeps.compose import cells, compose_cell
from ptqbench.sweeps.files import load_sweep
from ptqbench.sweeps.listing import KINDS, entries, options

FILES = {
    "method/mine.yaml": "# Mine: GPTQ with more damping. And more.\ndefaults:\n  - gptq\n"
    "  - override /calibration@calibration: tiny\n  - override solver: heavy\n  - _self_\nname: mine\n",
    "method/solver/heavy.yaml": "name: gptq\ndamping: 0.1\n",
    "bitwidth/w5g32.yaml": "name: w5g32\nw_bits: 5\na_bits: 16\nk_bits: 16\nv_bits: 16\ngroup_size: 32\n",
}
SMALL = ["model=tiny", "calibration.n_samples=2", "calibration.seq_len=32"]


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "a folder, of my = own"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def sweep(own):
    path = own.parent / "sweep.yaml"
    grids = [{"method": ["mine", "gptq"], "bitwidth": ["w5g32", "w3"]}]
    path.write_text(yaml.safe_dump({"name": "s", "config_dir": own.name, "common": SMALL, "grids": grids}))
    return path


def test_a_cell_of_own_files_is_the_cell_with_their_values(own):
    with with_own(own):
        mine = compose_cell(["+method=mine", "bitwidth=w5g32", *SMALL])
        other = compose_cell(["+method=mine", "bitwidth=w5g32", *SMALL, "method.solver.damping=0.2"])
    values = ["method.solver.damping=0.1", "bitwidth.w_bits=5", "bitwidth.group_size=32"]
    same = compose_cell(["+method=gptq", "calibration=tiny", "bitwidth=w4", *SMALL, *values])
    assert mine.method.solver == same.method.solver
    assert (mine.bitwidth.w_bits, mine.bitwidth.group_size, mine.bitwidth.name) == (5, 32, "w5g32")
    # Names are for people: labels say what differs from the file of that name.
    assert (mine.method.name, [path for path in mine.changed if path.startswith(("method", "bitwidth"))]) == (
        "mine",
        [],
    )
    assert "method.solver.options.damping" in other.changed
    assert not own_folders()


def test_every_command_takes_own_files(own, sweep, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    runs = f"execution.runs_dir={tmp_path / 'runs'}"
    assert main(["--config-dir", str(own), "+method=mine", "bitwidth=w5g32", *SMALL, runs]) == 0
    assert (
        main([f"--config-dir={own}", "+method=mine", "bitwidth=w5g32,w3", *SMALL, runs, "-m", "launcher=inline"]) == 0
    )
    # The sweep names the folder, relative to its file; its cells are those of the command lines.
    for command in (["plan"], ["status", "--all"], ["table", "--format", "csv"], ["sweep", "--dry-run"]):
        capsys.readouterr()
        assert main([*command, str(sweep), "--runs-dir", str(tmp_path / "runs")]) == 0, command
        out = capsys.readouterr().out
        assert "mine" in out, (command, out)
        assert "invalid" not in out, (command, out)
    for command in ("retry", "report", "claims", "status"):
        assert main([command, str(sweep), "--runs-dir", str(tmp_path / "runs")]) == 0
    assert "2 done" in capsys.readouterr().out
    # A shipped sweep with a bitwidth of one's own.
    assert main(["plan", "demo", "bitwidth=w5g32", "--config-dir", str(own)]) == 0
    assert "invalid" not in capsys.readouterr().out


def test_what_is_composed_again_follows_the_files(own, sweep):
    before = [cell.spec.method.solver.options["damping"] for cell in cells(load_sweep(str(sweep)), [])]
    (own / "method/solver/heavy.yaml").write_text("name: gptq\ndamping: 0.3\n")
    after = [cell.spec.method.solver.options["damping"] for cell in cells(load_sweep(str(sweep)), [])]
    assert (before, after) == ([0.1, 0.01, 0.1, 0.01], [0.3, 0.01, 0.3, 0.01])


def test_a_file_that_writes_to_another_section_is_honoured(own, sweep):
    bits = FILES["bitwidth/w5g32.yaml"].replace("\n", "\n  ")
    (own / "bitwidth/w5g32.yaml").write_text(f"# @package _global_\nmodel: {{dtype: bfloat16}}\nbitwidth:\n  {bits}\n")
    found = cells(load_sweep(str(sweep)), [])
    assert [cell.spec.model.dtype for cell in found] == ["bfloat16", "bfloat16", "float32", "float32"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda own: shutil.rmtree(own), "no folder of configuration files '.*my = own'"),
        (lambda own: [(own / name).unlink() for name in FILES], "expected files such as method/mine.yaml"),
        (
            lambda own: (own / "method/gptq.yaml").write_text("name: x"),
            "expected a name of its own, but .*method/gptq.yaml exists",
        ),
        (lambda own: (own / "method/mine.yaml").write_bytes(b"# \xff\xfe"), "mine.yaml is not UTF-8 text"),
    ],
)
def test_a_wrong_folder_is_one_line(own, sweep, capsys, change, words):
    change(own)
    for line in (
        ["plan", "demo", "--config-dir", str(own)],
        ["plan", str(sweep)],
        ["--config-dir", str(own), "+method=mine", *SMALL],
    ):
        with pytest.raises(ConfigError, match=words):
            raise_of(line)


def raise_of(line):
    """Run a command and raise what it reports."""
    from ptqbench import cli

    cli._dispatch(line)


def test_an_unknown_choice_names_the_folder_that_was_searched(own, capsys):
    assert main(["--config-dir", str(own), "+method=mien", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "unknown method 'mien'; did you mean 'mine'?" in said
    assert f"searched {own / 'method'} too" in said
    assert main(["+method=mine", *SMALL]) == 2
    assert "--config-dir FOLDER" in capsys.readouterr().err


def test_list_shows_what_is_there(own, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    for kind in KINDS:
        found = entries(kind)
        assert len({entry.name for entry in found}) == len(found) > 0
        assert main(["list", kind]) == 0
        shown = capsys.readouterr().out
        assert all(entry.name in shown for entry in found)
    assert {entry.name for entry in entries("methods")} == {
        path.stem for path in (conf_folder() / "method").glob("*.yaml")
    }
    assert main(["list", "methods", "--config-dir", str(own)]) == 0
    ours, theirs = capsys.readouterr().out.split("your own")
    assert "mine" not in ours
    assert str(own) in theirs
    assert "Mine: GPTQ with more damping " in theirs
    assert main(["list", "method", "mine", "--config-dir", str(own)]) == 0
    assert FILES["method/mine.yaml"] in capsys.readouterr().out
    with with_own(own):
        assert "mine" in group_names("method")


def test_list_shows_options_as_the_member_has_them(capsys, monkeypatch):
    from ptqbench.methods.solvers import Gptaq

    found = {option.name: option for option in options("solver", "gptaq")}
    assert list(found) == [field.name for field in dataclasses.fields(Gptaq)]
    assert (found["strength"].takes, found["strength"].default) == ("number >= 0, <= 1", "0.25")
    assert found["group_refit"].takes == "fresh | stale"
    assert found["act_order"].default == "false"
    assert (
        found["damping"].meaning == "Added to the diagonal of the second moment, as a fraction of its mean."
    )  # said by Gptq
    for role in ("transform", "target", "solver", "refine"):
        for entry in entries({"refine": "refinements"}.get(role, f"{role}s")):
            assert entry.file is not None or all(
                option.meaning and option.takes for option in options(role, entry.name)
            ), entry
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["list", "solver", "gptaq"]) == 0
    assert "method.solver.OPTION=VALUE" in capsys.readouterr().out
    assert main(["list", "solvr"]) == 2
    assert main(["list", "solver", "gptqq"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "did you mean 'solvers'" in first
    assert "did you mean 'gptq'" in second
