"""Attempts to leave the sandbox, as bodies of Python that do one thing each.

An attempt that ends without an exception has succeeded; OSError means that it was refused. ``PREAMBLE`` defines the names that
the attempts use. The test fills in its targets: ``OUT`` is a folder outside, which everybody may write to. It holds the file
``victim``, a listening stream socket ``stream`` and a datagram socket ``listener``. ``ABSTRACT`` is a datagram socket
without a path, ``VICTIM_PID`` a process of the same user, and ``SHM``, ``SEM``, ``MSG`` are its objects of System V.
"""

NUMBERS: dict[str, tuple[int, int | None]] = {
    "add_key": (248, 217), "bind": (49, 200), "bpf": (321, 280), "clock_gettime": (228, 113),
    "clone": (56, 220), "clone3": (435, 435), "fanotify_init": (300, 262), "fallocate": (285, 47), "fchmodat2": (None, None),
    "file_setattr": (469, 469), "fsopen": (430, 430), "futex": (202, 98), "get_robust_list": (274, 100),
    "inotify_add_watch": (254, 27), "inotify_init1": (294, 26), "io_setup": (206, 0),
    "io_uring_setup": (425, 425), "ioprio_set": (251, 30), "kcmp": (312, 272), "keyctl": (250, 219),
    "linkat": (265, 37), "memfd_secret": (447, 447), "migrate_pages": (256, 238), "mlockall": (151, 230),
    "modify_ldt": (154, None), "mq_open": (240, 180), "msgctl": (71, 187), "name_to_handle_at": (303, 264),
    "open_tree": (428, 428), "perf_event_open": (298, 241), "personality": (135, 92),
    "pidfd_getfd": (438, 438), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "prctl": (157, 167),
    "prlimit64": (302, 261), "process_vm_readv": (310, 270), "ptrace": (101, 117), "renameat2": (316, 276),
    "rt_sigqueueinfo": (129, 138), "seccomp": (317, 277), "semctl": (66, 191), "sendmmsg": (307, 269),
    "shmctl": (31, 195), "shmget": (29, 194), "socket": (41, 198), "sync": (162, 81), "syncfs": (306, 267),
    "syslog": (103, 116), "timer_create": (222, 107), "unshare": (272, 97), "userfaultfd": (323, 282),
}  # fmt: skip
"""System call of the attempts -> its numbers on x86_64 and on aarch64, from the kernel's headers."""

PREAMBLE = """
import ctypes, fcntl, os, socket, struct
C = ctypes.CDLL(None, use_errno=True)
C.syscall.restype = ctypes.c_long

def call(name, *args):
    number = NUMBERS.get(name, name)
    if number is None:
        raise OSError(f"this machine does not have {name}")
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = C.syscall(ctypes.c_long(number), *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result

def message(path):
    address = ctypes.create_string_buffer(struct.pack("H", 1) + path.encode() + bytes(1))
    kept.append(address)
    return struct.pack("PIxxxxPQPQiiI", ctypes.addressof(address), len(address), 0, 0, 0, 0, 0, 0, 0)

def filter_program():
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7fff0000))
    kept.append(allow)
    return struct.pack("HxxxxxxP", 1, ctypes.addressof(allow))

def machine_code(code):
    import mmap
    pages = mmap.mmap(-1, 4096, prot=7)
    pages.write(code)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    kept.append(pages)
    result = ctypes.CFUNCTYPE(ctypes.c_int)(start)() if os.uname().machine == "x86_64" else -38
    if result < 0:
        raise OSError(-result, os.strerror(-result))

kept = []
"""

