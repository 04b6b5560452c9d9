"""Checks one node before a run: its GPUs, shared memory and the run's folder. Prints one line.

    tools/check_node.py --folder RUN [--num-gpus 8]

The exit code is 1 if the node is not healthy, 2 for wrong flags. examples/slurm/rasft.sbatch runs this tool on each node of
the trainer and of the servers.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.tools import cli
from megatron_rasft.wording import counted

FIELDS = ("index", "memory.used", "ecc.errors.uncorrected.volatile.total")
MAX_USED_MIB = 2048
"""Memory of a GPU that the driver may use before the run. More belongs to another process."""
MIN_SHARED_GIB = 1.0
"""Shared memory that NCCL and the data workers need. Containers often have 64 MiB."""
GIB = 2**30


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags."""
    made = argparse.ArgumentParser(
        prog="check_node.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--folder", type=Path, required=True, help="the run's folder, on a disk that all nodes share"
    )
    made.add_argument(
        "--num-gpus",
        type=int,
        default=8,
        help="GPUs that the run needs on this node; 0: a CPU (default: %(default)s)",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Checks this node. Returns 0 if it is healthy, otherwise 1."""
    args = parser().parse_args(argv)
    if args.num_gpus < 0:
        raise ValueError(f"--num-gpus must be >= 0, got {args.num_gpus}. Use 0 for a run on a CPU.")
    faults = [folder_fault(args.folder)]
    if args.num_gpus:
        faults += [shared_memory_fault(), *gpu_faults(args.num_gpus)]
    found = [fault for fault in faults if fault]
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    if found:
        print(f"FAIL  {node}  {'; '.join(found)}", flush=True)
        return 1
    free = shutil.disk_usage(args.folder).free / GIB
    print(f"ok    {node}  {counted(args.num_gpus, 'GPU')}, {free:,.0f} GiB free in {args.folder}", flush=True)
    return 0


def folder_fault(folder: Path) -> str:
    """Returns why the folder cannot be used, or ""."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
            file.flush()
    except OSError as error:
        return f"--folder {folder} cannot be written here ({error.strerror}): name a folder on a shared disk"
    return ""


def shared_memory_fault(folder: str = "/dev/shm") -> str:
    """Returns why shared memory is too small, or ""."""
    total = shutil.disk_usage(folder).total / GIB
    if total < MIN_SHARED_GIB:
        return f"{folder} has {total:.2f} GiB, and NCCL needs {MIN_SHARED_GIB:g}: start the container with a larger one"
    return ""


def gpu_faults(num_gpus: int) -> list[str]:
    """Returns the faults of the GPUs by nvidia-smi, and whether torch can use them."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"nvidia-smi failed ({error})"]
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    faults = [fault for row in rows for fault in row_faults(row)]
    if len(rows) < num_gpus:
        faults.append(f"{counted(len(rows), 'GPU')}, but --num-gpus {num_gpus}")
    return faults or [torch_fault(num_gpus)]


def row_faults(row: Sequence[str]) -> list[str]:
    """Returns the faults in one row of nvidia-smi, with the cells of ``FIELDS``. A cell that is not a number is unknown."""
    index, *cells = row
    used, errors = (int(cell) if cell.isdecimal() else 0 for cell in cells)
    faults = []
    if used > MAX_USED_MIB:
        faults.append(f"GPU {index}: another process uses {used} MiB")
    if errors:
        faults.append(f"GPU {index}: {errors} uncorrected memory errors, so it needs a reset")
    return faults


def torch_fault(num_gpus: int) -> str:
    """Returns why torch cannot use the GPUs, or "". An image for servers may have torch for SGLang's interpreter only."""
    if find_spec("torch") is None:
        return ""
    import torch

    num = torch.cuda.device_count()
    if num < num_gpus:
        return f"torch {torch.__version__} can use {num} GPUs of {num_gpus}: check the driver and CUDA_VISIBLE_DEVICES"
    return ""


if __name__ == "__main__":
    sys.exit(cli.run(main))
