"""The seccomp filter of a check: which system calls its processes may make.

The filter is a program in classic BPF. The kernel runs it at every system call of the process that installed it, and of
its threads. It can be neither removed nor weakened. It is a list of allowed calls: those with which Python, numpy and
pytest compute, use their own open files, start threads and wait. Each level adds calls for files. A call that is
needed in one form only is allowed in this form only, by its arguments. All other calls fail, known or not.
"""

import ctypes
import errno
import itertools
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from megatron_rasft.verify.programs import kernel_calls

_ALLOWED = (
    "read write readv writev pread64 pwrite64 preadv pwritev preadv2 lseek close close_range dup dup2 dup3 "
    "pipe pipe2 sendfile copy_file_range fstat newfstatat stat lstat statx access faccessat fstatfs getcwd getdents64 "
    "ftruncate poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait "
    "eventfd2 timerfd_create timerfd_settime timerfd_gettime brk munmap mprotect mremap set_robust_list "
    "rseq gettid getpid getppid exit exit_group sched_yield wait4 waitid rt_sigaction rt_sigprocmask rt_sigreturn "
    "rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall pause alarm getitimer setitimer nanosleep "
    "gettimeofday time times getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getrlimit setrlimit "
    "getrusage getrandom uname sysinfo getcpu umask sched_get_priority_max sched_get_priority_min shutdown getsockname "
    "getpeername"
).split()
_READS_PATHS = "chdir fchdir readlink readlinkat statfs".split()
_CHANGES_FILES = (
    "rename renameat renameat2 unlink unlinkat mkdir mkdirat rmdir link linkat symlink symlinkat truncate"
).split()
_CHANGES_ATTRIBUTES = (
    "chmod fchmod fchmodat chown fchown lchown fchownat utime utimes utimensat futimesat"
).split()
# The files of a check vanish when it ends. Writing them to a disk would only slow down other processes
_FLUSHES = "fsync fdatasync msync".split()
# The standard library copies files without extended attributes if the file system has none
_READS_EXTENDED_ATTRIBUTES = "getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr".split()

_OPENS_FOR_WRITING = (
    # O_TMPFILE includes the bit of O_DIRECTORY, which opens folders for reading
    os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)
)
# O_DSYNC and __O_SYNC: every write would wait for the disk
_OPENS_FOR_SYNCHRONOUS_WRITING = 0x101000
_ANY_ACCESS = range(os.O_ACCMODE + 1)
_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter of linux/filter.h
_NEW_CALLS_FROM = 424
"""From this number on, system calls have the same number on every architecture."""


@dataclass(frozen=True)
class _Condition:
    """A condition on one argument of a system call: ``argument & mask`` is one of ``values``."""

    argument: int
    values: Sequence[int]
    mask: int = 0xFFFFFFFF
    is_high_half: bool = False
    """Compares the upper instead of the lower 32 bits. The lower half is enough for everything that the kernel reads as int."""
    error: int = errno.EPERM
    """Error number of a call that does not meet the condition."""


def _without(argument: int, bits: int, error: int = errno.EPERM) -> _Condition:
    """Returns the condition that none of these bits is set."""
    return _Condition(argument, (0,), mask=bits, error=error)


def _only(argument: int, bits: int) -> _Condition:
    """Returns the condition that no other than these bits is set."""
    return _without(argument, ~bits & 0xFFFFFFFF)


# Flags that only glibc or musl set when they start a thread: CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS,
# PARENT_SETTID and CHILD_CLEARTID (linux/sched.h), and CLONE_DETACHED by musl
_STARTS_THREAD = (0x3D0F00, 0x7D0F00)
# MAP_SHARED, PRIVATE, FIXED, ANONYMOUS, GROWSDOWN, DENYWRITE, NORESERVE, POPULATE, STACK and FIXED_NOREPLACE. Others lock
# memory or take pages from a pool that all processes share
_MAP_FLAGS = 0x12C933
# MADV_NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTNEED, FREE, [NO]HUGEPAGE, DONTDUMP, DODUMP, POPULATE_READ and WRITE,
# GUARD_INSTALL and REMOVE. Others write out pages that processes share, or merge equal pages
_MEMORY_ADVICE = (0, 1, 2, 3, 4, 8, 14, 15, 16, 17, 22, 23, 102, 103)
# FUTEX_WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET; not those that inherit priorities, which Python's
# locks do not use and which have had faults in the kernel
_FUTEX_OPERATIONS, _FUTEX_FLAGS = (0, 1, 3, 4, 5, 9, 10), 0x180  # FUTEX_PRIVATE_FLAG and CLOCK_REALTIME
_SOCK_STREAM, _SOCK_FLAGS = 1, 0x80800  # SOCK_CLOEXEC and SOCK_NONBLOCK
# MSG_PEEK, DONTWAIT, WAITALL, NOSIGNAL. MSG_OOB has had faults in the kernel by which a sandbox could be left
_MESSAGE_FLAGS = 0x4142
_WRITE_THROUGH = 0x6  # RWF_DSYNC and RWF_SYNC
_SOCKET_OPTIONS = (3, 4, 30, 38, 39)  # SO_TYPE, ERROR, ACCEPTCONN, PROTOCOL, DOMAIN
# F_DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC. Not those for owners, leases, notifications, seals and pipe sizes
_FILE_CONTROLS = (0, 1, 2, 3, 4, 1030)
_LOCK_CONTROLS = (5, 6)  # F_GETLK, SETLK: sqlite3 needs them for files
_DEVICE_CONTROLS = (
    0x5401,
    0x5413,
    0x541B,
    0x5421,
    0x5450,
    0x5451,
)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO[N]CLEX
_PROCESS_CONTROLS = (15, 16, 0x53564D41)  # PR_SET_NAME, GET_NAME, SET_VMA: names of threads and of memory
_NEGATIVE = 0x80000000
_OWN_ID = 0x7F3A5C61
"""Stands for the id of the process that installs the filter. Larger than every process id (2**22), and nothing else in a filter."""


