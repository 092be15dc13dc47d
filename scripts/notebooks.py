"""Execute notebooks one after another in one kernel, so that libraries are imported once. For the documentation and for tests."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

TIME_LIMIT = 300


def execute(paths: Iterable[Path], **environment: str) -> Iterator[tuple[nbformat.NotebookNode, str]]:
    """Execute notebooks in the folder of each.

    Args:
        paths: Files, not modified.
        environment: Variables of the kernel, beside those of this process.

    Yields:
        The notebook with its outputs, and the line of the error that ended it; empty if none did.
    """
    client = NotebookClient(nbformat.v4.new_notebook(), timeout=TIME_LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        # The kernel listens on sockets in a folder of its own, and not on the network.
        client.km = AsyncKernelManager(kernel_name="python3", transport="ipc", connection_file=f"{folder}/kernel.json")
        with client.setup_kernel(env=os.environ | environment):
            for path in paths:
                yield _execute(client, path)


def _execute(client: NotebookClient, path: Path) -> tuple[nbformat.NotebookNode, str]:
    client.nb, error = nbformat.read(path, as_version=4), ""
    client.reset_execution_trackers()
    # As in a kernel of its own: no variables, the folder of the notebook.
    client.nb.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {path.parent}"))
    try:
        for index, cell in enumerate(client.nb.cells):
            client.execute_cell(cell, index, store_history=index > 0)
    except CellExecutionError as failed:
        error = f"{failed.ename}: {failed.evalue}"
    del client.nb.cells[0]
    return client.nb, error
