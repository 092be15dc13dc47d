"""Run one cell: load, quantize, evaluate, record. ``python -m ptqbench.run SPEC_OR_FOLDER`` needs no scheduler."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from ptqbench.cell.spec import RunSpec
from ptqbench.errors import CellBusy, PtqbenchError, RunFailed, StorageError
from ptqbench.runs import provenance
from ptqbench.runs.artefacts import Artefacts
from ptqbench.runs.attempt import Observer, Silent, attempt, record_failure
from ptqbench.runs.files import write_json
from ptqbench.runs.folder import RunFolder
from ptqbench.runs.lease import Lease, lease
from ptqbench.runs.outcome import INTERRUPTED, WRONG, report
from ptqbench.sweeps.pins import check_unchanged
from ptqbench.tracking.guard import followed

KEEP_CODES_BELOW_BYTES = 64 << 20


def run_cell(spec: RunSpec, folder: RunFolder, shown: Observer | None = None) -> dict[str, Any]:
    """Run a cell, or return its result if it is done already.

    Args:
        spec: The validated, resolved cell.
        folder: Its run folder, existing.
        shown: Observer that shows progress.

    Returns:
        The content of ``result.json``.

    Raises:
        RunFailed: The cell failed; see ``failure.json``.
        CellBusy: Another living process works on the cell.
        StorageError: The run folder cannot be read or written.
    """
    done = folder.result()
    if done is not None:
        return done
    with lease(folder) as held:
        done = folder.result()  # perhaps finished by the previous holder between the first look and the lease
        return done if done is not None else _attempt(spec, folder, shown or Silent(), held)


def run_folder(folder: RunFolder) -> dict[str, Any]:
    """Run the cell that a folder describes; what jobs and workers call.

    Args:
        folder: Run folder with ``spec.json``.

    Returns:
        The content of ``result.json``.

    Raises:
        PtqbenchError: As :func:`run_cell`, or ``spec.json`` cannot be read or is of another cell, which is recorded in
            ``failure.json`` too.
    """
    try:
        return run_cell(folder.read_spec(), folder)
    except (CellBusy, RunFailed):  # nothing is wrong, or the attempt has recorded it
        raise
    except PtqbenchError as error:  # before an attempt began, which would have recorded it
        with contextlib.suppress(OSError):
            if folder.spec_path.exists():  # else there is no cell whose failure could be recorded
                record_failure(folder, error)
        raise


def _attempt(spec: RunSpec, folder: RunFolder, shown: Observer, held: Lease) -> dict[str, Any]:
    """Do the work of a cell under its lease, and write its result."""
    with followed(spec, folder), attempt(folder, shown, held) as current:
        check_unchanged(spec)
        result = _work(spec, folder, current)
        with held.confirmed():
            write_json(folder.result_path, result)
        _drop_codes(spec, folder, result["bits"]["packed_bytes"])
    return result


def _work(spec: RunSpec, folder: RunFolder, observer: Observer) -> dict[str, Any]:
    """Load, calibrate, quantize, evaluate; returns the content of ``result.json``."""
    from ptqbench.engine.work import Work

    observer.stage("load", 1)
    _configure(spec)
    # Every step writes what it finishes, and skips what is finished.
    cell = Work.begin(spec, folder, observer)
    if spec.calibrates:
        cell = cell.transformed()
    if spec.quantizes:
        cell.quantize()
    metrics = cell.evaluate()
    result = cell.result(metrics, cell.bits())
    _check_still(spec, folder, cell.calibration.artefacts)
    return result


def _check_still(spec: RunSpec, folder: RunFolder, artefacts: Artefacts) -> None:
    """Remove the work if its model or data have changed meanwhile. Where these cannot be read now, the work stays."""
    try:
        check_unchanged(spec)
    except StorageError:
        raise
    except PtqbenchError:
        for path in (folder.state_path, folder.records_path):
            shutil.rmtree(path, ignore_errors=True)
        artefacts.discard()
        raise


def _configure(spec: RunSpec) -> None:
    """Choose torch's threads, and ask it for deterministic algorithms."""
    # cuBLAS reads this when a GPU is first used: it makes the order of its sums fixed.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    from ptqbench.models.architecture import from_config
    from ptqbench.models.source import locate
    from ptqbench.numerics.fused_columns import forbid_fused

    busy = from_config(locate(spec.model).config).useful_threads
    torch.set_num_threads(spec.execution.threads or min(_threads_given(), busy))
    torch.use_deterministic_algorithms(True, warn_only=True)
    forbid_fused(spec.execution.column_loop == "plain")


@functools.cache
def _threads_given() -> int:
    """Threads that this process may use: those that torch was told or found, but not more than there are cores."""
    import torch

    return min(torch.get_num_threads(), provenance.cores())


def _drop_codes(spec: RunSpec, folder: RunFolder, packed_bytes: int) -> None:
    """Remove finished blocks unless they are to be kept; called after the result is written, so that a kill costs no work.

    Args:
        spec: Its ``execution.keep_codes`` decides; null keeps them below ``KEEP_CODES_BELOW_BYTES``.
        folder: The cell.
        packed_bytes: Size of the codes.
    """
    keep = spec.execution.keep_codes
    if keep is False or (keep is None and packed_bytes > KEEP_CODES_BELOW_BYTES):
        shutil.rmtree(folder.state_path, ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Run the cell of a run folder or of its ``spec.json``.

    Args:
        arguments: The path, and ``--with-parent`` if the process is to end with its parent.

    Returns:
        Exit status: 0 where the cell is done or another process works on it, 1 where it failed, 2 where the arguments are
        wrong, 130 where it was interrupted.
    """
    from ptqbench.results.metrics import format_value, measured

    words = [word for word in arguments if word != "--with-parent"]
    if len(words) != 1:
        print("usage: python -m ptqbench.run [--with-parent] RUN_FOLDER_OR_SPEC_JSON", file=sys.stderr)
        return 2
    if "--with-parent" in arguments:
        _end_with_parent()
    path = Path(words[0])
    folder = RunFolder(path.parent if path.name == "spec.json" else path)
    try:
        result = run_folder(folder)
    except CellBusy as error:
        print(f"ptqbench: {error}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        status = report(error)
        # A cell that failed is no wrong request.
        return 1 if status == WRONG and os.path.exists(folder.failure_path) else status
    for name, metric in result["metrics"].items():
        print(f"{name} = {format_value(name, measured(metric))}")
    return 0


def _end_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent process ends, so that a killed launcher leaves no workers behind."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    # The parent may have ended before the call.
    if os.getppid() != parent or parent == 1:
        sys.exit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
