"""Runs one process per rank over gloo, each with several trainers one after the other."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import forking


def run_ranks(worker: Path, world_size: int, root: Path, timeout_s: int = 900) -> forking.Outcome:
    """Runs ``worker RANK WORLD_SIZE ROOT`` on every rank. If one fails, the test fails with the output of all ranks."""
    ranks = [
        forking.Rank(
            program=worker,
            arguments=[str(rank), str(world_size), str(root)],
            log=root / f"{worker.stem}-{world_size}-{rank}.log",
            variables={},
        )
        for rank in range(world_size)
    ]
    outcome = forking.run(ranks, timeout_s=timeout_s, ends_with_first_failure=True)
    ends = "\n".join(f"--- rank {rank}\n{log[-3000:]}" for rank, log in enumerate(outcome.logs))
    assert outcome.codes == [0] * world_size, f"exit codes {outcome.codes}\n{ends}"
    return outcome


@contextlib.contextmanager
def trainer(
    model: Path,
    data: Path,
    flags: Sequence[str],
    has_distributed_optimizer: bool = True,
    has_gradient_fusion: bool = False,
) -> Iterator[Any]:
    """Builds a Trainer from a command line, and destroys Megatron's globals at the end, so that another can follow.

    The two booleans are set after parsing. The package switches the distributed optimizer on by default, and Megatron has
    no flag to switch it off. Gradient accumulation fusion is Megatron's default, but the package switches it off if
    Transformer Engine is missing.
    """
    from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
    from megatron.core.transformer import utils as transformer_utils
    from megatron.training import global_vars

    from megatron_rasft.training import startup
    from megatron_rasft.training.trainer import Trainer

    argv = ["--hf-model", str(model), "--train-data", str(data), *flags]
    args, config, folder = startup.parse(argv)
    args.train_iters = 100
    args.use_distributed_optimizer = has_distributed_optimizer
    args.gradient_accumulation_fusion = has_gradient_fusion
    startup.start(args)
    try:
        yield Trainer(args, config, folder)
    finally:
        parallel_state.destroy_model_parallel()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        rerun_state_machine.destroy_rerun_state_machine()
        global_vars.destroy_global_vars()
        # Megatron caches modules by the id of their model, and Python may give the next model the same id.
        transformer_utils._sequence_parallel_attr_cache = None
