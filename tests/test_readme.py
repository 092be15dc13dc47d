"""The README's commands are run (or, where they need a large model, composed and validated), and its table is true."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from ptqbench.cell.folders import conf_folder, group_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"\.venv/bin/python -m ptqbench (.*)", line.strip())
            if found:
                yield found[1]


COMMANDS = list(commands())


def is_large(command):
    """Whether a command needs a large model, or a folder of the reader."""
    return any(word in command for word in ("FOLDER", "qwen", "llama", "coquant_table1")) and not command.startswith(
        ("plan", "table")
    )


def test_readme_has_commands():
    assert len(COMMANDS) >= 8
    assert "make demo" in README


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if not is_large(c)])
def test_command_runs(command, tmp_path, monkeypatch, capfd):
    from ptqbench.cli import main

    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    words = [word for word in words if word != "--watch"]  # it would wait for cells that nobody runs here
    if words[0] == "sweep":
        words.append("launcher=print")  # the demo itself is run by `make demo`
    if any("method" in word for word in words):  # shorter, but the same path through the code
        words = [re.sub(r"n_samples=\d+", "n_samples=4", word) for word in words]
        words += [] if any(word.startswith("calibration.n_samples=") for word in words) else ["calibration.n_samples=4"]
        words += ["+evaluation.texts.tiny.portion=[0,0.02]", "evaluation.tasks=[]"]
    assert main(words) == 0, capfd.readouterr().err


@pytest.mark.parametrize("command", [c for c in COMMANDS if is_large(c)])
def test_command_composes(command):
    from ptqbench.sweeps.compose import requested

    words = [word for word in shlex.split(command, comments=True) if not word.startswith("-")]
    cells = requested(words[1:] if words[0] in ("sweep", "prefetch") else words)
    assert all(cell.draft.method.name for cell in cells)


def test_example_method_of_the_readme_composes(tmp_path, monkeypatch):
    import shutil

    from ptqbench.sweeps.compose import compose_cell

    (example,) = [block for block in re.findall(r"```yaml\n(.*?)```", README, flags=re.S) if "defaults:" in block]
    shutil.copytree(conf_folder(), tmp_path / "conf")
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(example)
    monkeypatch.setenv("PTQBENCH_CONF", str(tmp_path / "conf"))
    assert compose_cell(["+method=mine"]).method.name == yaml.safe_load(example)["name"]


@pytest.mark.parametrize("group", ["method", "bitwidth"])
def test_every_choice_is_in_the_readme(group):
    for name in group_names(group):
        assert re.search(rf"`[^`]*\b{re.escape(name)}\b[^`]*`", README), f"{group} {name} is not mentioned in README.md"


def test_paths_in_the_readme_exist():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README) + re.findall(r"^\| `(\w+/[\w/.]*)`", README, flags=re.M):
        assert (
            (ROOT / path).exists() or (ROOT / "src" / "ptqbench" / path).exists() or path in group_names("bitwidth")
        ), path
