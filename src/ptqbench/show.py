"""What people see on a terminal and in a picture: result tables, states, the comparison, the installation."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ptqbench import confdir, provenance
from ptqbench.store import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from ptqbench.spec import RunSpec

Cells = list[tuple[RunFolder, "RunSpec | None"]]


def result_table(title: str, result: dict[str, Any]) -> Table:
    """Lay out the result of one cell."""
    from ptqbench.tables import format_value

    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("± s.e.", justify="right")
    for name, metric in result["metrics"].items():
        error = metric.get("stderr")
        table.add_row(name, format_value(name, metric["value"]), "" if error is None else format_value(name, error))
    table.add_row("nominal weight bits", f"{result['bits']['nominal_w_bits']:.3f}", "")
    table.add_row("true weight bits", f"{result['bits']['effective_w_bits']:.3f}", "")
    table.add_row("packed weights", f"{result['bits']['packed_bytes'] / 2**20:.2f} MiB", "")
    table.add_row("time", f"{sum(result['timings'].values()):.1f} s", "")
    return table


def result_line(result: dict[str, Any]) -> str:
    """Say the result of one cell in one line."""
    from ptqbench.tables import format_value

    parts = [f"{name} {format_value(name, metric['value'])}" for name, metric in result["metrics"].items()]
    return ", ".join([*parts, f"{result['bits']['effective_w_bits']:.2f} bits"])


def print_status(cells: Cells) -> None:
    """Print the state of every cell and the count per state."""
    console, table, counts = Console(), Table(show_edge=False, pad_edge=False), Counter[str]()
    for column in ("cell", "state", "detail"):
        table.add_column(column)
    for folder, _ in cells:
        state, beat, failure = folder.state(), folder.heartbeat() or {}, folder.failure() or {}
        counts[state] += 1
        progress = f"{beat.get('stage')} {beat.get('done')}/{beat.get('total')}" if state == "running" else ""
        table.add_row(
            folder.path.name, state, progress or (str(failure.get("message", "")) if state == "failed" else "")
        )
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "no run folders")


def print_table(cells: Cells, style: str, picture: str | None) -> None:
    """Print the comparison of cells, and draw it if a file is named."""
    from ptqbench import tables

    frame = tables.tidy(cells)
    if frame.empty:
        print("no cells")
        return
    table, notes = tables.comparison(frame), tables.missing(frame)
    if style == "csv":
        print(frame.to_csv(index=False), end="")
        return
    if style == "md":
        print(tables.markdown(table), end="")
    else:
        Console().print(_rich(table))
    for note in notes:
        print(f"- {note}")
    if picture is not None and not frame["metric"].isna().all():
        from ptqbench.picture import draw

        draw(table, picture, tables.standard_errors(frame))
        print(f"picture: {picture}")


def _rich(table: pd.DataFrame) -> Table:
    from ptqbench import tables

    marks, metrics = tables.best(table), tables.metric_columns(table)
    models = list(table.index.get_level_values("model").unique())
    names = ["model", "method", "bitwidth"] if len(models) > 1 else ["method", "bitwidth"]
    title = None if len(models) > 1 else f"model: {models[0]}"
    out = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in names:
        out.add_column(name, no_wrap=True)
    for name in ("true w bits", *metrics):
        out.add_column(name.replace(" w ", " w\n").replace("/", "\n"), justify="right")
    previous = None
    for key, row in table.iterrows():
        assert isinstance(key, tuple)
        if previous is not None and (key[0], key[2]) != (previous[0], previous[2]):
            out.add_section()
        cells = [tables.format_value(m, row[m]) for m in metrics]
        cells = [f"[bold]{c}[/]" if marks.loc[key, m] else c for c, m in zip(cells, metrics, strict=True)]
        out.add_row(*key[-len(names) :], tables.format_bits(row["effective_w_bits"]), *cells)
        previous = key
    return out


def print_doctor() -> None:
    """Print versions, devices and folders."""
    facts = provenance.collect()
    print(f"python        {facts['python']} on {facts['platform']}")
    for name, version in facts["packages"].items():
        print(f"{name:13} {version}")
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPU           {', '.join(gpus) or 'none'}")
    print(f"SLURM         {shutil.which('sbatch') or 'no sbatch on PATH'}")
    print(f"conf          {confdir.conf_folder()}")
    print(f"sweeps        {confdir.sweep_folder()}")
