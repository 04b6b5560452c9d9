"""Real SGLang servers on the CPU, for tests.

A test asks the session's pool, the fixture ``server_pool`` of tests/conftest.py, for what it needs:

    def test_something(server_pool: ServerPool, model: Path) -> None:
        server = server_pool.get("0.5.23", model)           # ready to answer; started at the first call only
        control = ServerClient(server.url)

Starting one takes half a minute or more, so servers are kept between tests and handed out again for the same version,
model and flags: with the model's own weights (label ``default``), unpaused. Two at most are up at once (2 GB each);
``get`` stops the one that was asked for longest ago. A test may kill, freeze or ruin the server it got: one that
does not answer is started again at the next ``get``. A test that needs two asks for ``pair``.

``VERSIONS`` are those that tests/ is run against; ``make servers`` installs them.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.tools.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("0.5.17", "0.5.23")
"""The oldest and the newest that the tests run against; they differ in the update session and the version spans."""
OLDEST, NEWEST = VERSIONS

_START_S = 400.0
_MOST_AT_ONCE = 2


def server_python(version: str) -> Path:
    """The interpreter of a version's environment; the test fails where ``make servers`` has not been run."""
    python = ROOT / f".venv-sglang-{version}" / "bin" / "python"
    if not python.exists():
        pytest.fail(
            f"SGLang {version} is not installed in {python.parents[1].name}: run `make servers`", False
        )
    return python


class RunningServer:
    """One server process with its children, in a process group of its own.

    Args:
        version: of SGLang.
        model: Hugging Face folder.
        log: file for what the server prints.
        flags: further flags of sglang.launch_server.
    """

    def __init__(self, version: str, model: Path, log: Path, flags: tuple[str, ...] = ()) -> None:
        self.version = version
        self.model = model
        self.log = log
        self.flags = flags
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Launch the processes and return at once; the same port again after a stop."""
        command = [str(server_python(self.version)), str(ROOT / "tools" / "sglang_on_cpu.py")]
        command += ["--model-path", str(self.model), "--port", str(self.port)]
        command += ["--nccl-port", str(free_port()), *self.flags]
        if not (self.model / "tokenizer.json").exists() and "--skip-tokenizer-init" not in self.flags:
            command.append("--skip-tokenizer-init")
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def wait_until_ready(self, timeout_s: float = _START_S) -> None:
        """Until it has generated a token; the test fails with the end of the log if it does not come up."""
        deadline = time.monotonic() + timeout_s
        with ServerClient(self.url) as control:
            while True:
                try:
                    control.weight_label(deadline_s=5.0)
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
        return self._process is not None and self._process.poll() is None

    def answers(self) -> bool:
        """Whether it generates: looked at before it is handed out again."""
        if not self.is_alive:
            return False
        try:
            with ServerClient(self.url, deadline_s=20.0) as control:
                control.resume()
                control.generate(_one_token())
        except ServerError:
            return False
        return True

    def reset(self) -> None:
        """The model's own weights and the label of a fresh start, unpaused, whatever a test has sent it."""
        with ServerClient(self.url, deadline_s=60.0) as control:
            control.pause("abort")
            control.update_weights_from_disk(self.model)
            control.set_weight_label("default")
            control.resume()

    def freeze(self) -> None:
        """Stop every process where it is: a hung server, whose connections stay open."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL, children first of all included; returns when they are gone."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(60)

    def log_tail(self, num_lines: int = 25) -> str:
        """The last lines of the log, each cut to a readable length."""
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        )
        return "\n".join(line[:300] for line in lines[-num_lines:])

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)


class ServerPool:
    """The session's servers. Use it through the fixture ``server_pool``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers: dict[tuple[str, Path, tuple[str, ...], int], RunningServer] = {}
        self._num_started = 0

    def get(self, version: str, model: Path, *flags: str) -> RunningServer:
        """A server of this kind that answers, with the model's own weights."""
        return self._ready([(version, model, flags, 0)])[0]

    def pair(self, first: str, second: str, model: Path, *flags: str) -> tuple[RunningServer, RunningServer]:
        """Two servers at once, started side by side."""
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
                self._servers[kind] = server  # last: asked for most recently
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
        """The end of every log, for the report of a failed test."""
        parts = [f"--- SGLang {s.version} at {s.url}\n{s.log_tail()}" for s in self._servers.values()]
        return "\n".join(parts)

    def close(self) -> None:
        """Kill every server that is still up."""
        for server in self._servers.values():
            server.kill()
        self._servers.clear()


def _one_token() -> dict[str, object]:
    return {"input_ids": [1], "sampling_params": {"max_new_tokens": 1, "temperature": 0.0}}
