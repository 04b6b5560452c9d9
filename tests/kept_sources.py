"""Keeps the sources of classes that were read once, because the help texts of flags are parsed from them at every start.

Megatron's parser and this package's read the sources of 60 classes, which takes most of the time of parsing a command line. Tests
parse hundreds of command lines, many of them in processes forked from one that has read the sources.
"""

import argparse
import functools
import inspect

_read = inspect.getsource
_kept = functools.cache(_read)


def keep() -> None:
    """Makes inspect.getsource read the source of a class once in this process and those forked from it."""
    inspect.getsource = lambda thing: _kept(thing) if isinstance(thing, type) else _read(thing)


def read_all() -> None:
    """Reads all sources that a run of pretrain_rasft.py reads. Its modules must be imported."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_rasft.config.command_line import run_parser
    from megatron_rasft.training.arguments import add_arguments

    run_parser()
    add_arguments(add_megatron_arguments(argparse.ArgumentParser(add_help=False)))
