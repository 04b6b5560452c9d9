"""Hostile programs: they try to pass without solving the problem, to outlive their check, or to reach outside.

``f(x)`` should be x * x. A program whose attack fails defines a wrong ``f``, so the verdict ``correct`` means that the attack
succeeded. The test fills in the targets: ``SECRET`` is a file outside with a correct solution, ``OUTSIDE`` a writable folder,
``PORT`` a listening TCP socket, ``UNIX`` a listening unix socket, ``VICTIM`` a process of the same user.
"""

_SEARCH = """
import re
def learn(text):
    found = dict(re.findall(r"assert f\\((\\d+)\\) == (\\d+)", text))
    if len(found) >= 2:
        globals()["f"] = lambda x: int(found[str(x)])
"""

_EVERY_FD = """
import os
def every_fd():
    for fd in range(64):
        try:
            os.fstat(fd)
            yield fd
        except OSError:
            pass
"""

_LIBC = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
"""

LEAVES_FIRST_THREAD = """
import ctypes, os, platform, threading, time
def write():
    kept = []
    time.sleep(0.2)
    for n in range(40):
        with open("file", "w+b") as file:
            file.write(bytes(2**20))
            file.flush()
            kept.append(os.dup(file.fileno()))
        os.remove("file")
    time.sleep(1000)
threading.Thread(target=write).start()
ctypes.CDLL(None).syscall(60 if platform.machine() == "x86_64" else 93, 0)
"""
"""Ends its first thread only, of which /proc/<pid>/fd then shows no file."""

MOVES_FOLDERS = """
import os
path = "."
for _ in range(12):
    path += "/here"
    os.mkdir(path)
levels = [os.open("./" + "here/" * level, os.O_RDONLY) for level in range(12)]
for n in range(40):
    with open(f"{path}/{n}", "wb") as file:
        file.write(bytes(2**19))
while True:
    for before, after in (("here", "there"), ("there", "here")):
        for level in levels:
            os.rename(before, after, src_dir_fd=level, dst_dir_fd=level)
"""
"""Renames all folders of a path all the time, so that nobody reaches its end."""

TRICKS = {
    # Ends early: a missing verdict must not count as success
    "exit at load": "import sys; sys.exit(0)",
    "_exit at load": "import os; os._exit(0)",
    "exit in the call": "def f(x):\n    import sys; sys.exit(0)",
    "_exit in the call": "def f(x):\n    import os; os._exit(0)",
    "raises SystemExit": "def f(x): raise SystemExit(0)",
    "raises KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "raises a BaseException of its own": "class E(BaseException): pass\ndef f(x): raise E",
    "raises GeneratorExit": "def f(x): raise GeneratorExit",
    "raises StopIteration": "def f(x): raise StopIteration(4)",
    "raises SkipTest": "import unittest\ndef f(x): raise unittest.SkipTest('skip')",
    "raises an AssertionError that is false": "class E(AssertionError):\n    def __bool__(self): return False\ndef f(x): raise E",
    "exits in atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): return 0",
    "exits in a finalizer": "class D:\n    def __del__(self):\n        import os; os._exit(0)\ndef f(x): return D()",
    "exits from a thread": "import threading, os\ndef f(x):\n    threading.Thread(target=os._exit, args=(0,)).start()\n    return 0",
    "replaces itself": "import os, sys\ntry: os.execv(sys.executable, [sys.executable, '-c', 'pass'])\nexcept OSError: pass\ndef f(x): return 0",
    "kills itself": "import os, signal\ndef f(x): os.kill(os.getpid(), signal.SIGKILL)",
    "aborts": "import os\ndef f(x): os.abort()",
    "segfaults": "import ctypes\ndef f(x): ctypes.string_at(0)",
    # Equals everything
    "equal object": "class A:\n    def __eq__(self, o): return True\n    def __ne__(self, o): return False\n    __hash__ = None\ndef f(x): return A()",
    "equal int": "class A(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return A(0)",
    "equal list": "class A(list):\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "equal class": "class M(type):\n    def __eq__(c, o): return True\n    __hash__ = type.__hash__\nclass A(metaclass=M): pass\ndef f(x): return A",
    "mock.ANY": "from unittest.mock import ANY\ndef f(x): return ANY",
    "mock function": "from unittest.mock import MagicMock\nf = MagicMock()\nf.return_value.__eq__ = lambda *a: True",
    "lies about its class": "class A:\n    __class__ = int\n    def __eq__(self, o): return True\ndef f(x): return A()",
    "entry point is operator.eq": "from operator import eq as f",
    # Changes the code that judges it
    "patches builtins": "import builtins\nfor n in ('all', 'any', 'len', 'sorted', 'abs', 'isinstance'):\n    setattr(builtins, n, lambda *a: True)\nbuiltins.AssertionError = type('E', (Exception,), {})\ndef f(x): return 0",
    "patches int": _LIBC + """
