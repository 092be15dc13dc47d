"""A small sweep on a random model, as users run it: separate processes and the real command line."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import warm

SWEEP = """
name: small
common:
  - model=local
  - model.path={model}
  - calibration=file
  - calibration.path={text}
  - calibration.separator='|'
  - calibration.portion=[0,0.5]
  - calibration.n_samples=4
  - calibration.seq_len=32
  - evaluation=file
  - evaluation.texts.file.path={text}
  - evaluation.texts.file.separator='|'
  - evaluation.texts.file.portion=[0.5,1]
  - evaluation.texts.file.seq_len=32
  - execution.threads=1
  - resources.host_mem_gib=2
  - resources.time_min=20
grids:
{grids}
"""


def wait_for(condition: Callable[[], Any], timeout: float = 240.0, step: float = 0.1) -> Any:
    """Return what a condition gives once it gives something true."""
    deadline = time.time() + timeout
    while not (found := condition()):
        assert time.time() < deadline, f"nothing happened within {timeout} s"
        time.sleep(step)
    return found


class Small:
    """A folder with a random checkpoint, a text and a sweep file; commands run in it."""

    def __init__(self, folder: Path, make_checkpoint: Callable[..., Path]) -> None:
        self.folder, self.sweep = folder, folder / "small.yaml"
        self.model = make_checkpoint(folder / "model", "qwen2", num_hidden_layers=3)
        self.text = folder / "text.txt"
        self.text.write_text(
            "".join(f"The {a} cat saw {b} red birds near house {a * b}.|" for a in range(30) for b in range(30))
        )
        self.grids("{method: [rtn, gptq], bitwidth: [w4, w3]}")

    def damaged_model(self) -> Path:
        """A copy of the model with one weight that is no number: its cells fail when they run."""
        folder = self.folder / "nan-model"
        shutil.copytree(self.model, folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def grids(self, *lines: str) -> None:
        body = "\n".join(f"  - {line}" for line in lines)
        self.sweep.write_text(SWEEP.format(model=self.model, text=self.text, grids=body))

    def seeds(self, number: int) -> None:
        """Four cells for each of so many seeds."""
        self.grids(f"{{method: [rtn, gptq], bitwidth: [w4, w3], seed: {list(range(number))}}}")

    def command(self, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        return warm.run(*words, timeout=600, cwd=self.folder, COLUMNS="250", **environment)

    def start(self, *words: object, **environment: str) -> warm.Started:
        return warm.Started(*words, cwd=self.folder, COLUMNS="250", **environment)

    def words(self) -> list[str]:
        """The common overrides, for a command line without a sweep file."""
        import yaml

        return list(yaml.safe_load(self.sweep.read_text())["common"])

    @property
    def runs(self) -> list[Path]:
        return sorted(path.parent for path in (self.folder / "runs").glob("*/spec.json"))

    def results(self) -> dict[str, dict]:
        """What must not depend on how often a cell was interrupted, by run folder."""
        found = {}
        for path in self.runs:
            result = json.loads((path / "result.json").read_text())
            kept = ("format", "run_id", "model", "method", "bitwidth", "seed", "metrics", "bits")
            found[path.name] = {key: result[key] for key in kept}
        return found

    def heartbeats(self) -> list[Path]:
        """Signs of life of all attempts so far."""
        return list((self.folder / "runs").glob("*/attempts/*/heartbeat.json"))

    def note_finished(self, finished: dict[Path, int]) -> None:
        """Remember when each cell finished, and insist that none did so twice."""
        for path in self.runs:
            if (path / "result.json").exists():
                stamp = (path / "result.json").stat().st_mtime_ns
                assert finished.setdefault(path, stamp) == stamp, "finished work was done again"

    def outlive(self, kills: int, seeds_more: int, strike: Callable[..., bool], *words: object) -> None:
        """Give a sweep's command again and again while its processes are killed: the results are those of an undisturbed run.

        Args:
            kills: How many must strike; the sweep grows for as long as it ends before.
            seeds_more: By how many seeds it grows.
            strike: Kills something of the command's process at some moment; tells whether there was something to kill.
            words: Of the command, after the sweep.
        """
        struck, seeds, finished = 0, 0, dict[Path, int]()
        while struck < kills:
            seeds += seeds_more
            self.seeds(seeds)
            for _ in range(3 * kills):
                process = self.start("sweep", self.sweep, *words)
                while struck < kills and process.poll() is None:
                    struck += strike(process)
                out, err = process.communicate(timeout=900)
                self.note_finished(finished)
                if process.returncode == 0:
                    break
            assert process.returncode == 0, out + err
        print(f"{struck} kills, {len(self.runs)} cells, {len(self.heartbeats())} attempts")
        disturbed = self.results()
        reference = self.command("sweep", self.sweep, "launcher=inline", "--runs-dir", "reference")
        assert reference.returncode == 0, reference.stderr
        assert len(disturbed) == 4 * seeds
        assert self.results_of("reference") == disturbed

    def results_of(self, name: str) -> dict[str, dict]:
        """Results of another folder of runs, which takes the place of the present one."""
        (self.folder / "runs").rename(self.folder / f"runs-before-{name}")
        (self.folder / name).rename(self.folder / "runs")
        return self.results()
