"""Runs programs of this product in processes that are forked from one that has imported torch, Megatron and transformers.

A program then starts at once. Otherwise it imports for about ten seconds, which is longer than a small training. Only for
machines without a GPU: CUDA cannot be used in a forked process if an import has already called it.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

IMPORTS = "examples.benchmark_reproduction.imports"
"""Module that the first process imports."""


def run_program(program: Path, arguments: Sequence[str], log: Path) -> int:
    """Runs a Python program as ``python program arguments`` would, and waits for its end.

    May be called from several threads.

    Args:
        program: the .py file.
        arguments: its command line.
        log: file for its standard output and standard error, which is overwritten.

    Returns:
        The exit code, negative for a signal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTS])
    process = context.Process(target=_become, args=(program, list(arguments), log))
    process.start()
    process.join()
    assert process.exitcode is not None, "join has returned"
    return process.exitcode


def _become(program: Path, arguments: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")