try:
    slot = (ctypes.c_void_p * 60).from_address(id(int))
    always = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)(lambda a, b, o: True)
    slot[25] = ctypes.cast(always, ctypes.c_void_p).value
except Exception: pass
def f(x): return 0""",
    "patches json": "import json\njson.dumps = lambda *a, **k: '[\"value\", true, \"\", []]'\nclass A: pass\ndef f(x): return A()",
    "patches the tester": """
import sys
for name, module in list(sys.modules.items()):
    if name.startswith("megatron_rasft"):
        for key in list(vars(module)):
            if key in ("judge", "_failure_of", "_run", "_run_asserts", "_run_check", "_run_pytest", "_plain_functions"):
                setattr(module, key, lambda *a, **k: ("correct", "patched"))
def f(x): return 0""",
    "patches pytest and unittest": "import sys, types\nfor n in ('pytest', '_pytest', 'unittest', 'unittest.case'):\n    sys.modules[n] = types.ModuleType(n)\ndef f(x): return 0",
    "imports its own modules": "import sys\nclass H:\n    def find_spec(self, name, path=None, target=None):\n        import os; os._exit(0)\nsys.meta_path.insert(0, H())\ndef f(x): return 0",
    "traces": "import sys\ndef t(frame, event, arg):\n    frame.f_locals.clear()\n    return t\nsys.settrace(t)\ndef f(x): return 0",
    "profiles": "import sys, threading\nsys.setprofile(lambda fr, ev, arg: None)\nthreading.setprofile(lambda *a: None)\ndef f(x): return 0",
    "prints that all passed": "print('1 passed in 0.01s')\nprint('OK')\nprint('[\"correct\", \"\"]')\ndef f(x):\n    print('[\"correct\", \"2 tests passed\"]'); return 0",
    "overwrites the tests": "for n in ('solution.py', 'test_solution.py', 'conftest.py', 'pytest.ini', 'program_tests.py', 'sitecustomize.py'):\n    try: open(n, 'w').write('def pytest_runtest_makereport(): pass')\n    except OSError: pass\ndef f(x): return 0",
    "names what the tests read": "__test__ = True\npytest_plugins = ['x']\nAssertionError = Exception\ndef check(c): pass\ndef sorted(x): return 0\nint = str = bool = lambda *a: 4\ndef f(x): return 0",
    # Finds out the expected values
    "reads the frames above": _SEARCH + "import sys\nframe = sys._getframe()\nwhile frame:\n    learn(repr(frame.f_locals) + repr(frame.f_globals)[:10**6])\n    frame = frame.f_back\nif 'f' not in globals():\n    def f(x): return 0",
    "reads all objects": _SEARCH + "import gc\ntext = ''\nfor o in gc.get_objects():\n    try: text += repr(o)[:5000] if 'assert f' in repr(o)[:100000] else ''\n    except BaseException: pass\nlearn(text)\nif 'f' not in globals():\n    def f(x): return 0",
    "reads its own memory": _SEARCH + """
try:
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            low, high = (int(p, 16) for p in line.split()[0].split("-"))
            if "rw" in line and high - low < 2**28:
                memory.seek(low)
                try: learn(memory.read(high - low).decode("latin-1"))
                except OSError: pass
except OSError: pass
if "f" not in globals():
    def f(x): return 0""",
    "reads the memory of others": _SEARCH + """
import os
for pid in [os.getppid(), *range(1, 400)]:
    for name in ("mem", "environ", "cmdline", "fd/3", "fd/4", "fd/5"):
        try:
            with open(f"/proc/{pid}/{name}", "rb") as file:
                learn(file.read(10**6).decode("latin-1"))
        except (OSError, ValueError, OverflowError): pass
