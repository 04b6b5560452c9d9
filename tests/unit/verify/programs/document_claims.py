"""What docs/sandbox.md says about hostile programs, and how each statement is tried.

The keys are fragments of the document. A statement that names several things has several trials. ``test_document`` runs the
trials, and fails if a fragment is not in the document or if a statement of the document has no trial.
"""

from dataclasses import dataclass

from megatron_rasft.types import CodeTests, Verdict

EVERY = ("namespaces", "landlock", "limits")
WITH_FILES = ("namespaces", "landlock")


@dataclass(frozen=True)
class Judged:
    """A program, tests, and the verdict that they must get."""

    program: str
    tests: CodeTests
    verdict: Verdict = "wrong"


@dataclass(frozen=True)
class Tried:
    """Statements that end without OSError at the levels ``works_at`` and raise OSError at the others.

    They use the names that ``escape_attempts`` describes.
    """

    body: str
    works_at: tuple[str, ...] = ()


@dataclass(frozen=True)
class TestedBy:
    """A test function elsewhere in this folder."""

    __test__ = False

    name: str


@dataclass(frozen=True)
class Explains:
    """The fragment claims nothing that a program could try: the reason says why."""

    reason: str


Trial = Judged | Tried | TestedBy | Explains


def asserts(*tests: str) -> CodeTests:
    return CodeTests(style="asserts", tests=tests, entry_point="f")


SQUARES = asserts("assert f(2) == 4", "assert f(3) == 9")
_RETURNS = "def f(*a): return {}"
_OBJECT = "class A:\n    def __eq__(s, o): return True\n    __add__ = __radd__ = __sub__ = __lt__ = __le__ = __gt__ = __eq__\n    __hash__ = None\n"

