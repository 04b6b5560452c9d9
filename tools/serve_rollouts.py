"""Starts one SGLang server for rollouts and enters its address in the file that the trainer reads.

    tools/serve_rollouts.py --model DIR --server-file servers.txt [--tp 4] [--python ENV/bin/python] [-- SGLANG FLAGS]

Runs in the foreground until the server ends or a SIGTERM, SIGINT or SIGHUP comes. Then it takes the address out again and
ends the server, which has 30 s to finish what it is at. SGLang lives in an environment of its own, whose interpreter --python names. With --cpu it starts on a machine
without a GPU, from the environments that `make servers` makes. Flags after -- go to sglang.launch_server as they are.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from megatron_rasft.config.rollout import check_address
from megatron_rasft.errors import RasftError, RolloutError, ServerError
from megatron_rasft.servers.addresses import add_address, check_writable, remove_address
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.keys import read_key
from megatron_rasft.tools.ports import check_port, free_port

ROOT = Path(__file__).resolve().parent.parent
CPU_LAUNCHER = Path(__file__).resolve().parent / "sglang_on_cpu.py"
DRAIN_S = 30.0
"""A server that is told to end finishes its requests first, for ever if it is paused; after this time it is killed."""


def parser() -> argparse.ArgumentParser:
    """All flags; what follows a lone -- is SGLang's."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder to serve: the trainer's --hf-model"
    )
    made.add_argument(
        "--server-file", type=Path, help="file to enter the address in: the trainer's --rollout-server-file"
    )
    made.add_argument(
        "--tp", type=int, default=1, help="GPUs to split the model over, >= 1 (default: %(default)s)"
    )
    made.add_argument(
        "--host",
        help="address to listen on and to enter; 0.0.0.0 or :: listens on all and enters this machine's (default: this "
        "machine's; with --cpu 127.0.0.1)",
    )
    made.add_argument(
        "--port", type=int, default=0, help="port to listen on; 0 takes a free one (default: %(default)s)"
    )
    made.add_argument(
        "--python", type=Path, help="interpreter of the environment that holds SGLang (default: python3)"
    )
    made.add_argument("--cpu", action="store_true", help="run without a GPU, for tests and trials")
    made.add_argument("--api-key-env", help="environment variable with the key that clients must give")
    made.add_argument(
        "--memory-saver",
        action="store_true",
        help="let the trainer on the same GPU release and resume the server's memory (--sync-method tensor)",
    )
    made.add_argument(
        "--ready-s",
        type=float,
        default=1800.0,
        help="time the server may take to start, seconds (default: %(default)s)",
    )
    made.add_argument(
        "sglang", nargs="*", metavar="-- SGLANG FLAGS", help="further flags of sglang.launch_server"
    )
    return made


def main() -> int:
    """Start, wait, enter, watch; every expected failure is one line on stderr and exit status 1."""
    args = parser().parse_args()
    try:
        return serve(args)
    except (RasftError, ValueError) as error:
        print(f"serve_rollouts: {error}", file=sys.stderr)
        return 1


def serve(args: argparse.Namespace) -> int:
    """Run the server to its end; its exit status, 0 if it was asked to stop."""
    if not (args.model / "config.json").is_file():
        raise ValueError(
            f"--model {args.model} holds no config.json: name the folder of a Hugging Face model."
        )
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
            "--api-key-env does not go with SGLang's --config: write api-key into that file instead."
        )
    with secrets_file(key) as secrets:
        return _watch(args, command(args, host, port, secrets), url, key)


def _watch(args: argparse.Namespace, line: Sequence[str], url: str, key: str | None) -> int:
    stopping: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.append(number)
        for process in started:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, stop)
    try:
        process = subprocess.Popen(line, env=environment(), start_new_session=True)
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
    if stopping:
        return 0
    raise RolloutError(
        f"the server at {url} ended by itself with status {process.returncode}: its log above says why"
    )