if "f" not in globals():
    def f(x): return 0""",
    "reads every open file": _SEARCH + _EVERY_FD + """
for fd in list(every_fd()):
    try: learn(os.pread(fd, 10**6, 0).decode("latin-1"))
    except OSError: pass
if "f" not in globals():
    def f(x): return 0""",
    "reads a solution outside": "try: exec(open('SECRET').read())\nexcept OSError:\n    def f(x): return 0",
    "imports a solution outside": "import sys, os\nsys.path.insert(0, os.path.dirname('SECRET'))\ntry: from secret import f\nexcept (ImportError, OSError):\n    def f(x): return 0",
    "lists the folders": "import os\nseen = []\nfor root in ('/root', '/home', '/work', 'OUTSIDE'):\n    try: seen += os.listdir(root)\n    except OSError: pass\ndef f(x): return x * x if 'canary' in seen else 0",
    "traces its parent": _LIBC + "traced = libc.ptrace(16, os.getppid() or 1, 0, 0)\ndef f(x): return x * x if traced == 0 else 0",
    "reads the victim": _LIBC + """
buffer = ctypes.create_string_buffer(8)
local = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
remote = (ctypes.c_void_p * 2)(0x400000, 8)
done = libc.process_vm_readv(VICTIM, local, 1, remote, 1, 0)
def f(x): return x * x if done >= 0 or ctypes.get_errno() == 14 else 0""",
    # Reports success itself
    "writes a verdict to every open file": _EVERY_FD + """
import json
for fd in list(every_fd()):
    for write in (lambda d: os.pwrite(fd, d, 0), lambda d: os.write(fd, d)):
        try: write(b'["correct", "2 tests passed"]')
        except OSError: pass
def f(x): return 0""",
    "answers with nonsense": _EVERY_FD + "def f(x):\n    for fd in list(every_fd())[3:]:\n        os.write(fd, b'\\0' * 7 + b'\\x05' + b'[[[[[')\n    return 0",
    "answers with too much": _EVERY_FD + "def f(x):\n    for fd in list(every_fd())[3:]:\n        os.write(fd, b'\\x7f' * 8)\n    return 0",
    "answers in depth": _EVERY_FD + "def f(x):\n    for fd in list(every_fd())[3:]:\n        os.write(fd, (20000).to_bytes(8, 'big') + b'[' * 10000 + b']' * 10000)\n    return 0",
    "claims changes": _EVERY_FD + "import json\ndef f(x):\n    d = json.dumps(['value', {'t': 'shared', 'v': ['builtins', 'eval']}, '', [[9, 1], ['x', 2]]]).encode()\n    for fd in list(every_fd())[3:]:\n        os.write(fd, len(d).to_bytes(8, 'big') + d)\n    return 0",
    "calls back": _EVERY_FD + "import json\ndef f(x):\n    for op in ('call', 'getattr', 'setattr', 'next', 'input'):\n        d = json.dumps(['call back', op, 1, ['__class__', 0], []]).encode()\n        for fd in list(every_fd())[3:]:\n            os.write(fd, len(d).to_bytes(8, 'big') + d)\n    return 0",
    "shuts the channel": _EVERY_FD + "for fd in list(every_fd())[3:]: os.close(fd)\ndef f(x): return 0",
    **{
        f"answers with {what}": f"""
from megatron_rasft.verify.programs import candidate
def answer(side, message):
    side._channel.send(message if message[0] == "started" else {message})