VERDICT_CLAIMS: list[tuple[str, list[Trial]]] = [
    ("Tests and program run in different processes", [
        Judged("import os\ndef f(): return [os.getpid(), os.getppid()]", asserts("import os", "assert f() != [os.getpid(), os.getppid()]"), "correct"),
    ]),
    ("The tester holds the tests and gives the verdict", [
        Judged("import sys\nsys.modules['program_tests'] = None\ndef f(x): return 0", SQUARES),
    ]),
    ("The candidate holds the program", [
        Judged("import os\ndef f(): return os.getpid()", asserts("assert f() == f()"), "correct"),
    ]),
    ("a call sends the arguments to the candidate, and the result returns as plain data", [
        Judged("def f(*a, **k): return [a, k]", asserts("assert f([1], {2: (3,)}, x='y') == [([1], {2: (3,)}), {'x': 'y'}]"), "correct"),
    ]),
    ("a program sees the arguments of its calls, but no test and no expected value", [
        Judged("import gc, sys\ndef f():\n    seen, frame = [], sys._getframe()\n    while frame:\n        seen.append(repr((frame.f_locals, frame.f_globals)))\n        frame = frame.f_back\n"
               "    return 'number %d' % 4711 in repr(seen) + repr(gc.get_objects())", asserts("assert f() == (not 'number 4711')"), "correct"),
        Judged("def f(g): return g.__globals__['expected']", asserts("expected = 16", "assert f(lambda v: v) == expected")),
        Judged("def f(g): return g.__code__.co_consts[-1]", asserts("assert f(lambda v: v == 16) == 16")),
        Judged("def f(o): return type(o).run.__globals__['expected']", asserts("expected = 16\nclass O:\n    def run(self): return 1", "assert f(O()) == expected")),
        TestedBy("test_sandbox.test_no_hostile_program_scores_survives_or_reaches_outside"),
    ]),
    ("there is no assert that it could patch", [
        Judged("import builtins\nclass AssertionError(Exception):\n    def __new__(c, *a): raise SystemExit(0)\nbuiltins.AssertionError = AssertionError\ndef f(x): return 0", SQUARES),
    ]),
    ("exiting, printing and writing to open files do not change the verdict", [
        Judged("def f(x): raise SystemExit(0)", SQUARES),
        Judged("import os\ndef f(x): os._exit(0)", SQUARES),
        Judged("def f(x): print('[\"correct\", \"2 tests passed\"]')", SQUARES),
        Judged("import os\nfor fd in range(64):\n    try: os.write(fd, b'[\"correct\", \"\"]')\n    except OSError: pass\ndef f(x): return 0", SQUARES),
    ]),
    ("nothing of an earlier check is left for a program to find", [TestedBy("test_sandbox.test_one_check_leaves_nothing_to_the_next")]),
    ("Plain values (numbers, text, containers, dates, numpy arrays) cross as copies", [
        Judged("kept = []\ndef f(a):\n    kept.append(a)\n    return kept[0]", asserts("a = [1]", "f(a)", "a.append(2)", "assert f([]) == [1]"), "correct"),
        TestedBy("test_stand_ins.test_values_cross_unchanged"),
    ]),
    ("are applied to the test's own object after the call", [
        Judged("def f(a): a.append(4)", asserts("a = [1]", "f(a)", "assert a == [1, 4]"), "correct"),
    ]),
    ("they are applied after the comparison, unless `f` returns None", [
        TestedBy("test_verdicts.test_changes_of_inputs_are_seen_where_tests_look_at_them"),
    ]),
    ("So a program cannot change the input from which the test calculates the expected value", [
        Judged("def f(a):\n    a.clear()\n    return []", asserts("a = [3, 1]\nassert f(a) == sorted(a)")),
        TestedBy("test_verdicts.test_reference_sees_the_inputs_before_the_program_changes_them"),
    ]),
    ("the tests hold stand-ins, which cannot be subclassed", [
        Judged("class A: pass\ndef f(): return A", asserts("class B(f()): pass", "assert B()")),
    ]),
    ("An object of the program never sees the expected value", [
        Judged("seen = []\nclass A:\n    def __eq__(s, o):\n        seen.append(o)\n        return True\ndef f(x): return seen[-1] if seen else A()", asserts("f(1) == 4", "assert f(1) == 4")),
    ]),
    ("With a plain value it compares as unequal", [Judged(_OBJECT + "def f(x): return A()", SQUARES)]),
    ("it supports neither order nor arithmetic, regardless of its class", [
        Judged(_OBJECT + "def f(x): return A()", asserts("assert f(2) <= 4")),
        Judged(_OBJECT + "class N(A): __class__ = int\ndef f(x): return N()", asserts("assert f(2) + 1")),
    ]),
    ("`in` compares the items that iteration over the object gives", [
        Judged("class A:\n    def __contains__(s, o): return True\n    def __iter__(s): return iter([1])\ndef f(): return A()", asserts("assert 4 in f()")),
        Judged("class A:\n    def __iter__(s): return iter([1, 4])\ndef f(): return A()", asserts("assert 4 in f()"), "correct"),
    ]),
    ("Operators between two objects of the program are the program's", [
        Judged("class A:\n    def __add__(s, o): return 4\ndef f(): return A()", asserts("assert f() + f() == 4"), "correct"),
    ]),
    ("An empty array, which equals every number", [
        Judged("import numpy\ndef f(x): return numpy.zeros(0)", asserts("import numpy\nassert numpy.allclose(f(2), [4, 9])")),
        Judged("import numpy\ndef f(x): return numpy.zeros(0)", asserts("import numpy\nassert numpy.allclose(f(2), [])"), "correct"),
    ]),
    ("Operations between an empty array of the program and values that are not empty fail", [
        Judged("import numpy\ndef f(x): return numpy.zeros(0)", asserts("import numpy\nassert (abs(f(2) - numpy.array([4])) < 1).all()")),
    ]),
    ("It becomes a RuntimeError, unless the tests mention StopIteration", [
        Judged("def f(x): raise StopIteration", asserts("assert all(map(f, [1, 2]))")),
        Judged("def f(x): raise StopIteration", asserts("try:\n    f(1)\n    assert False\nexcept StopIteration: pass"), "correct"),
    ]),
    ("`all(map(f, inputs))` takes a StopIteration of `f` for the end of the inputs", [Explains("the next sentence has the consequence")]),
    ("Tests without any handler of exceptions fail if a call of the program raised one", [
        Judged("class A:\n    @property\n    def x(s): return A.y()\n    def y(): raise AttributeError\nf = A.y", asserts("import threading\nt = threading.Thread(target=f)\nt.start()\nt.join()\nassert not t.is_alive()")),
    ]),
    ("A context manager of the program does not see a failed assert", [
        Judged("class A:\n    def __enter__(s): return s\n    def __exit__(s, *a): return True\ndef f(): return A()", asserts("with f():\n    assert False")),
    ]),
    ("The program cannot replace names that the tests define, nor builtins", [
        Judged("def sorted(x): return 4\ndef expected(): return 4\ndef f(x): return 4", asserts("def expected(): return [1]", "assert f(1) == sorted(expected())")),
        Judged("def sorted(x): return 4", CodeTests(style="asserts", tests=("assert sorted(1) == 4",), entry_point="sorted"), "correct"),
    ]),
    ("Tests that pass without using the program give `unverifiable`", [Judged("def f(x): return 0", asserts("assert 1 == abs(-1)"), "unverifiable")]),
    ("A value that exhausts the memory of the tests", [
        TestedBy("test_sandbox.test_a_value_that_exhausts_the_memory_of_the_tests_is_wrong"),
        TestedBy("test_sandbox.test_no_hostile_program_scores_survives_or_reaches_outside"),
    ]),
    # Remaining risks: each program gets the verdict that it does not deserve
    ("A program can be written for exactly the inputs with which it is called", [Judged("def f(x): return {2: 4, 3: 9}[x]", SQUARES, "correct")]),
    ("A truth test such as `assert f(x)` accepts every true object", [Judged("def f(x): return 'no'", asserts("assert f(2)"), "correct")]),
    ("If a test calls a method of an object, the program decides the answer", [
        Judged("class A:\n    def is_right(s): return True\ndef f(x): return A()", asserts("assert f(2).is_right()"), "correct"),
    ]),
    ("This also holds for `==` between two of its objects, and for a helper function that a test takes from the program", [
        Judged("class A:\n    def __eq__(s, o): return True\ndef f(x): return A()", asserts("assert f(2) == f(3)"), "correct"),
        Judged("def same(a, b): return True\ndef f(x): return 0", asserts("assert same(f(2), 4)"), "correct"),
    ]),
    ("can mislead a reference that is called elsewhere, such as in another function", [
        Judged("def f(a):\n    a.clear()\n    return []", asserts("def run(a): return f(a)\ndef same(r, a): return r == sorted(a)\na = [3, 1]\nr = run(a)", "b = a", "assert same(r, b)"), "correct"),
    ]),
    ("An empty list or array that the tests convert to an array themselves passes", [
        Judged("def f(x): return []", asserts("import numpy\nassert (numpy.array(f(2)) == 4).all()"), "correct"),
    ]),
    ("In tests with handlers of exceptions, an exception of the program may be ignored as in plain Python", [
        Judged("def f(x): raise ValueError", asserts("r = 4\ntry: r = f(0)\nexcept ValueError: pass\nassert r == 4"), "correct"),
    ]),
    ("Some published tests accept anything", [Explains("this is about a data set; Mbpp+/794 compares with its own result")]),
    ("Objects have no operators with plain values", [
        Judged("class V:\n    def __mul__(s, o): return 4\ndef f(): return V()", asserts("assert f() * 3 == 4")),
        Judged("class T:\n    def __contains__(s, o): return True\ndef f(): return T()", asserts("assert 5 in f()")),
    ]),
    ("None of the 224 KodCode rows needs them", [TestedBy("test_reference_solutions.test_references_pass_and_mutants_fail")]),
    ("A container that an object returns is a copy", [Explains("the next sentence has the consequence")]),
    ("Changing it does not change the object", [
        Judged("class A:\n    def __init__(s): s.a = [1]\ndef f(): return A()", asserts("o = f()", "o.a.append(2)", "assert o.a == [1, 2]")),
    ]),
    ("Tests cannot await coroutines, and `unittest.mock` cannot patch inside the program", [
        Judged("async def f(x): return x * x", asserts("import asyncio\nassert asyncio.run(f(2)) == 4"), "unverifiable"),
        Judged("import os\ndef f(): return os.getcwd()", asserts("from unittest.mock import patch\nwith patch('solution.os.getcwd', return_value='x'): assert f() == 'x'")),
    ]),
]  # fmt: skip
"""Statements of "Why a program cannot report its own success". They do not depend on the level."""