def _allowed_in_one_form() -> dict[str, tuple[_Condition, ...]]:
    """Returns the calls that every level allows with some arguments only."""
    is_own_or_zero = _Condition(0, (0, _OWN_ID))
    has_no_address = (_Condition(4, (0,)), _Condition(4, (0,), is_high_half=True))
    # Negative clocks measure the CPU time of any process
    is_common_clock = _without(0, _NEGATIVE)
    return {
        "futex": (_Condition(1, _FUTEX_OPERATIONS, mask=~_FUTEX_FLAGS & 0xFFFFFFFF),),
        "madvise": (_Condition(2, _MEMORY_ADVICE, error=errno.EINVAL),),
        "mmap": (_only(3, _MAP_FLAGS),),
        "clone": (_Condition(0, _STARTS_THREAD),),
        "kill": (_Condition(0, (_OWN_ID,)),),
        "tgkill": (_Condition(0, (_OWN_ID,)),),
        # Process id 0 means the calling process
        **dict.fromkeys(("prlimit64", "sched_getaffinity", "getpgid", "getsid"), (is_own_or_zero,)),
        **dict.fromkeys(("clock_gettime", "clock_getres", "clock_nanosleep"), (is_common_clock,)),
        # Event loops need a pair. Datagrams and messages with files can be sent to any socket, also from a pair
        "socketpair": (_Condition(0, (1,)), _Condition(1, (_SOCK_STREAM,), mask=~_SOCK_FLAGS & 0xFFFFFFFF)),
        "sendto": (*has_no_address, _only(3, _MESSAGE_FLAGS)),
        "recvfrom": (_only(3, _MESSAGE_FLAGS),),
        # FALLOC_FL_KEEP_SIZE, for example, takes blocks of the disk beyond the largest size of a file
        "fallocate": (_Condition(1, (0,), error=errno.EOPNOTSUPP),),
        "pwritev2": (_without(5, _WRITE_THROUGH, error=errno.EOPNOTSUPP),),
        "getsockopt": (_Condition(2, _SOCKET_OPTIONS),),
        "ioctl": (_Condition(1, _DEVICE_CONTROLS, error=errno.EOPNOTSUPP),),
        "prctl": (_Condition(0, _PROCESS_CONTROLS),),
    }


