"""Scripts behave as under ``python solution.py < input`` at every level, and have LiveCodeBench's imports."""

from megatron_rasft.types import CodeTests, ProgramCase
from megatron_rasft.verify.programs.program_grading import run_tests
from megatron_rasft.verify.programs.sandbox import Sandbox

SCRIPTS: dict[str, tuple[str, str, str]] = {
    "star": (
        "n = int(input())\nd: List[int] = deque(range(n))\nprint(reduce(add, d), floor(pi))",
        "4",
        "6 3",
    ),
    "threads": (
        "import threading, time\ndef g():\n    time.sleep(0.2); print(input())\nthreading.Thread(target=g).start()",
        "4",
        "4",
    ),
    "thread big": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**27)\ndef r(n): return 0 if n == 0 else 1 + r(n-1)\ndef g(): print(r(50000))\nt=threading.Thread(target=g)\nt.start()\nt.join()",
        "",
        "50000",
    ),
    "atexit": ("import atexit\natexit.register(lambda: print(x))\nx = input()", "4", "4"),
    "atexit exit": ("import atexit, sys\natexit.register(print, 4)\nsys.exit()", "", "4"),
    "atexit flush io": (
        "import atexit, io, sys\nsys.stdout = buf = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(buf.getvalue()))\nprint(4)",
        "",
        "4",
    ),
    "os.read": ("import os\nprint(int(os.read(0, 100)))", "4\n", "4"),
    "io.BytesIO os.read fstat": (
        "import os, io\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline\nprint(int(input()))",
        "4\n",
        "4",
    ),
    "/dev/stdin": ("print(open('/dev/stdin').read())", "4\n", "4"),
    "/dev/stdin path": ("from pathlib import Path\nprint(Path('/dev/stdin').read_text())", "4\n", "4"),
    "/dev/stdin os": ("import os\nprint(int(os.read(os.open('/dev/stdin', os.O_RDONLY), 9)))", "4\n", "4"),
    "/dev/stdout": ("print(4, file=open('/dev/stdout', 'w'))", "", "4"),
    "open 0": ("print(open(0).read())", "4\n", "4"),
    "peek": ("import sys\nprint(sys.stdin.buffer.peek(1)[:1].decode())", "4\n", "4"),
    "buffer": (
        "import sys\nread = sys.stdin.buffer.readline\nprint(int(read()))\nsys.stdout.buffer.write(b'5\\n')",
        "4\n",
        "5\n4",
    ),
    "fileinput": ("import fileinput\nprint(sum(int(l) for l in fileinput.input()))", "4\n5\n", "9"),
    "__file__": (
        "import os\nprint(os.path.basename(__file__), len(sys.argv), os.path.basename(sys.argv[0]), __name__, sys.argv[1:])",
        "",
        "solution.py 1 solution.py __main__ []",
    ),
    "eof": ("try:\n    while True: print(int(input()))\nexcept EOFError: pass", "4\n5", "4\n5"),
    "exit 0": ("print(4)\nimport sys; sys.exit(0)", "", "4"),
    "exit()": ("print(4)\nexit()", "", "4"),
    "quit()": ("print(4)\nquit()", "", "4"),
    "os._exit": ("print(4, flush=True)\nimport os; os._exit(0)", "", "4"),
    "input prompt": ("input('n? ')\nprint(4)", "1", "n? 4"),
    "pickle dataclass": (
        "import pickle\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(pickle.loads(pickle.dumps(P(4))).x)",
        "",
        "4",
    ),
    "getsource": ("import inspect\ndef f(): return 4\nprint(inspect.getsource(f))", "", "def f(): return 4"),
    "future": ("from __future__ import annotations\ndef f(x: Nope): return x\nprint(f(4))", "", "4"),
    "del": ("class A:\n    def __del__(self): print('bye')\na = A()", "", "bye"),
    "daemon": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(100,), daemon=True).start()\nprint(4)",
        "",
        "4",
    ),
    "executor": (
        "from concurrent.futures import ThreadPoolExecutor\ne = ThreadPoolExecutor(2)\ne.submit(print, 4)",
        "",
        "4",
    ),
    "strptime": (
        "from datetime import datetime\nprint(datetime.strptime('2024-01-02', '%Y-%m-%d').day)",
        "",
        "2",
    ),
    "numpy.random": ("import numpy as np\nprint(np.random.default_rng(0).integers(4, 5))", "", "4"),
    "numpy.random2": (
        "import numpy as np\nimport numpy.random as r\nnp.random.seed(0)\nprint(np.random.randint(4, 5), np.linalg.det(np.eye(2)), np.fft.fft([1.0])[0].real, np.ma.masked, np.polynomial.Polynomial([1])(3))",
        "",
        "4 1.0 1.0 -- 1.0",
    ),
    "mock": (
        "from unittest.mock import MagicMock, patch\nm = MagicMock(return_value=4)\nprint(m())",
        "",
        "4",
    ),
    "codecs": (
        "import codecs\nprint('ü'.encode('cp1252'), b'\\x93\\xfa'.decode('shift_jis'), codecs.encode('a','rot13'), 'a'.encode('utf-16-le'), codecs.encode(b'a','hex'), b'a'.decode('koi8-r'), '\\u4e2d'.encode('gb18030'))",
        "",
        "b'\\xfc' 日 n b'a\\x00' b'61' a b'\\xd6\\xd0'",
    ),
    "asyncio": ("import asyncio\nasync def g(): return 4\nprint(asyncio.run(g()))", "", "4"),
    "xml json csv": (
        "import xml.etree.ElementTree as E, json, csv, io, email.message, html.parser, urllib.parse, importlib.util, logging.handlers, concurrent.futures, multiprocessing.pool, sqlite3\nprint(E.fromstring('<a>4</a>').text)",
        "",
        "4",
    ),
    "zoneinfo": (
        "from zoneinfo import ZoneInfo\nfrom datetime import datetime\nprint(datetime(2024,1,1,tzinfo=ZoneInfo('UTC')).utcoffset().seconds)",
        "",
        "0",
    ),
    "unknown codec": ("try: 'a'.encode('nope')\nexcept LookupError: print(4)", "", "4"),
    "unknown module": ("try: import nope\nexcept ImportError: print(4)", "", "4"),
    "decimal re": ("import _pydecimal, _strptime, _pyio\nprint(4)", "", "4"),
    "textio": (
        "import sys\nprint(sys.stdin.encoding, sys.stdin.name, sys.stdin.isatty(), sys.stdin.fileno(), type(sys.stdin.buffer).__name__, sys.stdin.readable())",
        "",
        "utf-8 <stdin> False 0 BufferedReader True",
    ),
    "lead blank": ("print()\nprint(4)", "", "4"),
    "class main": (
        "import sys\ninput = sys.stdin.readline\ndef main():\n    n = int(input())\n    print(*sorted(map(int, input().split())))\nif __name__ == '__main__': main()",
        "3\n3 1 2\n",
        "1 2 3\n",
    ),
    "name shadows": (
        "def gcd(a, b):\n    return a if b == 0 else gcd(b, a % b)\ncount = 0\nfor _ in range(2): count += 1\nprint(gcd(4, 6), count)",
        "",
        "2 2",
    ),
    "pow2": ("print(pow(2, 3, 5), sum([1, 2]), abs(-1), max(1, 2))", "", "3 3 1 2"),
    "empty lines": ("print('a')\nprint()\nprint('b')", "", "a\n\nb\n"),
    "asyncio executor": (
        "import asyncio, sys\nasync def main():\n    loop = asyncio.get_running_loop()\n    print(await loop.run_in_executor(None, sys.stdin.readline))\nasyncio.run(main())",
        "4\n",
        "4",
    ),
    "queue thread": (
        "import threading, queue\nq = queue.Queue()\ndef w():\n    for i in range(3): q.put(i)\nt = threading.Thread(target=w); t.start()\nprint(*[q.get() for _ in range(3)])",
        "",
        "0 1 2",
    ),
    "signal alarm": ("import signal\nsignal.alarm(10)\nprint(4)", "", "4"),
    "thread exception": (
        "import threading\nt = threading.Thread(target=lambda: 1/0)\nt.start()\nprint(4)",
        "",
        "4",
    ),
    "stdout.write fd": ("import os\nos.write(1, b'4')", "", "4"),
    "mix": ("import sys, os\nprint(1)\nsys.stdout.flush()\nos.write(1, b'2\\n')\nprint(3)", "", "1\n2\n3"),
    "fdopen": ("import os\no = os.fdopen(1, 'w')\no.write('4')", "", "4"),
    "open 1": ("import sys\nsys.stdout = open(1, 'w', buffering=1 << 20)\nprint(4)", "", "4"),
    "detach": (
        "import sys, io\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), write_through=False)\nprint(4)",
        "",
        "4",
    ),
    "reconfigure": ("import sys\nsys.stdout.reconfigure(line_buffering=True)\nprint(4)", "", "4"),
    "surrogates bytes": ("import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())", "ü\n", "ü"),
    "main module import": ("import __main__\nx = 4\nprint(__main__.x)", "", "4"),
    "sys.modules": ("import sys\nprint(sys.modules['__main__'].__name__)", "", "__main__"),
    "globals": ("exec('x = 4', globals())\nprint(x)", "", "4"),
    "weakref finalize": ("import weakref\nclass A: pass\na = A()\nweakref.finalize(a, print, 4)", "", "4"),
    "read twice": (
        "import sys\na = sys.stdin.readline()\nb = open(0).read()\nprint(a.strip(), len(b))",
        "4\n",
        "4 0",
    ),
}
"""Name -> program, input, output under plain Python."""

