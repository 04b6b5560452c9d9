"""tools/serve_rollouts.py and tools/check_servers.py with real servers."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.addresses import read_addresses
from megatron_rasft.servers.client import ServerClient
from tests.functional import launching
from tests.servers.faulty_proxy import FaultyProxy, wait_for
from tests.servers.running import NEWEST, OLDEST, ROOT, ServerPool, server_python
from tests.tiny_policy import write_model


def run_check(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "check_servers.py"), "--deadline-s", "600", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)


def start_serving(log: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "tools" / "serve_rollouts.py"), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def processes_of(text: str) -> Sequence[str]:
    """Returns the command lines of all processes on this machine that contain ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.servers
def test_a_tensor_parallel_server_is_started_checked_and_stopped(
    served_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers, log = tmp_path / "servers.txt", tmp_path / "serve.log"
    flags = ["--model", str(served_model), "--server-file", str(servers), "--tp", "2", "--cpu"]
    key = "a key: with # signs"
    monkeypatch.setenv("SERVER_KEY", key)
    flags += ["--api-key-env", "SERVER_KEY"]
    process = start_serving(log, *flags, "--python", str(server_python(NEWEST)))
    try:
        wait_for(lambda: bool(read_addresses(servers)) or process.poll() is not None)
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        (url,) = read_addresses(servers)
        with ServerClient(url) as stranger, pytest.raises(ServerError, match="--rollout-api-key-env"):
            stranger.probe()
        assert processes_of(key) == [], "every user of the machine can read a command line"
        with ServerClient(url, api_key=key) as client:
            before = client.checksums()
            assert client.probe().tp_size == len(before) == 2
            checked = run_check(
                "--hf-model", str(served_model), "--server-file", str(servers), "--api-key-env", "SERVER_KEY"
            )
            assert checked.returncode == 0, checked.stdout + checked.stderr
            assert key not in checked.stdout + checked.stderr
            line = checked.stdout.splitlines()[0]
            for part in (f"ok    {url}", f"SGLang {NEWEST}", "tp 2", "update session", "GB/s"):
                assert part in line
            assert client.checksums() == before, "the test broadcast sent the weights the server had"
            assert client.weight_label() == "default"
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0
    finally:
        process.kill()
        process.wait()
    assert key not in log.read_text(errors="replace"), "SGLang logs its settings"
    assert read_addresses(servers) == []
    line = f"--model-path {served_model} --host 127.0.0.1 --port {url.rpartition(':')[2]}"
    wait_for(lambda: processes_of(line) == [])


def test_every_unfit_server_is_named_with_its_fault(
    server_pool: ServerPool, served_model: Path, tmp_path: Path
) -> None:
    server = server_pool.get(OLDEST, served_model)
    again = server.url.replace("127.0.0.1", "localhost")
    with FaultyProxy(server.url) as liar:
        liar.fault = "token beyond the vocabulary"
        flags = ["--hf-model", str(served_model), "--broadcast-mib", "1"]
        done = run_check(*flags, "--urls", server.url, "http://127.0.0.1:1", liar.url, again)
    assert done.returncode == 1, done.stdout + done.stderr
    good, dead, lying, double, count = done.stdout.splitlines()
    assert good.startswith(f"ok    {server.url}") and "no update session" in good and "GB/s" in good
    assert dead.startswith("FAIL  http://127.0.0.1:1  cannot be reached")
    assert lying.startswith(f"FAIL  {liar.url}") and "outside the vocabulary" in lying
    assert double.startswith(f"FAIL  {again}") and server.url in double
    assert count == "fit: 1 of 4 servers"

    other = write_model(tmp_path / "other", hidden_size=32)
    done = run_check("--hf-model", str(other), "--urls", server.url)
    assert done.returncode == 1
    assert "hidden_size is 64" in done.stdout and "32" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--urls", "localhost"], "error: --urls: 'localhost'"),
        ([], "--server-file"),
        (["--urls", "http://a:1", "--api-key-env", "NOT_SET_HERE"], "--api-key-env NOT_SET_HERE"),
    ],
)
def test_check_servers_refuses_wrong_flags(
    served_model: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    line = ["--hf-model", str(served_model), *flags]
    program = ROOT / "tools" / "check_servers.py"
    done = launching.run(tmp_path, line, program=program, has_launcher=False)
    assert done.codes == [2] and said in done.logs[0].splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "/nothing"], "error: --model /nothing"),
        (["--model", "MODEL", "--tp", "0"], "error: --tp"),
        (["--model", "MODEL", "--host", "192.0.2.1"], "error: --host 192.0.2.1"),
        (["--model", "MODEL", "--cpu", "--python", "/nothing/python"], "error: --python /nothing/python"),
        (["--model", "MODEL", "--api-key-env", "HOME", "--", "--config", "x"], "error: --api-key-env"),
    ],
)
def test_serve_rollouts_refuses_wrong_flags(
    served_model: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    server_python(NEWEST)
    log = tmp_path / "log"
    process = start_serving(log, *[str(served_model) if f == "MODEL" else f for f in flags])
    assert process.wait(900) == 2
    assert named in log.read_text().splitlines()[-1]
