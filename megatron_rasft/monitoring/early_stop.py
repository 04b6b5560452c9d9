"""Remembers SIGTERM that comes before the run handles it: while the program imports its packages, or builds the model."""

import signal
from types import FrameType

_has_come = False


def remember() -> None:
    """Makes this process remember SIGTERM, if whoever started it ignores the signal, as examples/slurm does for torchrun's sake.

    The ignored signal would be lost, and the job would not stop. A process that does not ignore it ends at once, and nothing is lost.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _note)


def _note(number: int, frame: FrameType | None) -> None:
    global _has_come
    _has_come = True


def has_come() -> bool:
    """Returns whether SIGTERM came before Megatron's handler replaced this one."""
    return _has_come