ATTEMPTS = {
    "descriptor sent to an outside listener through a socketpair": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendmsg([b'x'], [(1, 1, struct.pack('i', 0))], 0, OUT + '/listener')",
    "descriptor sent to an abstract name": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.sendmsg([b'x'], [(1, 1, struct.pack('i', 0))], 0, ABSTRACT)",
    "datagram sent to a path": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', OUT + '/listener')",
    "datagram sent to an abstract name": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', ABSTRACT)",
    "paired socket connected anew": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].connect(OUT + '/listener')",
    "sendmmsg": "a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); call('sendmmsg', a.fileno(), message(OUT + '/listener'), 1, 0)",
    "socket bound to an outside path": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].bind(OUT + '/made')",
    "socket autobound": "a = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]; call('bind', a.fileno(), struct.pack('H', 1), 2)",
    "stream socket": "socket.socket(socket.AF_UNIX).connect(OUT + '/stream')",
    "internet socket": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "netlink": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "vsock and kernel crypto": "[call('socket', f, t, 0) for f, t in ((40, 1), (38, 5))]",
    "packet socket": "call('socket', 17, 3, 0)",
    "descriptors kept in flight": "a, b = socket.socketpair(); [socket.send_fds(a, [b'x'], [a.fileno()] * 200) for _ in range(50)]",
    "FIFO": "os.mkfifo(OUT + '/fifo')",
    "socket node": "os.mknod(OUT + '/node', 0o140600)",
    "device node": "os.mknod('device', 0o020600, os.makedev(1, 1))",
    "hard link into the working folder": "os.link(OUT + '/victim', 'kept')",
    "symbolic link outside": "os.symlink('victim', OUT + '/link')",
    "rename out": "open('mine', 'w').close(); os.rename('mine', OUT + '/arrived')",
    "exchange": "open('mine', 'w').close(); call('renameat2', -100, b'mine', -100, (OUT + '/victim').encode(), 2)",
    "unnamed file": "os.open(OUT, os.O_TMPFILE | os.O_WRONLY)",
    "path descriptor linked": "f = os.open(OUT + '/victim', os.O_PATH); call('linkat', f, b'', -100, b'again', 0x1000)",
    "times": "os.utime(OUT + '/victim', (1, 1))",
    "mode": "os.chmod(OUT + '/victim', 0)",
    "mode through fchmodat2": "call('fchmodat2', -100, (OUT + '/victim').encode(), 0, 0)",
    "owner": "os.chown(OUT + '/victim', os.getuid(), os.getgid())",
    "extended attribute": "os.setxattr(OUT + '/victim', 'user.mark', b'1')",
    "size": "os.truncate(OUT + '/victim', 0)",
    "lock on a file that others use": "f = os.open(os.__file__, os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)",
    "read lock": "f = os.open(os.__file__, os.O_RDONLY); fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB)",
    "lease": "f = os.open(os.__file__, os.O_RDONLY); fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "directory notification": "f = os.open(os.path.dirname(os.__file__), os.O_RDONLY); fcntl.fcntl(f, fcntl.F_NOTIFY, 2)",
    "inotify": "call('inotify_add_watch', call('inotify_init1', 0), OUT.encode(), 0xfff)",
    "fanotify": "call('fanotify_init', 0x200, 0)",
    "file handle": "h = struct.pack('Ii', 128, 0) + bytes(128); call('name_to_handle_at', -100, OUT.encode(), h, bytes(4), 0)",
    "page cache of a file dropped": "f = os.open(os.__file__, os.O_RDONLY); os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)",
    "inode flags": "f = os.open('.', os.O_RDONLY); fcntl.ioctl(f, 0x40086602, struct.pack('l', 0x80))",
    "inode flags by file_setattr": "call('file_setattr', -100, b'.', bytes(24), 24, 0)",
    "all disks synchronised": "call('sync')",
    "file system synchronised": "f = os.open('.', os.O_RDONLY); call('syncfs', f)",
    "disk written by every write": "os.open('made', os.O_RDWR | os.O_CREAT | os.O_SYNC)",
    "disk written by one write": "f = os.open('made', os.O_RDWR | os.O_CREAT); os.pwritev(f, [b'x'], 0, os.RWF_SYNC)",
    "disk reserved beyond the size of a file": "f = os.open('made', os.O_RDWR | os.O_CREAT); call('fallocate', f, 1, 0, 1 << 30)",
    "path descriptor opened again": "f = os.open(OUT + '/victim', os.O_PATH); os.open(f'/proc/self/fd/{f}', os.O_RDONLY)",
    "links of another process": "os.readlink(f'/proc/{VICTIM_PID}/exe')",
    "working folder of another process": "os.chdir(f'/proc/{VICTIM_PID}/cwd')",
    "own folder renamed": "os.rename(os.getcwd(), os.getcwd() + '2')",
    "signal owner of a pipe": "r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, VICTIM_PID); fcntl.fcntl(r, 10, 9); fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC); os.write(w, b'x')",
    "signal owner by F_SETOWN_EX": "r, w = os.pipe(); fcntl.fcntl(r, 15, struct.pack('ii', 1, VICTIM_PID))",
    "signal owner by ioctl": "a, b = socket.socketpair(); fcntl.ioctl(a, 0x8901, struct.pack('i', VICTIM_PID))",
    "queued signal": "call('rt_sigqueueinfo', VICTIM_PID, 12, struct.pack('iiiiiiq', 12, 0, -1, 0, 0, 0, 0) + bytes(96))",
    "signal through a pidfd": "p = call('pidfd_open', VICTIM_PID, 0); call('pidfd_send_signal', p, 0, 0, 0)",
    "signal to the group": "os.kill(0, 0)",
    "limits of another": "call('prlimit64', VICTIM_PID, 0, struct.pack('QQ', 1000, 1000), 0)",
    "priority of the user": "os.setpriority(os.PRIO_USER, 0, 19)",
    "disk priority of another": "call('ioprio_set', 1, VICTIM_PID, 3 << 13)",
    "affinity of another": "os.sched_setaffinity(VICTIM_PID, {0})",
    "scheduler of another": "os.sched_setscheduler(VICTIM_PID, os.SCHED_IDLE, os.sched_param(0))",
    "memory of another written": "b = ctypes.create_string_buffer(8); v = struct.pack('QQ', ctypes.addressof(b), 8); call('process_vm_readv', VICTIM_PID, v, 1, v, 1, 0)",
    "descriptor of another taken": "p = call('pidfd_open', VICTIM_PID, 0); call('pidfd_getfd', p, 0, 0)",
    "group of another": "os.setpgid(VICTIM_PID, 0)",
    "new session": "os.setsid()",
    "memory pages of another moved": "call('migrate_pages', VICTIM_PID, 64, bytes(8), bytes(8))",
    "two processes compared": "call('kcmp', VICTIM_PID, VICTIM_PID, 0, 0, 0)",
    "robust list of another": "p = ctypes.create_string_buffer(8); n = ctypes.create_string_buffer(8); call('get_robust_list', VICTIM_PID, p, n)",
    "shared memory removed": "call('shmctl', SHM, 0, 0)",
    "semaphores removed": "call('semctl', SEM, 0, 0, 0)",
    "message queue removed": "call('msgctl', MSG, 0, 0)",
    "shared memory made": "call('shmget', 0, 4096, 0o1600)",
    "POSIX message queue": "call('mq_open', b'made', 0o102, 0o600, 0)",
    "key": "call('add_key', b'user', b'mark', b'x', 1, -4)",
    "session keyring": "call('keyctl', 1, 0)",
    "POSIX shared memory": "open('/dev/shm/made', 'w').close()",
    "user's timers used up": "[call('timer_create', 1, 0, bytes(8)) for _ in range(100)]",
    "io_uring": "call('io_uring_setup', 4, bytes(120))",
    "asynchronous input": "call('io_setup', 8, bytes(8))",
    "BPF": "call('bpf', 0, bytes(128), 128)",
    "performance counters": "call('perf_event_open', struct.pack('IIQ', 1, 128, 0) + bytes(112), 0, -1, -1, 0)",
    "user fault": "call('userfaultfd', 1)",
    "namespace": "call('unshare', 0x10000000)",
    "namespace by clone": "call('clone', 0x10000000 | 17, 0, 0, 0, 0) or os._exit(0)",
    "process by clone3": "call('clone3', struct.pack('QQQQQQQQ', 0, 0, 0, 0, 17, 0, 0, 0), 64) or os._exit(0)",
    "process by vfork": "os.posix_spawn('/bin/true', ['true'], {})",
    "program by descriptor": "f = os.open('/bin/true', os.O_RDONLY); os.execve(f, ['true'], {})",
    "root folder": "os.chroot('.')",
    "mount API": "call('fsopen', b'tmpfs', 0)",
    "mount tree": "call('open_tree', -100, b'/', 1)",
    "host name": "socket.sethostname(socket.gethostname())",
    "time": "import time; time.clock_settime(0, time.time())",
    "kernel log": "call('syslog', 3, bytes(10), 10)",
    "32-bit system call": "machine_code(bytes.fromhex('b814000000cd80c3'))",
    "x32 system call": "call(0x40000000 | 39)",
    "local descriptor table": "call('modify_ldt', 0, bytes(16), 16)",
    "personality": "call('personality', 0x0040000)",
    "listener for system calls": "call('seccomp', 1, 8, filter_program())",
    "memory locked": "C.mlockall(3) and call('mlockall', 3)",
    "secret memory": "call('memfd_secret', 0)",
    "ptrace": "call('ptrace', 16, VICTIM_PID, 0, 0)",
    "traced by any": "call('prctl', 0x59616d61, -1, 0, 0, 0)",
    "orphans adopted": "call('prctl', 36, 1, 0, 0, 0)",
    "memory map rewritten": "call('prctl', 35, 1, 0, 0, 0)",
    "user id": "os.setresuid(os.getuid(), os.getuid(), os.getuid())",
    "copy between pipes": "r, w = os.pipe(); q, v = os.pipe(); os.write(w, b'x'); os.splice(r, v, 1)",
    "terminal input pushed": "fcntl.ioctl(0, 0x5412, b'x')",
    "environment of another": "open(f'/proc/{VICTIM_PID}/environ').read()",
    "memory file of another": "open(f'/proc/{VICTIM_PID}/mem', 'rb')",
    "descriptor of another opened": "open(f'/proc/{VICTIM_PID}/fd/0')",
    "memory score of another": "open(f'/proc/{VICTIM_PID}/oom_score_adj', 'w').write('500')",
    "control group": "open('/sys/fs/cgroup/cgroup.procs', 'w')",
    "kernel settings": "open('/proc/sys/kernel/hostname', 'a')",
    "core dump filter": "open('/proc/self/coredump_filter', 'w').write('0')",
    "outside file read": "open(OUT + '/victim').read()",
    "outside folder listed": "os.listdir(OUT)",
    "outside folder entered": "os.chdir(OUT)",
    "outside file seen by stat": "os.stat(OUT + '/victim')",
    "stream pair connected": "socket.socketpair()[0].connect(OUT + '/stream')",
    "stream pair bound": "socket.socketpair()[0].bind(OUT + '/made')",
    "stream pair bound here": "socket.socketpair()[0].bind('made')",
    "stream pair listening": "socket.socketpair()[0].listen()",
    "stream pair with a descriptor": "socket.send_fds(socket.socketpair()[0], [b'x'], [0])",
    "stream pair with an address": "a = socket.socketpair()[0]; a.sendto(b'x', OUT + '/listener')",
    "stream pair out of band": "socket.socketpair()[0].send(b'x', socket.MSG_OOB)",
    "stream pair with a socket filter": "socket.socketpair()[0].setsockopt(1, 26, struct.pack('HxxxxxxP', 0, 0))",
    "process handle of the peer": "socket.socketpair()[0].getsockopt(1, 77, 4)",
    "packet pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
    "clock of another": "call('clock_gettime', ~VICTIM_PID << 3 | 2, ctypes.create_string_buffer(16))",
    "pages of the common pool": "import mmap; mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)",
    "pages merged": "import mmap; mmap.mmap(-1, 4096).madvise(12)",
    "pages written out": "import mmap; mmap.mmap(-1, 4096).madvise(21)",
    "futex that inherits priorities": "word = ctypes.create_string_buffer(4); call('futex', word, 6 | 128, 0, 0)",
    "pipe enlarged": "r, w = os.pipe(); fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 1 << 20)",
    "queued signals used up": "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 65)); [os.kill(os.getpid(), 40) for _ in range(9)]; [signal.sigtimedwait([40], 0) or os.kill(0, 0) for _ in range(9)]",
    "extended attributes listed": "os.listxattr(OUT + '/victim')",
    "CPU limit of another": "import resource; resource.prlimit(VICTIM_PID, resource.RLIMIT_CPU, (100, 100))",
    "session of another": "os.getsid(VICTIM_PID)",
    "socket node here": "os.mknod('node', 0o140600)",
    "memory file": "os.memfd_create('made')",
    "name of a process group": "os.setpgid(0, 0)",
    "threads as processes": "call('clone', 0x100 | 17, 0, 0, 0, 0) or os._exit(0)",
    "a sibling by clone": "call('clone', 0x8000 | 17, 0, 0, 0, 0) or os._exit(0)",
}  # fmt: skip
