"""tools/serve_rollouts.py with a small stand-in for SGLang; tests/functional uses real servers."""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.scratch import ScratchFolder
from megatron_rasft.servers.addresses import read_addresses
from megatron_rasft.tools.ports import free_port
from tests.ports import new_port
from tests.servers.faulty_proxy import wait_for
from tools import serve_rollouts

ROOT = Path(__file__).resolve().parents[3]

SERVER = '''#!{python}
"""Answers the launcher's requests, records its process id and the requests, and ignores SIGTERM if it is paused."""
import json, os, signal, socket, sys, tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
if {is_paused}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
asked = open({note!r} + ".asked", "a", buffering=1)
answers = {{"/health": [503, 503]}}
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{{"weight_version": "default"}}'
        asked.write(self.path + "\\n")
        self.send_response((answers.get(self.path) or [200]).pop())
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *args):
        pass
class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ":" in sys.argv[sys.argv.index("--host") + 1] else socket.AF_INET
host, port = (sys.argv[sys.argv.index(flag) + 1] for flag in ("--host", "--port"))
if "--config" in sys.argv:  # SGLang logs its settings like this
    key = json.loads(open(sys.argv[sys.argv.index("--config") + 1]).read().removeprefix("api-key: "))
    print(f"ServerArgs(api_key={{key!r}})", key, json.dumps(key), flush=True)
    print("warning:", key, file=sys.stderr, flush=True)
open({note!r} + ".made", "w").write(tempfile.mkstemp()[1])
open({note!r}, "w").write(str(os.getpid()))
Server((host, int(port)), Handler).serve_forever()
'''


