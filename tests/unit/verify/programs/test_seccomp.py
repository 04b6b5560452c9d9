"""The seccomp filter alone: only listed calls are possible, in the forms that a check needs."""

import errno
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rasft.verify.programs import kernel_calls, seccomp

REPOSITORY = Path(__file__).parents[4]
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
"""The kernel's own tables; aarch64 has the generic one."""
CONFINING = {"pivot_root", "mount_setattr", "open_tree", "move_mount"}
"""Calls of the table that only the launcher makes, before the filter."""

ALL = dict.fromkeys(("may_open", "may_change_files", "may_change_attributes", "may_truncate"), True)
READS = ALL | {"may_change_files": False, "may_change_attributes": False}
COMPUTES = READS | {"may_open": False}
OLD_LANDLOCK = ALL | {"may_change_attributes": False, "may_truncate": False}


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


# Every call number, known or not, whose call even the level with the most rights never allows. Arguments of 0 would
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


OWN, OTHER = os.getpid(), os.getpid() + 1
READ, WRITE, TRUNCATE, NEW = os.O_RDONLY, os.O_WRONLY, os.O_TRUNC, os.O_CREAT | os.O_RDWR
PAIR = (1, 1 | 0x80000)  # AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC
# Call and arguments -> error number with all rights, 0 for success without a call; None means that it is allowed
FORMS: list[tuple[str, tuple[int, ...], int | None]] = [
    ("clone", (0x3D0F00,), None), ("clone", (0x7D0F00,), None), ("clone", (17,), errno.EPERM),
    ("clone", (0x3D0F00 | 0x10000000,), errno.EPERM), ("clone", (0x4111,), errno.EPERM),
    ("socketpair", PAIR, None), ("socketpair", (1, 2), errno.EPERM), ("socketpair", (1, 5), errno.EPERM),
    ("socketpair", (2, 1), errno.EPERM), ("socketpair", (1, 1 | 0x100000), errno.EPERM),
    ("sendto", (3, 0, 0, 0x4000, 0, 0), None), ("sendto", (3, 0, 0, 1, 0, 0), errno.EPERM),
    ("sendto", (3, 0, 0, 0, 0x1000, 2), errno.EPERM), ("sendto", (3, 0, 0, 0, 1 << 32, 2), errno.EPERM),
    ("recvfrom", (3, 0, 0, 2, 1 << 40, 0), None), ("recvfrom", (3, 0, 0, 1), errno.EPERM),
    ("kill", (OWN, 9), None), ("kill", (OTHER, 9), errno.EPERM), ("kill", (0, 9), errno.EPERM),
    ("kill", (0xFFFFFFFF, 9), errno.EPERM), ("tgkill", (OWN, OWN, 9), None), ("tgkill", (OTHER, OWN, 9), errno.EPERM),
    ("prlimit64", (0, 0), None), ("prlimit64", (OWN, 0), None), ("prlimit64", (OTHER, 0), errno.EPERM),
    ("getsid", (OTHER,), errno.EPERM), ("getpgid", (0,), None), ("sched_getaffinity", (OTHER,), errno.EPERM),
    ("mmap", (0, 4096, 3, 0x22), None), ("mmap", (0, 4096, 5, 0x802), None), ("mmap", (0, 4096, 3, 0x2022), errno.EPERM),
    ("mmap", (0, 4096, 3, 0x40022), errno.EPERM), ("madvise", (0, 4096, 4), None), ("madvise", (0, 4096, 21), errno.EINVAL),
    ("futex", (0, 0x189), None), ("futex", (0, 129), None), ("futex", (0, 6), errno.EPERM), ("futex", (0, 139), errno.EPERM),
    ("fcntl", (0, 4), None), ("fcntl", (0, 1030), None), ("fcntl", (0, 6), None), ("fcntl", (0, 7), errno.EPERM),
    *[("fcntl", (0, command), errno.EPERM) for command in (8, 9, 10, 15, 37, 1024, 1025, 1026, 1031, 1033)],
    ("ioctl", (0, 0x5401), None), ("ioctl", (0, 0x5421), None), ("ioctl", (0, 0x8901), errno.EOPNOTSUPP),
    ("ioctl", (0, 0x5412), errno.EOPNOTSUPP), ("ioctl", (0, 0x40086602), errno.EOPNOTSUPP),
    ("prctl", (15,), None), ("prctl", (1,), errno.EPERM), ("prctl", (4,), errno.EPERM), ("prctl", (22,), errno.EPERM),
    ("getsockopt", (3, 1, 3), None), ("getsockopt", (3, 1, 77), errno.EPERM),
    ("clock_gettime", (2,), None), ("clock_gettime", (0xFFFFFFFE,), errno.EPERM),
    ("mknodat", (-100, 0, 0o010600), None), ("mknodat", (-100, 0, 0o140600), errno.EPERM),
    ("mknodat", (-100, 0, 0o020600), errno.EPERM), ("openat", (-100, 0, NEW), None), ("fsync", (3,), 0),
    ("openat", (-100, 0, NEW | 0x1000), errno.EINVAL), ("openat", (-100, 0, NEW | 0x101000), errno.EINVAL),
    ("fallocate", (3, 0), None), ("fallocate", (3, 1), errno.EOPNOTSUPP), ("pwritev2", (3, 0, 0, 0, 0, 0), None),
    ("pwritev2", (3, 0, 0, 0, 0, 2), errno.EOPNOTSUPP), ("pwritev2", (3, 0, 0, 0, 0, 4), errno.EOPNOTSUPP),
    ("getxattr", (), errno.ENOTSUP), ("pivot_root", (), errno.EPERM), ("move_mount", (), errno.ENOSYS),
]  # fmt: skip
# The same with fewer rights: what the tester may open at the level "limits", what the program may, and an old Landlock
FORMS_OF_LEVELS: list[tuple[dict[str, bool], str, tuple[int, ...], int | None]] = [
    (READS, "openat", (-100, 0, READ | os.O_DIRECTORY), None), (READS, "openat", (-100, 0, WRITE), errno.EROFS),
    (READS, "openat", (-100, 0, NEW), errno.EROFS), (READS, "openat", (-100, 0, os.O_TMPFILE), errno.EROFS),
    (READS, "mkdirat", (), errno.EROFS), (READS, "mknodat", (-100, 0, 0o010600), errno.EPERM), (READS, "fchmod", (), errno.EPERM),
    (READS, "fcntl", (0, 6), errno.EPERM), (READS, "chdir", (), None), (COMPUTES, "openat", (-100, 0, READ), errno.EACCES),
    (COMPUTES, "chdir", (), errno.EPERM), (COMPUTES, "readlinkat", (), errno.EPERM), (COMPUTES, "read", (), None),
    (OLD_LANDLOCK, "truncate", (), errno.EPERM), (OLD_LANDLOCK, "openat", (-100, 0, READ | TRUNCATE), errno.EPERM),
    (OLD_LANDLOCK, "openat", (-100, 0, NEW | TRUNCATE), None), (OLD_LANDLOCK, "openat", (-100, 0, READ), None),
    (OLD_LANDLOCK, "ftruncate", (), None), (OLD_LANDLOCK, "fchmodat", (), errno.EPERM),
]  # fmt: skip


