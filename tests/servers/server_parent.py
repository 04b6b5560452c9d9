"""Imports SGLang once, and then forks a server for every line of standard input. tests/servers/running.py starts it.

    python server_parent.py

Runs in the environment of a version of SGLang. A line is a JSON object with ``flags`` of tools/sglang_on_cpu.py and ``log``, a file
that the output is appended to. The answer is a line with the process id, which is also the server's process group. An ended server
leaves no zombie. When standard input ends, so do the servers.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import sglang_on_cpu

PRELOADED = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
)


def serve(flags: list[str], log: str) -> None:
    """Becomes a server, in a process of its own. Does not return."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(log, "ab") as output, open(os.devnull, "rb") as nothing:
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source.fileno(), target)
    sglang_on_cpu.serve(flags)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # garbage collection in the servers then leaves the memory of these objects shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    servers = []
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        server = os.fork()
        if server == 0:
            answers.close()
            serve(**json.loads(line))
            return
        with contextlib.suppress(OSError):
            os.setpgid(server, server)  # both do this, so that it has happened when either goes on
        servers.append(server)
        print(server, file=answers, flush=True)
    for server in servers:
        with contextlib.suppress(OSError):
            os.killpg(server, signal.SIGKILL)
    os._exit(0)  # an ordinary end of the interpreter prints pages about objects that Triton leaks


if __name__ == "__main__":
    main()