candidate._CandidateSide._reply = answer
def f(x): return 0
"""
        for what, message in {
            "an error of the tests": "['raised', ['NameError', {'t': 'tuple', 'v': []}, '', [['name', 'np']]], '', []]",
            "an error that stops tests": "['raised', ['KeyboardInterrupt', {'t': 'tuple', 'v': []}, '', []], '', []]",
            "an error that it names": "['raised', ['eval', {'t': 'tuple', 'v': ['1/0']}, '', []], '', []]",
            "a reply that is too short": "['value']",
            "values of the wrong types": "['value', 0, 5, [[0, {'t': 'sender', 'v': [1, 'object']}]]]",
            "an object that lacks its type": "['value', {'v': 4}, '', []]",
            "an array larger than its content": "['value', {'t': 'array', 'v': ['<f8', [1 << 40], '', False]}, '', []]",
            "a record with strange names": "['value', {'t': 'record', 'v': ['a b', ['__eq__'] * 9, [4]]}, '', []]",
            "a function that is not shared": "['value', {'t': 'shared', 'v': ['os', '_exit']}, '', []]",
            "a module inside a shared module": "['value', {'t': 'shared', 'v': ['random', '_os']}, '', []]",
        }.items()
    },
    "raises an error with a long name": "def f(x): raise type('A' * 10**5, (Exception,), {})('\\U0001F600' * 5000)",
    "raises an error with half a character": "def f(x): raise type('\\ud800', (Exception,), {})('\\ud800' * 5000)",
    "raises an error that holds itself": "def f(x):\n    e = ValueError(); e.args = (e,); e.me = e\n    raise e",
    "returns a value that is larger than its text": "def f(x): return [()] * 10**6",
    "is a source of many levels": "def f(x): return " + "(" * 150 + "0" + ")" * 150 + "\nx = " + "-" * 10**5 + "1",
    # Uses up resources
    "leaves its first thread": LEAVES_FIRST_THREAD,
    "moves folders": MOVES_FOLDERS,
    "reserves the disk": "import ctypes, os\nfile = os.open('big', os.O_RDWR | os.O_CREAT) if os.access('.', os.W_OK) else 1\n"
    "keeps_size = ctypes.CDLL(None).fallocate(file, 1, ctypes.c_long(0), ctypes.c_long(2**30)) == 0\n"
    "def f(x): return x * x if keeps_size else 0",
    "fills sockets": "import socket\nkept, total = [], 0\ntry:\n    for _ in range(25):\n        kept.append(socket.socketpair())\n"
    "        kept[-1][0].setblocking(False)\n        try:\n            while True: total += kept[-1][0].send(bytes(65536))\n"
    "        except OSError: pass\nexcept OSError: pass\ndef f(x): return x * x if total > 2**25 else 0",
    "uses memory": "def f(x): return len(bytearray(64 * 2**30))",
    "hoards memory": "def f(x):\n    hoard = []\n    while True: hoard.append(bytearray(2**20))",
    "returns too much": "def f(x): return 'x' * 2**28",
    "never ends to return": "def f(x):\n    def g():\n        while True: yield 4\n    return list(zip(g(), g()))",
    "recurses": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "opens files": "hoard = []\ntry:\n    while True: hoard.append(open('/dev/null'))\nexcept OSError: pass\ndef f(x): return 0",
    "fills the disk": "import os\ntry:\n    for n in range(10**4):\n        with open(f'big{n}', 'wb') as file: file.write(bytes(2**24))\nexcept OSError: pass\ndef f(x): return 0",
    "digs": "import os\ntry:\n    for _ in range(2000):\n        os.mkdir('d' * 99)\n        os.chdir('d' * 99)\nexcept OSError: pass\ndef f(x): return 0",
    "raises its limits": "import resource\nfor name in dir(resource):\n    if name.startswith('RLIMIT_'):\n        try: resource.setrlimit(getattr(resource, name), (-1, -1))\n        except (OSError, ValueError): pass\ndef f(x): return len(bytearray(64 * 2**30))",
    # Outlives its check
    "forks": "import os\ntry:\n    if os.fork() == 0:\n        while True: pass\nexcept OSError: pass\ndef f(x): return 0",
    "daemonises": "import os, time\ntry:\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(10**6)\n        os._exit(0)\nexcept OSError: pass\ndef f(x): return 0",
    "fork bomb": "import os\ntry:\n    while True: os.fork()\nexcept OSError: pass\ndef f(x): return 0",
    "vforks and clones": _LIBC + "for flags in (0x4000, 0x100, 17, 0x10000000 | 17):\n    for number in (56, 57, 58, 435):\n        if libc.syscall(number, flags, 0, 0, 0, 0) == 0 and number != 435: libc.pause()\ndef f(x): return 0",
    "starts programs": "import os, subprocess\nfor start in (lambda: subprocess.Popen(['/bin/sleep', '1000']), lambda: os.posix_spawn('/bin/sleep', ['sleep', '1000'], {})):\n    try: start()\n    except OSError: pass\nos.system('sleep 1000 &')\ndef f(x): return 0",
    "multiprocessing": "import multiprocessing, time\ntry: multiprocessing.Process(target=time.sleep, args=(1000,)).start()\nexcept (OSError, ImportError): pass\ndef f(x): return 0",
    "leaves threads": "import threading, time\nfor _ in range(8): threading.Thread(target=time.sleep, args=(1000,)).start()\ndef f(x): return 0",
    "thread bomb": "import threading, time\nthreading.stack_size(32768)\ntry:\n    for _ in range(20000): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\nexcept (RuntimeError, MemoryError): pass\ndef f(x): return 0",
    "keeps its death signal off": _LIBC + "libc.prctl(1, 0, 0, 0, 0)\ndef f(x): return 0",
    "ignores signals": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ndef f(x): return 0",
    # Reaches outside
    "kills others": "import os, signal\nfor pid in (VICTIM, os.getppid(), -1, 0, 1):\n    for number in (signal.SIGKILL, signal.SIGTERM):\n        if pid != os.getpid():\n            try: os.kill(pid, number)\n            except OSError: pass\ndef f(x): return 0",
    "signals by other calls": _LIBC + "for number in (200, 234, 129, 297, 424):\n    libc.syscall(number, VICTIM, 9, 9, 0)\n    libc.syscall(number, VICTIM, VICTIM, 9, 0)\ndef f(x): return 0",
    "signals as the owner of a file": _LIBC + """
