"""Takes from the calling process what a program that a model wrote must not have. Linux, no package, no helper program.

Every function acts on the process that calls it and can only take away. Three layers, of which a machine may allow
the first two or not: namespaces (own file system, process ids and network), Landlock (which paths may be opened),
and seccomp (which system calls exist), which every level has.
"""

import contextlib
import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Iterable
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER, _PR_CAP_AMBIENT = 22, 38, 36, 47
_AT_FDCWD, _AT_RECURSIVE, _AT_EMPTY_PATH = -100, 0x8000, 0x1000
_NOBODY = 65534

# Numbers from the kernel's asm/unistd_64.h and asm-generic/unistd.h; None where the machine has no such call.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "kcmp": (312, 272), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "socket": (41, 198), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142),
    "swapon": (167, 224), "swapoff": (168, 225), "sethostname": (170, 161), "setdomainname": (171, 162),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "acct": (163, 89), "quotactl": (179, 60),
    "syslog": (103, 116), "personality": (135, 92), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262), "prlimit64": (302, 261), "setpriority": (141, 140), "prctl": (157, 167),
    "open": (2, None), "openat": (257, 56), "openat2": (437, 437), "creat": (85, None), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, None), "unlinkat": (263, 35), "mkdir": (83, None),
    "mkdirat": (258, 34), "rmdir": (84, None), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "truncate": (76, 45), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "setxattrat": (463, 463), "removexattrat": (466, 466), "file_setattr": (469, 469), "open_tree_attr": (467, 467),
    "fcntl": (72, 25), "ioctl": (16, 29), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "process_mrelease": (448, 448), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
}  # fmt: skip

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
# Whom the kernel signals about a file, with what, and who waits for it: F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE
_OWNS_BY_FCNTL = (8, 10, 15, 1024)
_OWNS_BY_IOCTL = (0x8901, 0x8902)  # FIOSETOWN, SIOCSPGRP


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _syscall(number: int, what: str, *args: object) -> int:
    return _check(int(_LIBC.syscall(ctypes.c_long(number), *args)), what)


def _prctl(option: int, value: int, what: str) -> None:
    _check(_LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0), what)


