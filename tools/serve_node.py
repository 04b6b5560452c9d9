"""Keeps the rollout servers of one node running: starts each with tools/serve_rollouts.py, and starts it again if it ends.

    tools/serve_node.py --num-servers 2 --tp 4 --model DIR --server-file servers.txt [FLAGS of serve_rollouts.py] [-- SGLANG FLAGS]

Each server gets --tp of the node's GPUs. A server that ends by itself is started again, up to --max-restarts times. With SIGTERM,
SIGINT, SIGHUP or SIGUSR1 all servers sign off and end, and the exit code is 0. It is 1 if no server is left. examples/slurm/rasft.sbatch
runs this tool on each node of servers.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.errors import RolloutError
from megatron_rasft.tools import cli
from megatron_rasft.tools.ports import free_port
from tools import serve_rollouts

LAUNCHER = Path(serve_rollouts.__file__).resolve()
POLL_S = 0.5
REAP_S = 10.0
"""The longest wait for killed processes, seconds. A process that is stuck in the driver does not end."""
_PR_SET_CHILD_SUBREAPER = 36
"""prctl: processes whose parent dies become children of this process in place of init's."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this tool's own flags. The others are those of tools/serve_rollouts.py."""
    made = argparse.ArgumentParser(
        prog="serve_node.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--num-servers", type=int, default=1, metavar="N", help="servers on this node, >= 1 (default: 1)"
    )
    made.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        metavar="N",
        help="how often a server is started again, >= 0 (default: 3)",
    )
    made.add_argument(
        "--log-folder",
        type=Path,
        metavar="DIR",
        help="folder for one log of each server, server-NODE-NUMBER.log (default: the output of this tool)",
    )
    made.add_argument(
        "--given-up-file",
        type=Path,
        metavar="FILE",
        help="file to which a line is added for each server that is not started again",
    )
    return made


@dataclass
class Server:
    """One server: its launcher's command, and the launcher that runs."""

    name: str
    command: list[str]
    """Without --host, --port and SGLang's flags."""
    variables: dict[str, str]
    host: str
    port: int
    """0: another free port at each start."""
    server_file: Path | None
    log: Path | None
    sglang_flags: list[str] = field(default_factory=list)
    """Begin with a lone --, if there are any."""
    given_up_file: Path | None = None
    num_restarts: int = 0
    process: subprocess.Popen[bytes] | None = None
    url: str = ""
    """The address that the launcher adds to the file."""

    def start(self) -> None:
        """Starts the launcher, which adds the server's address to the file when the server is ready."""
        port = self.port or free_port(self.host)
        self.url = serve_rollouts.address_of(self.host, port)
        command = [*self.command, "--host", self.host, "--port", str(port), *self.sglang_flags]
        with open(self.log, "ab") if self.log is not None else nullcontext() as output:
            self.process = subprocess.Popen(
                command, env=os.environ | self.variables, stdout=output, stderr=output and subprocess.STDOUT
            )

    def sign_off(self) -> None:
        """Removes the address from the file. The launcher does so itself, unless it was killed."""
        serve_rollouts.sign_off(self.server_file, self.url)

    def give_up(self, max_restarts: int) -> None:
        """Notes that the server is not started again."""
        text = f"{self.name} ended with status {self.exit_code} after {max_restarts} restarts"
        print(f"{text} and is given up", flush=True)
        if self.given_up_file is not None:
            with suppress(OSError), self.given_up_file.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")  # a full disk must not end the other servers

    @property
    def exit_code(self) -> int | None:
        """The launcher's exit code; None while it runs."""
        assert self.process is not None, "the server has not been started"
        return self.process.poll()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the node's servers until a signal, or until none is left."""
    words, sglang_flags = split_at_dashes(sys.argv[1:] if argv is None else argv)
    args, more = parser().parse_known_args(words)
    servers = prepared(args, more, sglang_flags)
    adopt_orphans()
    stopping: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.append(number)

    # srun forwards SIGUSR1, but kills its tasks if it gets one of the others.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        watch(servers, args.max_restarts, stopping)
    finally:
        end(servers)
    return 0


def split_at_dashes(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words before the first lone --, and the others: the -- and SGLang's flags."""
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at]], [*words[at:]]