def enter(file: Path | None, url: str) -> None:
    """Tell the trainer, and whoever watches, that the server is ready."""
    try:
        if file is not None:
            add_address(file, url)
    except OSError as error:
        raise RolloutError(f"{file} can no longer be written ({error.strerror})") from error
    print(f"ready: {url}" + (f", entered in {file}" if file else ""), flush=True)


def sign_off(file: Path | None, url: str) -> None:
    """Take the server out of the file; where that cannot be, it is said."""
    try:
        if file is not None:
            remove_address(file, url)
    except OSError as error:
        print(
            f"serve_rollouts: {url} could not be taken out of {file} ({error.strerror}): do so by hand",
            file=sys.stderr,
        )


def command(args: argparse.Namespace, host: str, port: int, secrets: Path | None) -> list[str]:
    """The server's command line, which every user of the machine can read."""
    python = args.python or (cpu_python() if args.cpu else Path("python3"))
    line = [str(python), *([str(CPU_LAUNCHER)] if args.cpu else ["-m", "sglang.launch_server"])]
    line += ["--model-path", str(args.model), "--host", host, "--port", str(port), "--tp-size", str(args.tp)]
    line += ["--nccl-port", str(free_port(host))]  # its own choice may be taken before it gets to it
    if not (args.model / "tokenizer.json").exists() and not (args.model / "tokenizer.model").exists():
        line.append("--skip-tokenizer-init")  # token ids go in and out
    if args.memory_saver:
        line.append("--enable-memory-saver")
    if secrets is not None:
        line += ["--config", str(secrets)]
    return line + list(args.sglang)


@contextmanager
def secrets_file(key: str | None) -> Iterator[Path | None]:
    """SGLang's configuration with the key, in a file that only this user reads; None without a key."""
    if key is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="serve_rollouts-") as folder:  # of mode 0700
        path = Path(folder) / "secrets.yaml"
        path.write_text(f"api-key: {json.dumps(key)}\n", encoding="utf-8")
        yield path


def environment() -> dict[str, str]:
    """Ours without what would lead the server's interpreter to this environment's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def cpu_python() -> Path:
    """The newest of the environments that `make servers` has made."""

    def version(python: Path) -> list[int]:
        return [int(n) for n in python.parents[1].name.removeprefix(".venv-sglang-").split(".")]

    found = sorted(ROOT.glob(".venv-sglang-[0-9]*/bin/python"), key=version)
    if not found:
        raise RolloutError(
            "--cpu needs an environment with SGLang: run `make servers`, or name one with --python."
        )
    return found[-1]


def wait_until_ready(
    url: str, key: str | None, process: subprocess.Popen[bytes], limit_s: float, stopping: list[int]
) -> None:
    """Until the server has warmed up and generated a token; returns early if this process was asked to stop."""
    ends = time.monotonic() + limit_s
    said = ""
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
                said = error.reason
            if process.poll() is not None:
                raise RolloutError(
                    f"the server ended with status {process.returncode} while starting: see its log above"
                )
            if time.monotonic() > ends:
                raise RolloutError(
                    f"the server is not ready after --ready-s {limit_s:g} s ({said}): see its log above"
                )
            time.sleep(1.0)


def end(process: subprocess.Popen[bytes]) -> None:
    """Leave none of the server's processes behind."""
    if process.poll() is None:
        process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(DRAIN_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def address_of(host: str, port: int) -> str:
    """The address to enter for a server that listens on ``host``; this machine's for one that listens everywhere.

    Raises:
        ValueError: ``host`` cannot be part of one.
    """
    if host in ("0.0.0.0", "::"):
        host = own_address(host)
    return check_address(f"http://{f'[{host}]' if ':' in host else host}:{port}", f"--host {host}")


def own_address(everywhere: str = "0.0.0.0") -> str:
    """The address, IPv6 for ``::``, by which other machines reach this one; no packet is sent."""
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
            pass  # no route that leads away
    own = [e.address for entries in psutil.net_if_addrs().values() for e in entries if e.family == family]
    return next((a for a in own if not a.startswith(("127.", "169.254.", "::1", "fe80:"))), loopback)


if __name__ == "__main__":
    sys.exit(main())
