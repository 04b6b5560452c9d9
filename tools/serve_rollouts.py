"""Starts one SGLang server for rollouts and adds its address to the file that the trainer reads.

    tools/serve_rollouts.py --model DIR --server-file servers.txt [--tp 4] [--python ENV/bin/python] [-- SGLANG FLAGS]

Runs in the foreground until the server ends or until SIGTERM, SIGINT or SIGHUP. Then it removes the address again and ends the
server, which gets 30 s to finish its requests. SGLang needs its own environment; --python names its interpreter. With --cpu
the server runs without a GPU, in one of the environments that `make servers` creates. Flags after -- are passed to
sglang.launch_server unchanged.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import IO

import psutil

from megatron_rasft.config.rollout import check_address
from megatron_rasft.errors import RolloutError, ServerError
from megatron_rasft.scratch import ScratchFolder
from megatron_rasft.servers.addresses import add_address, check_writable, remove_address
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.keys import read_key
from megatron_rasft.tools import cli
from megatron_rasft.tools.ports import check_port, free_port

ROOT = Path(__file__).resolve().parent.parent
CPU_LAUNCHER = Path(__file__).resolve().parent / "sglang_on_cpu.py"
DRAIN_S = 30.0
"""Time after SIGTERM until the server is killed, seconds. It finishes its requests first, which never ends if it is paused."""
LOG_S = 5.0
"""The longest wait for the rest of an ended server's log, seconds. A process that has left its session may still have it open."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all flags. Arguments after a lone -- are SGLang's."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder to serve: the trainer's --hf-model"
    )
    made.add_argument(
        "--server-file",
        type=Path,
        help="file that gets the server's address: the trainer's --rollout-server-file",
    )
    made.add_argument(
        "--tp",
        type=int,
        default=1,
        help="number of GPUs over which the model is split, >= 1 (default: %(default)s)",
    )
    made.add_argument(
        "--host",
        help="address to listen on and to add to the file; with 0.0.0.0 or :: it listens on all addresses and adds this machine's "
        "(default: this machine's; with --cpu 127.0.0.1)",
    )
    made.add_argument(
        "--port", type=int, default=0, help="port to listen on; 0 chooses a free one (default: %(default)s)"
    )
    made.add_argument(
        "--python", type=Path, help="interpreter of the environment with SGLang (default: python3)"
    )
    made.add_argument("--cpu", action="store_true", help="run without a GPU, for tests and trials")
    made.add_argument("--api-key-env", help="environment variable that holds the key that clients must send")
    made.add_argument(
        "--memory-saver",
        action="store_true",
        help="let the trainer on the same GPU release and resume the server's memory (--sync-method tensor)",
    )
    made.add_argument(
        "--ready-s",
        type=float,
        default=1800.0,
        help="longest time for the server to start, seconds (default: %(default)s)",
    )
    made.add_argument(
        "sglang", nargs="*", metavar="-- SGLANG FLAGS", help="further flags of sglang.launch_server"
    )
    return made


def main() -> int:
    """Runs the server until it ends or this process is asked to stop; returns 0 in the second case."""
    return serve(parser().parse_args())


def serve(args: argparse.Namespace) -> int:
    """Checks the flags, then runs the server.

    Raises:
        ValueError: a flag is wrong; no server was started.
        RolloutError: the server did not become ready, or ended by itself.
    """
    if not (args.model / "config.json").is_file():
        raise ValueError(f"--model {args.model} has no config.json: name the folder of a Hugging Face model.")
    if args.tp < 1:
        raise ValueError(f"--tp must be >= 1, got {args.tp}. Use 1 for a server on one GPU.")
    host = args.host or ("127.0.0.1" if args.cpu else own_address())
    if args.port:
        check_port(host, args.port)
    port = args.port or free_port(host)
    if args.server_file is not None:
        check_writable(args.server_file)
    url = address_of(host, port)
    key = read_key("--api-key-env", args.api_key_env)
    if key is not None and "--config" in args.sglang:
        raise ValueError(
            "--api-key-env cannot be combined with SGLang's --config: write api-key into that file instead."
        )
    with closing(ScratchFolder("rasft-serve-")) as scratch:
        line = command(args, host, port, write_secrets(scratch, key))
        return _watch(args, line, url, key, scratch)


