"""Runs a command-line tool, so that all tools have the same exit codes and error lines."""

import os
import signal
import sys
from collections.abc import Callable

from megatron_rasft.errors import FailedElsewhere, RasftError

USAGE_ERROR = 2
"""Exit code for a wrong flag or input, as in argparse."""


def run[**P](main: Callable[P, int | None], *args: P.args, **kwargs: P.kwargs) -> int:
    """Calls ``main`` and turns its expected errors into one line on stderr, as pretrain_rasft.py prints them.

    Other exceptions are bugs and pass through with their traceback.

    Returns:
        The exit code: the result of ``main`` (0 for None; tools return 1 for a failed check), 1 for a RasftError or an OSError,
        2 for a ValueError, 130 after Ctrl-C, 141 if the reader of stdout has ended, as with ``| head``.
    """
    try:
        code = main(*args, **kwargs)
        sys.stdout.flush()  # flushed here, because a closed pipe at exit would make Python print a traceback
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Python flushes stdout again at exit, which would fail too if stdout had no open file
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except FailedElsewhere:
        return 1  # the rank that failed printed the message
    except (RasftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code or 0
