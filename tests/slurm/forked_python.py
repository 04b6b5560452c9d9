"""Stands for the interpreter of a job's programs: they are forked from a process that has imported everything, and start at once.

``make_python`` writes a file that is given to a job as ``PYTHON``. Started with a program's file, it asks the fork server in
``FORK_SERVER`` to run the program with this process's arguments, environment, folder, output and ignored signals. It passes each signal on,
ends as the program ends, and when it is killed the program is killed too. So it is in Slurm's tree of processes what the program would be.
Slurm does not know the processes that a forked program starts. Modules (``-m``), such as torchrun, are therefore run by ``REAL_PYTHON``, except
those in ``FORKED_MODULES``, whose signals are passed on to all processes that they have started. This file starts in 20 ms, because it imports
only small modules of Python.
"""

import json
import os
import select
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
LARGEST_REQUEST = 150_000
"""Bytes of a request, which is one message of a socket."""


def run(words: list[str]) -> NoReturn:
    """Runs a program with its arguments in a forked process, and ends this process as it ends."""
    request = {
        "words": words,
        "folder": os.getcwd(),
        "variables": dict(os.environ),
        "ignored": [name for name in PASSED_ON if signal.getsignal(signal.Signals[name]) == signal.SIG_IGN],
        "python": sys.argv[0],
    }
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(os.environ["FORK_SERVER"])
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    server.setblocking(False)
    signal.set_wakeup_fd(
        server.fileno(), warn_on_full_buffer=False
    )  # each signal's number is sent as one byte
    for name in PASSED_ON:
        signal.signal(signal.Signals[name], lambda number, frame: None)
    while not select.select([server], [], [])[0]:
        pass
    answer = server.recv(16)
    code = int(answer) if answer else -signal.SIGKILL  # the fork server has ended
    if code < 0:
        with suppress(OSError):  # of SIGKILL, which has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    given = [word for word in sys.argv[1:] if word != "-u"]
    if given[0].endswith(".py"):
        run(given)
    if given[0] == "-m" and given[1] in os.environ.get("FORKED_MODULES", "").split():
        run(given)
    os.execv(os.environ["REAL_PYTHON"], [os.environ["REAL_PYTHON"], *sys.argv[1:]])
