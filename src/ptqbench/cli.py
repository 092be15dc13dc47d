"""The command line. Where the first word is a command, the command parses the rest; all other command lines go to Hydra.

Exit status: 0 done, 1 a cell or the environment failed, 2 the request was wrong (one line on standard error, nothing was run),
130 interrupted, 141 the reader of the output has closed it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ptqbench import __version__
from ptqbench.cell.folders import with_own
from ptqbench.errors import ConfigError
from ptqbench.runs.output import discard_output, print_anything, uncollected
from ptqbench.runs.places import existing_runs_folder, gib, natural, output_file, picture_file, runs_folder, seconds

if TYPE_CHECKING:
    from ptqbench.cell.spec import RunSpec
    from ptqbench.results.sources import Shown
    from ptqbench.runs.folder import RunFolder
    from ptqbench.sweeps.cells import Cell

HELP = """\
usage: python -m ptqbench +method=NAME [model=NAME] [bitwidth=NAME] [key=value ...] [-m]
       python -m ptqbench COMMAND [options]

One cell: quantize a model, measure it, record the result.
  python -m ptqbench +method=gptq model=tiny bitwidth=w3
  python -m ptqbench +method=rtn,gptq model=tiny bitwidth=w4,w3,w2 -m       every combination, on SLURM or this machine
  python -m ptqbench +method=rtn,gptq model=tiny bitwidth=w4,w3,w2 -m --dry-run          the plan of that, and nothing else
  python -m ptqbench +method=gptq model=local model.path=FOLDER calibration=file calibration.path=FILE ...
  python -m ptqbench +method=gptq --cfg job                                  show the composed configuration

commands:
{commands}

