"""Programs that must work in the sandbox: they use Python and numpy in the ways that need system calls.

``ANYWHERE`` runs at every level, ``WITH_FILES`` where a check has a folder.
"""

ANYWHERE = {
    "asyncio": "import asyncio\nasync def m():\n    r = await asyncio.gather(*(asyncio.sleep(.001, i) for i in range(3)))\n    print(r)\nasyncio.run(m())",
    "asyncio threads": "import asyncio\nprint(asyncio.run(asyncio.to_thread(lambda: 4)))",
    "asyncio streams": "import asyncio, socket\nasync def m():\n    a, b = socket.socketpair()\n    r, w = await asyncio.open_connection(sock=a)\n    w.write(b'hi\\n'); await w.drain(); print(b.recv(9))\nasyncio.run(m())",
    "threads": "import threading\nfrom concurrent.futures import ThreadPoolExecutor\nprint(sum(ThreadPoolExecutor(8).map(abs, range(100))))\nt = threading.Timer(.01, print, ['t']); t.start(); t.join()\nq=threading.local()",
    "numpy": "import numpy as np\nrng = np.random.default_rng(0)\na = rng.random((200, 200))\nprint(np.linalg.inv(a).shape, np.fft.fft(a[0]).shape, np.linalg.svd(a)[1][0] > 0, np.sort(a).sum() > 0)",
    "numpy big": "import numpy as np\na = np.ones((1500, 1500)); print((a @ a)[0, 0]); del a; print(np.zeros(10**7).sum())",
    "signal": "import signal, os, time\nhit = []\nsignal.signal(signal.SIGALRM, lambda *a: hit.append(1)); signal.setitimer(signal.ITIMER_REAL, .01); time.sleep(.05); signal.raise_signal(signal.SIGALRM); os.kill(os.getpid(), signal.SIGALRM); signal.alarm(0); print(hit)\nsignal.signal(signal.SIGUSR1, lambda *a: hit.append(2)); signal.pthread_kill(__import__('threading').get_ident(), signal.SIGUSR1)\nprint(hit)",
    "time": "import time\nfor n in ('time', 'monotonic', 'perf_counter', 'process_time', 'thread_time'):\n    getattr(time, n)()\n    time.get_clock_info(n)\ntime.sleep(.001); print(time.clock_gettime(time.CLOCK_REALTIME) > 0, time.strftime('%Y') > '2000', time.clock_gettime(time.CLOCK_BOOTTIME) > 0)",
    "os": "import os\nprint(os.getpid() > 0, os.cpu_count() > 0, os.getuid() >= 0, os.uname().sysname, len(os.sched_getaffinity(0)) > 0, os.urandom(4) != b'', os.sysconf('SC_PAGE_SIZE'), os.getpgid(0) >= 0, os.getsid(0) >= 0, os.times()[0] >= 0, os.path.exists('/nowhere'), os.isatty(1), os.umask(0o22) >= 0)\nr, w = os.pipe(); os.write(w, b'x'); print(os.read(r, 1)); os.set_blocking(r, False); os.set_inheritable(r, True); f = os.fdopen(w, 'wb'); os.dup2(r, 40); os.closerange(30, 50)",
    "resource": "import resource\nprint(resource.getrlimit(resource.RLIMIT_AS)[0] > 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0); resource.setrlimit(resource.RLIMIT_STACK, resource.getrlimit(resource.RLIMIT_STACK))\nimport sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(2**26); r = []\ndef d(n): return 0 if n == 0 else 1 + d(n - 1)\nt = threading.Thread(target=lambda: r.append(d(20000))); t.start(); t.join(); print(r)",
    "select": "import selectors, select, os\nr, w = os.pipe(); s = selectors.DefaultSelector(); s.register(r, selectors.EVENT_READ); os.write(w, b'1'); print(len(s.select(.1))); print(select.select([r], [], [], 0)[0] == [r]); p = select.poll(); p.register(r); print(p.poll(0) != []); e = select.epoll(); e.register(r); print(e.poll(.1) != [])",
    "mmap": "import mmap\nm = mmap.mmap(-1, 4096); m[:3] = b'abc'; print(m[:3]); m.flush(); m.madvise(mmap.MADV_DONTNEED); m.resize(8192)",
    "ctypes": "import ctypes\ncb = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda a, b: 0)\na = (ctypes.c_int * 4)(3, 1, 2, 0); ctypes.CDLL(None).qsort(a, 4, 4, cb); print('ok')",
    "multiprocessing.pool": "from multiprocessing.pool import ThreadPool\nimport contextlib\nwith contextlib.suppress(OSError): ThreadPool(2)",
    "sqlite memory": "import sqlite3\nc = sqlite3.connect(':memory:'); c.execute('create table t(a)'); c.execute('insert into t values(1)'); print(c.execute('select * from t').fetchall())",
    "uuid": "import uuid, secrets, random\nprint(len(str(uuid.uuid4())), len(secrets.token_hex(4)), uuid.uuid5(uuid.NAMESPACE_DNS, 'a'))",
    "gc": "import gc, weakref, tracemalloc, faulthandler\ntracemalloc.start(); gc.collect(); print(tracemalloc.get_traced_memory()[0] >= 0)",
    "eventfd": "import os\nf = os.eventfd(1); print(os.eventfd_read(f))",
    "queue": "import queue, threading, sched, time\nq = queue.Queue()\nthreading.Thread(target=q.put, args=(1,)).start()\nprint(q.get(timeout=60)); s = sched.scheduler(); s.enter(.001, 1, print, ['s']); s.run()\nc = threading.Condition()\nwith c: c.wait(.001)\nthreading.Barrier(1).wait(); print(threading.Event().wait(.001))",
    "big integers": "assert len(str(3**10000)) == 4772",
    "refused process": "import subprocess, os, multiprocessing\nfor start in (lambda: subprocess.run(['true']), os.fork, lambda: multiprocessing.Process(target=print).start(), lambda: os.posix_spawn('/bin/true', ['true'], {})):\n    try: start()\n    except PermissionError: continue\n    raise AssertionError('started')",
}  # fmt: skip

