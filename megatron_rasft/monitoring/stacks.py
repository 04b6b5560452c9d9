"""Python stacks of other processes on this machine, by py-spy where it is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_rasft.errors import first_line

_PATIENCE_S = 30.0


def frame_name(filename: str, line: int | None, function: str) -> str:
    """Returns how a frame is shown: ``file:line function``."""
    return f"{Path(filename).name}:{line} {function}"


def stack_of(pid: int) -> tuple[str, ...]:
    """Returns the frames of a process's main thread, innermost first; () if py-spy is missing or cannot read them.

    The process need not run any Python code meanwhile, and is not paused.
    """
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        return ()
    command = [program, "dump", "--json", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
        threads = json.loads(done.stdout)
        main = next(thread for thread in threads if thread["os_thread_id"] == pid)
        return tuple(frame_name(f["filename"], f["line"], f["name"]) for f in main["frames"])
    except subprocess.CalledProcessError as error:
        # It often lacks the right to read another process (kernel.yama.ptrace_scope, or a container without SYS_PTRACE).
        reason = first_line(RuntimeError(error.stderr), f"exit code {error.returncode}")
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, StopIteration) as error:
        reason = first_line(error)
    print(f"py-spy cannot read the stack of process {pid}: {reason}", file=sys.stderr, flush=True)
    return ()
