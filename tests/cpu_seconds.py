"""Measures the CPU seconds of each test, on Linux as root: `pytest -p tests.cpu_seconds`, or `make test ARGS="-p tests.cpu_seconds"`.

pytest moves into a control group of its own, in which the kernel counts the CPU time of everything that the tests start, also of
processes that outlive their test or their parent. The set-up of a shared fixture counts for the first test that asks for it. Other
programs on the machine change the figures little, unlike durations. With CPU_SECONDS=FILE all figures are written there after each test.
"""

import collections
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

NUM_SHOWN = 40
FOLDER = Path("/sys/fs/cgroup")


class Clock:
    """The CPU seconds of a new control group, with this process and all that it starts from now on. Knows cgroup v1 and v2."""

    def __init__(self) -> None:
        self._is_v1 = (FOLDER / "cpuacct").is_dir()
        self._root = FOLDER / "cpuacct" if self._is_v1 else FOLDER
        self._group = self._root / f"tests-{os.getpid()}"
        self._group.mkdir()
        self._move(self._group)

    def _move(self, group: Path) -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    def seconds(self) -> float:
        if self._is_v1:
            return int((self._group / "cpuacct.usage").read_text()) / 1e9
        return int((self._group / "cpu.stat").read_text().split()[1]) / 1e6

    def close(self) -> None:
        self._move(self._root)
        with contextlib.suppress(OSError):  # a process of the tests is still running
            self._group.rmdir()


class Plugin:
    def __init__(self) -> None:
        self._clock = Clock()
        self._seconds: dict[str, float] = collections.defaultdict(float)
        """Name of the test, or "collection" -> CPU seconds."""
        self._file = os.environ.get("CPU_SECONDS")

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        before = self._clock.seconds()
        yield
        self._seconds[name] += self._clock.seconds() - before
        if self._file:
            lines = [f"{seconds:.3f}\t{name}\n" for name, seconds in self._seconds.items()]
            Path(self._file).write_text("".join(lines), encoding="utf-8")

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Iterator[None]:
        with self._counted("collection"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        with self._counted(item.nodeid):
            return (yield)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        files: dict[str, float] = collections.defaultdict(float)
        for name, seconds in self._seconds.items():
            files[name.partition("::")[0]] += seconds
        for title, table in (("files", files), ("tests", self._seconds)):
            terminalreporter.section(f"CPU seconds of {title}")
            for name, seconds in sorted(table.items(), key=lambda row: -row[1])[:NUM_SHOWN]:
                terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        terminalreporter.write_line(f"{sum(files.values()):8.1f}  all")

    def pytest_unconfigure(self) -> None:
        self._clock.close()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Plugin(), "cpu seconds")
