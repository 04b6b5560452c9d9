"""The seccomp filter of a check: which system calls its processes may make.

The filter is a program in classic BPF. The kernel runs it at every system call of the process that installed it, and of
its threads and children. It can be neither removed nor weakened. The design is a list of forbidden calls, not of allowed
ones: Python, numpy and pytest may then use all calls that only read or compute.
"""

import ctypes
import errno
import os
import struct

from megatron_rasft.verify.programs import kernel_calls

_FORBIDDEN = (
    "fork vfork execve execveat ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_open "
    "pidfd_send_signal pidfd_getfd tkill rt_sigqueueinfo rt_tgsigqueueinfo socket io_uring_setup io_uring_enter "
    "io_uring_register bpf perf_event_open userfaultfd add_key request_key keyctl mount umount2 pivot_root chroot "
    "move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr unshare setns shmget shmat semget msgget "
    "mq_open memfd_create memfd_secret kexec_load kexec_file_load init_module finit_module delete_module reboot "
    "swapon swapoff sethostname setdomainname settimeofday clock_settime clock_adjtime adjtimex iopl ioperm "
    "modify_ldt acct quotactl syslog personality name_to_handle_at open_by_handle_at fanotify_init setpriority "
    "open_tree_attr ioprio_set migrate_pages move_pages process_mrelease"
).split()
_CHANGES_ATTRIBUTES = (
    "chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat setxattr lsetxattr "
    "fsetxattr setxattrat removexattr lremovexattr fremovexattr removexattrat file_setattr"
).split()
_CHANGES_FILES = (
    "creat rename renameat renameat2 unlink unlinkat mkdir mkdirat rmdir link linkat symlink symlinkat mknod mknodat "
    "truncate"
).split()
_SCHEDULES = "sched_setaffinity sched_setscheduler sched_setparam sched_setattr".split()
# With these the kernel signals another process when a file changes: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE
_OWNS_BY_FCNTL = (8, 10, 15, 1024)
_OWNS_BY_IOCTL = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP
# O_TMPFILE includes the bit of O_DIRECTORY, which opens folders for reading
_OPENS_FOR_WRITING = (
    os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)
)


def filter_system_calls(
    *, may_open: bool, may_change_files: bool, may_change_attributes: bool, may_truncate: bool
) -> None:
    """Forbids this process to start processes or programs, open sockets, signal, trace or schedule other processes.

    Also forbidden: mounts, namespaces, keys, io_uring, bpf, shared memory, setting clocks, changing the death signal. A
    forbidden call fails with the error that a user without the permission would get.

    Args:
        may_open: False forbids opening files, also for reading.
        may_change_files: False forbids creating, renaming and removing files, and opening them for writing.
        may_change_attributes: False forbids changing modes, owners, times and extended attributes.
        may_truncate: False forbids truncating files that are not open for writing.

    Raises:
        OSError: the machine is neither x86_64 nor aarch64, or its kernel does not support seccomp.
    """
    # clone3 passes its flags in memory, which a filter cannot read. ENOSYS makes glibc use clone instead
    rules = [*((name, errno.EPERM) for name in _FORBIDDEN), ("clone3", errno.ENOSYS)]
    if not may_change_files:
        rules += [(name, errno.EROFS) for name in (*_CHANGES_FILES, "openat2")]
    if not may_change_attributes:
        rules += [(name, errno.EPERM) for name in _CHANGES_ATTRIBUTES]
    if not may_truncate:
        rules += [(name, errno.EACCES) for name in ("truncate", "openat2")]
    if not may_open:
        rules += [(name, errno.EACCES) for name in ("open", "openat", "openat2")]
    program = _Filter()
    for name, code in rules:
        program.deny(name, code)
    own = os.getpid()
    # CLONE_THREAD: threads share the limits of their process, a new process would have its own
    program.deny_unless_all_bits("clone", 0, 0x10000)
    for name in ("kill", "tgkill"):
        program.deny_unless_equal(name, 0, own)
    # Process id 0 means the calling process
    for name in ("prlimit64", *_SCHEDULES):
        program.deny_unless_equal(name, 0, 0, own)
    program.deny_if_equal("fcntl", 1, *_OWNS_BY_FCNTL)
    program.deny_if_equal("ioctl", 1, *_OWNS_BY_IOCTL)
    program.deny_if_equal("prctl", 0, kernel_calls.PR_SET_PDEATHSIG, kernel_calls.PR_SET_DUMPABLE)
    for name, flags_argument in (("openat", 2), ("open", 1)):
        if may_open and not may_change_files:
            program.deny_if_any_bit(name, flags_argument, _OPENS_FOR_WRITING)
        if not may_truncate:
            truncates = os.O_TRUNC | os.O_ACCMODE, os.O_TRUNC | os.O_RDONLY
            program.deny_if_masked_equal(name, flags_argument, *truncates)
    program.install()


