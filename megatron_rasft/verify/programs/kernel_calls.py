"""Calls of the Linux kernel that Python's standard library does not offer, through libc."""

import ctypes
import errno
import os
import platform

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 36, 38, 47

# Architecture of platform.machine(): its column in the table below, and its AUDIT_ARCH_ number (linux/audit.h)
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# System call numbers from the kernel's asm/unistd_64.h and asm-generic/unistd.h: the calls that a check may make, or that get
# an answer of their own, and those that confine it. None: the machine does not have the call
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286),
    "pwritev2": (328, 287), "lseek": (8, 62), "close": (3, 57), "close_range": (436, 436), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "sendfile": (40, 71),
    "copy_file_range": (326, 285), "fstat": (5, 80), "newfstatat": (262, 79), "stat": (4, None),
    "lstat": (6, None), "statx": (332, 291), "access": (21, None), "faccessat": (269, 48), "getcwd": (79, 17),
    "getdents64": (217, 61), "ftruncate": (77, 46), "fallocate": (285, 47), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create": (213, None),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "eventfd2": (290, 19), "timerfd_create": (283, 85), "timerfd_settime": (286, 86),
    "timerfd_gettime": (287, 87), "brk": (12, 214), "munmap": (11, 215), "mprotect": (10, 226),
    "mremap": (25, 216), "madvise": (28, 233), "mmap": (9, 222), "futex": (202, 98),
    "set_robust_list": (273, 99), "rseq": (334, 293), "clone": (56, 220), "gettid": (186, 178),
    "getpid": (39, 172), "getppid": (110, 173), "exit": (60, 93), "exit_group": (231, 94),
    "sched_yield": (24, 124), "wait4": (61, 260), "waitid": (247, 95), "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132),
    "restart_syscall": (219, 128), "pause": (34, None), "alarm": (37, None), "getitimer": (36, 102),
    "setitimer": (38, 103), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176),
    "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "getpgrp": (111, None), "getrlimit": (97, 163), "getrusage": (98, 165), "getrandom": (318, 278),
    "uname": (63, 160), "sysinfo": (99, 179), "getcpu": (309, 168), "umask": (95, 166),
    "setrlimit": (160, 164), "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
    "sched_getaffinity": (204, 123), "getpgid": (121, 155), "getsid": (124, 156), "prlimit64": (302, 261),
    "kill": (62, 129), "tgkill": (234, 131), "socketpair": (53, 199), "sendto": (44, 206),
    "recvfrom": (45, 207), "shutdown": (48, 210), "getsockname": (51, 204), "getpeername": (52, 205),
    "getsockopt": (55, 209), "fcntl": (72, 25), "ioctl": (16, 29), "prctl": (157, 167), "open": (2, None),
    "openat": (257, 56), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276),
    "unlink": (87, None), "unlinkat": (263, 35), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33), "truncate": (76, 45),
    "chdir": (80, 49), "fchdir": (81, 50), "readlink": (89, None), "readlinkat": (267, 78),
    "statfs": (137, 43), "fstatfs": (138, 44), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None),
    "fsync": (74, 82), "fdatasync": (75, 83), "msync": (26, 227), "getxattr": (191, 8), "lgetxattr": (192, 9),
    "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13),
    "pivot_root": (155, 41), "mount_setattr": (442, 442), "open_tree": (428, 428), "move_mount": (429, 429),
}  # fmt: skip


def check(result: int, what: str) -> int:
    """Returns the result of a call to libc.

    Raises:
        OSError: the result is negative; the message names the call.
    """
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int, what: str) -> None:
    """Sets one attribute of this process; ``what`` is its name in the error message."""
    check(LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0), what)


def call(number: int, what: str, *args: object) -> int:
    """Makes a system call that libc has no function for; ``what`` is its name in the error message."""
    return check(int(LIBC.syscall(ctypes.c_long(number), *args)), what)


def find_number(name: str) -> int | None:
    """Returns the number of a system call on this machine, or None if the machine does not have it.

    Raises:
        OSError: the machine is neither x86_64 nor aarch64.
    """
    return NUMBERS[name][_machine()[0]]


def architecture() -> int:
    """Returns the number by which the kernel names this machine's architecture (AUDIT_ARCH_* of linux/audit.h)."""
    return _machine()[1]


def _machine() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(
            errno.ENOSYS, f"system calls are known for {' and '.join(_MACHINES)}, not for {machine}"
        )
    return _MACHINES[machine]
