"""The command line. First word a command: its own parser; anything else goes to Hydra.

Exit status: 0 done, 1 a cell failed, 2 the request was wrong (one line on standard error, nothing was run).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ptqbench import __version__
from ptqbench.cell.spec import nearest
from ptqbench.errors import ConfigError, PtqbenchError, RunFailed

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.results.tables import Source
    from ptqbench.runs.folder import RunFolder
    from ptqbench.sweeps.cells import Cell

HELP = """\
usage: python -m ptqbench +method=NAME [model=NAME] [bitwidth=NAME] [key=value ...] [-m]
       python -m ptqbench COMMAND [options]

One cell: quantize a model, measure it, record the result.
  python -m ptqbench +method=gptq model=tiny bitwidth=w3
  python -m ptqbench +method=rtn,gptq model=tiny bitwidth=w4,w3,w2 -m       every combination, on SLURM or this machine
  python -m ptqbench +method=gptq model=local model.path=FOLDER calibration=file calibration.path=FILE ...
  python -m ptqbench +method=gptq --cfg job                                  show the composed configuration

commands:
  plan SWEEP       every cell with its state, resources and estimated time; runs nothing
  sweep SWEEP      run (or submit) the cells of a sweep file that are not done yet
  retry SWEEP      run the failed cells again
  cancel SWEEP     stop what runs or waits
  status [SWEEP]   state of every cell, from the run folders
  table [SWEEP]    comparison table of finished cells
  report [SWEEP]   one HTML page with table, plots, cost and provenance
  sync [SWEEP]     upload finished cells to Weights & Biases
  prefetch SWEEP   load models and data on a node with network
  gc               remove shared artefacts that were not used for longest
  doctor           what is installed and where things are looked for