def die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends, however that ends."""
    _prctl(_PR_SET_PDEATHSIG, 9, "PR_SET_PDEATHSIG")


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def hide_memory() -> None:
    """No process without privileges may trace this one or open its /proc/<pid>/mem, of whatever user it is."""
    _prctl(_PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """mount(2)."""
    done = _LIBC.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(done, f"mount {kind or source} on {target}")


def enter_namespaces() -> None:
    """Own mounts, process ids (of children), network, IPC and host name; as an ordinary user in a user namespace too."""
    uid, gid = os.geteuid(), os.getegid()
    flags = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    if uid == 0:
        os.unshare(flags)
    else:
        os.unshare(flags | os.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def enter_bare_root(readable: Iterable[Path]) -> None:
    """Swap the root for one that holds ``readable`` and four devices, all read-only, and an empty /tmp; no /proc.

    Needs ``enter_namespaces``. A path that does not exist is left out.
    """
    # Any folder that is there and holds nothing we need; the mount on it is gone when the root is swapped.
    root = Path("/sys")
    mount("tmpfs", str(root), "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=0755")
    for path in readable:
        target = root / path.relative_to("/")
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        else:
            continue
        mount(str(path), str(target), "", _MS_BIND | _MS_REC)
    for folder in ("tmp", "old"):
        (root / folder).mkdir(exist_ok=True)
    os.chdir(root)
    _check(_LIBC.syscall(_number("pivot_root"), b".", b"old"), "pivot_root")
    os.chdir("/")
    _check(_LIBC.umount2(b"/old", _MNT_DETACH), "umount of the old root")
    os.rmdir("/old")
    # struct mount_attr: set, clear, propagation, user namespace; the flags of each mount below stay as they are
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    _syscall(_number("mount_setattr"), "mount_setattr", _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, 32)


def drop_privileges(to_nobody: bool) -> None:
    """No capability is left and none can be had again; ``to_nobody``: root becomes the user nobody too.

    Where a user namespace around this process has no nobody, root stays root, of the namespace and without rights.
    """
    with_capabilities = 0
    while _LIBC.prctl(_PR_CAPBSET_DROP, with_capabilities, 0, 0, 0) == 0:
        with_capabilities += 1
    if to_nobody and os.geteuid() == 0:
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    _LIBC.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
    header, empty = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *([0] * 6))
    _check(_LIBC.capset(header, empty), "capset")
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def restrict_paths(readable: Iterable[Path], writable: Path) -> bool:
    """Landlock: only files below ``readable`` may be read, and only what is below ``writable`` changed.

    It knows nothing of modes, owners, times and extended attributes. From Linux 6.12 on no signal leaves it either.

    Returns:
        Whether it keeps files from being truncated, which it does from Linux 6.2 on.

    Raises:
        OSError: the kernel has no Landlock, or this process may not use it.
    """
    create, add, restrict = 444, 445, 446
    abi = _syscall(create, "landlock_create_ruleset", None, ctypes.c_size_t(0), 1)
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    attributes = struct.pack("QQQ", known, 0, 0b11)  # files, network, scope: abstract sockets and signals
    size = 24 if abi >= 6 else 8
    ruleset = _syscall(create, "landlock_create_ruleset", attributes, ctypes.c_size_t(size), 0)
    read, read_file = 0b1101 & known, 0b0101 & known  # execute, read file, read folder
    rules = [(path, read if path.is_dir() else read_file) for path in readable if path.exists()]
    rules += [(writable, known), (Path(os.devnull), 0b0110 & known)]
    for path, access in rules:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            _syscall(add, f"landlock_add_rule {path}", ruleset, 1, struct.pack("=Qi", access, fd), 0)
        finally:
            os.close(fd)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    _syscall(restrict, "landlock_restrict_self", ruleset, 0)
    os.close(ruleset)
    return abi >= 3


def set_limits(
    *, memory_bytes: int, cpu_s: int, file_bytes: int, num_files: int, num_processes: int | None
) -> None:
    """Hard limits of this process: address space, CPU, size of a file, open files, processes of its user."""
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: num_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if num_processes is not None:
        limits[resource.RLIMIT_NPROC] = num_processes
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lowest, lowest))


def address_space_bytes() -> int:
    """Address space this process has claimed so far; needs /proc."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def filter_system_calls(
    *, may_open: bool, may_change_files: bool, may_change_attributes: bool, may_truncate: bool
) -> None:
    """seccomp: no new process or program, no socket, no signal but to itself, nothing that looks into other processes
    or schedules them.

    Also gone: mounts, namespaces, keys, io_uring, bpf, shared memory, clocks, a new death signal. A call that is not
    allowed fails as if the user had no right to it.

    Args:
        may_open: False: no file can be opened any more, not even for reading.
        may_change_files: False: no file can be created, written by name, renamed or removed.
        may_change_attributes: False: modes, owners, times and extended attributes stay as they are.
        may_truncate: False: only what is open for writing can be cut.

    Raises:
        OSError: the machine is neither x86_64 nor aarch64, or has no seccomp.
    """
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
    program.deny_unless_all_bits(
        "clone", 0, 0x10000
    )  # CLONE_THREAD: threads share every limit, processes do not
    for name in ("kill", "tgkill"):
        program.deny_unless_equal(name, 0, own)
    for name in ("prlimit64", *_SCHEDULES):
        program.deny_unless_equal(name, 0, 0, own)
    program.deny_if_equal("fcntl", 1, *_OWNS_BY_FCNTL)
    program.deny_if_equal("ioctl", 1, *_OWNS_BY_IOCTL)
    program.deny_if_equal("prctl", 0, _PR_SET_PDEATHSIG, _PR_SET_DUMPABLE)
    if may_open and not may_change_files:
        write_flags = (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | (os.O_TMPFILE & ~os.O_DIRECTORY)
        )
        program.deny_if_any_bit("openat", 2, write_flags)
        program.deny_if_any_bit("open", 1, write_flags)
    if not may_truncate:
        for name, argument in (("openat", 2), ("open", 1)):
            program.deny_if_masked_equal(name, argument, os.O_TRUNC | os.O_ACCMODE, os.O_TRUNC | os.O_RDONLY)
    program.install()


