"""The seccomp filter alone: only listed calls are possible, in the forms that a check needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rasft.verify.programs import kernel_calls

REPOSITORY = Path(__file__).parents[4]
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
"""The kernel's own tables; aarch64 has the generic one."""
CONFINING = {"pivot_root", "mount_setattr", "open_tree", "move_mount"}
"""Calls of the table that only the launcher makes, before the filter."""


def run(source: str, *arguments: str) -> str:
    """Runs a script in an interpreter of its own, and returns what it printed."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


CUTS = """
import os, sys
from megatron_rasft.verify.programs import seccomp
seccomp.filter_system_calls(may_open=True, may_change_files=True, may_change_attributes=False, may_truncate=False)
for cut in (lambda p: os.truncate(p, 0), lambda p: os.open(p, os.O_RDONLY | os.O_TRUNC), lambda p: os.chmod(p, 0)):
    try: cut(sys.argv[1])
    except PermissionError: print("refused")
open(sys.argv[1] + ".own", "w").write("x")
"""


def test_filter_refuses_truncation_where_landlock_cannot(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    assert run(CUTS, str(file)) == "refused\n" * 3
    assert [p.read_text() for p in sorted(tmp_path.iterdir())] == ["x", "x"]


# Every call number, known or not, of which the level with the most rights does not allow any form. Arguments of 0 would
# make most of them fail anyway, but with other errors: those of the filter are EPERM and, for new calls, ENOSYS
ALL_NUMBERS = """
import ctypes, errno, sys
from megatron_rasft.verify.programs import seccomp
libc = ctypes.CDLL(None, use_errno=True)
seccomp.filter_system_calls(may_open=True, may_change_files=True, may_change_attributes=True, may_truncate=True)
known = set(map(int, sys.argv[1].split(",")))
for number in [n for n in range(1000) if n not in known] + [0x40000000 + n for n in (0, 39, 57, 59, 520, 1000)] + [-1]:
    wanted = errno.ENOSYS if not 0 <= number < 424 else errno.EPERM
    if libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != wanted:
        print(number, ctypes.get_errno())
"""


def test_calls_that_are_not_listed_are_refused_whatever_their_number() -> None:
    numbers = {name: kernel_calls.find_number(name) for name in kernel_calls.NUMBERS}
    listed = {number for name, number in numbers.items() if number is not None and name not in CONFINING}
    # On x86_64, the kernel does not filter uretprobe and uprobe, and ends a process that calls them itself
    unfiltered = {335, 336} if kernel_calls.find_number("open") is not None else set()
    assert run(ALL_NUMBERS, ",".join(map(str, listed | unfiltered))) == ""


@pytest.mark.parametrize("machine", HEADERS)
def test_numbers_are_those_of_the_kernel(machine: str) -> None:
    header = HEADERS[machine]
    if not header.is_file():
        pytest.skip(f"{header} is not installed (linux-libc-dev)")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", header.read_text()))
    # The generic table names this call as 32-bit machines do
    found.setdefault("newfstatat", found.get("fstatat", ""))
    column = list(HEADERS).index(machine)
    for name, numbers in kernel_calls.NUMBERS.items():
        assert str(numbers[column]) == found.get(name, "None"), name


def test_no_number_is_listed_twice() -> None:
    for column in (0, 1):
        numbers = [row[column] for row in kernel_calls.NUMBERS.values() if row[column] is not None]
        assert len(numbers) == len(set(numbers))