WITH_FILES = {
    "files": "import os, tempfile, shutil, pathlib\nwith tempfile.TemporaryDirectory() as d:\n    p = pathlib.Path(d, 'a'); p.write_text('x'); p.rename(p.with_name('b')); shutil.copyfile(p.with_name('b'), p); os.link(p, d + '/l'); os.symlink('a', d + '/s'); print(sorted(os.listdir(d)), os.readlink(d + '/s'), p.resolve().name, os.stat(p).st_nlink); os.truncate(p, 0); f = open(p, 'r+'); f.truncate(5); f.flush(); os.fsync(f.fileno()); f.close(); os.mkfifo(d + '/f'); os.chdir(d); print(os.path.basename(os.getcwd()) != ''); os.chdir('..')\nwith tempfile.TemporaryFile() as f: f.write(b'x'); f.seek(0); print(f.read())\nwith tempfile.NamedTemporaryFile('w+') as f: f.write('x')\nprint(os.listdir('.'), shutil.disk_usage('.').total > 0)",
    "sqlite file": "import sqlite3\nc = sqlite3.connect('db'); c.execute('create table t(a)'); c.execute('insert into t values(1)'); c.commit(); print(c.execute('select * from t').fetchall())",
    "mmap file": "import mmap\nopen('m', 'wb').write(b'x' * 4096)\nwith open('m', 'r+b') as f:\n    m = mmap.mmap(f.fileno(), 0); m[:1] = b'y'; m.flush(); m.close()\nprint(open('m').read(2))",
    "zip": "import zipfile, tarfile, shelve, dbm.dumb, logging, csv, gzip, io\nwith zipfile.ZipFile('z', 'w') as z: z.writestr('a', 'b')\nwith gzip.open('g', 'w') as g: g.write(b'x')\nwith tarfile.open('t', 'w') as t: t.add('z')\nwith tarfile.open('t') as t: print(t.getnames())\nlogging.basicConfig(filename='log'); logging.warning('x'); print(open('log').read())",
    "copy2": "import shutil, os\nopen('a', 'w').write('x')\ntry: shutil.copy2('a', 'b'); print('copied')\nexcept PermissionError: print('PermissionError')",
    "lazy": "import xml.dom.minidom, email.mime.text, http.client, unittest, doctest, pydoc, plistlib, wave\nprint(xml.dom.minidom.parseString('<a/>').documentElement.tagName)\nimport zoneinfo\ntry: print(zoneinfo.ZoneInfo('Europe/Paris'))\nexcept Exception as e: print(type(e))",
    "flushing and attributes": "import os, errno\nwith open('a', 'w') as f:\n    f.write('x'); f.flush(); os.fsync(f.fileno()); os.fdatasync(f.fileno())\ntry: os.listxattr('a')\nexcept OSError as e: assert e.errno == errno.ENOTSUP",
    "temporary folder": "import tempfile, os\nassert os.path.realpath(tempfile.gettempdir()) == os.path.realpath('.'), tempfile.gettempdir()",
}  # fmt: skip
