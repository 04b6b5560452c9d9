"""Takes rights from the calling process before it runs a program that a model wrote.

Every function changes the process that calls it, and can only take rights away. There are three layers: namespaces (a
file system, process ids and a network of its own), Landlock (which paths may be opened), and seccomp (which system
calls are allowed, see ``seccomp``). A machine may forbid the first two; seccomp is always needed. Works on Linux,
without any package or helper program.
"""

import contextlib
import ctypes
import os
import resource
import struct
from collections.abc import Iterable
from pathlib import Path

from megatron_rasft.verify.programs import kernel_calls

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
NOBODY = 65534
# System calls that are newer than 424 have the same number on every architecture
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446


def die_with_parent() -> None:
    """Makes the kernel kill this process when the thread that started it ends, for whatever reason."""
    kernel_calls.prctl(kernel_calls.PR_SET_PDEATHSIG, 9, "PR_SET_PDEATHSIG")


def adopt_orphans() -> None:
    """Makes orphaned descendants children of this process, so that it can wait for them."""
    kernel_calls.prctl(kernel_calls.PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def hide_memory() -> None:
    """Forbids processes without privileges, also of the same user, to trace this one or to open its /proc/<pid>/mem."""
    kernel_calls.prctl(kernel_calls.PR_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Calls mount(2)."""
    done = kernel_calls.LIBC.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    kernel_calls.check(done, f"mount {kind or source} on {target}")


def enter_namespaces() -> None:
    """Moves this process to namespaces of its own: mounts, network, IPC, host name, and process ids of its children.

    An ordinary user also gets a user namespace, in which its own user and group ids are mapped to themselves.

    Raises:
        OSError: this user, container or kernel does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    flags = os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC | os.CLONE_NEWUTS
    if uid == 0:
        os.unshare(flags)
    else:
        os.unshare(flags | os.CLONE_NEWUSER)
        # The kernel accepts the gid_map of an ordinary user only after setgroups is denied
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    # Mounts made from here on must not propagate to the host's mount namespace
    mount("none", "/", "", _MS_REC | _MS_PRIVATE)


def enter_bare_root(readable: Iterable[Path]) -> None:
    """Replaces the root file system by a new root with the ``readable`` paths, read-only, an empty /tmp, and no /proc.

    Call ``enter_namespaces`` first. Paths that do not exist are left out.
    """
    # The new root needs an existing folder to be mounted on. /sys exists everywhere and is not needed later
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
    _call("pivot_root", b".", b"old")
    os.chdir("/")
    kernel_calls.check(kernel_calls.LIBC.umount2(b"/old", _MNT_DETACH), "umount of the old root")
    os.rmdir("/old")
    # struct mount_attr: flags to set, flags to clear, propagation, user namespace. mount_setattr works on all mounts at
    # once and keeps their other flags; mount(2) would need the flags of each bind mount repeated
    attributes = struct.pack("QQQQ", MS_RDONLY | MS_NOSUID, 0, 0, 0)
    _call("mount_setattr", _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, len(attributes))


def mount_empty_folder(folder: Path, options: str, kept: Iterable[Path]) -> None:
    """Mounts an empty file system in memory on ``folder``. Mounts on the ``kept`` paths stay visible if they are below it.

    Args:
        folder: where to mount it.
        options: size and mode of the file system, see tmpfs(5).
        kept: absolute paths, below the folder or not.
    """
    below = [path for path in kept if folder in path.parents and path.exists()]
    flags = _OPEN_TREE_CLONE | _AT_RECURSIVE | os.O_CLOEXEC
    trees = [(path, path.is_dir(), _call("open_tree", _AT_FDCWD, os.fsencode(path), flags)) for path in below]
    mount("tmpfs", str(folder), "tmpfs", MS_NOSUID | MS_NODEV, options)
    for path, is_folder, tree in trees:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if is_folder else path.touch()
        _call("move_mount", tree, b"", _AT_FDCWD, os.fsencode(path), _MOVE_MOUNT_F_EMPTY_PATH)
        os.close(tree)


def _call(name: str, *args: object) -> int:
    number = kernel_calls.find_number(name)
    assert number is not None, f"this machine does not have the system call {name}"
    return kernel_calls.call(number, name, *args)


def drop_privileges(users: Iterable[int] = ()) -> None:
    """Gives up all capabilities for good. Root becomes the first of ``users`` that its user namespace maps."""
    # The capabilities' numbers are contiguous. The first number that fails does not exist in this kernel
    capability = 0
    while kernel_calls.LIBC.prctl(kernel_calls.PR_CAPBSET_DROP, capability, 0, 0, 0) == 0:
        capability += 1
    for user in users if os.geteuid() == 0 else ():
        # Root without capabilities has no more rights than the users have
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            break
    clear_all = 4
    kernel_calls.LIBC.prctl(kernel_calls.PR_CAP_AMBIENT, clear_all, 0, 0, 0)
    # _LINUX_CAPABILITY_VERSION_3 and this process; then two words each of effective, permitted and inheritable
    header, empty = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *([0] * 6))
    kernel_calls.check(kernel_calls.LIBC.capset(header, empty), "capset")
    kernel_calls.prctl(kernel_calls.PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def landlock_version() -> int:
    """Returns the version of Landlock that the kernel has.

    Raises:
        OSError: the kernel does not have Landlock, or this process may not use it.
    """
    return kernel_calls.call(_LANDLOCK_CREATE, "landlock_create_ruleset", None, ctypes.c_size_t(0), 1)


def restrict_paths(readable: Iterable[Path], writable: Path) -> bool:
    """Restricts this process by Landlock: reads only below ``readable``, changes files only below ``writable``.

    Landlock does not cover modes, owners, times and extended attributes. From Linux 6.12 on it also forbids signals to
    processes outside.

    Returns:
        Whether Landlock covers truncation of files, as it does from Linux 6.2 on.

    Raises:
        OSError: the kernel does not have Landlock, or this process may not use it.
    """
    abi = landlock_version()
    # The rights of linux/landlock.h that each ABI version knows: 13 at first, then REFER, TRUNCATE and IOCTL_DEV
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    # struct landlock_ruleset_attr: rights to files, to the network (left to seccomp), scope (abstract sockets, signals).
    # A kernel before ABI 6 refuses a structure longer than its own, unless the additional fields are zero
    attributes = struct.pack("QQQ", known, 0, 0b11)
    size = 24 if abi >= 6 else 8
    ruleset = kernel_calls.call(
        _LANDLOCK_CREATE, "landlock_create_ruleset", attributes, ctypes.c_size_t(size), 0
    )
    read, read_file = 0b1101 & known, 0b0101 & known  # rights to execute, to read files and to read folders
    rules = [(path, read if path.is_dir() else read_file) for path in readable if path.exists()]
    rules += [(writable, known), (Path(os.devnull), 0b0110 & known)]
    for path, access in rules:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            kernel_calls.call(
                _LANDLOCK_ADD, f"landlock_add_rule {path}", ruleset, 1, struct.pack("=Qi", access, fd), 0
            )
        finally:
            os.close(fd)
    kernel_calls.prctl(kernel_calls.PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    kernel_calls.call(_LANDLOCK_RESTRICT, "landlock_restrict_self", ruleset, 0)
    os.close(ruleset)
    return abi >= 3


def set_limits(
    *, memory_bytes: int, cpu_s: int, file_bytes: int, num_files: int, num_processes: int | None
) -> None:
    """Sets hard limits of this process. Those of core dumps, locked memory, message queues and queued signals are 0.

    Args:
        memory_bytes: address space, including the process's present size.
        cpu_s: CPU time since the start of the process, seconds.
        file_bytes: size of each file that it writes.
        num_files: open files.
        num_processes: processes and threads of its user on the whole machine; None sets no limit, because a user outside a
            namespace may own many other processes.
    """
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: num_files,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        # Counts the queued signals and timers of the user's processes together
        resource.RLIMIT_SIGPENDING: 0,
    }
    if num_processes is not None:
        limits[resource.RLIMIT_NPROC] = num_processes
    for limit, value in limits.items():
        hard = resource.getrlimit(limit)[1]
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (lowest, lowest))


def address_space_bytes() -> int:
    """Returns the address space of this process. Needs /proc, so call it before ``enter_bare_root``."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()