help of a command: python -m ptqbench COMMAND --help
files of your own (method/mine.yaml, bitwidth/w5.yaml): --config-dir FOLDER with any command, config_dir: FOLDER in a sweep file
values with , = : ( ) [ ] {{ }} # ' " or a space: in quotes that the shell keeps, as in "model.path='/data/a=b'"
shell completion: eval "$(ptqbench -sc install=bash)"
"""


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # our progress bar only, none of the libraries'
    print_anything()
    try:
        status = _dispatch(arguments)
        print(end="", flush=True)
    except (BrokenPipeError, SystemExit) as stop:
        from ptqbench.runs.outcome import CLOSED

        # The reader of the output has closed it, as ``head`` does; rich then raises SystemExit.
        if not isinstance(stop, BrokenPipeError) and not isinstance(stop.__context__, BrokenPipeError):
            raise
        discard_output()
        return CLOSED
    except (KeyboardInterrupt, Exception) as error:
        from ptqbench.runs.outcome import report

        status = report(error)
        discard_output()
    return status


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first == "help" and arguments[1:2] and arguments[1] in COMMANDS:
        return _run(arguments[1], ["--help"])
    if first in ("", "-h", "--help", "help"):
        width = max(len(f"{name} {command.sweep}") for name, command in COMMANDS.items())
        lines = [f"  {f'{name} {c.sweep}'.ljust(width)}  {c.about}" for name, c in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0 if arguments else 2
    if first == "--version":
        print(f"ptqbench {__version__}")
        return 0
    if first in COMMANDS:
        return _run(first, arguments[1:])
    # Not a word of Hydra's grammar, so a command was meant.
    if not first.startswith(("-", "+", "~")) and "=" not in first:
        from ptqbench.cell.spec import nearest

        raise ConfigError(
            f"unknown command {first!r}; {nearest(first, COMMANDS)} (a cell is asked for with +method=NAME)"
        )
    from ptqbench.hydra_app import run_hydra

    return run_hydra(arguments)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog.rpartition(' ')[2]}: {message}; see {self.prog} --help")


def _list(options: argparse.Namespace) -> int:
    from ptqbench.sweeps.listing import print_kinds

    print_kinds(options.kind, options.name)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from ptqbench.launch.summary import print_plan
    from ptqbench.sweeps.plan import plan

    print_plan(plan(_cells(options)), every_cell=not options.groups)
    return 0


def _sweep(options: argparse.Namespace, only_failed: bool = False) -> int:
    from ptqbench.launch.dispatch import launch
    from ptqbench.sweeps.files import load_sweep

    name = load_sweep(options.sweep).name
    return launch(_cells(options), options.wait, only_failed, name, options.dry_run)


def _cancel(options: argparse.Namespace) -> int:
    from ptqbench.launch.dispatch import cancel

    print(cancel(_cells(options)))
    return 0


def _status(options: argparse.Namespace) -> int:
    if options.watch is not None:
        from ptqbench.launch.watch import watch, watch_sweep

        if options.sweep is not None:
            return watch_sweep(_cells(options), options.watch)
        return watch(lambda: [folder for folder, _ in _chosen(options)], options.watch)
    from ptqbench.results.terminal import print_status

    print_status([folder for folder, _ in _chosen(options)], options.all)
    return 0


def _table(options: argparse.Namespace) -> int:
    with uncollected():
        from ptqbench.results.terminal import print_table, table_options

        shown = _shown(options)
        print_table(shown.cells, table_options(options, shown.title, shown.columns, shown.papers))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from ptqbench.results.compare_sheet import print_comparison

    print_comparison(options.a, options.b, options.runs_dir, options.examples)
    return 0


def _claims(options: argparse.Namespace) -> int:
    from ptqbench.results.claims import answer, load_claims
    from ptqbench.results.claims_sheet import print_claims
    from ptqbench.results.sides import sweep_command

    claims = load_claims(options.claims)
    shown = _shown(options)
    command = "" if options.sweep is None else sweep_command(_given(options))
    print_claims(answer(claims, shown.cells), options, command, shown.title)
    return 0


def _report(options: argparse.Namespace) -> int:
    from ptqbench.results.report_page import report_page
    from ptqbench.runs.places import write_output

    shown = _shown(options)
    command = [] if options.sweep is None else _given(options)
    write_output(options.output, report_page(shown.cells, shown.title, shown.columns, command))
    print(f"report: {options.output}")
    return 0


def _sync(options: argparse.Namespace) -> int:
    from ptqbench.tracking.sync import sync

    return sync(_chosen(options), "offline" if options.offline else "online", options.project, options.entity)


def _prefetch(options: argparse.Namespace) -> int:
    from ptqbench.sweeps.compose import requested
    from ptqbench.sweeps.prefetch import prefetch

    manifest = Path(options.runs_dir or "runs") / "prefetch.json"
    items = prefetch(
        requested(options.request),
        manifest,
        lambda i: print(f"{'ok' if i.loaded else 'FAILED'} {i.kind} {i.name}: {i.detail}"),
    )
    print(f"{sum(item.loaded for item in items)} of {len(items)} loaded; manifest: {manifest}")
    return 0 if all(item.loaded for item in items) else 1


def _gc(options: argparse.Namespace) -> int:
    from ptqbench.runs.artefacts import FOLDER, collect_garbage

    budget = int(options.budget_gib * 2**30)
    removed, freed, _ = collect_garbage(Path(options.runs_dir or "runs") / FOLDER, budget)
    print(f"removed {removed} files, {freed / 2**30:.2f} GiB")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from ptqbench.doctor import print_doctor

    print_doctor(options.runs_dir or "runs")
    return 0


def _cells(options: argparse.Namespace) -> list[Cell]:
    """The cells of the sweep that the options name, in its order."""
    from ptqbench.sweeps.compose import cells
    from ptqbench.sweeps.files import load_sweep

    return cells(load_sweep(options.sweep), _overrides(options))


def _chosen(options: argparse.Namespace) -> list[tuple[RunFolder, RunSpec | None]]:
    """The run folders of a sweep with their cells; without a sweep, all run folders."""
    if options.sweep is not None:
        return [(c.folder, c.spec) for c in _cells(options) if c.folder is not None and c.skipped is None]
    from ptqbench.runs.folder import all_runs

    return [(folder, None) for folder in all_runs(Path(options.runs_dir or "runs"))]


def _shown(options: argparse.Namespace) -> Shown:
    """The cells of a sweep, of a W&B project, or of all run folders, and what there is to say of their table."""
    from ptqbench.results.sources import Shown, of_sweep

    if getattr(options, "from_wandb", None) is not None:
        if options.sweep is not None or options.runs_dir is not None:
            raise ConfigError(
                "table --from-wandb: expected no sweep and no --runs-dir beside it; it reads a whole project"
            )
        from ptqbench.tracking.recorded import sources

        return Shown(sources(options.from_wandb), options.from_wandb)
    return Shown(_chosen(options)) if options.sweep is None else of_sweep(options.sweep, _overrides(options))


def _overrides(options: argparse.Namespace) -> list[str]:
    from ptqbench.sweeps.words import assign

    given: list[str] = options.overrides
    return given + (assign("execution.runs_dir", options.runs_dir) if options.runs_dir else [])


def _given(options: argparse.Namespace) -> list[str]:
    """The words of a command line that say which cells are meant."""
    own = [] if options.config_dir is None else ["--config-dir", options.config_dir]
    return [options.sweep, *options.overrides, *own]


def _option(*names: str, **settings: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    return names, settings


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of the command line.

    Attributes:
        run: Runs the command with its parsed options; returns the exit status.
        about: One line of help.
        sweep: ``SWEEP`` where a sweep is required, ``[SWEEP]`` where all run folders are taken without one, else empty.
        options: Arguments of ``add_argument`` for every option that only this command has.
        runs_dir: Checks the value of ``--runs-dir``.
    """

    run: Callable[[argparse.Namespace], int]
    about: str
    sweep: str = ""
    options: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = ()
    runs_dir: Callable[[str], str] = runs_folder


_RUN = (
    _option("--wait", action="store_true", help="with SLURM: stay until every cell is done"),
    _option("--dry-run", action="store_true", help="print the plan, and run, submit and write nothing"),
)
_STYLES = ("terminal", "md", "latex", "html", "csv")
_WRITTEN = (
    _option("--format", choices=_STYLES, help="default: terminal, or by the suffix of --output"),
    _option("--output", metavar="FILE", type=output_file, help="write a .md, .tex, .html or .csv file"),
)