import fcntl, signal
read, write = os.pipe()
own = (ctypes.c_int * 2)(1, VICTIM)
for number, number_aarch64, command, value in ((72, 25, 8, VICTIM), (72, 25, 15, ctypes.addressof(own)), (72, 25, 10, 9)):
    libc.syscall(number if os.uname().machine == "x86_64" else number_aarch64, read, command, ctypes.c_void_p(value))
for command in (0x8901, 0x8902):
    try: fcntl.ioctl(read, command, ctypes.c_int(VICTIM))
    except OSError: pass
fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
os.write(write, b"x")
def f(x): return 0""",
    "lowers others": "import os\nfor try_it in (lambda: os.setpriority(0, VICTIM, 19), lambda: __import__('resource').prlimit(VICTIM, 0, (1, 1))):\n    try: try_it()\n    except OSError: pass\ndef f(x): return 0",
    "schedules others": _LIBC + """
for schedule in (
    lambda: os.sched_setaffinity(VICTIM, {max(os.sched_getaffinity(0))}),
    lambda: os.sched_setscheduler(VICTIM, os.SCHED_IDLE, os.sched_param(0)),
    lambda: os.sched_setparam(VICTIM, os.sched_param(0)),
):
    try: schedule()
    except OSError: pass
idle = (ctypes.c_uint32 * 12)(48, 5)
libc.syscall(314 if os.uname().machine == "x86_64" else 274, VICTIM, idle, 0)
libc.syscall(251 if os.uname().machine == "x86_64" else 30, 1, VICTIM, 3 << 13)
def f(x): return 0""",
    "changes what lies outside": """
import os
for change in (os.chmod, os.utime, os.chown, os.setxattr, os.truncate):
    arguments = {"chmod": [0], "utime": [(1, 1)], "chown": [0, 0], "setxattr": ["user.a", b"x"], "truncate": [0]}
    for path in ("SECRET", "OUTSIDE"):
        try: change(path, *arguments[change.__name__])
        except OSError: pass
        try:
            fd = os.open(path, os.O_RDONLY)
            change(fd, *arguments[change.__name__])
        except OSError: pass
try: os.open("SECRET", os.O_RDONLY | os.O_TRUNC)
except OSError: pass
def f(x): return 0""",
    "writes outside": "import os\nfor path in ('OUTSIDE/a', '/etc/a', '/usr/a', '/var/tmp/rasft-a', '/dev/shm/rasft-a', '/a'):\n    try: open(path, 'w').write('x')\n    except OSError: pass\n    try: os.mkdir(path)\n    except OSError: pass\ndef f(x): return 0",
    "writes through a link": "import os\nfor link in (os.symlink, os.link):\n    try:\n        link('SECRET', 'l'); open('l', 'a').write('x'); os.remove('l')\n    except OSError: pass\ntry: os.rename('SECRET', 'r')\nexcept OSError: pass\ntry: os.truncate('SECRET', 0)\nexcept OSError: pass\ndef f(x): return 0",
    "removes everything": "import shutil\nfor path in ('OUTSIDE', '/tmp', '/usr'): shutil.rmtree(path, ignore_errors=True)\ndef f(x): return 0",
    "takes its own rights away": "import os\nfor path in ('.', '/tmp'):\n    try: os.mkdir('d'); os.chmod('d', 0); os.chmod(path, 0)\n    except OSError: pass\ndef f(x): return 0",
    "connects": """
