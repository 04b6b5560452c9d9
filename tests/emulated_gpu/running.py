"""Runs programs unmodified on an emulated machine with GPUs: in fresh interpreters, or forked from one that is prepared.

``variables`` is all that a program needs: give it as the environment of any command. See machine/gpu_emulation/__init__.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import forking
from tests.forking import ENVIRONMENT, REPOSITORY, Outcome
from tests.functional import launching

TRANSFORMER_ENGINE = REPOSITORY / ".cache" / "transformer_engine-2.20.2"
"""Where tools/install_emulated_gpu.sh puts it."""

MACHINE = Path(__file__).parent / "machine"


def variables(*packages: str) -> dict[str, str]:
    """The environment that makes a process one on an emulated GPU.

    Args:
        packages: those that the machine has: transformer_engine, apex, or transformer_engine_of_another_torch.
    """
    # EMULATED_GPU_TE can name a folder that is there already, as in a second checkout.
    folder = Path(os.environ.get("EMULATED_GPU_TE", TRANSFORMER_ENGINE))
    if not (folder / ".installed").is_file():
        pytest.fail(f"{folder} is not installed: make emulated-gpu")
    return ENVIRONMENT | {
        "EMULATED_GPU": ",".join(packages),
        "EMULATED_GPU_TE": str(folder),
        "PYTHONPATH": os.pathsep.join([str(MACHINE), str(REPOSITORY)]),
        # There is nothing to run compiled kernels on.
        "TRITON_INTERPRET": "1",
        # Compiling for the CPU would take minutes, and shows nothing about a GPU.
        "TORCHDYNAMO_DISABLE": "1",
    }


_parents: dict[tuple[str, ...], forking.Parent] = {}


def parent(*packages: str) -> forking.Parent:
    """The process on the emulated machine from which ranks are forked."""
    if packages not in _parents:
        _parents[packages] = forking.Parent("tests.emulated_gpu.preloaded", variables(*packages))
    return _parents[packages]


def _add_paths() -> None:
    """Put the machine's folders back on the path: multiprocessing gives a forked process the path of the one that asked for it."""
    sys.path += [str(MACHINE), os.environ["EMULATED_GPU_TE"]]


def run(
    folder: Path,
    flags: Sequence[str],
    world_size: int = 1,
    *,
    packages: Sequence[str] = ("transformer_engine",),
    prepare_rank: Callable[[int], Sequence[Callable[[], None]]] = lambda rank: (),
    **options: Any,
) -> Outcome:
    """``launching.run`` on the emulated machine."""
    options["prepare_rank"] = lambda rank: [_add_paths, *prepare_rank(rank)]
    local = {"LOCAL_WORLD_SIZE": str(world_size)} | dict(options.pop("variables", {}))
    return launching.run(folder, flags, world_size, parent=parent(*packages), variables=local, **options)


def command(
    line: Sequence[str],
    *packages: str,
    more: Mapping[str, str] | None = None,
    timeout_s: float = 240,
) -> subprocess.CompletedProcess[str]:
    """A command on the emulated machine as a user types it, with both outputs in ``stdout``."""
    environment = os.environ | variables(*packages) | (more or {})
    return subprocess.run(
        line,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=timeout_s,
    )
