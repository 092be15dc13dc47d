"""The command line. First word a command: its own parser; anything else goes to Hydra.

Exit status: 0 done, 1 a cell failed, 2 the request was wrong (one line on standard error, nothing was run).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ptqbench import __version__
from ptqbench.errors import ConfigError, PtqbenchError, RunFailed
from ptqbench.spec import nearest

if TYPE_CHECKING:
    from ptqbench.spec import RunSpec
    from ptqbench.store import RunFolder

HELP = """\
usage: python -m ptqbench +method=NAME [model=NAME] [bitwidth=NAME] [key=value ...] [-m]
       python -m ptqbench COMMAND [options]

One cell: quantize a model, measure it, record the result.
  python -m ptqbench +method=gptq model=tiny bitwidth=w3
  python -m ptqbench +method=rtn,gptq model=tiny bitwidth=w4,w3,w2 -m       every combination, one after another
  python -m ptqbench +method=gptq model=local model.path=FOLDER calibration=file calibration.path=FILE ...
  python -m ptqbench +method=gptq --cfg job                                  show the composed configuration

commands:
  sweep SWEEP      run the cells of a sweep file that are not done yet
  status [SWEEP]   state of every cell, from the run folders
  table [SWEEP]    comparison table of finished cells
  doctor           what is installed and where things are looked for

shell completion: eval "$(ptqbench -sc install=bash)"
"""


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "sweep": _sweep,
        "status": _status,
        "table": _table,
        "doctor": _doctor,
    }
    os.environ.setdefault("TQDM_DISABLE", "1")  # one progress bar, ours, instead of one per library
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(HELP, end="")
            return 0 if arguments else 2
        if arguments[0] == "--version":
            print(f"ptqbench {__version__}")
            return 0
        if arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        if not arguments[0].startswith(("-", "+", "~")) and "=" not in arguments[0]:
            raise ConfigError(f"unknown command {arguments[0]!r}; {nearest(arguments[0], commands)}")
        from ptqbench.compose import run_hydra

        return run_hydra(arguments)
    except RunFailed as error:
        print(f"ptqbench: {error}", file=sys.stderr)
        return 1
    except PtqbenchError as error:
        print(f"ptqbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ptqbench: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser(command: str, description: str, sweep: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m ptqbench {command}", description=description)
    parser.add_argument(
        "sweep", nargs=None if sweep == "required" else "?", help="name of a shipped sweep, or a YAML file"
    )
    parser.add_argument(
        "overrides", nargs="*", help="extra overrides for every cell, e.g. seed=1 execution.runs_dir=FOLDER"
    )
    parser.add_argument("--runs-dir", default=None, help="folder of run folders (default: runs)")
    return parser


def _sweep(arguments: list[str]) -> int:
    from ptqbench.compose import cells
    from ptqbench.foreground import run_cells
    from ptqbench.sweep import load_sweep

    options = _parser("sweep", "Run the cells of a sweep that are not done yet.", "required").parse_intermixed_args(
        arguments
    )
    return run_cells(cells(load_sweep(options.sweep), _overrides(options)))


def _status(arguments: list[str]) -> int:
    from ptqbench.show import print_status

    options = _parser("status", "State of every cell, derived from the run folders.", "optional").parse_intermixed_args(
        arguments
    )
    print_status(_folders(options))
    return 0


def _table(arguments: list[str]) -> int:
    parser = _parser("table", "Comparison table of finished cells.", "optional")
    parser.add_argument("--format", choices=("terminal", "md", "csv"), default="terminal")
    parser.add_argument("--picture", metavar="FILE", help="also draw the table's figures to a PNG or PDF file")
    options = parser.parse_intermixed_args(arguments)
    from ptqbench.show import print_table

    print_table(_folders(options), options.format, options.picture)
    return 0


def _doctor(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m ptqbench doctor").parse_args(arguments)
    from ptqbench.show import print_doctor

    print_doctor()
    return 0


def _overrides(options: argparse.Namespace) -> list[str]:
    given: list[str] = options.overrides
    return given + ([f"execution.runs_dir={options.runs_dir}"] if options.runs_dir else [])


def _folders(options: argparse.Namespace) -> list[tuple[RunFolder, RunSpec | None]]:
    """Run folders of a sweep's cells in the sweep's order, or all run folders."""
    from ptqbench.store import all_runs, folder_of

    if options.sweep is None:
        return [(folder, None) for folder in all_runs(Path(options.runs_dir or "runs"))]
    from ptqbench.compose import cells
    from ptqbench.sweep import load_sweep

    return [(folder_of(spec), spec) for spec in cells(load_sweep(options.sweep), _overrides(options))]