def _watch(
    args: argparse.Namespace, line: Sequence[str], url: str, key: str | None, scratch: ScratchFolder
) -> int:
    stopping: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.append(number)
        for process in started:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        process, log = start(line, key, scratch)
        started.append(process)
    except OSError as error:
        raise ValueError(f"--python {line[0]} cannot be started ({error.strerror}).") from error
    try:
        wait_until_ready(url, key, process, args.ready_s, stopping)
        if not stopping:
            enter(args.server_file, url)
        while not stopping and process.poll() is None:
            time.sleep(0.5)
    finally:
        try:
            sign_off(args.server_file, url)
        finally:
            end(process)
            if log is not None:
                log.join(LOG_S)  # the last lines say why the server ended
    if stopping:
        return 0
    raise RolloutError(
        f"the server at {url} ended by itself with status {process.returncode}: see its log above"
    )


def start(
    line: Sequence[str], key: str | None, scratch: ScratchFolder
) -> tuple[subprocess.Popen[bytes], Thread | None]:
    """Starts the server. SGLang logs its own settings, so a server with a key writes to this process, which masks the key.

    Args:
        line: its command line.
        key: its key; None for none.
        scratch: where it makes its sockets, which SGLang never removes. They stay as long as the server, even if this process is
            killed.

    Returns:
        The server, and the thread that copies its log; None without a key.

    Raises:
        OSError: the interpreter cannot be started.
    """
    output = None if key is None else subprocess.PIPE
    process = subprocess.Popen(
        line,
        env=environment(scratch),
        start_new_session=True,
        pass_fds=[scratch.lock],
        stdout=output,
        stderr=output and subprocess.STDOUT,
    )
    if key is None:
        return process, None
    assert process.stdout is not None
    log = Thread(target=copy_masked, args=(process.stdout, key), name="server's log", daemon=True)
    log.start()
    return process, log


def copy_masked(source: IO[bytes], key: str) -> None:
    """Copies lines to standard output, without the key in any form in which Python or JSON would print it."""
    forms = {form.encode() for form in (key, repr(key)[1:-1], json.dumps(key)[1:-1])}
    for line in source:
        for form in sorted(forms, key=len, reverse=True):
            line = line.replace(form, b"***")
        with suppress(OSError):  # if the disk is full, the server would wait for ever for a reader of its log
            os.write(1, line)


def enter(file: Path | None, url: str) -> None:
    """Adds the server to the file, and prints that it is ready."""
    try:
        if file is not None:
            add_address(file, url)
    except OSError as error:
        raise RolloutError(f"{file} can no longer be written ({error.strerror})") from error
    print(f"ready: {url}" + (f", added to {file}" if file else ""), flush=True)


def sign_off(file: Path | None, url: str) -> None:
    """Removes the server from the file; prints a line if that fails."""
    try:
        if file is not None:
            remove_address(file, url)
    except OSError as error:
        print(
            f"error: {url} could not be removed from {file} ({error.strerror}): remove it by hand",
            file=sys.stderr,
        )


