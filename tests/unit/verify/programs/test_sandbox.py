"""Hostile programs at every level of the sandbox: they neither get the verdict correct, nor outlive their check, nor reach
outside."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.tools.evaluation.benchmark_grading import verify_config
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.types import CodeTests, ProgramCase
from megatron_rasft.verify.programs import confinement
from megatron_rasft.verify.programs.program_grading import run_tests
from megatron_rasft.verify.programs.sandbox import Sandbox, SandboxError
from tests.unit.verify.programs.conftest import PATIENT, REPOSITORY, with_limits
from tests.unit.verify.programs.hostile_programs import ENDLESS, HOSTILE_SCRIPTS, HOSTILE_TO_PYTEST, TRICKS

SQUARES = ("assert f(2) == 4", "assert f(3) == 9")
ASSERTS = CodeTests(style="asserts", tests=SQUARES, entry_point="f")
CHECK = CodeTests(
    style="check",
    tests=("def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n",),
    entry_point="f",
)
PYTEST = CodeTests(
    style="pytest",
    tests=(
        "from solution import *\nimport pytest\n"
        "def test_exact():\n    assert f(2) == 4\n    assert sorted([f(3), 1]) == [1, 9]\n"
        "def test_near():\n    assert abs(f(2) - 4) < 1e-6\n    assert f(3) == pytest.approx(9)\n"
        "def test_types():\n    assert isinstance(f(2), int)\n    assert len(str(f(3))) == 1\n    assert 4 in [f(2)]\n",
    ),
    entry_point="f",
)
FIXTURES = CodeTests(
    style="pytest",
    tests=(
        "from solution import f\nimport pytest\n@pytest.mark.parametrize('x', [2, 3])\n"
        "def test_square(x):\n    assert f(x) == x * x\n",
    ),
    entry_point="f",
)
STDIN = CodeTests(style="stdin", cases=(ProgramCase(input="2\n", output="4\n"),))


@dataclass(frozen=True)
class World:
    """Files, sockets and a process outside of the sandbox, which hostile programs try to reach."""

    folder: Path
    secret: Path
    victim: subprocess.Popen[bytes]
    tcp: socket.socket
    unix: socket.socket
    state_before: list[object] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_before", self.state())

    def state(self) -> list[object]:
        """The scheduling of the process and the attributes of the files."""
        victim = psutil.Process(self.victim.pid)
        found: list[object] = [victim.nice(), victim.ionice(), victim.cpu_affinity()]
        found.append(os.sched_getscheduler(self.victim.pid))
        for path in (self.folder, self.secret):
            status = path.stat()
            found.append((status.st_mode, status.st_uid, status.st_gid, os.listxattr(path)))
        return [*found, self.folder.stat().st_mtime, self.secret.stat().st_mtime]

    def aim(self, program: str) -> str:
        """Returns the program with the names of its targets filled in."""
        for name, value in {
            "SECRET": self.secret,
            "OUTSIDE": self.folder,
            "PORT": self.tcp.getsockname()[1],
            "UNIX": self.unix.getsockname(),
            "VICTIM": self.victim.pid,
        }.items():
            program = program.replace(name, str(value))
        return program

    def faults(self) -> list[str]:
        """Returns a description of everything that a program changed."""
        if self.victim.poll() is not None:
            return ["the victim is dead"]
        found = (
            []
            if self.state() == self.state_before
            else ["the victim's scheduling or a file's attributes changed"]
        )
        if sorted(p.name for p in self.folder.iterdir()) != ["canary", "secret.py", "unix"]:
            found.append("the folder changed")
        if self.secret.read_text() != "def f(x): return x * x\n":
            found.append("the file changed")
        for listener in (self.tcp, self.unix):
            try:
                listener.accept()
            except BlockingIOError:
                continue
            found.append("somebody connected")
        for path in ("/etc/a", "/usr/a", "/var/tmp/rasft-a", "/dev/shm/rasft-a", "/a"):
            if os.path.exists(path):
                found.append(f"{path} was written")
        return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o777)
    (folder / "canary").touch()
    secret = folder / "secret.py"
    secret.write_text("def f(x): return x * x\n")
    secret.chmod(0o666)
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind(str(folder / "unix"))
    (folder / "unix").chmod(0o777)
    unix.listen()
    for listener in (tcp, unix):
        listener.setblocking(False)
    # Without capabilities, like a process of an ordinary user: other processes of the user may change its scheduling
    victim = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(10000)"],
        preexec_fn=confinement.drop_privileges,
    )
    yield World(folder, secret, victim, tcp, unix)
    victim.kill()
    victim.wait()
    tcp.close()
    unix.close()


def launchers_of(pid: int) -> list[psutil.Process]:
    """The launchers that a process has started."""
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if "verify.programs.launcher" in " ".join(child.cmdline()):
                found.append(child)
    return found


def left_running(timeout_s: float = 600.0) -> list[str]:
    """Processes of checks that still run. Waits for those of launchers that have just been closed, which end by themselves."""
    deadline = time.monotonic() + timeout_s
    while True:
        parents, left = _processes_of_checks()
        orphans = [pid for pid in left if parents[pid] not in parents]
        if not orphans or time.monotonic() > deadline:
            return [f"{pid} of {parents[pid]}" for pid in left]
        time.sleep(0.02)


def _processes_of_checks() -> tuple[dict[int, int], list[int]]:
    """Returns the parents of all launchers and their descendants, and those among them that belong to a check."""
    # A forked process keeps the command line of its launcher
    lines = {
        process.pid: (process.info["ppid"], " ".join(process.info["cmdline"] or []).split())
        for process in psutil.process_iter(["cmdline", "ppid"])
    }
    marks = {"megatron_rasft.verify.programs.launcher", str(os.getpid())}
    ours = {pid: parent for pid, (parent, line) in lines.items() if marks <= set(line)}
    launchers = {pid for pid, parent in ours.items() if parent == os.getpid()}
    assert launchers
    firsts = {pid for pid, parent in ours.items() if parent in launchers and "namespaces" in lines[pid][1]}
    return ours, [pid for pid in ours if pid not in launchers | firsts]


def test_the_solution_passes_every_style(patient_sandbox: Sandbox) -> None:
    for tests in (ASSERTS, CHECK, PYTEST, FIXTURES):
        assert patient_sandbox.judge("def f(x): return x * x", tests)[0] == "correct", tests.style
        assert patient_sandbox.judge("def f(x): return x + x", tests)[0] == "wrong", tests.style
    assert run_tests(patient_sandbox, "print(int(input()) ** 2)", STDIN)[0] == "correct"
    assert run_tests(patient_sandbox, "print(int(input()) + 1)", STDIN)[0] == "wrong"


@pytest.mark.parametrize("name", TRICKS)
def test_no_hostile_program_scores_survives_or_reaches_outside(
    sandbox: Sandbox, world: World, name: str
) -> None:
    verdict, reason = sandbox.judge(world.aim(TRICKS[name]), ASSERTS)
    assert verdict in ("wrong", "timeout"), reason
    assert left_running() == []
    assert world.faults() == []


@pytest.mark.parametrize("name", ENDLESS)
def test_program_that_does_not_end_is_killed_at_the_deadline(brief_sandbox: Sandbox, name: str) -> None:
    verdict, reason = brief_sandbox.judge(ENDLESS[name], ASSERTS)
    assert verdict in ("wrong", "timeout"), reason
    assert left_running() == []


@pytest.mark.parametrize("name", HOSTILE_TO_PYTEST)
def test_no_program_fools_pytest(patient_sandbox: Sandbox, name: str) -> None:
    for tests in (PYTEST, FIXTURES):
        verdict, reason = patient_sandbox.judge(HOSTILE_TO_PYTEST[name], tests)
        assert verdict == "wrong", reason
    assert left_running() == []


@pytest.mark.parametrize(
    "name", ["exit in the call", "equal object", "names what the tests read", "reads all objects"]
)
def test_no_program_fools_check(patient_sandbox: Sandbox, name: str) -> None:
    assert patient_sandbox.judge(TRICKS[name], CHECK)[0] == "wrong"


@pytest.mark.parametrize("name", HOSTILE_SCRIPTS)
def test_no_hostile_script_scores_or_survives(sandbox: Sandbox, brief_sandbox: Sandbox, name: str) -> None:
    chosen = brief_sandbox if name == "waits" else sandbox
    verdict, reason = run_tests(chosen, HOSTILE_SCRIPTS[name], STDIN)
    assert verdict in ("wrong", "timeout"), reason
    assert left_running() == []


def test_one_check_leaves_nothing_to_the_next(patient_sandbox: Sandbox) -> None:
    patient_sandbox.judge(
        "import builtins, json\nbuiltins.f = lambda x: x * x\njson.f = builtins.f\ndef f(x): return 0",
        ASSERTS,
    )
    program = "import builtins, json\nf = getattr(builtins, 'f', getattr(json, 'f', None))"
    assert patient_sandbox.judge(program, ASSERTS)[0] == "wrong"
    patient_sandbox.judge(
        "try: open('left', 'w').write('x')\nexcept OSError: pass\ndef f(x): return 0", ASSERTS
    )
    program = "import os\ndef f(x): return x * x if os.path.exists('left') else 0"
    assert patient_sandbox.judge(program, ASSERTS)[0] == "wrong"
    # The standard streams are open files, and have flags that all their users share
    marks = "import fcntl, os\nfor fd in range(3): fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)\ndef f(x): return 0"
    patient_sandbox.judge(marks, ASSERTS)
    program = (
        "import fcntl, os\ndef f(x): return x * x * any(fcntl.fcntl(fd, 3) & os.O_APPEND for fd in range(3))"
    )
    assert patient_sandbox.judge(program, ASSERTS)[0] == "wrong"


def test_environment_is_cleared(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os\ndef f(x): return sorted(os.environ)"
    tests = CodeTests(
        style="asserts",
        tests=(
            "assert not [n for n in f(0) if 'PYTEST_CURRENT' in n or 'SECRET' in n or n == 'USER'], f(0)",
        ),
        entry_point="f",
    )
    monkeypatch.setenv("RASFT_SECRET", "x")
    with Sandbox(PATIENT, [sandbox.level]) as fresh:
        assert fresh.judge(program, tests)[0] == "correct"


def test_tests_can_write_files_except_at_the_lowest_level(patient_sandbox: Sandbox) -> None:
    tests = CodeTests(
        style="asserts",
        tests=("f('a.txt')", "assert open('a.txt').read() == 'written'"),
        entry_point="f",
    )
    verdict, _ = patient_sandbox.judge(
        "def f(name):\n    with open(name, 'w') as file: file.write('written')", tests
    )
    assert verdict == ("wrong" if patient_sandbox.level == "limits" else "correct")


# Fewer files than a program may have open, so that the watcher stops it and not the system
NAMELESS = """
import mmap, os, time
kept = []
for n in range(40):
    with open("file", "w+b") as file:
        file.write(bytes(2**20))
        file.flush()
        HOLDS
    os.remove("file")
