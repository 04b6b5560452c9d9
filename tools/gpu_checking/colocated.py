"""Trains on the same GPU as an SGLang server: starts the server, waits until it is ready, runs the trainer, stops the server.

    python tools/gpu_checking/colocated.py --sglang-python PYTHON --model DIR --folder DIR -- PROGRAM [FLAGS]

PROGRAM is started with Python and gets the server's address through --rollout-server-file.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SERVER_FLAGS = [
    "--mem-fraction-static",
    "0.3",
    "--attention-backend",
    "triton",
    "--sampling-backend",
    "pytorch",
]
"""Flags of SGLang. A third of the memory leaves enough for the trainer; these backends need the fewest compiled packages."""

SERVER_VARIABLES = {"SGLANG_SKIP_SGL_KERNEL_VERSION_CHECK": "1"}
"""Makes SGLang accept a wheel of its kernels that was reduced to one kind of GPU and has another version."""

END_S = 60.0
"""Time for the server to end, seconds: longer than the 30 s in which serve_rollouts.py lets SGLang finish its requests."""


def server_line(python: Path, model: Path, server_file: Path) -> list[str]:
    """The command that serves the model and writes the server's address into ``server_file``."""
    line = [sys.executable, str(ROOT / "tools" / "serve_rollouts.py"), "--python", str(python)]
    line += [
        "--model",
        str(model),
        "--server-file",
        str(server_file),
        "--host",
        "127.0.0.1",
        "--memory-saver",
    ]
    return [*line, "--", *SERVER_FLAGS]


def run(server: Sequence[str], trainer: Sequence[str], server_file: Path) -> int:
    """Runs both. Returns the trainer's exit code, or the server's if the server ends before it is ready."""
    serving = subprocess.Popen(server, cwd=ROOT, env=os.environ | SERVER_VARIABLES)
    try:
        began = time.monotonic()
        while not (server_file.exists() and server_file.read_text(encoding="utf-8").strip()):
            if (code := serving.poll()) is not None:
                print(f"colocated: the server ended with {code} before it was ready", file=sys.stderr)
                return code or 1
            time.sleep(0.2)
        print(f"colocated: the server was ready after {time.monotonic() - began:.0f} s", flush=True)
        return subprocess.run(trainer, cwd=ROOT, check=False).returncode
    finally:
        serving.send_signal(signal.SIGTERM)
        try:
            serving.wait(END_S)
        except subprocess.TimeoutExpired:
            serving.kill()


def main() -> int:
    """Runs the server and the trainer; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sglang-python", type=Path, required=True, help="interpreter of an environment with SGLang"
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder that both take")
    parser.add_argument("--folder", type=Path, required=True, help="folder for the server file")
    parser.add_argument("program", nargs="+", metavar="-- PROGRAM", help="the trainer and its flags")
    options = parser.parse_args()
    server_file = options.folder / "servers.txt"
    trainer = [sys.executable, *options.program, "--rollout-server-file", str(server_file)]
    return run(server_line(options.sglang_python, options.model, server_file), trainer, server_file)


if __name__ == "__main__":
    sys.exit(main())
