"""Runs one process per rank over gloo, and in it one trainer after another."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def run_ranks(worker: Path, world_size: int, root: Path, timeout_s: int = 300) -> None:
    """Run ``worker RANK WORLD_SIZE ROOT`` on every rank; fails with the ranks' output if one of them does."""
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "WORLD_SIZE": str(world_size),
    }
    logs = [root / f"{worker.stem}-{world_size}-{rank}.log" for rank in range(world_size)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, "-W", "ignore", str(worker), str(rank), str(world_size), str(root)]
            variables = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=variables, stdout=output, stderr=subprocess.STDOUT))
    try:
        deadline = time.monotonic() + timeout_s
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):
                break  # the others wait for it in a collective
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    codes = [rank.returncode for rank in ranks]
    assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(
        f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(logs)
    )


@contextlib.contextmanager
def trainer(
    model: Path, data: Path, flags: Sequence[str], has_distributed_optimizer: bool = True
) -> Iterator[Any]:
    """A Trainer built from a command line; Megatron's globals are gone afterwards, so another can follow.

    The distributed optimizer is this package's default, and Megatron has no flag that turns it off.
    """
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.transformer import utils as transformer_utils
    from megatron.training import global_vars

    from megatron_rasft.training import host

    argv = ["--hf-model", str(model), "--train-data", str(data), *flags]
    args, config, folder = host.parse(argv)
    args.train_iters = 100
    args.use_distributed_optimizer = has_distributed_optimizer
    host.start(args)
    try:
        yield host.Trainer(args, config, folder)
    finally:
        parallel_state.destroy_model_parallel()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        rerun_state_machine.destroy_rerun_state_machine()
        global_vars.destroy_global_vars()
        # Megatron remembers modules by the id of their model, which the next model may be given again.
        transformer_utils._sequence_parallel_attr_cache = None