time.sleep(100)
"""


@pytest.mark.parametrize(
    "holds", ["kept.append(os.dup(file.fileno()))", "kept.append(mmap.mmap(file.fileno(), 4096))"]
)
def test_files_without_a_name_count(watched_sandbox: Sandbox, holds: str) -> None:
    program = NAMELESS.replace("HOLDS", holds if "dup" in holds else "file.truncate(2**20); " + holds)
    verdict, reason = watched_sandbox.judge(program, ASSERTS)
    assert verdict == "wrong"
    if watched_sandbox.level == "landlock":
        assert reason.startswith("stopped: it wrote more than 16 MiB")


EXHAUSTING = {
    "f(2)": "def f(x): return range(10**12)",
    "f(1)": "from itertools import count as f",
    "f(2).elements()": "import collections\ndef f(x): return collections.Counter(a=10**10)",
}


@pytest.mark.parametrize("value", EXHAUSTING)
def test_a_value_that_exhausts_the_memory_of_the_tests_is_wrong(
    strongest_sandbox: Sandbox, value: str
) -> None:
    config = VerifyConfig(
        verify_code_timeout_s=120.0, verify_code_memory_mib=64, verify_sandbox_level="limits"
    )
    tests = CodeTests(style="asserts", tests=(f"assert list({value}) == [4]",), entry_point="f")
    verdict, reason = with_limits(strongest_sandbox, config).judge(EXHAUSTING[value], tests)
    assert verdict == "wrong", reason


THREADS = """
import threading, time
threading.stack_size(32768)
started, end = [], threading.Event()
for _ in range(NUMBER):
    try:
        threading.Thread(target=end.wait, daemon=True).start()
        started.append(1)
    except RuntimeError:
        break
