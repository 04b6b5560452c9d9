"""A grader that misbehaves in the way that the response text names. Imported by the pool's workers."""

import ctypes
import os
import signal
import sys
import time
from typing import Any

from megatron_rasft.types import Verdict

PROGRAM_GRADING = "megatron_rasft.verify.programs.program_grading"


class UnpicklableError(Exception):
    """Can be pickled but not unpickled: its constructor needs two arguments."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__("one argument")


def act_out(text: str, gold: str) -> tuple[Verdict, Any]:
    """Performs the action that the first word of the text names. ``equal`` compares the rest with the gold answer."""
    action, _, rest = text.partition(" ")
    if action == "sleep":
        time.sleep(3600)
    elif action == "slowly":
        time.sleep(0.3)
    elif action == "alarm":
        os.kill(os.getpid(), signal.SIGALRM)
        time.sleep(3600)
    elif action == "spin":
        return "correct", len(str(10**10**10))
    elif action == "ignore_sigterm":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    elif action == "exit":
        os._exit(int(rest or 3))
    elif action == "sys_exit":
        sys.exit(1)
    elif action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "segfault":
        ctypes.string_at(0)
    elif action == "raise":
        raise UnpicklableError("a", "b")
    elif action == "recurse":
        act_out(text, gold)
    elif action == "memory":
        return "correct", str(len(bytearray(8 * 2**30)))
    elif action == "hoard":
        hoard = []
        while True:
            hoard.append(bytearray(2**20))
    elif action == "nonsense":
        return "splendid", ""  # type: ignore[return-value]
    elif action == "none":
        return None  # type: ignore[return-value]
    elif action == "long_reason":
        return "correct", "x" * 10**6
    elif action == "print":
        print("x" * 10**5)
        return "correct", ""
    elif action == "modules":
        names = ("torch", "megatron", "nltk", "__mp_main__", "only_the_trainer", PROGRAM_GRADING)
        return "correct", ",".join(name for name in names if name in sys.modules)
    elif action == "pid":
        return "correct", str(os.getpid())
    return ("correct" if rest == gold else "wrong"), ""
