"""Prints the error that ends a run: once per node, although most errors are raised on every rank."""

import os
import sys
from datetime import timedelta

import torch.distributed as dist

from megatron_rasft.errors import FailedElsewhere, is_first_of_node, tell_launcher

_INTERRUPTED = 130
"""Exit code after Ctrl-C, as of shells: 128 and the number of SIGINT."""

_GRACE = timedelta(seconds=5)
"""How long the other ranks of a node wait for its first rank to print the same error."""


def report_failure(error: BaseException) -> int:
    """Prints the error that ends this process on stderr, unless another rank prints it.

    Returns:
        The exit code: 2 for a ValueError (a flag or an input is wrong), 130 for Ctrl-C, 1 for any other error.
    """
    message = "interrupted by Ctrl-C" if isinstance(error, KeyboardInterrupt) else str(error)
    tell_launcher(f"error: {message}")
    if not isinstance(error, FailedElsewhere) and prints_for_node(message):
        # The rank's number shows which node's files and log to look at. Rank 0 needs no number: users look there first.
        rank = int(os.environ.get("RANK", "0"))
        print("error: " + (f"rank {rank}: " if rank else "") + message, file=sys.stderr, flush=True)
    if isinstance(error, KeyboardInterrupt):
        return _INTERRUPTED
    return 2 if isinstance(error, ValueError) else 1


def prints_for_node(message: str) -> bool:
    """Returns whether this process prints an error.

    The first rank of a node prints it at once and marks it as printed in the store of torch.distributed. The node's other ranks
    wait ``_GRACE`` for that mark and print the error themselves if it does not appear: then the first rank did not have the
    error. Before torch.distributed is initialized, only the first rank of a node prints.
    """
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or "0"
    mark = f"rasft/printed/{node}/{message}"
    is_first = is_first_of_node()
    if not dist.is_initialized():
        return is_first
    store = dist.distributed_c10d._get_default_store()
    try:
        if is_first:
            store.set(mark, "1")
        else:
            store.wait([mark], _GRACE)
    except dist.DistNetworkError:
        # Rank 0 hosts the store and has ended. It printed its own error before it ended.
        return is_first
    except RuntimeError:  # torch's class for "the mark did not appear in time"
        return True
    return is_first
