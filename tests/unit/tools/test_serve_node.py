"""tools/serve_node.py with a stand-in for SGLang; tests/slurm uses real servers."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_rasft.errors import RolloutError
from megatron_rasft.servers.addresses import read_addresses
from megatron_rasft.tools import cli
from tests.servers.faulty_proxy import wait_for
from tests.unit.tools.test_serve_rollouts import Launcher
from tools import serve_node, serve_rollouts

ROOT = Path(__file__).resolve().parents[3]


@contextmanager
def watched(launcher: Launcher, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Runs the tool with one server. It may inherit ignored signals from nohup."""
    program = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); import sys; from tools import serve_node as s; "
    program += "s.serve_rollouts.DRAIN_S = 0.5; sys.exit(s.cli.run(s.main))"
    command = [sys.executable, "-c", program, "--model", str(launcher.model), "--host", "127.0.0.1", *flags]
    command += ["--python", str(launcher.python), "--server-file", str(launcher.file)]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        yield process
    finally:
        for child in (
            [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        ):
            child.kill()
        process.kill()
        process.wait()


@pytest.mark.parametrize("is_launcher", [False, True], ids=["server", "launcher"])
def test_a_killed_server_is_started_again_and_signs_off_at_the_end(tmp_path: Path, is_launcher: bool) -> None:
    launcher = Launcher(tmp_path, is_paused=False)
    with watched(launcher, "--log-folder", str(tmp_path / "logs")) as process:
        first = launcher.wait_until_added(process)
        server = psutil.Process(int(launcher.note.read_text()))
        killed = server.parent() if is_launcher else server
        assert killed is not None
        killed.kill()
        wait_for(lambda: read_addresses(launcher.file) not in ([first], []))
        assert len(read_addresses(launcher.file)) == 1 and not server.is_running()
        process.send_signal(signal.SIGUSR1 if is_launcher else signal.SIGTERM)
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0 and "restart 1 of 3" in said
        assert read_addresses(launcher.file) == [] and not launcher.is_serving
    (log,) = (tmp_path / "logs").iterdir()
    assert "ready: " in log.read_text()


def servers(*codes: int, folder: Path) -> list[serve_node.Server]:
    """Servers whose launchers end at once with these codes; each start adds a line to a file."""
    script = folder / "launcher.py"
    script.write_text("import sys; open(sys.argv[2], 'a').write('x'); sys.exit(int(sys.argv[1]))")
    return [
        serve_node.Server(
            name=f"server {number}",
            command=[sys.executable, "-S", str(script), str(code), str(folder / f"starts{number}")],
            variables={},
            host="127.0.0.1",
            port=7,
            server_file=None,
            given_up_file=folder / "given_up.txt",
            log=None,
        )
        for number, code in enumerate(codes)
    ]


def test_servers_are_given_up_after_their_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_node, "POLL_S", 0.01)
    # the tests' own children are no orphans
    monkeypatch.setattr(serve_node, "kill_orphans", lambda servers: None)
    with pytest.raises(RolloutError):
        serve_node.watch(servers(1, 2, folder=tmp_path), 3, [])
    assert [(tmp_path / f"starts{n}").read_text() for n in (0, 1)] == ["xxxx", "xxxx"]
    assert capsys.readouterr().out.count("given up") == 2
    lines = (tmp_path / "given_up.txt").read_text().splitlines()
    assert sorted(line.split(" after")[0] for line in lines) == [
        "server 0 ended with status 1",
        "server 1 ended with status 2",
    ]


def test_other_servers_go_on_if_the_file_of_given_up_ones_cannot_be_written(tmp_path: Path) -> None:
    (given_up,) = servers(1, folder=tmp_path)
    given_up.given_up_file = Path("/dev/full")
    given_up.start()
    assert given_up.process is not None
    given_up.process.wait()
    given_up.give_up(3)


def test_process_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_node, "REAP_S", 0.01)
    # like a process that is stuck in the driver
    monkeypatch.setattr(psutil.Process, "kill", lambda process: None)
    with subprocess.Popen(["sleep", "600"]) as stuck:
        try:
            serve_node.kill_orphans(())
            assert stuck.poll() is None
        finally:
            stuck.kill()


@pytest.mark.parametrize("port", ["0", "30000"])
def test_address_is_the_servers_flag_and_not_sglangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: str
) -> None:
    started = tmp_path / "started"
    launcher = tmp_path / "launcher.py"
    launcher.write_text(f"import sys; open({str(started)!r}, 'a').write('\\0'.join(sys.argv[1:]))")
    monkeypatch.setattr(serve_node, "LAUNCHER", launcher)
    monkeypatch.setattr(serve_node, "watch", lambda servers, *others: servers[0].start())
    monkeypatch.setattr(serve_node, "kill_orphans", lambda servers: None)
    monkeypatch.setattr(serve_node, "adopt_orphans", lambda: None)
    monkeypatch.setattr(serve_node, "end", lambda servers: servers[0].process.wait())
    monkeypatch.setattr(signal, "signal", lambda *handler: None)
    sglang_flags = ["--mem-fraction-static", "0.8", "--port", "7"]
    own = ["--model", "DIR", "--host", "127.0.0.1", "--port", port, "--num-servers", "1"]
    assert serve_node.main([*own, "--", *sglang_flags]) == 0
    args = serve_rollouts.parser().parse_args(started.read_text().split("\0"))
    assert args.sglang == sglang_flags and args.host == "127.0.0.1"
    assert args.port == int(port) if port != "0" else args.port > 1000


@pytest.mark.parametrize(
    ("visible", "num_servers", "tp", "shares"),
    [
        (None, 2, 4, ["0,1,2,3", "4,5,6,7"]),
        ("2,3,6,7", 2, 2, ["2,3", "6,7"]),
        ("GPU-a,GPU-b", 1, 1, ["GPU-a"]),
    ],
)
def test_servers_share_the_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, num_servers: int, tp: int, shares: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert serve_node.gpu_shares(num_servers, tp) == shares


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--num-servers", "0"], "--num-servers"),
        (["--max-restarts", "-1"], "--max-restarts"),
        (["--num-servers", "2", "--port", "30000"], "--port 30000"),
        (["--num-servers", "2", "--tp", "2"], "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_wrong_flag_is_one_line_before_a_server_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert cli.run(serve_node.main, ["--model", "DIR", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