def _machine() -> tuple[int, int]:
    machine = platform.machine()
    if machine not in _MACHINES:
        raise OSError(
            errno.ENOSYS, f"no table of system calls for {machine}, only for {', '.join(_MACHINES)}"
        )
    return _MACHINES[machine]


def _number(name: str) -> int:
    number = _NUMBERS[name][_machine()[0]]
    assert number is not None, f"this machine has no system call {name}"
    return number


class _Filter:
    """A seccomp program: straight comparisons in classic BPF, the first that holds decides."""

    _LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
    _ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
    _NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
    _FIRST_X32_CALL = 0x40000000

    def __init__(self) -> None:
        self._column, architecture = _machine()
        self._code: list[tuple[int, int, int, int]] = [
            (self._LOAD, 0, 0, self._ARCHITECTURE_AT),
            (self._JUMP_EQUAL, 1, 0, architecture),
            (self._RETURN, 0, 0, self._KILL_PROCESS),
            (self._LOAD, 0, 0, self._NUMBER_AT),
            (self._JUMP_AT_LEAST, 0, 1, self._FIRST_X32_CALL),
            (self._RETURN, 0, 0, self._KILL_PROCESS),
        ]

    def deny(self, name: str, code: int) -> None:
        self._on(name, [(self._RETURN, 0, 0, self._ERRNO | code)])

    def deny_unless_equal(self, name: str, argument: int, *allowed: int) -> None:
        tests = [(self._JUMP_EQUAL, len(allowed) - i, 0, value) for i, value in enumerate(allowed)]
        self._on_argument(name, argument, [*tests, self._refusal(), self._approval()])

    def deny_if_equal(self, name: str, argument: int, *refused: int) -> None:
        tests = [(self._JUMP_EQUAL, len(refused) - i, 0, value) for i, value in enumerate(refused)]
        self._on_argument(name, argument, [*tests, self._approval(), self._refusal()])

    def deny_unless_all_bits(self, name: str, argument: int, bits: int) -> None:
        tests = [(self._AND, 0, 0, bits), (self._JUMP_EQUAL, 1, 0, bits)]
        self._on_argument(name, argument, [*tests, self._refusal(), self._approval()])

    def deny_if_masked_equal(self, name: str, argument: int, mask: int, refused: int) -> None:
        tests = [(self._AND, 0, 0, mask), (self._JUMP_EQUAL, 0, 1, refused)]
        self._on_argument(name, argument, [*tests, self._refusal(), self._approval()])

    def deny_if_any_bit(self, name: str, argument: int, bits: int) -> None:
        test = (self._JUMP_ANY_BIT, 0, 1, bits)
        self._on_argument(
            name, argument, [test, (self._RETURN, 0, 0, self._ERRNO | errno.EROFS), self._approval()]
        )

    def install(self) -> None:
        code = [*self._code, self._approval()]
        packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
        buffer = ctypes.create_string_buffer(packed)
        program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
        mode_filter = 2
        _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
        _check(_LIBC.prctl(_PR_SET_SECCOMP, mode_filter, program, 0, 0), "PR_SET_SECCOMP")

    def _refusal(self) -> tuple[int, int, int, int]:
        return (self._RETURN, 0, 0, self._ERRNO | errno.EPERM)

    def _approval(self) -> tuple[int, int, int, int]:
        return (self._RETURN, 0, 0, self._ALLOW)

    def _on(self, name: str, then: list[tuple[int, int, int, int]]) -> None:
        number = _NUMBERS[name][self._column]
        if number is not None:
            self._code += [(self._JUMP_EQUAL, 0, len(then), number), *then]

    def _on_argument(self, name: str, argument: int, then: list[tuple[int, int, int, int]]) -> None:
        # The low half: what is tested is a pid, an option or a set of flags, and the kernel reads no more of it
        self._on(name, [(self._LOAD, 0, 0, self._ARGUMENTS_AT + 8 * argument), *then])