class _Filter:
    """A BPF program under construction: a sequence of comparisons, of which the first that matches decides.

    An instruction is (opcode, instructions to skip if true, the same if false, operand). It reads struct seccomp_data of
    linux/seccomp.h: call number, architecture, instruction pointer, six 64-bit arguments.
    """

    _LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    _ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
    _NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
    # x86_64 also accepts the x32 calls, with numbers of their own. They would bypass the comparisons by number
    _FIRST_X32_CALL = 0x40000000

    def __init__(self) -> None:
        architecture = kernel_calls.architecture()
        self._code: list[tuple[int, int, int, int]] = [
            (self._LOAD, 0, 0, self._ARCHITECTURE_AT),
            (self._JUMP_EQUAL, 1, 0, architecture),
            (self._RETURN, 0, 0, self._KILL_PROCESS),
            (self._LOAD, 0, 0, self._NUMBER_AT),
            (self._JUMP_AT_LEAST, 0, 1, self._FIRST_X32_CALL),
            (self._RETURN, 0, 0, self._KILL_PROCESS),
        ]

    def deny(self, name: str, code: int) -> None:
        """Makes a call fail with the error number ``code``."""
        self._on(name, [(self._RETURN, 0, 0, self._ERRNO | code)])

    def deny_unless_equal(self, name: str, argument: int, *allowed: int) -> None:
        """Forbids a call unless an argument has one of the allowed values."""
        tests = [(self._JUMP_EQUAL, len(allowed) - i, 0, value) for i, value in enumerate(allowed)]
        self._on_argument(name, argument, [*tests, self._refusal(), self._approval()])

    def deny_if_equal(self, name: str, argument: int, *refused: int) -> None:
        """Forbids a call if an argument has one of the refused values."""
        tests = [(self._JUMP_EQUAL, len(refused) - i, 0, value) for i, value in enumerate(refused)]
        self._on_argument(name, argument, [*tests, self._approval(), self._refusal()])

    def deny_unless_all_bits(self, name: str, argument: int, bits: int) -> None:
        """Forbids a call unless an argument has all these bits set."""
        tests = [(self._AND, 0, 0, bits), (self._JUMP_EQUAL, 1, 0, bits)]
        self._on_argument(name, argument, [*tests, self._refusal(), self._approval()])

    def deny_if_masked_equal(self, name: str, argument: int, mask: int, refused: int) -> None:
        """Forbids a call if the masked bits of an argument equal ``refused``."""
        tests = [(self._AND, 0, 0, mask), (self._JUMP_EQUAL, 0, 1, refused)]
        self._on_argument(name, argument, [*tests, self._refusal(), self._approval()])

    def deny_if_any_bit(self, name: str, argument: int, bits: int) -> None:
        """Forbids a call, as on a read-only file system, if an argument has any of these bits set."""
        test = (self._JUMP_ANY_BIT, 0, 1, bits)
        self._on_argument(
            name, argument, [test, (self._RETURN, 0, 0, self._ERRNO | errno.EROFS), self._approval()]
        )

    def install(self) -> None:
        """Applies the filter to this process. It cannot be removed."""
        code = [*self._code, self._approval()]
        packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
        buffer = ctypes.create_string_buffer(packed)
        program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
        # The kernel requires this before a process without privileges may install a filter
        kernel_calls.prctl(kernel_calls.PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
        mode_filter = 2
        done = kernel_calls.LIBC.prctl(kernel_calls.PR_SET_SECCOMP, mode_filter, program, 0, 0)
        kernel_calls.check(done, "PR_SET_SECCOMP")

    def _refusal(self) -> tuple[int, int, int, int]:
        return (self._RETURN, 0, 0, self._ERRNO | errno.EPERM)

    def _approval(self) -> tuple[int, int, int, int]:
        return (self._RETURN, 0, 0, self._ALLOW)

    def _on(self, name: str, then: list[tuple[int, int, int, int]]) -> None:
        number = kernel_calls.find_number(name)
        if number is not None:
            self._code += [(self._JUMP_EQUAL, 0, len(then), number), *then]

    def _on_argument(self, name: str, argument: int, then: list[tuple[int, int, int, int]]) -> None:
        # BPF loads 32 bits. The low half is enough: the kernel itself reads a process id, an option or flags as int
        self._on(name, [(self._LOAD, 0, 0, self._ARGUMENTS_AT + 8 * argument), *then])