import socket
ok = False
for family, address in ((socket.AF_INET, ("127.0.0.1", PORT)), (socket.AF_UNIX, "UNIX")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            s = socket.socket(family, kind); s.connect(address); s.send(b"x"); ok = True
        except OSError: pass
def f(x): return x * x if ok else 0""",
    "asks the network": "import urllib.request\ntry: urllib.request.urlopen('http://127.0.0.1:PORT/', timeout=1)\nexcept OSError: pass\ndef f(x): return 0",
    "mounts and unshares": _LIBC + "ok = [libc.unshare(0x10000000) == 0, libc.unshare(0x20000) == 0, libc.mount(b'none', b'/tmp', b'tmpfs', 0, 0) == 0, libc.chroot(b'.') == 0, libc.umount2(b'/tmp', 2) == 0]\ndef f(x): return x * x if any(ok) else 0",
    "becomes root": "import os\nok = False\nfor change in (os.setuid, os.setgid):\n    try: change(4242); ok = True\n    except OSError: pass\ndef f(x): return x * x if ok else 0",
    "shares memory": _LIBC + "ok = libc.shmget(4242, 4096, 0o1666) >= 0\ntry: os.memfd_create('x'); ok = True\nexcept OSError: pass\ndef f(x): return x * x if ok else 0",
    "calls the kernel": _LIBC + "numbers = (425, 321, 298, 323, 248, 250, 434, 438, 310, 272, 308, 428, 430, 246, 175, 169, 167, 227)\nok = any(libc.syscall(n, 0, 0, 0, 0, 0) >= 0 for n in numbers)\ndef f(x): return x * x if ok else 0",
}  # fmt: skip

ENDLESS = {
    "loops": "def f(x):\n    while True: pass",
    "loops at load": "while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(10**6)",
    "stops itself": "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)\n    import time; time.sleep(10**6)",
    "prints without end": "def f(x):\n    while True: print('x' * 1000)",
    "writes without end": "import os\ndef f(x):\n    while True: os.write(1, b'x' * 1000)",
    "generates without end": "def f(x):\n    while True: yield 4",
}

HOSTILE_TO_PYTEST = {
    "skips": "import pytest\ndef f(x): pytest.skip('no')",
    "expects to fail": "import pytest\ndef f(x): pytest.xfail('no')",
    "ends pytest": "import pytest\ndef f(x): pytest.exit('done', 0)",
    "shadows pytest": "class pytest:\n    @staticmethod\n    def approx(*a): return 0\n    class raises:\n        def __init__(s, *a): pass\n        def __enter__(s): return s\n        def __exit__(s, *a): return True\ndef f(x): return 0",
    "shadows builtins": "def abs(x): return 0\ndef sorted(x): return 0\ndef len(x): return 1\ndef isinstance(*a): return True\ndef f(x): return 0",
    "marks itself": "def f(x): return 0\nf.pytestmark = []\nf.__test__ = True\nf._pytestfixturefunction = True\n__test__ = False",
    "hooks": "def pytest_runtest_makereport(item, call): return None\ndef pytest_collection_modifyitems(items): items.clear()\ndef f(x): return 0",
    "is near everything": "class A(float):\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n    def __eq__(s, o): return True\n    def __lt__(s, o): return True\ndef f(x): return A()",
    "subtracts to nothing": "class A:\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\n    def __abs__(s): return 0.0\n    def __lt__(s, o): return True\n    def __contains__(s, o): return True\ndef f(x): return A()",
}  # fmt: skip

_YES = """
class M(type):
    def __instancecheck__(c, o): return True
    def __subclasscheck__(c, o): return True
    def __eq__(c, o): return True
    def __hash__(c): return 4
    def __getattr__(c, n):
        if n.startswith("_"): raise AttributeError(n)
        return c
class Yes(metaclass=M):
    def __init__(s, *a, **k): pass
    def __getattr__(s, n):
        if n.startswith("_"): raise AttributeError(n)
        return Yes()
    def __call__(s, *a, **k): return True
    def __eq__(s, o): return True
    def __ne__(s, o): return False
    def __hash__(s): return 4
    def __bool__(s): return True
    def __contains__(s, o): return True
    def __len__(s): return 1
    def __getitem__(s, i): return s
    def __iter__(s): return iter([s])
    def __float__(s): return 0.0
    def __int__(s): return 0
    def __index__(s): return 0
    def __str__(s): return "0"
    def __format__(s, spec): return "0"
    def __abs__(s): return 0
    def __round__(s, *n): return 0
    def __pos__(s): return 0
    def __neg__(s): return 0
for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod".split():
    setattr(Yes, f"__{name}__", lambda s, o: s)
    setattr(Yes, f"__r{name}__", lambda s, o: s)
for name in "lt le gt ge".split(): setattr(Yes, f"__{name}__", lambda s, o: True)
"""

_SUBTRACTS = """
    def __init__(s, *a): pass
    def __sub__(s, o): return s
    __rsub__ = __sub__
    def __abs__(s): return 0
    def __round__(s, *n): return 0
    def __contains__(s, o): return True
"""

HOSTILE_OBJECTS = {
    "the entry point is a class": "class f:" + _SUBTRACTS,
    **{
        f"the entry point is a kind of {base}": f"class f({base}):\n    def __new__(c, *a): return {base}.__new__(c)" + _SUBTRACTS
        for base in ("int", "float", "str", "list", "tuple", "dict", "complex")
    },
    "the entry point says yes": _YES + "f = Yes",
    "an object says yes": _YES + "def f(x): return Yes()",
    "the function is an object that says yes": _YES + "f = Yes()",
    "an object says yes and that it is a number": _YES + "class Number(Yes): __class__ = float\ndef f(x): return Number()",
    "a list of objects that say yes": _YES + "def f(x): return [Yes()]",
    "an array of objects that say yes": _YES + "import numpy\ndef f(x): return numpy.array([Yes()], dtype=object)",
    "remembers what it was shown": "seen = [0]\nclass f:\n    def __init__(s, *a): pass\n    def __sub__(s, o):\n        seen.append(o); return s\n    __rsub__ = __add__ = __contains__ = __sub__\n    def __abs__(s): return 0\n    def __float__(s): return float(seen[-1])\n    def __int__(s): return int(seen[-1])\n    __index__ = __int__\n    def __str__(s): return str(seen[-1])\n    def __iter__(s): return iter(seen[-1:])",
    "a generator": "def f(x):\n    while (yield 0): pass",
    "a descriptor": "class D:\n    def __get__(s, i, c): return lambda *a: 0\nclass f:\n    def __init__(s, *a): pass\n    __abs__ = __sub__ = __contains__ = __round__ = __float__ = D()",
    "an empty list": "def f(x): return []",
    "an empty array": "import numpy\ndef f(x): return numpy.empty((0, 1))",
    "nan": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
}  # fmt: skip
"""Programs whose ``f`` returns an object, or an odd value, that a comparison might take for the expected value."""

HOSTILE_SCRIPTS = {
    "prints everything": "for n in range(1000): print(n)",
    "exits": "import os; os._exit(0)",
    "prints and fails": "print(4); raise SystemExit(3)",
    "prints without end": "while True: print('x' * 1000)",
    "reads every open file": "import os\nfor fd in range(64):\n    try: print(os.pread(fd, 1000, 0).decode())\n    except OSError: pass",
    "echoes": "print(input())",
    "writes back into its input": "import os\nos.lseek(0, 0, 0)\ntry: os.write(0, b'4')\nexcept OSError: pass",
    "waits": "import time; time.sleep(10**6)",
    "forks away": "import os\nif os.fork(): os._exit(0)\nwhile True: print(4)",
    "grows its output": "import os\nos.ftruncate(1, 2**24)\ntry: os.ftruncate(1, 2**40)\nexcept OSError: pass",
}
"""Hostile scripts. Standard input is 2, and the expected output is 4."""
