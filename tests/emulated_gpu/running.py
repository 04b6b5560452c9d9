"""Runs unmodified programs on an emulated machine with GPUs, in new interpreters or forked from a prepared process.

The environment variables of ``variables`` are sufficient to emulate GPUs for any command. See machine/gpu_emulation/__init__.py.
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
"""Folder to which tools/install_emulated_gpu.sh installs Transformer Engine's Python files."""

MACHINE = Path(__file__).parent / "machine"


def variables(*packages: str) -> dict[str, str]:
    """The environment variables that give a process emulated GPUs.

    Args:
        packages: packages on the machine: transformer_engine, apex, or transformer_engine_of_another_torch.
    """
    # EMULATED_GPU_TE can name an existing folder, for example that of another checkout.
    folder = Path(os.environ.get("EMULATED_GPU_TE", TRANSFORMER_ENGINE))
    if not (folder / ".installed").is_file():
        pytest.fail(f"{folder} is not installed: make emulated-gpu")
    return ENVIRONMENT | {
        "EMULATED_GPU": ",".join(packages),
        "EMULATED_GPU_TE": str(folder),
        "PYTHONPATH": os.pathsep.join([str(MACHINE), str(REPOSITORY)]),
        # Triton's interpreter, because there is no device for compiled kernels.
        "TRITON_INTERPRET": "1",
        # torch.compile would take minutes to compile for the CPU, which would not test a GPU.
        "TORCHDYNAMO_DISABLE": "1",
    }


_parents: dict[tuple[str, ...], forking.Parent] = {}


def parent(*packages: str) -> forking.Parent:
    """The process on the emulated machine from which ranks are forked."""
    if packages not in _parents:
        _parents[packages] = forking.Parent("tests.emulated_gpu.preloaded", variables(*packages))
    return _parents[packages]


def add_paths() -> None:
    """Adds the machine's folders to sys.path again. multiprocessing replaces a forked process's path by the requester's."""
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
    """Calls ``launching.run`` on the emulated machine."""
    options["prepare_rank"] = lambda rank: [add_paths, *prepare_rank(rank)]
    local = {"LOCAL_WORLD_SIZE": str(world_size)} | dict(options.pop("variables", {}))
    return launching.run(folder, flags, world_size, parent=parent(*packages), variables=local, **options)


def command(
    line: Sequence[str],
    *packages: str,
    more: Mapping[str, str] | None = None,
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs a command on the emulated machine. Standard output and standard error are both in ``stdout``."""
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
