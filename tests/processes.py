"""
Python processes of their own, with what they say. A new interpreter spends five seconds on its imports, so most are
forked from a server that has them: their memory, signals, limits and exits are theirs alone, as those of others.
"""

import functools
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np

import echoatt_hf


IMPORTED = ["echoatt_hf.cli.app", *(f"echoatt_hf.{module}" for module in echoatt_hf._MODULES)]
IMPORTED += ["accelerate", "datasets", "matplotlib.pyplot", "peft", "transformers.models.llama.modeling_llama"]


def process_environment(**changes: str) -> dict[str, str]:
    """Environment of a process that runs this package, installed or not, offline and on one thread."""
    package = str(Path(echoatt_hf.__file__).parents[1])
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": package} | changes


@functools.cache
def _server():
    """What forks processes. Made once, as its imports take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, process_environment()):
        forkserver.ensure_running()
    return context


def _python(arguments: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    """What `python *arguments` does, in a forked process; standard output and error go to files in `output`."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    # A shell lets what runs in its background ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # The server's would be the same in every process.
    random.seed()
    np.random.seed()
    match arguments:
        case ["-c", code, *_]:
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        case ["-m", module, *_]:
            sys.argv = arguments[1:]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case [path, *_]:
            sys.argv = arguments
            sys.path.insert(0, os.path.dirname(path))
            runpy.run_path(path, run_name="__main__")


class ForkedPython:
    """
    A process that runs `python *arguments`, forked from one that has imported what takes long.

    Args:
        arguments: of Python: `-c` and code, `-m` and a module, or a script, and what those take.
        cwd (`str` or `os.PathLike`, *optional*): where it runs.
        changes (`str`): changes of the environment that matter after imports.
    """

    def __init__(self, *arguments, cwd=None, **changes: str):
        self.arguments = [str(argument) for argument in arguments]
        self._output = tempfile.TemporaryDirectory()
        self._process = _server().Process(
            target=_python,
            args=(self.arguments, str(cwd or Path.cwd()), process_environment(**changes), self._output.name),
        )
        self._process.start()

    def is_running(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Its exit and what it said."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        said = [Path(self._output.name, name).read_text() for name in ("stdout", "stderr")]
        self._output.cleanup()
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, *said)


def run_python(*arguments, cwd=None, new_interpreter: bool = False, **changes: str) -> subprocess.CompletedProcess:
    """
    Run `python *arguments` in a process of its own.

    Args:
        new_interpreter (`bool`): not forked. Its strings have other hashes than those of all forked processes: for what
            their results are compared with.
    """
    if not new_interpreter:
        return ForkedPython(*arguments, cwd=cwd, **changes).wait()
    command = [sys.executable, *map(str, arguments)]
    environment = process_environment(**changes)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