FAILING: dict[str, tuple[str, str, str]] = {
    "eof uncaught": ("print(4)\ninput();input()", "", "4"),
    "exit 1": ("print(4)\nimport sys; sys.exit(1)", "", "4"),
    "exit text": ("print(4)\nimport sys; sys.exit('x')", "", "4"),
    "excepthook": ("import sys\nsys.excepthook = lambda *a: print('hook')\n1/0", "", "hook"),
}
"""Programs that print the output and end with another status than 0."""


def test_scripts_behave_as_under_plain_python(patient_sandbox: Sandbox) -> None:
    found = {name: _judge(patient_sandbox, *script) for name, script in SCRIPTS.items()}
    assert {name: verdict for name, verdict in found.items() if verdict[0] != "correct"} == {}


def test_scripts_that_end_with_an_error_are_wrong(patient_sandbox: Sandbox) -> None:
    found = {name: _judge(patient_sandbox, *script) for name, script in FAILING.items()}
    assert {name: verdict for name, verdict in found.items() if verdict[0] != "wrong"} == {}


def _judge(sandbox: Sandbox, program: str, given: str, output: str) -> tuple[str, str]:
    tests = CodeTests(style="stdin", cases=(ProgramCase(input=given, output=output),))
    return run_tests(sandbox, program, tests)