LEVEL_CLAIMS: list[tuple[str, list[Trial]]] = [
    ("A run uses the strongest level that the machine allows", [TestedBy("test_sandbox.test_level_that_is_not_available_is_refused")]),
    ("sets the weakest level that is accepted, by default `landlock`", [
        TestedBy("test_sandbox.test_a_machine_that_allows_only_the_weakest_level_is_refused_unless_it_is_accepted"),
    ]),
    ("the run stops before the model is loaded, and the error says why each level failed", [
        TestedBy("test_sandbox.test_a_machine_that_allows_only_the_weakest_level_is_refused_unless_it_is_accepted"),
    ]),
    ("`--verify-sandbox-level limits` accepts every machine", [
        TestedBy("test_sandbox.test_a_machine_that_allows_only_the_weakest_level_is_refused_unless_it_is_accepted"),
    ]),
    ("| needs |", [Explains("the kernel's versions are those of mount_setattr(2) and landlock(7)")]),
    ("| readable files |", [
        Tried("open(os.__file__).read()", WITH_FILES),
        Tried("open('/etc/passwd').read()"),
        Tried("open(OUT + '/victim').read()"),
        Tried("import colorsys, sqlite3, xml.dom.minidom, concurrent.futures.thread", EVERY),
        TestedBy("test_document.test_the_tests_can_read_every_file_only_at_the_lowest_level"),
    ]),
    ("| writable files |", [
        Tried("open('mine', 'w').write('x')", WITH_FILES),
        Tried("import tempfile; tempfile.TemporaryFile(dir=os.environ.get('TMPDIR', '/tmp')).write(b'x')", WITH_FILES),
        Tried("os.pwrite(os.open('large', os.O_WRONLY | os.O_CREAT), b'x', 1 << 30)"),
        Tried("open(OUT + '/made', 'w')"),
        Tried("open(os.path.dirname(os.__file__) + '/made', 'w')"),
        TestedBy("test_sandbox.test_files_of_a_program_are_limited_and_removed"),
        TestedBy("test_escapes.test_no_attempt_leaves_the_sandbox"),
    ]),
    ("| modes, owners, times of files |", [
        Tried("open('mine', 'w').close(); os.chmod('mine', 0o600); os.utime('mine', (1, 1))", ("namespaces",)),
        Tried("open('mine', 'w').close(); os.chown('mine', os.getuid(), os.getgid())", ("namespaces",)),
        Tried("os.chmod(OUT + '/victim', 0)"),
        Tried("os.utime(OUT + '/victim', (1, 1))"),
    ]),
    ("| other paths |", [
        Tried("os.stat(OUT + '/victim').st_size", ("landlock", "limits")),
        Tried("os.chdir(OUT); os.chdir(HERE)", ("landlock",)),
        Tried("os.listdir(OUT)"),
        Tried("os.listdir('/')", ("namespaces",)),
    ]),
    ("| other processes |", [
        Tried("open(f'/proc/{VICTIM_PID}/cmdline').read()"),
        Tried("open('/proc/self/status').read()"),
        Tried("os.stat('/proc')", ("landlock", "limits")),
    ]),
    ("| threads |", [TestedBy("test_sandbox.test_a_check_has_some_threads_and_not_many")]),
    ("| locks of files |", [
        Tried("f = os.open(os.__file__, os.O_RDONLY); fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB)", WITH_FILES),
        Tried("f = os.open(os.__file__, os.O_RDONLY); fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)"),
        Tried("fcntl.lockf(0, fcntl.LOCK_SH | fcntl.LOCK_NB)", WITH_FILES),
    ]),
    ("Python that is installed below /tmp stays visible there", [TestedBy("test_sandbox.test_python_that_is_installed_below_tmp_is_readable_and_not_writable")]),
    ("A check that exceeds a limit that is checked every 0.05 s is stopped", [TestedBy("test_sandbox.test_a_check_has_some_threads_and_not_many")]),
    ("Deleted files count as long as they are open or mapped", [TestedBy("test_sandbox.test_files_without_a_name_count")]),
    ("Once a second the processes are stopped while their files are counted", [TestedBy("test_usage.test_moving_folders_are_counted")]),
    ("seccomp allows only the system calls that `seccomp.py` lists", [TestedBy("test_escapes.test_python_and_numpy_work")]),
    ("Every other call fails, also one that is newer than this list", [TestedBy("test_seccomp.test_calls_that_are_not_listed_are_refused_whatever_their_number")]),
    ("The error is EPERM", [TestedBy("test_seccomp.test_calls_that_are_not_listed_are_refused_whatever_their_number")]),
    ("For calls from number 424 on it is ENOSYS", [TestedBy("test_seccomp.test_calls_that_are_not_listed_are_refused_whatever_their_number")]),
    ("These calls are allowed in one form only", [TestedBy("test_seccomp.test_calls_are_allowed_in_the_forms_that_a_check_needs")]),
    ("| `clone` |", [
        Tried("import threading; t = threading.Thread(target=abs, args=(1,)); t.start(); t.join()", EVERY),
        Tried("os.fork() or os._exit(0)"),
        Tried("os.execv('/bin/true', ['true'])"),
    ]),
    ("| `socketpair` |", [
        Tried("a, b = socket.socketpair(); a.send(b'x'); b.recv(1)", EVERY),
        Tried("socket.socketpair()[0].bind('made')"),
        Tried("socket.socketpair()[0].connect(OUT + '/stream')"),
        Tried("socket.socketpair()[0].listen()"),
        Tried("socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)"),
    ]),
    ("| `sendto`, `recvfrom` |", [
        Tried("socket.socketpair()[0].sendto(b'x', OUT + '/listener')"),
        Tried("socket.socketpair()[0].send(b'x', socket.MSG_OOB)"),
        Tried("socket.send_fds(socket.socketpair()[0], [b'x'], [0])"),
    ]),
    ("| `kill`, `tgkill` |", [
        Tried("os.kill(os.getpid(), 0)", EVERY),
        Tried("os.kill(VICTIM_PID, 0)"),
        Tried("os.kill(os.getppid() or 2, 0)"),
    ]),
    ("| `prlimit64`, `sched_getaffinity`, `getpgid`, `getsid` |", [
        Tried("import resource; resource.prlimit(0, resource.RLIMIT_CPU); os.sched_getaffinity(0); os.getpgid(0); os.getsid(0)", EVERY),
        Tried("import resource; resource.prlimit(VICTIM_PID, resource.RLIMIT_CPU)"),
        Tried("os.sched_getaffinity(VICTIM_PID)"),
        Tried("os.getpgid(VICTIM_PID)"),
        Tried("os.getsid(VICTIM_PID)"),
    ]),
    ("| `fcntl` |", [
        Tried("fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3); fcntl.fcntl(1, fcntl.F_GETFL)", EVERY),
        Tried("r, w = os.pipe(); fcntl.fcntl(r, fcntl.F_SETOWN, os.getpid())"),
        Tried("f = os.open(os.__file__, os.O_RDONLY); fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_RDLCK)"),
        Tried("f = os.open(os.path.dirname(os.__file__), os.O_RDONLY); fcntl.fcntl(f, fcntl.F_NOTIFY, 2)"),
        Tried("r, w = os.pipe(); fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 4096)"),
    ]),
    ("| `ioctl` |", [
        Tried("a, b = socket.socketpair(); fcntl.ioctl(a, 0x541B, bytes(4)); fcntl.ioctl(a, 0x5421, bytes(4))", EVERY),
        Tried("a, b = socket.socketpair(); fcntl.ioctl(a, 0x8901, struct.pack('i', os.getpid()))"),
        Tried("a, b = socket.socketpair(); fcntl.ioctl(a, 0x8912, bytes(16))"),
    ]),
    ("| `prctl` |", [
        Tried("call('prctl', 15, b'name')", EVERY),
        Tried("call('prctl', 1, 0, 0, 0, 0)"),
        Tried("call('prctl', 4, 1, 0, 0, 0)"),
    ]),
    ("| `mmap` |", [
        Tried("import mmap; mmap.mmap(-1, 4096)[:1] = b'x'", EVERY),
        Tried("import mmap; mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x2000)"),
        Tried("import mmap; mmap.mmap(-1, 1 << 21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)"),
    ]),
    ("| `madvise` |", [
        Tried("import mmap; mmap.mmap(-1, 4096).madvise(mmap.MADV_DONTNEED)", EVERY),
        Tried("import mmap; mmap.mmap(-1, 4096).madvise(12)"),
        Tried("import mmap; mmap.mmap(-1, 4096).madvise(21)"),
    ]),
    ("| `futex` |", [
        Tried("word = ctypes.create_string_buffer(4); call('futex', word, 1 | 128, 1)", EVERY),
        Tried("word = ctypes.create_string_buffer(4); call('futex', word, 6 | 128, 0, 0)"),
    ]),
    ("| `clock_gettime` and its kin |", [
        Tried("import time; time.clock_gettime(time.CLOCK_MONOTONIC); time.process_time(); time.thread_time()", EVERY),
        Tried("call('clock_gettime', ~VICTIM_PID << 3 | 2, ctypes.create_string_buffer(16))"),
    ]),
    ("| `mknod` |", [
        Tried("os.mknod('plain'); os.mkfifo('fifo')", WITH_FILES),
        Tried("os.mknod('node', 0o140600)"),
        Tried("os.mknod('device', 0o020600, os.makedev(1, 3))"),
    ]),
    ("| `open`, `openat`, `pwritev2` |", [
        Tried("os.open('made', os.O_RDWR | os.O_CREAT | os.O_SYNC)"),
        Tried("os.open('made', os.O_RDWR | os.O_CREAT | os.O_DSYNC)"),
        Tried("f = os.open('made', os.O_RDWR | os.O_CREAT); os.pwritev(f, [b'x'], 0, os.RWF_SYNC)"),
        Tried("f = os.open('made', os.O_RDWR | os.O_CREAT); os.pwritev(f, [b'x'], 0)", WITH_FILES),
    ]),
    ("| `fallocate` |", [
        Tried("f = os.open('made', os.O_RDWR | os.O_CREAT); os.posix_fallocate(f, 0, 4096)", WITH_FILES),
        Tried("f = os.open('made', os.O_RDWR | os.O_CREAT); call('fallocate', f, 1, 0, 4096)"),
        Tried("f = os.open('made', os.O_RDWR | os.O_CREAT); call('fallocate', f, 3, 0, 4096)"),
    ]),
    ("| `fsync`, `fdatasync`, `msync` |", [
        # Pipes cannot be synchronised, so a success shows that the kernel has not tried
        Tried("r, w = os.pipe(); os.fsync(w); os.fdatasync(w)", EVERY),
        Tried("import mmap; mmap.mmap(-1, 4096).flush()", EVERY),
    ]),
    ("| calls that read extended attributes |", [
        Tried("try:\n    os.listxattr('/usr')\nexcept OSError as error:\n    import errno\n    assert error.errno == errno.ENOTSUP", EVERY),
        Tried("os.getxattr('/usr', 'user.x')"),
    ]),
    ("reach a socket outside, or leave one in a folder", [
        Tried("socket.socket(socket.AF_UNIX).connect(OUT + '/stream')"),
        Tried("socket.socket(socket.AF_INET)"),
        Tried("socket.socketpair()[0].bind(OUT + '/made')"),
    ]),
    ("signal, trace or schedule other processes", [
        Tried("os.kill(VICTIM_PID, 0)"),
        Tried("call('ptrace', 16, VICTIM_PID, 0, 0)"),
        Tried("os.setpriority(os.PRIO_PROCESS, VICTIM_PID, 19)"),
        Tried("os.sched_setaffinity(VICTIM_PID, {0})"),
    ]),
    ("make or remove shared memory, semaphores, message queues and keys", [
        Tried("call('shmget', 0, 4096, 0o1600)"),
        Tried("call('shmctl', SHM, 0, 0)"),
        Tried("call('semctl', SEM, 0, 0, 0)"),
        Tried("call('msgctl', MSG, 0, 0)"),
        Tried("call('mq_open', b'made', 0o102, 0o600, 0)"),
        Tried("call('add_key', b'user', b'mark', b'x', 1, -4)"),
    ]),
    ("watch files (inotify, fanotify), mount, change namespaces, users or clocks, or use io_uring and bpf", [
        Tried("call('inotify_init1', 0)"),
        Tried("call('fanotify_init', 0x200, 0)"),
        Tried("call('fsopen', b'tmpfs', 0)"),
        Tried("if C.mount(b'none', b'/tmp', b'tmpfs', 0, None): raise OSError"),
        Tried("call('unshare', 0x10000000)"),
        Tried("os.setuid(os.getuid())"),
        Tried("import time; time.clock_settime(0, time.time())"),
        Tried("call('io_uring_setup', 4, bytes(120))"),
        Tried("call('bpf', 0, bytes(128), 128)"),
    ]),
    ("have queued signals, timers or locked memory", [
        Tried("call('rt_sigqueueinfo', os.getpid(), 40, struct.pack('iiiiiiq', 40, 0, -1, 0, 0, 0, 0) + bytes(96))"),
        Tried("call('timer_create', 1, 0, bytes(8))"),
        Tried("call('mlockall', 1)"),
    ]),
    ("Capabilities are dropped and the environment is cleared", [
        Tried("os.chroot('.')"),
        TestedBy("test_sandbox.test_environment_is_cleared"),
    ]),
    ("`--verify-code-memory-mib`, `--verify-code-output-mib` and CPU time are hard limits", [
        Tried("import resource\nfor name in ('AS', 'CPU', 'FSIZE', 'NOFILE'):\n    limit = getattr(resource, 'RLIMIT_' + name)\n    soft, hard = resource.getrlimit(limit)\n"
              "    if soft != hard or hard == resource.RLIM_INFINITY: raise OSError", EVERY),
        Tried("import resource\nhard = resource.getrlimit(resource.RLIMIT_CPU)[1]\ntry: resource.setrlimit(resource.RLIMIT_CPU, (hard + 1, hard + 1))\nexcept ValueError as error: raise OSError from error"),
        Tried("try: bytearray(64 << 30)\nexcept MemoryError as error: raise OSError from error"),
    ]),
    ("At `--verify-code-timeout-s` all processes of the check are killed", [TestedBy("test_sandbox.test_program_that_does_not_end_is_killed_at_the_deadline")]),
    ("Every process of a check ends when the run ends or is killed", [TestedBy("test_sandbox.test_all_processes_end_when_the_user_of_a_sandbox_is_killed")]),
    ("The folders of `landlock` are removed after each check", [TestedBy("test_sandbox.test_files_of_a_program_are_limited_and_removed")]),
    ("After a run that was killed, the next run of the same user removes them", [
        TestedBy("test_sandbox.test_all_processes_end_when_the_user_of_a_sandbox_is_killed"),
        TestedBy("tests.unit.test_scratch.test_a_folder_of_a_killed_process_is_removed_by_the_next_and_no_other"),
    ]),
    ("At `landlock`, programs that change modes or times fail (`shutil.copy`)", [
        Tried("import shutil; open('mine', 'w').close(); shutil.copy('mine', 'copy')", ("namespaces",)),
        Tried("import shutil; open('mine', 'w').close(); shutil.copyfile('mine', 'copied')", WITH_FILES),
    ]),
    ("At `limits`, programs and tests that write files fail", [
        TestedBy("test_sandbox.test_tests_can_write_files_except_at_the_lowest_level"),
        TestedBy("test_sandbox.test_python_that_is_installed_below_tmp_is_readable_and_not_writable"),
    ]),
    ("through a vulnerability of the kernel", [Explains("nobody knows such a program")]),
    ("A program can measure how long operations take", [Tried("import time; assert time.perf_counter() <= time.perf_counter()", EVERY)]),
    ("It can hold a read lock on a file of Python or of the system until its deadline, except at `limits`", [
        Tried("f = os.open(os.__file__, os.O_RDONLY); kept.append(f); fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB)", WITH_FILES),
    ]),
    ("It can slow a disk down", [Explains("not every file system has O_DIRECT")]),
    ("it can start more than 64 threads, and write more than its limit, in the 0.05 s before it is stopped", [
        TestedBy("test_sandbox.test_a_check_has_some_threads_and_not_many"),
    ]),
    ("The kernel's own limits count all processes of a user", [Explains("this is the reason for the sentence before it")]),
    ("Only a virtual machine would prevent that", [Explains("this is advice")]),
    ("The filter exists for x86_64 and aarch64", [TestedBy("test_seccomp.test_calls_are_allowed_in_the_forms_that_a_check_needs")]),
    ("The tests run programs on the machine's own architecture", [Explains("this is about the tests")]),
    ("The filter of aarch64 is tested with an interpreter of the kernel's filter language", [
        TestedBy("test_seccomp.test_calls_are_allowed_in_the_forms_that_a_check_needs"),
    ]),
    ("tests these statements at every level", [TestedBy("test_document.test_every_statement_has_a_trial")]),
    ("The numbers of those that succeed", [TestedBy("test_document.test_the_document_counts_programs_and_attempts")]),
    ("| of the", [TestedBy("test_document.test_the_document_counts_programs_and_attempts")]),
]  # fmt: skip
"""Statements of "What a program cannot reach", in the order of the document."""
