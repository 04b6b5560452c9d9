"""Runs a command-line tool: the same exit codes and error lines for all of tools/."""

import os
import signal
import sys
from collections.abc import Callable

from megatron_rasft.errors import FailedElsewhere, RasftError

USAGE_ERROR = 2
"""Exit code for a wrong flag or input, the same as argparse's."""


def run[**P](main: Callable[P, int | None], *args: P.args, **kwargs: P.kwargs) -> int:
    """Calls ``main`` and turns its expected errors into one line on stderr, as pretrain_rasft.py prints them.

    Other exceptions are bugs and pass through with their traceback.

    Returns:
        The exit code: that of ``main`` (0 for None; tools return 1 for a failed check), 1 for a RasftError or an OSError,
        2 for a ValueError, 130 after Ctrl-C, 141 when the reader of stdout is gone, as after ``| head``.
    """
    try:
        code = main(*args, **kwargs)
        sys.stdout.flush()  # a closed pipe shows here rather than at exit, where Python prints a traceback
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Python flushes stdout once more at exit: without an open file below it, that fails too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except FailedElsewhere:
        return 1  # the rank that failed printed the message
    except (RasftError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code or 0
