"""Commands as processes of their own, forked from a server that has imported everything: imports cost more than most tests.

Exit status, output, signals and children are those of ``python -m ptqbench``. A pool that such a process starts has a server of its
own, as always; that one is forked too, so it need not import anything either. What depends on the start of the interpreter
(environment variables that libraries read when they are imported, what is imported when) needs ``subprocess``.
"""

import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ptqbench.launch.worker import PRELOADED

IMPORTED = (
    *PRELOADED, "pytest", "ptqbench.cli", "ptqbench.hydra_app", "ptqbench.foreground", "ptqbench.launch.local",
    "ptqbench.results.terminal", "ptqbench.results.tables", "transformers.models.qwen2.modeling_qwen2", __name__,
)  # fmt: skip


def call(function, *arguments):
    """Start a process that calls a function of a module; returns the ``multiprocessing.Process``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


class Started:
    """A running process, used as ``subprocess.Popen`` is."""

    def __init__(self, *words, cwd, module="ptqbench.cli", **environment):
        """Start ``main(words)`` of a module in a folder, with environment variables beside the present ones."""
        self.args, self._folder = [module, *map(str, words)], tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("out", "err")]
        background = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        given = (self.args, str(cwd), os.environ | environment, list(map(str, self._outputs)), background)
        self._process = call(_be, *given)
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    returncode = property(poll)

    def kill(self):
        self._process.kill()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=300):
        """Wait for the end; returns standard output and standard error."""
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return tuple(path.read_text() for path in self._outputs)


def run(*words, timeout=300, **options):
    """Run a command to its end, as ``subprocess.run`` does; options are those of ``Started``."""
    process = Started(*words, **options)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _be(arguments, cwd, environment, outputs, background):
    """Be the process."""
    module, *words = arguments
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.default_int_handler)
    for descriptor, path in enumerate(outputs, start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv = [module, *words]
    multiprocessing.util.spawnv_passfds = _forked
    sys.exit(importlib.import_module(module).main(words))


def _forked(path, arguments, kept):
    """Start ``python -c CODE`` by forking: with the descriptors to keep and no others, as after ``exec``."""
    pid = os.fork()
    if pid:
        return pid
    try:
        bounds = [2, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
        for below, above in itertools.pairwise(bounds):
            os.closerange(below + 1, above)
        with contextlib.suppress(SystemExit):
            exec(arguments[-1], {})
    finally:
        os._exit(0)