class Launcher:
    """Runs the launcher with a stand-in for SGLang, which writes its process id to ``note`` when it starts."""

    def __init__(self, folder: Path, is_paused: bool) -> None:
        self.folder = folder
        self.file = folder / "servers.txt"
        self.note = folder / "pid"
        self.model = folder / "model"
        self.model.mkdir()
        (self.model / "config.json").write_text("{}")
        self.python = folder / "python"
        self.python.write_text(
            SERVER.format(python=sys.executable, is_paused=is_paused, note=str(self.note)), encoding="utf-8"
        )
        self.python.chmod(0o755)

    @contextmanager
    def run(self, *flags: str) -> Iterator[subprocess.Popen[str]]:
        # under nohup the tests ignore signals, and the launcher inherits this
        program = (
            "import signal, sys; [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)]; "
        )
        program += "from tools import serve_rollouts as s; s.DRAIN_S = 0.5; sys.exit(s.cli.run(s.main))"
        command = [
            sys.executable,
            "-c",
            program,
            "--model",
            str(self.model),
            "--python",
            str(self.python),
            *flags,
        ]
        process = subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            if self.is_serving:
                os.killpg(int(self.note.read_text()), signal.SIGKILL)

    @property
    def is_serving(self) -> bool:
        """Whether the server's process exists."""
        return self.note.exists() and Path(f"/proc/{self.note.read_text()}").exists()

    def wait_until_added(self, process: subprocess.Popen[str]) -> str:
        wait_for(lambda: bool(read_addresses(self.file)) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return read_addresses(self.file)[0]


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path, is_paused=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_server_that_does_not_end_is_removed_from_the_file_and_killed(
    tmp_path: Path, number: signal.Signals
) -> None:
    launcher = Launcher(tmp_path, is_paused=True)
    with launcher.run("--host", "127.0.0.1", "--server-file", str(launcher.file)) as process:
        launcher.wait_until_added(process)
        process.send_signal(number)
        assert process.wait(600) == 0, process.communicate()
        assert read_addresses(launcher.file) == [] and not launcher.is_serving


def test_a_server_is_added_only_after_it_has_warmed_up(launcher: Launcher) -> None:
    with launcher.run("--server-file", str(launcher.file)) as process:
        launcher.wait_until_added(process)
    asked = Path(f"{launcher.note}.asked").read_text().split()
    assert [path for path in asked if path != "/model_info"] == ["/health", "/health", "/health", "/generate"]


def test_a_server_that_ends_while_starting_gives_its_status(launcher: Launcher) -> None:
    launcher.python.write_text("#!/bin/sh\nexit 3\n")
    with launcher.run("--server-file", str(launcher.file)) as process:
        _, printed = process.communicate()
    assert (
        process.returncode == 1 and printed.splitlines()[-1].startswith("error: ") and " status 3 " in printed
    )
    assert read_addresses(launcher.file) == []


def test_the_server_ends_even_if_the_file_has_become_unwritable(launcher: Launcher) -> None:
    with launcher.run("--host", "127.0.0.1", "--server-file", str(launcher.file)) as process:
        url = launcher.wait_until_added(process)
        launcher.file.unlink()
        launcher.file.mkdir()
        process.terminate()
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0 and not launcher.is_serving
        assert url in said and str(launcher.file) in said


def test_a_file_that_cannot_be_written_is_found_before_the_server_starts(launcher: Launcher) -> None:
    with launcher.run("--server-file", str(launcher.folder)) as process:
        _, said = process.communicate(timeout=600)
    assert process.returncode == 2 and not launcher.note.exists()
    assert str(launcher.folder) in said


def test_a_port_in_use_is_refused(launcher: Launcher) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with launcher.run("--host", "127.0.0.1", "--port", str(port)) as process:
            _, said = process.communicate(timeout=600)
    assert process.returncode == 2 and not launcher.note.exists()
    assert said.startswith(f"error: --port {port}")


def loopbacks() -> list[str]:
    """Returns the loopback addresses of this machine, which may lack IPv6."""
    try:
        free_port("::1")
    except (ValueError, OSError):
        return ["127.0.0.1"]
    return ["127.0.0.1", "::1"]


@pytest.mark.parametrize("host", loopbacks())
def test_the_address_in_the_file_is_the_one_that_the_server_listens_on(launcher: Launcher, host: str) -> None:
    port = new_port()
    with launcher.run("--host", host, "--port", str(port), "--server-file", str(launcher.file)) as process:
        assert launcher.wait_until_added(process) == serve_rollouts.address_of(host, port)


def test_key_is_neither_logged_nor_in_a_title(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key that Python and JSON print in other forms."""
    key = "hidden-'\"\\-key"
    monkeypatch.setenv("SERVER_KEY", key)
    with launcher.run("--api-key-env", "SERVER_KEY", "--server-file", str(launcher.file)) as process:
        launcher.wait_until_added(process)
        titles = [
            Path(f"/proc/{pid}/cmdline").read_text() for pid in (process.pid, launcher.note.read_text())
        ]
        process.send_signal(signal.SIGTERM)
        written = "".join(process.communicate(timeout=600))
    assert written.count("***") == 4 and "ServerArgs" in written
    for text in (*titles, written, launcher.file.read_text()):
        assert "hidden" not in text


def test_without_a_route_the_address_is_that_of_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(address: str, family: int = socket.AF_INET) -> SimpleNamespace:
        return SimpleNamespace(address=address, family=family)

    found = {
        "lo": [entry("127.0.0.1"), entry("::1", socket.AF_INET6)],
        "eth0": [entry("fe80::1%eth0", socket.AF_INET6), entry("169.254.1.1"), entry("172.16.0.5")],
    }
    monkeypatch.setattr(serve_rollouts.psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(serve_rollouts.socket.socket, "connect", no_route)
    assert serve_rollouts.own_address() == "172.16.0.5"
    assert serve_rollouts.own_address("::") == "::1", "it is the only one"


def no_route(*_: object) -> None:
    raise OSError(errno.ENETUNREACH, "Network is unreachable")


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("0.0.0.0", f"http://{serve_rollouts.own_address()}:7"),
        ("NODE1", "http://node1:7"),
        ("fd00::1", "http://[fd00::1]:7"),
    ],
)
def test_the_address_in_the_file_is_reachable_from_other_machines(host: str, address: str) -> None:
    assert serve_rollouts.address_of(host, 7) == address
    assert "0.0.0.0" not in address


def test_file_with_the_key_is_private() -> None:
    with closing(ScratchFolder("rasft-serve-")) as scratch:
        path = serve_rollouts.write_secrets(scratch, "a key")
        assert path is not None and "a key" in path.read_text()
        assert path.parent.stat().st_mode & 0o077 == 0


def test_temporary_files_of_a_server_stay_as_long_as_the_server(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TemporaryDirectory() as own:  # tmp_path is too long for a socket in it
        monkeypatch.setenv("TMPDIR", own)
        monkeypatch.setattr("tempfile.tempdir", own)
        with launcher.run("--server-file", str(launcher.file)) as process:
            launcher.wait_until_added(process)
            made = Path(launcher.note.with_suffix(".made").read_text())
            assert made.exists() and made.parent.parent == Path(own)
            process.kill()
            process.wait()
            ScratchFolder("rasft-serve-").close()
            assert made.exists(), "the server lives"
        wait_for(lambda: not launcher.is_serving)
        ScratchFolder("rasft-serve-").close()
        assert list(Path(own).iterdir()) == []


def in_new_interpreter(work: str, **options: Any) -> subprocess.CompletedProcess[str]:
    program = f"import sys, time; from tools import serve_rollouts as s; {work}"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, stderr=subprocess.PIPE, timeout=900, **options
    )


def test_last_lines_of_a_server_with_a_key_are_copied(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVER_KEY", "hidden")
    launcher.python.write_text(f"#!{sys.executable}\nraise SystemExit('the cause')\n")
    flags = ["--model", str(launcher.model), "--python", str(launcher.python), "--api-key-env", "SERVER_KEY"]
    late = "copy = s.copy_masked; s.copy_masked = lambda *given: (time.sleep(3), copy(*given)); s.LOG_S = 200"
    ended = in_new_interpreter(f"{late}; sys.argv[1:] = {flags}; s.main()", stdout=subprocess.PIPE)
    assert "the cause" in ended.stdout and "status 1" in ended.stderr


def test_server_goes_on_if_its_log_cannot_be_written() -> None:
    writer = [sys.executable, "-c", "print('many lines\\n' * 20_000)"]
    with Path("/dev/full").open("wb") as full:
        ended = in_new_interpreter(
            f"scratch = s.ScratchFolder('rasft-serve-'); sys.exit(s.start({writer}, 'key', scratch)[0].wait(600))",
            stdout=full,
        )
    assert ended.returncode == 0, ended.stderr
