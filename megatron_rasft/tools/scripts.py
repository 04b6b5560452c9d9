"""Entry points of the console scripts, such as ``rasft-report``. They run the files of tools/ and pretrain_rasft.py.

The wheel holds the files of tools/ as the package ``megatron_rasft.commands`` (setup.py).
"""

import runpy
from importlib import import_module

from megatron_rasft.tools import cli


def train() -> None:
    """Runs pretrain_rasft.py with one process. For more: ``torchrun --nproc-per-node N -m pretrain_rasft``."""
    runpy.run_module("pretrain_rasft", run_name="__main__", alter_sys=True)


def convert() -> int:
    """Runs tools/convert_checkpoint.py."""
    return _run("convert_checkpoint")


def evaluate() -> int:
    """Runs tools/evaluate.py."""
    return _run("evaluate")


def plan() -> int:
    """Runs tools/plan.py."""
    return _run("plan")


def prepare_data() -> int:
    """Runs tools/prepare_data.py."""
    return _run("prepare_data")


def report() -> int:
    """Runs tools/report.py."""
    return _run("report")


def serve() -> int:
    """Runs tools/serve_rollouts.py."""
    return _run("serve_rollouts")


def check_servers() -> int:
    """Runs tools/check_servers.py."""
    return _run("check_servers")


def _run(name: str) -> int:
    return cli.run(import_module(f"megatron_rasft.commands.{name}").main)
