"""Real SGLang servers on the CPU, for tests.

A test gets servers from the session's pool, the fixture ``server_pool`` of tests/conftest.py:

    def test_something(server_pool: ServerPool, model: Path) -> None:
        server = server_pool.get("0.5.23", model)           # ready; started at the first call only
        client = ServerClient(server.url)

Each server is forked from a process that has imported SGLang. It is ready after a few seconds, but not at once, so servers are kept
between tests. A test gets a kept server of the same version,
model and flags, reset to the model's own weights (label ``default``) and not paused. At most two servers run at once (2 GB
each); ``get`` stops the least recently used one. A test may kill, freeze or break its server: a server that does not answer is
started again at the next ``get``. A test that needs two servers calls ``pair``.

The tests use the versions of SGLang in ``VERSIONS``, which ``make servers`` installs.
"""

import functools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from tests.ports import new_port

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("0.5.17", "0.5.23")
"""The oldest and the newest version that is tested. Only the newest has update sessions and reports spans of versions."""
OLDEST, NEWEST = VERSIONS

_START_S = 900.0
_MOST_AT_ONCE = 2


def server_python(version: str) -> Path:
    """Returns the interpreter of a version's environment. The test fails if ``make servers`` has not been run."""
    python = ROOT / f".venv-sglang-{version}" / "bin" / "python"
    if not python.exists():
        pytest.fail(
            f"SGLang {version} is not installed in {python.parents[1].name}: run `make servers`", False
        )
    return python


class ServerParent:
    """The process from which the servers of a version are forked. It ends with this process, and its servers with it."""

    def __init__(self, version: str) -> None:
        self.version = version
        command = [str(server_python(version)), str(Path(__file__).with_name("server_parent.py"))]
        # Bytecode is written, because the packages were installed without.
        left_out = ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
        environment = {k: v for k, v in os.environ.items() if k not in left_out}
        # SGLang leaves the files of its sockets and locks there.
        self._folder = tempfile.TemporaryDirectory(prefix="sglang-", ignore_cleanup_errors=True)
        self._process = subprocess.Popen(
            command,
            env=environment | {"PYTHONWARNINGS": "ignore", "TMPDIR": self._folder.name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def fork(self, flags: Sequence[str], log: Path) -> int:
        """Starts a server and returns its process id, which is also the id of its process group."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"flags": list(flags), "log": str(log)}), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            pytest.fail(f"SGLang {self.version} cannot be imported; the error is in the output", False)
        return int(answer)


@functools.cache
def server_parent(version: str) -> ServerParent:
    return ServerParent(version)


class RunningServer:
    """A server process with its children, in its own process group.

    Args:
        version: version of SGLang.
        model: Hugging Face folder.
        log: file for the server's output.
        flags: further flags of sglang.launch_server.
    """

    def __init__(self, version: str, model: Path, log: Path, flags: tuple[str, ...] = ()) -> None:
        self.version = version
        self.model = model
        self.log = log
        self.flags = flags
        self.port = new_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._pid: int | None = None

    def start(self) -> None:
        """Starts the processes and returns at once. After a stop the same port is used again."""
        flags = ["--model-path", str(self.model), "--port", str(self.port)]
        flags += ["--nccl-port", str(new_port()), *self.flags]
        if not (self.model / "tokenizer.json").exists() and "--skip-tokenizer-init" not in self.flags:
            flags.append("--skip-tokenizer-init")
        self._pid = server_parent(self.version).fork(flags, self.log)

    def wait_until_ready(self, timeout_s: float = _START_S) -> None:
        """Waits until the server has warmed up and generated a token. If it does not, the test fails and shows the end of the log."""
        deadline = time.monotonic() + timeout_s
        with ServerClient(self.url) as control:
            while True:
                try:
                    control.weight_label(deadline_s=30.0)
                    control.check_health(deadline_s=30.0)
                    control.generate(_one_token(), deadline_s=30.0)
                    return
                except ServerError as error:
                    if not self.is_alive or time.monotonic() > deadline:
                        why = "ended" if not self.is_alive else f"is not ready after {timeout_s:.0f} s"
                        tail = self.log_tail()
                        self.kill()
                        pytest.fail(f"SGLang {self.version} {why} ({error.reason}):\n{tail}", False)
                time.sleep(0.5)

    @property
    def is_alive(self) -> bool:
        if self._pid is None:
            return False
        with suppress(ProcessLookupError):
            os.kill(self._pid, 0)
            return True
        return False

    def answers(self) -> bool:
        """Whether the server still generates."""
        if not self.is_alive:
            return False
        try:
            with ServerClient(self.url, deadline_s=60.0) as control:
                control.resume()
                control.generate(_one_token())
        except ServerError:
            return False
        return True

    def reset(self) -> None:
        """Resets the server to the model's own weights and the label of a fresh start, and resumes it."""
        with ServerClient(self.url, deadline_s=600.0) as control:
            control.pause("abort")
            control.update_weights_from_disk(self.model)
            control.set_weight_label("default")
            control.resume()

    def freeze(self) -> None:
        """Stops every process, like a server that hangs: its connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kills the server and its children, and returns when the server has ended."""
        self._signal(signal.SIGKILL)
        deadline = time.monotonic() + 600
        while self.is_alive:
            assert time.monotonic() < deadline, f"process {self._pid} survives SIGKILL"
            time.sleep(0.01)
        self._pid = None

    def log_tail(self, num_lines: int = 25) -> str:
        """Returns the last lines of the log, each cut to a readable length."""
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        )
        return "\n".join(line[:300] for line in lines[-num_lines:])

    def _signal(self, number: int) -> None:
        if self._pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._pid, number)


class ServerPool:
    """The session's servers. Use it through the fixture ``server_pool``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: dict[tuple[str, Path, tuple[str, ...], int], RunningServer] = {}
        self._num_started = 0

    def get(self, version: str, model: Path, *flags: str) -> RunningServer:
        """Returns a server that answers and has the model's own weights."""
        return self._ready([(version, model, flags, 0)])[0]

    def pair(self, first: str, second: str, model: Path, *flags: str) -> tuple[RunningServer, RunningServer]:
        """Returns two servers, which are started at the same time."""
        kinds = [(first, model, flags, 0), (second, model, flags, int(first == second))]
        a, b = self._ready(kinds)
        return a, b

    def _ready(self, kinds: list[tuple[str, Path, tuple[str, ...], int]]) -> list[RunningServer]:
        for kind in kinds:
            server = self._servers.pop(kind, None)
            if server is not None and not server.answers():
                server.kill()
                server = None
            if server is not None:
                server.reset()
                self._servers[kind] = server  # moved to the end: the most recently used
        for kind in kinds:
            if kind not in self._servers:
                while len(self._servers) >= _MOST_AT_ONCE:
                    oldest = next(k for k in self._servers if k not in kinds)
                    self._servers.pop(oldest).kill()
                self._num_started += 1
                version, model, flags, _ = kind
                log = self.folder / f"server{self._num_started}-{version}.log"
                self._servers[kind] = RunningServer(version, model, log, flags)
                self._servers[kind].start()
        for kind in kinds:
            self._servers[kind].wait_until_ready()
        return [self._servers[kind] for kind in kinds]

    def logs(self) -> str:
        """Returns the end of every log, for the report of a failed test."""
        parts = [f"--- SGLang {s.version} at {s.url}\n{s.log_tail()}" for s in self._servers.values()]
        return "\n".join(parts)

    def close(self) -> None:
        """Kills every server that is still running."""
        for server in self._servers.values():
            server.kill()
        self._servers.clear()


def _one_token() -> dict[str, object]:
    return {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