def command(args: argparse.Namespace, host: str, port: int, secrets: Path | None) -> list[str]:
    """Returns the server's command line. It holds no key, because every user of the machine can read it."""
    python = args.python or (cpu_python() if args.cpu else Path("python3"))
    line = [str(python), *([str(CPU_LAUNCHER)] if args.cpu else ["-m", "sglang.launch_server"])]
    line += ["--model-path", str(args.model), "--host", host, "--port", str(port), "--tp-size", str(args.tp)]
    line += [
        "--nccl-port",
        str(free_port(host)),
    ]  # chosen here, because a port chosen by SGLang could be taken before SGLang uses it
    if not (args.model / "tokenizer.json").exists() and not (args.model / "tokenizer.model").exists():
        line.append("--skip-tokenizer-init")  # no tokenizer, because requests and answers are token ids
    if args.memory_saver:
        line.append("--enable-memory-saver")
    if secrets is not None:
        line += ["--config", str(secrets)]
    return line + list(args.sglang)


def write_secrets(scratch: ScratchFolder, key: str | None) -> Path | None:
    """Writes a configuration file of SGLang with the key, which only this user can read. Returns None without a key."""
    if key is None:
        return None
    path = scratch.path / "secrets.yaml"  # the mode of the folder is 0700
    path.write_text(f"api-key: {json.dumps(key)}\n", encoding="utf-8")
    return path


def environment(scratch: ScratchFolder) -> dict[str, str]:
    """Returns the environment variables, without those that make the server's interpreter load this environment's packages."""
    own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return {**own, "TMPDIR": str(scratch.path)} if scratch.holds_sockets else own


def cpu_python() -> Path:
    """Returns the interpreter of the newest environment that `make servers` has created."""

    def version(python: Path) -> list[int]:
        return [int(n) for n in python.parents[1].name.removeprefix(".venv-sglang-").split(".")]

    found = sorted(ROOT.glob(".venv-sglang-[0-9]*/bin/python"), key=version)
    if not found:
        raise RolloutError(
            "--cpu needs an environment with SGLang: run `make servers`, or name an interpreter with --python."
        )
    return found[-1]


def wait_until_ready(
    url: str, key: str | None, process: subprocess.Popen[bytes], limit_s: float, stopping: list[int]
) -> None:
    """Waits until the server has warmed up and generated a token. Returns early if this process is asked to stop."""
    ends = time.monotonic() + limit_s
    reason = ""
    with ServerClient(url, api_key=key) as control:
        while not stopping:
            try:
                control.weight_label(deadline_s=10.0)
                control.check_health(deadline_s=60.0)
                control.generate(
                    {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}, deadline_s=120.0
                )
                return
            except ServerError as error:
                reason = error.reason
            if process.poll() is not None:
                raise RolloutError(
                    f"the server ended with status {process.returncode} while starting: see its log above"
                )
            if time.monotonic() > ends:
                raise RolloutError(
                    f"the server is not ready after --ready-s {limit_s:g} s ({reason}): see its log above"
                )
            time.sleep(1.0)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends all of the server's processes."""
    if process.poll() is None:
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(DRAIN_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def address_of(host: str, port: int) -> str:
    """Returns the address to add for a server that listens on ``host``: this machine's if it listens on all addresses.

    Raises:
        ValueError: ``host`` is not a valid host.
    """
    if host in ("0.0.0.0", "::"):
        host = own_address(host)
    return check_address(f"http://{f'[{host}]' if ':' in host else host}:{port}", f"--host {host}")


def own_address(everywhere: str = "0.0.0.0") -> str:
    """Returns the address at which other machines reach this machine; an IPv6 address for ``::``."""
    # connecting a datagram socket sends nothing, but chooses the address from which it would send
    family, far, loopback = (
        (socket.AF_INET6, "2001:db8::1", "::1")
        if ":" in everywhere
        else (socket.AF_INET, "10.255.255.255", "127.0.0.1")
    )
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((far, 1))
            return str(probe.getsockname()[0])
        except OSError:
            pass  # there is no route to other machines
    own = [e.address for entries in psutil.net_if_addrs().values() for e in entries if e.family == family]
    return next((a for a in own if not a.startswith(("127.", "169.254.", "::1", "fe80:"))), loopback)


if __name__ == "__main__":
    sys.exit(cli.run(main))