def decide(program: bytes, number: int, arguments: tuple[int, ...], architecture: int) -> int | None:
    """Runs a filter as the kernel would: classic BPF over struct seccomp_data. Returns an error number, or None to allow."""
    padded = [value & (1 << 64) - 1 for value in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *padded)
    instructions = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, operand = instructions[at]
        at += 1
        match code:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                accumulator = struct.unpack_from("=I", data, operand)[0]
            case 0x54:  # BPF_ALU | BPF_AND
                accumulator &= operand
            case 0x15:  # BPF_JMP | BPF_JEQ
                at += if_true if accumulator == operand else if_false
            case 0x35:  # BPF_JMP | BPF_JGE
                at += if_true if accumulator >= operand else if_false
            case 0x06:  # BPF_RET
                if operand == 0x7FFF0000:
                    return None
                assert operand >> 16 == 5, "neither allowed nor an error"
                return operand & 0xFFFF
            case _:
                raise AssertionError(f"unknown instruction {code:#x}")


@pytest.mark.parametrize(("machine", "architecture"), [("x86_64", 0xC000003E), ("aarch64", 0xC00000B7)])
def test_calls_are_allowed_in_the_forms_that_a_check_needs(
    monkeypatch: pytest.MonkeyPatch, machine: str, architecture: int
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for rights, name, arguments, wanted in [*((ALL, *form) for form in FORMS), *FORMS_OF_LEVELS]:
        number = kernel_calls.find_number(name)
        assert number is not None
        program = seccomp.build_filter(**rights)
        assert decide(program, number, arguments, architecture) == wanted, (name, arguments, rights)
        assert decide(program, number, arguments, 0x40000003) == errno.ENOSYS, "a call of a 32-bit machine"


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
