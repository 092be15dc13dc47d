"""Runs in W&B -> the tidy frame that tables are made of; it equals the frame of the run folders that were projected."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ptqbench.cell.fingerprint import FORMAT, RUN_ID_LENGTH, run_id
from ptqbench.cell.spec import RunSpec, build
from ptqbench.errors import ConfigError, PtqbenchError
from ptqbench.results.tables import KEYS, Absent, Source, tidy
from ptqbench.runs.files import number
from ptqbench.runs.folder import DAMAGED, DONE, FAILED, INTERRUPTED, RUNNING

if TYPE_CHECKING:
    import pandas as pd

TIMEOUT_S = 30
STATES = {"running": RUNNING, "failed": FAILED, "finished": DAMAGED}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A run in W&B, which answers the questions that tables ask of a run folder."""

    run_id: str
    stored: dict[str, Any] | None
    ended: str
    message: str | None

    def result(self) -> dict[str, Any] | None:
        """The content of ``result.json``; None for a cell that is not done."""
        return self.stored

    def state(self) -> str:
        """State of the cell as far as W&B knows it."""
        return DONE if self.stored is not None else self.ended

    def failure(self) -> dict[str, Any] | None:
        """Why the last attempt failed."""
        return None if self.message is None else {"message": self.message}


def runs_frame(path: str, api: Any = None) -> pd.DataFrame:
    """Read the cells of a W&B project into a tidy frame.

    Args:
        path: ``ENTITY/PROJECT``.
        api: A ``wandb.Api``; None opens one.

    Returns:
        As :func:`ptqbench.results.tables.tidy`. Runs that are not cells of this version of ptqbench are left out.

    Raises:
        ConfigError: The path is no ``ENTITY/PROJECT``, W&B cannot be reached, or it has no such project.
    """
    return tidy(sources(path, api))


def sources(path: str, api: Any = None) -> list[Source]:
    """List the cells of a W&B project, oldest first; arguments and errors are those of :func:`runs_frame`."""
    return [source for run in _runs(path, api) for source in _source(run)]


def _runs(path: str, api: Any) -> Iterable[Any]:
    if path.count("/") != 1:
        raise ConfigError(f"expected a W&B project as ENTITY/PROJECT, got {path!r}")
    try:
        if api is None:
            import wandb

            api = wandb.Api(timeout=TIMEOUT_S)
        return list(api.runs(path, order="+created_at", lazy=False))
    except Exception as error:  # wandb raises exceptions of any class
        raise ConfigError(f"cannot read {path} from W&B: {' '.join(str(error).split())}") from None


def _source(run: Any) -> Iterable[Source]:
    """The cell of a run; nothing if it is none of ours, and an ``Absent`` with the reason if its config or result is damaged."""
    config, summary = run.config, run.summary
    if config.get("format") != FORMAT or len(run.id) != RUN_ID_LENGTH or "spec" not in config:
        return
    try:
        spec = build(RunSpec, {key: value for key, value in json.loads(config["spec"]).items() if key != "format"})
        stored = dict(json.loads(summary["result"])) if "result" in summary else None
    except (PtqbenchError, ValueError, TypeError, AttributeError, RecursionError) as error:
        parts = (config.get(key) for key in KEYS)
        model, method, bitwidth = (str(part.get("name") if isinstance(part, dict) else part) for part in parts)
        yield Absent(model, method, bitwidth, int(number(config, "seed") or 0), DAMAGED, str(error))
        return
    if run_id(spec) != run.id:
        yield Absent.of(spec, DAMAGED, f"the run's config describes cell {run_id(spec)}, not {run.id}")
        return
    yield Recorded(run.id, stored, STATES.get(run.state, INTERRUPTED), summary.get("failure")), spec