def prepared(args: argparse.Namespace, more: list[str], sglang_flags: list[str]) -> list[Server]:
    """Returns the servers, not yet started.

    Args:
        args: this tool's own flags.
        more: flags of serve_rollouts.py.
        sglang_flags: see ``Server``.

    Raises:
        ValueError: a flag is wrong.
    """
    if args.num_servers < 1:
        raise ValueError(f"--num-servers must be >= 1, got {args.num_servers}.")
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts must be >= 0, got {args.max_restarts}. Use 0 for no restart.")
    of_server = serve_rollouts.parser().parse_args([*more, *sglang_flags])
    if of_server.port and args.num_servers > 1:
        raise ValueError(
            f"--port {of_server.port} cannot be given to {args.num_servers} servers: leave it out, and each takes a free port."
        )
    shares = [] if of_server.cpu else gpu_shares(args.num_servers, of_server.tp)
    if args.log_folder is not None:
        args.log_folder.mkdir(parents=True, exist_ok=True)
    node = socket.gethostname() if "SLURMD_NODENAME" not in os.environ else os.environ["SLURMD_NODENAME"]
    host = of_server.host or ("127.0.0.1" if of_server.cpu else serve_rollouts.own_address())
    return [
        Server(
            name=f"server {number} of {node}",
            command=[sys.executable, str(LAUNCHER), *more],
            sglang_flags=sglang_flags,
            host=host,
            port=of_server.port,
            server_file=of_server.server_file,
            variables={"PYTHONPATH": str(LAUNCHER.parents[1])}
            | ({"CUDA_VISIBLE_DEVICES": shares[number]} if shares else {}),
            given_up_file=args.given_up_file,
            log=args.log_folder and args.log_folder / f"server-{node}-{number}.log",
        )
        for number in range(args.num_servers)
    ]


def gpu_shares(num_servers: int, tp: int) -> list[str]:
    """Returns the CUDA_VISIBLE_DEVICES of each server: parts of this process's own, or of 0, 1, 2, ... if it has none.

    Raises:
        ValueError: there are too few GPUs.
    """
    needed = num_servers * tp
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(needed)]
    if len(gpus) < needed:
        raise ValueError(
            f"--num-servers {num_servers} with --tp {tp} needs {needed} GPUs, but CUDA_VISIBLE_DEVICES has {len(gpus)} ({visible})."
        )
    return [",".join(gpus[number * tp : (number + 1) * tp]) for number in range(num_servers)]


def watch(servers: Sequence[Server], max_restarts: int, stopping: list[int]) -> None:
    """Starts the servers, and starts a server again when it ends. Returns after a signal.

    Raises:
        RolloutError: every server has ended more than ``max_restarts`` times.
    """
    running = list(servers)
    for server in running:
        server.start()
    while running and not stopping:
        time.sleep(POLL_S)
        for server in list(running):
            code = server.exit_code
            if code is None or stopping:
                continue
            server.sign_off()
            kill_orphans(servers)
            if server.num_restarts == max_restarts:
                running.remove(server)
                server.give_up(max_restarts)
                continue
            server.num_restarts += 1
            print(
                f"{server.name} ended with status {code}: restart {server.num_restarts} of {max_restarts}",
                flush=True,
            )
            server.start()
    if not stopping:
        raise RolloutError(f"no server is left after {max_restarts} restarts each: see their logs")


def end(servers: Sequence[Server]) -> None:
    """Ends all servers. Each finishes its requests and signs off first."""
    started = [server.process for server in servers if server.process is not None]
    for process in started:
        if process.poll() is None:
            process.terminate()
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(serve_rollouts.DRAIN_S + 10)
        process.kill()
    for server in servers:
        if server.process is not None:
            server.sign_off()
    kill_orphans(())


def adopt_orphans() -> None:
    """Makes processes of a killed launcher children of this process, which can then find and end them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_orphans(servers: Sequence[Server]) -> None:
    """Kills the processes that a launcher left behind when it was killed: they hold GPUs that its next start needs."""
    running = {server.process.pid for server in servers if server.process is not None}
    orphans = [child for child in psutil.Process().children() if child.pid not in running]
    for orphan in orphans:
        with suppress(psutil.Error):
            for process in [*orphan.children(recursive=True), orphan]:
                with suppress(psutil.Error):
                    process.kill()
    psutil.wait_procs(orphans, timeout=REAP_S)


if __name__ == "__main__":
    sys.exit(cli.run(main))