shell completion: eval "$(ptqbench -sc install=bash)"
"""


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    commands: dict[str, Callable[[list[str]], int]] = {
        "plan": _plan,
        "sweep": _sweep,
        "retry": _retry,
        "cancel": _cancel,
        "status": _status,
        "table": _table,
        "report": _report,
        "sync": _sync,
        "prefetch": _prefetch,
        "gc": _gc,
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
        from ptqbench.hydra_app import run_hydra

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


def _plan(arguments: list[str]) -> int:
    parser = _parser("plan", "Every cell of a sweep with its state and what it needs; submits nothing.", "required")
    parser.add_argument("--groups", action="store_true", help="only the sums per resource group")
    options = parser.parse_intermixed_args(arguments)
    from ptqbench.launch.summary import print_plan
    from ptqbench.sweeps.plan import plan

    print_plan(plan(_cells(options)), every_cell=not options.groups)
    return 0


def _sweep(arguments: list[str]) -> int:
    parser = _parser("sweep", "Run (or submit) the cells of a sweep that are not done yet.", "required")
    parser.add_argument("--wait", action="store_true", help="with SLURM: stay until every cell is done")
    options = parser.parse_intermixed_args(arguments)
    from ptqbench.launch.dispatch import launch

    return launch(_cells(options), wait=options.wait)


def _retry(arguments: list[str]) -> int:
    parser = _parser(
        "retry", "Run the failed cells of a sweep again; twice the memory where that was short.", "required"
    )
    parser.add_argument("--wait", action="store_true", help="with SLURM: stay until every cell is done")
    options = parser.parse_intermixed_args(arguments)
    from ptqbench.launch.dispatch import launch

    return launch(_cells(options), wait=options.wait, only_failed=True)


def _cancel(arguments: list[str]) -> int:
    options = _parser("cancel", "Stop the running and waiting cells of a sweep.", "required").parse_intermixed_args(
        arguments
    )
    from ptqbench.launch.dispatch import cancel

    print(cancel(_cells(options)))
    return 0


def _status(arguments: list[str]) -> int:
    parser = _parser("status", "State of the cells, derived from the run folders and the queue.", "optional")
    parser.add_argument("--all", action="store_true", help="list finished and pending cells too")
    options = parser.parse_intermixed_args(arguments)
    from ptqbench.results.terminal import print_status

    if options.sweep is None:
        from ptqbench.runs.folder import all_runs

        print_status(list(all_runs(Path(options.runs_dir or "runs"))), options.all)
    else:
        print_status(
            [cell.folder for cell in _cells(options) if cell.folder is not None and cell.skipped is None], options.all
        )
    return 0


def _table(arguments: list[str]) -> int:
    parser = _parser("table", "Comparison table of finished cells.", "optional")
    parser.add_argument(
        "--format",
        choices=("terminal", "md", "latex", "html", "csv"),
        help="default: terminal, or by the suffix of --output",
    )
    parser.add_argument("--output", metavar="FILE", help="write the table to a .md, .tex, .html or .csv file")
    parser.add_argument(
        "--check", action="store_true", help="the papers' figures beside ours, and whether they compare"
    )
    parser.add_argument("--picture", metavar="FILE", help="also draw the table's figures to a PNG or PDF file")
    parser.add_argument("--from-wandb", metavar="ENTITY/PROJECT", help="cells of a W&B project instead of run folders")
    options = parser.parse_intermixed_args(arguments)
    with _uncollected():
        from ptqbench.results.terminal import print_table, table_options

        find = _wandb_sources if options.from_wandb is not None else _table_sources
        sources, title, columns = find(options)
        print_table(sources, table_options(options, title, columns))
    return 0


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the cyclic garbage collector: it would look through thousands of rows that all stay in use to the end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _report(arguments: list[str]) -> int:
    parser = _parser("report", "One self-contained HTML page: table, plots, cost and provenance.", "optional")
    parser.add_argument("--output", metavar="FILE", default="report.html", help="the page (default: report.html)")
    options = parser.parse_intermixed_args(arguments)
    from ptqbench.results.report_page import report_page
    from ptqbench.runs.folder import write_text

    sources, title, columns = _table_sources(options)
    command = [] if options.sweep is None else [options.sweep, *options.overrides]
    write_text(Path(options.output), report_page(sources, title, columns, command))
    print(f"report: {options.output}")
    return 0


def _wandb_sources(options: argparse.Namespace) -> tuple[list[Source], str, tuple[str, ...]]:
    """Cells of a W&B project, with its name as the title."""
    if options.sweep is not None or options.runs_dir is not None:
        raise ConfigError("table --from-wandb: expected no sweep and no --runs-dir beside it; it reads a whole project")
    from ptqbench.tracking.recorded import sources

    return sources(options.from_wandb), options.from_wandb, ("metric",)


def _every_run(options: argparse.Namespace) -> list[tuple[RunFolder, RunSpec | None]]:
    """All run folders, for a command that was given no sweep."""
    from ptqbench.runs.folder import all_runs

    return [(folder, None) for folder in all_runs(Path(options.runs_dir or "runs"))]


def _table_sources(options: argparse.Namespace) -> tuple[list[Source], str, tuple[str, ...]]:
    """Cells of a sweep with its title and columns, or all run folders."""
    if options.sweep is None:
        return [*_every_run(options)], "", ("metric",)
    from ptqbench.results.sources import sweep_cells
    from ptqbench.sweeps.files import load_sweep

    sweep = load_sweep(options.sweep)
    return sweep_cells(sweep, _overrides(options)), sweep.title, tuple(sweep.columns)


def _sync(arguments: list[str]) -> int:
    parser = _parser("sync", "Upload finished cells that Weights & Biases does not have yet.", "optional")
    parser.add_argument("--offline", action="store_true", help="write W&B's own files instead, for `wandb sync`")
    parser.add_argument("--project", help="W&B project (default: that of each cell, ptqbench)")
    parser.add_argument("--entity", help="W&B user or team (default: that of each cell, else the account's)")
    options = parser.parse_intermixed_args(arguments)
    from ptqbench.tracking.sync import sync

    if options.sweep is None:
        found = _every_run(options)
    else:
        found = [(cell.folder, cell.spec) for cell in _cells(options) if cell.folder is not None]
    return sync(found, "offline" if options.offline else "online", options.project, options.entity)


def _doctor(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m ptqbench doctor")
    parser.add_argument("--runs-dir", default="runs", help="folder of run folders (default: runs)")
    options = parser.parse_args(arguments)
    from ptqbench.doctor import print_doctor

    print_doctor(options.runs_dir)
    return 0


def _prefetch(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ptqbench prefetch",
        description="Load the models, texts and tasks of a sweep (or of one cell: +method=... model=...) from the network.",
    )
    parser.add_argument("request", nargs="+", help="a sweep and overrides, or the overrides of one cell")
    parser.add_argument("--runs-dir", default="runs", help="where prefetch.json is written (default: runs)")
    options = parser.parse_intermixed_args(arguments)
    from ptqbench.sweeps.compose import requested
    from ptqbench.sweeps.prefetch import prefetch

    manifest = Path(options.runs_dir) / "prefetch.json"
    items = prefetch(
        requested(options.request),
        manifest,
        lambda i: print(f"{'ok' if i.loaded else 'FAILED'} {i.kind} {i.name}: {i.detail}"),
    )
    print(f"{sum(item.loaded for item in items)} of {len(items)} loaded; manifest: {manifest}")
    return 0 if all(item.loaded for item in items) else 1


def _gc(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ptqbench gc", description="Remove the least recently used shared artefacts; results stay."
    )
    parser.add_argument("--budget-gib", type=float, required=True, help="what may stay, GiB")
    parser.add_argument("--runs-dir", default="runs", help="folder of run folders (default: runs)")
    options = parser.parse_args(arguments)
    from ptqbench.runs.artefacts import FOLDER, collect_garbage

    removed, freed, _ = collect_garbage(Path(options.runs_dir) / FOLDER, int(options.budget_gib * 2**30))
    print(f"removed {removed} files, {freed / 2**30:.2f} GiB")
    return 0


def _overrides(options: argparse.Namespace) -> list[str]:
    given: list[str] = options.overrides
    return given + ([f"execution.runs_dir={options.runs_dir}"] if options.runs_dir else [])


def _cells(options: argparse.Namespace) -> list[Cell]:
    """Cells of a sweep in the sweep's order."""
    from ptqbench.sweeps.compose import cells
    from ptqbench.sweeps.files import load_sweep

    return cells(load_sweep(options.sweep), _overrides(options))