COMMANDS = {
    "list": Command(
        _list, "what can be composed: methods, models, bitwidths, members of the roles with their options, tasks, sweeps", "",
        (
            _option("kind", metavar="KIND", nargs="?", help="methods, models, bitwidths, transforms, targets, solvers, ..."),
            _option("name", metavar="NAME", nargs="?", help="one of them"),
        ),
    ),
    "plan": Command(
        _plan, "every cell with its state, resources and estimated time; runs nothing", "SWEEP",
        (_option("--groups", action="store_true", help="only the sums per resource group"),),
    ),
    "sweep": Command(_sweep, "run (or submit) the cells of a sweep file that are not done yet", "SWEEP", _RUN),
    "retry": Command(
        partial(_sweep, only_failed=True), "run the failed cells again, with twice the memory if that was short", "SWEEP", _RUN,
    ),
    "cancel": Command(_cancel, "stop the cells that run or wait; finished blocks stay", "SWEEP"),
    "status": Command(
        _status, "state of every cell, from the run folders and the queue", "[SWEEP]",
        (
            _option("--all", action="store_true", help="list finished and pending cells too"),
            _option("--watch", metavar="SECONDS", nargs="?", type=seconds, const=5.0,
                    help="look again every so many seconds (5) until all cells have ended; the exit status is that of sweep"),
        ), existing_runs_folder,
    ),
    "table": Command(
        _table, "comparison table of finished cells", "[SWEEP]",
        (
            *_WRITTEN,
            _option("--check", action="store_true", help="show the papers' figures beside ours, and how they compare"),
            _option("--paper", action="store_true", help="show the papers' own tables with our figures in them"),
            _option("--picture", metavar="FILE", type=picture_file, help="also draw the figures to a PNG or PDF file"),
            _option("--from-wandb", metavar="ENTITY/PROJECT", help="cells of a W&B project instead of run folders"),
        ), existing_runs_folder,
    ),
    "compare": Command(
        _compare, "two finished cells or two sweeps, metric by metric, by paired tests", "",
        (
            _option("a", metavar="A", help="a run folder, a run id, words of a label such as 'gptq w3', the overrides of a cell "
                    "such as 'method=gptq bitwidth=w3 seed=0,1', or a sweep such as 'demo seed=1'"),
            _option("b", metavar="B", help="another; differences are B - A"),
            _option("--examples", metavar="N", type=natural, default=0, help="also list the N windows and examples of every "
                    "metric on which they differ most"),
        ), existing_runs_folder,
    ),
    "claims": Command(
        _claims, "what finished cells say to the claims of the papers", "[SWEEP]",
        (*_WRITTEN, _option("--claims", metavar="FILE", help="a YAML file of claims (default: those of the papers)")),
        existing_runs_folder,
    ),
    "report": Command(
        _report, "one HTML page with table, plots, cost and provenance", "[SWEEP]",
        (_option("--output", metavar="FILE", type=output_file, default="report.html", help="the page (default: report.html)"),),
        existing_runs_folder,
    ),
    "sync": Command(
        _sync, "upload finished cells to Weights & Biases", "[SWEEP]",
        (
            _option("--offline", action="store_true", help="write W&B's own files instead, for `wandb sync`"),
            _option("--project", help="W&B project (default: that of each cell, ptqbench)"),
            _option("--entity", help="W&B user or team (default: that of each cell, else the account's)"),
        ), existing_runs_folder,
    ),
    "prefetch": Command(
        _prefetch, "download models and data, on a node with network", "",
        (_option("request", nargs="+", metavar="REQUEST", help="a sweep with overrides, or the overrides of one cell"),),
    ),
    "gc": Command(
        _gc, "remove the least recently used of the artefacts that cells share; results stay", "",
        (_option("--budget-gib", metavar="GIB", type=gib, required=True, help="how much may stay"),), existing_runs_folder,
    ),
    "doctor": Command(_doctor, "what is installed, and which folders are used"),
}  # fmt: skip


def _run(name: str, arguments: list[str]) -> int:
    """Parse the arguments of a command and run it."""
    command = COMMANDS[name]
    parser = _Parser(prog=f"python -m ptqbench {name}", description=command.about)
    if command.sweep:
        nargs, without = ("?", " (default: all run folders)") if command.sweep.startswith("[") else (None, "")
        parser.add_argument(
            "sweep", metavar="SWEEP", nargs=nargs, help=f"name of a shipped sweep, or a YAML file{without}"
        )
        overrides = "overrides for every cell, e.g. seed=1 execution.threads=1"
        parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", default=[], help=overrides)
    for names, settings in command.options:
        parser.add_argument(*names, **settings)
    parser.add_argument(
        "--runs-dir", metavar="FOLDER", type=command.runs_dir, help="where the run folders are (default: runs)"
    )
    parser.add_argument(
        "--config-dir", metavar="FOLDER", help="configuration files of your own, such as FOLDER/method/mine.yaml"
    )
    options = parser.parse_intermixed_args(arguments)  # options may stand between overrides
    with with_own(options.config_dir):
        return command.run(options)