time.sleep(100 if len(started) > 64 else 0.2)
end.set()
def f(x): return x * x if len(started) == NUMBER else 0
"""


def test_a_check_has_some_threads_and_not_many(patient_sandbox: Sandbox) -> None:
    assert patient_sandbox.judge(THREADS.replace("NUMBER", "40"), ASSERTS)[0] == "correct"
    verdict, reason = patient_sandbox.judge(THREADS.replace("NUMBER", "80"), ASSERTS)
    assert verdict == "wrong"
    if patient_sandbox.level != "namespaces":
        assert reason == "stopped: it started more than 64 threads"


def test_threads_of_other_sandboxes_do_not_count(strongest_sandbox: Sandbox) -> None:
    program = THREADS.replace("NUMBER", "40").replace("0.2", "1")
    with Sandbox(PATIENT, [strongest_sandbox.level]) as other, ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda one: one.judge(program, ASSERTS), (strongest_sandbox, other)))
    assert [verdict for verdict, _ in verdicts] == ["correct", "correct"], verdicts


@pytest.mark.parametrize("name", ["fills the disk", "digs", "moves folders", "leaves its first thread"])
def test_files_of_a_program_are_limited_and_removed(watched_sandbox: Sandbox, name: str) -> None:
    # Only landlock sets this variable, and only there the launcher must have time to look
    waits = "import os, time\nif 'TMPDIR' in os.environ: time.sleep(100)\n"
    verdict, reason = watched_sandbox.judge(TRICKS[name] + "\n" + waits, ASSERTS)
    assert verdict in ("wrong", "timeout")
    if watched_sandbox.level == "landlock":
        assert reason.startswith("stopped: it wrote more than 16 MiB")
        # The launcher removes the folder of a check before it answers
        homes = [Path(launcher.cmdline()[-1]) for launcher in launchers_of(os.getpid())]
        assert homes
        assert [left for home in homes if home.is_dir() and home.name for left in home.iterdir()] == []


def test_a_launcher_that_is_killed_costs_one_check(sandbox: Sandbox) -> None:
    before = launchers_of(os.getpid())
    with Sandbox(PATIENT, [sandbox.level]) as fresh:
        (launcher,) = set(launchers_of(os.getpid())) - set(before)
        # At the level namespaces, the first process of the namespace does the work and dies after its parent
        processes = [launcher, *launcher.children()]
        launcher.kill()
        wait_until_ended(processes)
        assert fresh.judge("def f(x): return x * x", ASSERTS)[0] == "unverifiable"
        assert fresh.judge("def f(x): return x * x", ASSERTS)[0] == "correct"


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has reaped counts as ended."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until_ended(processes: list[psutil.Process], timeout_s: float = 600.0) -> None:
    """Waits until these processes have ended."""
    deadline = time.monotonic() + timeout_s
    while running := [process for process in processes if not has_ended(process)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.02)


KILLED = """
import json, sys
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.types import CodeTests
from megatron_rasft.verify.programs.sandbox import Sandbox
config = VerifyConfig(verify_code_timeout_s=10000.0, verify_sandbox_level="limits")
sandbox = Sandbox(config, [sys.argv[1]])
print("ready", flush=True)
sandbox.judge("import time; time.sleep(10**6)", CodeTests(style="asserts", tests=("assert f(1)",), entry_point="f"))
"""


def test_all_processes_end_when_the_user_of_a_sandbox_is_killed(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = subprocess.Popen(
        [sys.executable, "-c", KILLED, sandbox.level],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "ready\n"
    started = psutil.Process(user.pid)
    deadline = time.monotonic() + 600
    while len(started.children(recursive=True)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    running = started.children(recursive=True)
    assert len(running) >= 3
    user.kill()
    user.wait()
    # The program sleeps, so only the death signal can end it: neither its deadline nor its CPU limit does
    wait_until_ended(running)
    # The next sandbox of the same user removes the folder of the killed one
    assert len(list(tmp_path.iterdir())) == (sandbox.level == "landlock")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    deadline = time.monotonic() + 600
    while True:
        Sandbox(PATIENT, [sandbox.level]).close()
        left = list(tmp_path.iterdir())
        # A process of the check that started after ``running`` was read may hold the folder's lock a moment longer
        if not left or time.monotonic() > deadline:
            break
    assert left == []


def test_level_that_is_not_available_is_refused() -> None:
    config = VerifyConfig(verify_sandbox_level="namespaces")
    with pytest.raises(SandboxError, match="--verify-sandbox-level namespaces"):
        Sandbox(config, ["landlock", "limits"])


def test_a_machine_that_allows_only_the_weakest_level_is_refused_unless_it_is_accepted() -> None:
    for config in (VerifyConfig(), verify_config(EvaluationConfig())):
        with pytest.raises(SandboxError, match=r"--verify-sandbox-level landlock.* --sandbox-level"):
            Sandbox(config, ["limits"])
    with Sandbox(VerifyConfig(verify_sandbox_level="limits"), ["limits"]) as accepted:
        assert accepted.level == "limits"


IMPORTS = """
import sys
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.types import CodeTests
from megatron_rasft.verify.programs.sandbox import Sandbox
tests = CodeTests(style="asserts", tests=("assert f(3) == [9, ['its own']]",), entry_point="f")
program = "import installed\\ndef f(x): return [x * x, installed.try_to_write()]"
with Sandbox(VerifyConfig(verify_code_timeout_s=120.0, verify_sandbox_level="limits"), [sys.argv[1]]) as sandbox:
    print(sandbox.judge(program, tests))
"""
INSTALLED = """
import os
def try_to_write():
    open("own", "w").write("x")
    written = ["its own"]
    for path in (__file__, os.path.dirname(__file__) + "/new"):
        try:
            open(path, "w").write("x")
            written.append(path)
        except OSError:
            pass
    return written
"""


def test_python_that_is_installed_below_tmp_is_readable_and_not_writable(patient_sandbox: Sandbox) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        environment = Path(folder, "environment")
        venv.create(environment, symlinks=True, with_pip=False)
        python = environment / "bin" / "python"
        packages = (
            environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        )
        (packages / "installed.py").write_text(INSTALLED)
        done = subprocess.run(
            [python, "-c", IMPORTS, patient_sandbox.level],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
        )
    # At the lowest level, programs import the standard library and numpy only
    verdict = "wrong" if patient_sandbox.level == "limits" else "correct"
    assert done.stdout.startswith(f"('{verdict}'"), done.stdout + done.stderr


def test_verdict_is_json_and_short(patient_sandbox: Sandbox) -> None:
    verdict = patient_sandbox.judge("def f(x): raise ValueError('x' * 10**5)", ASSERTS)
    assert verdict[0] == "wrong"
    assert len(json.dumps(verdict)) < 400