def filter_system_calls(
    *, may_open: bool, may_change_files: bool, may_change_attributes: bool, may_truncate: bool
) -> None:
    """Forbids this process all system calls but those that a check needs.

    It can compute, use its open files, start threads, wait, and signal itself. A call that only the flags below forbid fails
    with the error that it has on a file system without the right. Other calls fail with EPERM, or, if they are so new
    that libraries try them first and then use an older call, with ENOSYS.

    Args:
        may_open: False forbids opening files, also for reading.
        may_change_files: False forbids creating, renaming and removing files, and opening them for writing.
        may_change_attributes: False forbids changing modes, owners and times.
        may_truncate: False forbids truncating files that are not open for writing.

    Raises:
        OSError: the machine is neither x86_64 nor aarch64, or its kernel does not support seccomp.
    """
    program = build_filter(
        may_open=may_open,
        may_change_files=may_change_files,
        may_change_attributes=may_change_attributes,
        may_truncate=may_truncate,
    )
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // _INSTRUCTION.size, ctypes.addressof(buffer))
    # The kernel requires this before a process without privileges may install a filter
    kernel_calls.prctl(kernel_calls.PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    mode_filter = 2
    done = kernel_calls.LIBC.prctl(kernel_calls.PR_SET_SECCOMP, mode_filter, header, 0, 0)
    kernel_calls.check(done, "PR_SET_SECCOMP")


def build_filter(
    *, may_open: bool, may_change_files: bool, may_change_attributes: bool, may_truncate: bool
) -> bytes:
    """Returns the filter that ``filter_system_calls`` installs, as a program for the kernel's classic BPF."""
    program = _assemble(
        kernel_calls.architecture(), may_open, may_change_files, may_change_attributes, may_truncate
    )
    return program.replace(struct.pack("=I", _OWN_ID), struct.pack("=I", os.getpid()))


def prepare_filters() -> None:
    """Assembles the filters, so that the processes that this process forks need not."""
    for rights in itertools.product((True, False), repeat=4):
        _assemble(kernel_calls.architecture(), *rights)


@cache
def _assemble(
    architecture: int, may_open: bool, may_change_files: bool, may_change_attributes: bool, may_truncate: bool
) -> bytes:
    """Returns the filter with ``_OWN_ID`` in place of the id of the process."""
    program = _Filter(architecture)
    controls = (*_FILE_CONTROLS, *(_LOCK_CONTROLS if may_change_files else ()))
    program.allow("fcntl", _Condition(1, controls))
    for name, flags_argument in (("openat", 2), ("open", 1)):
        if may_open:
            program.allow(name, *_conditions_of_open(flags_argument, may_change_files, may_truncate))
        else:
            program.answer(name, errno.EACCES)
    for name, conditions in _allowed_in_one_form().items():
        program.allow(name, *conditions)
    program.allow_all(_ALLOWED)
    if may_open:
        program.allow_all(_READS_PATHS)
    for name in _CHANGES_FILES:
        if not may_change_files:
            program.answer(name, errno.EROFS)
        elif may_truncate or name != "truncate":
            program.allow(name)
    if may_change_files:
        kinds = (0, 0o100000, 0o010000)  # regular files and FIFOs, but neither sockets nor devices
        program.allow("mknod", _Condition(1, kinds, mask=0o170000))
        program.allow("mknodat", _Condition(2, kinds, mask=0o170000))
    if may_change_attributes:
        program.allow_all(_CHANGES_ATTRIBUTES)
    for name in _FLUSHES:
        program.answer(name, 0)
    for name in _READS_EXTENDED_ATTRIBUTES:
        program.answer(name, errno.ENOTSUP)
    return program.assemble()


def _conditions_of_open(argument: int, may_change_files: bool, may_truncate: bool) -> list[_Condition]:
    conditions = [_without(argument, _OPENS_FOR_SYNCHRONOUS_WRITING, error=errno.EINVAL)]
    if not may_change_files:
        conditions.append(_without(argument, _OPENS_FOR_WRITING, error=errno.EROFS))
    if not may_truncate:
        # O_TRUNC truncates a file that is opened for reading, too
        kept = [
            access | cut for cut in (0, os.O_TRUNC) for access in _ANY_ACCESS if cut + access != os.O_TRUNC
        ]
        conditions.append(_Condition(argument, kept, mask=os.O_TRUNC | os.O_ACCMODE))
    return conditions


class _Filter:
    """A BPF program under construction: a sequence of comparisons, of which the first that matches decides.

    An instruction is (opcode, instructions to skip if true, the same if false, operand). It reads struct seccomp_data of
    linux/seccomp.h: call number, architecture, instruction pointer, six 64-bit arguments.
    """

    _LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
    _ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
    _NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16

    def __init__(self, architecture: int) -> None:
        # A 32-bit call on a 64-bit machine has another architecture, and other numbers
        self._code: list[tuple[int, int, int, int]] = [
            (self._LOAD, 0, 0, self._ARCHITECTURE_AT),
            (self._JUMP_EQUAL, 1, 0, architecture),
            self._return(errno.ENOSYS),
            (self._LOAD, 0, 0, self._NUMBER_AT),
        ]

    def allow(self, name: str, *conditions: _Condition) -> None:
        """Allows a call whose arguments meet all conditions."""
        code = [instruction for condition in conditions for instruction in self._require(condition)]
        self._on(name, [*code, (self._RETURN, 0, 0, self._ALLOW)])

    def allow_all(self, names: Iterable[str]) -> None:
        """Allows calls with any arguments."""
        for name in names:
            self.allow(name)

    def answer(self, name: str, code: int) -> None:
        """Makes a call return at once, with the error number ``code``, or with success if it is 0."""
        self._on(name, [self._return(code)])

    def assemble(self) -> bytes:
        """Returns the program. It refuses all calls that have not been entered."""
        # x86_64 also has the x32 calls, from 0x40000000 on. They are not allowed either
        is_new = (self._JUMP_AT_LEAST, 0, 1, _NEW_CALLS_FROM)
        code = [*self._code, is_new, self._return(errno.ENOSYS), self._return(errno.EPERM)]
        return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)

    def _require(self, condition: _Condition) -> list[tuple[int, int, int, int]]:
        # Both supported architectures are little-endian
        at = self._ARGUMENTS_AT + 8 * condition.argument + 4 * condition.is_high_half
        values = condition.values
        # Every matching comparison skips the remaining ones and the refusal
        tests = [(self._JUMP_EQUAL, len(values) - i, 0, value) for i, value in enumerate(values)]
        return [
            (self._LOAD, 0, 0, at),
            (self._AND, 0, 0, condition.mask),
            *tests,
            self._return(condition.error),
        ]

    def _return(self, code: int) -> tuple[int, int, int, int]:
        return (self._RETURN, 0, 0, self._ERRNO | code)

    def _on(self, name: str, then: list[tuple[int, int, int, int]]) -> None:
        number = kernel_calls.find_number(name)
        if number is not None:
            self._code += [(self._JUMP_EQUAL, 0, len(then), number), *then]
