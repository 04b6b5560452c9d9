"""A Slurm cluster of several nodes on this machine, for tests: munged, slurmctld and a slurmd for each node, on loopback ports.

    python -m tests.slurm.cluster        starts one, prints the line that makes Slurm's commands use it, and stops it at Ctrl-C

Needs Debian's packages ``slurm-wlm`` and ``munge``, and root. There are no cgroups, so Slurm binds and limits nothing, and a process
whose parent was killed leaves its step. Node names do not resolve: use 127.0.0.1 for a rendezvous.
"""

import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from tests.forking import REPOSITORY
from tests.ports import new_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_START_S = 300.0
"""The longest wait for the daemons, which take two seconds on an idle machine."""
_FACTS_S = 0.5
"""Age of the answers to questions about jobs."""
_NODE = "TEST_SLURM_NODE"
"""Variable of a slurmd and of its step daemons: the node's name."""

_GUARD = "--end-with-input"

CONFIGURATION = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[ctld]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0,requeue_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
PropagatePrioProcess=1
ReturnToService=2
SlurmdTimeout=60
MessageTimeout=30
BatchStartTimeout=300
KillWait={kill_wait_s}
UnkillableStepTimeout=60
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime={grace_s}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10 PreemptMode=OFF
"""
"""slurm.conf. ``config_overrides``: without it a node with fewer cores than it claims is drained."""


def missing() -> str:
    """Returns why no cluster can run here, or ""."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install --no-install-recommends slurm-wlm munge"
    return "" if os.geteuid() == 0 else "the cluster's daemons need root"


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float, every_s: float = 0.2) -> None:
    """Waits until a condition holds.

    Raises:
        TimeoutError: it does not hold after ``timeout_s``.
    """
    ends = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError(f"{what}: not after {timeout_s:g} s")
        time.sleep(every_s)


class Cluster:
    """The daemons and the jobs. Use it as a context: its end kills all that the cluster has started, and so does the end of this process.

    Args:
        num_nodes: the nodes are n1, n2 and so on.
        grace_s: time that partition ``batch`` gives a preempted job.
        kill_wait_s: time from SIGTERM to SIGKILL.
    """

    def __init__(self, num_nodes: int = 4, grace_s: int = 600, kill_wait_s: int = 5) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="slurm-")
        )  # short: the path of a socket has 107 characters
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._asking = threading.Lock()
        self._asked_at = float("-inf")
        self._jobs: dict[str, dict[str, str]] = {}
        """Number of a job -> its newest fields."""
        self.nodes = [f"n{number}" for number in range(1, num_nodes + 1)]
        ports = {name: new_port() for name in ("ctld", *self.nodes)}
        nodes = (
            f"NodeName={name} NodeAddr=127.0.0.1 NodeHostname=localhost Port={ports[name]} CPUs=64 RealMemory=100000 "
            "Gres=gpu:8 State=UNKNOWN"
            for name in self.nodes
        )
        text = CONFIGURATION.format(
            folder=self.folder,
            ports=ports,
            nodes="\n".join(nodes),
            grace_s=grace_s,
            kill_wait_s=kill_wait_s,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        for name in ("state", "tmp"):
            (self.folder / name).mkdir()
        for number in range(8):
            self._make_device(self.folder / f"gpu{number}")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    @staticmethod
    def _make_device(path: Path) -> None:
        """Makes a file that stands for a GPU. Slurm numbers devices in CUDA_VISIBLE_DEVICES, and only counts plain files."""
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except OSError:  # a container without the right to
            path.touch()

    def __enter__(self) -> "Cluster":
        # Its input ends with this process, also if that is killed. Then it ends the cluster.
        self._guard = subprocess.Popen(
            [sys.executable, "-m", "tests.slurm.cluster", _GUARD, str(self.folder)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        at = self.folder
        socket = f"{at}/munge.socket"
        munged = ["munged", "--foreground", "--force", "--num-threads", "2", "--key-file", f"{at}/munge.key"]
        munged += ["--socket", socket, "--pid-file", f"{at}/munged.pid", "--log-file", f"{at}/munged.log"]
        self._launch("munged", [*munged, "--seed-file", f"{at}/munge.seed"])
        wait_for("munged", lambda: self._succeeds("munge", "--socket", socket, "--no-input"), _START_S)
        self._launch("slurmctld", ["slurmctld", "-D", "-c", "-f", f"{at}/slurm.conf"])
        for node in self.nodes:
            self.start_node(node)
        idle = ("sinfo", "--noheader", "--partition=batch", "--states=idle", "--format=%D")
        wait_for("the nodes", lambda: self._output(*idle).strip() == str(len(self.nodes)), _START_S)

    def _launch(self, name: str, command: list[str], variables: Mapping[str, str] | None = None) -> None:
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment | dict(variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def environment(self) -> dict[str, str]:
        """The environment of Slurm's commands."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return kept | {"SLURM_CONF": f"{self.folder}/slurm.conf", "TMPDIR": f"{self.folder}/tmp"}

    def run(
        self, *command: str, variables: Mapping[str, str] | None = None, folder: Path = REPOSITORY
    ) -> str:
        """Runs one of Slurm's commands; returns its output.

        Raises:
            RuntimeError: it failed.
        """
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.environment | dict(variables or {}),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def _output(self, *command: str) -> str:
        """The output of a command; "" if it fails, as while slurmctld is starting or busy."""
        with suppress(RuntimeError, subprocess.TimeoutExpired):
            return self.run(*command)
        return ""

    def _succeeds(self, *command: str) -> bool:
        return subprocess.run(command, env=self.environment, capture_output=True, check=False).returncode == 0

    def submit(
        self, *arguments: str, variables: Mapping[str, str] | None = None, folder: Path = REPOSITORY
    ) -> str:
        """Submits a job from a folder; returns its number."""
        return self.run("sbatch", "--parsable", *arguments, variables=variables, folder=folder).strip()

    def facts(self, job: str) -> dict[str, str]:
        """Returns the fields of ``scontrol show job``, at most ``_FACTS_S`` old; {} if the command fails, or the job is newer.

        Many threads ask at the same time, so that one command answers all of them.
        """
        with self._asking:
            if time.monotonic() - self._asked_at > _FACTS_S:
                self._jobs = {}
                for line in self._output("scontrol", "--oneliner", "show", "jobs").splitlines():
                    record = dict(word.split("=", 1) for word in line.split() if "=" in word)
                    # the first component of a heterogeneous job stands for it
                    number = record.get("HetJobId") or record.get("ArrayJobId") or record.get("JobId", "")
                    self._jobs.setdefault(number, record)
                self._asked_at = time.monotonic()
            return self._jobs.get(job, {})

    def wait_until(
        self, job: str, *states: str, timeout_s: float = 300, every_s: float = 0.2
    ) -> dict[str, str]:
        """Waits until the job is in one of the states; returns its facts."""
        facts: dict[str, str] = {}

        def has_state() -> bool:
            facts.update(self.facts(job))
            return facts.get("JobState") in states

        wait_for(f"job {job} in {states}", has_state, timeout_s, every_s)
        return facts

    def start_now(self, job: str, restart: int, timeout_s: float = 120) -> None:
        """Starts a job that was requeued for the ``restart``-th time. Slurm itself would hold it for two minutes."""

        seen: list[float] = []

        def has_started() -> bool:
            facts = self.facts(job)
            if int(facts.get("Restarts", 0)) < restart:
                return False
            if facts["JobState"] == "PENDING":
                seen.append(time.monotonic())
                # Slurm kills a job that it starts again within two seconds ("Job credential revoked").
                if seen[-1] - seen[0] > 5:
                    self._output("scontrol", "update", f"jobid={job}", "StartTime=now")
            # A job is completing before it is pending, and again at its end.
            return facts["JobState"] not in ("PENDING", "COMPLETING")

        wait_for(f"restart {restart} of job {job}", has_started, timeout_s, every_s=1.0)

    def start_node(self, node: str) -> None:
        """Boots a node."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        command = ["slurmd", "-D", "-N", node, "-f", f"{self.folder}/slurm.conf"]
        self._launch(f"slurmd.{node}", command, {_NODE: node})

    def kill_node(self, node: str) -> None:
        """Kills all processes of a node, as a power failure does: slurmd first, so that it reports nothing."""
        self._daemons[f"slurmd.{node}"].kill()
        self._daemons[f"slurmd.{node}"].wait()
        for process in self.processes(node):
            with suppress(psutil.Error):
                process.kill()

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """Returns the processes of jobs and step daemons, of one node or of all."""
        return [process for process, home in members(self.folder) if home and node in (None, home)]

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(
                ["scancel", "--user=root", "--signal=KILL", "--full"],
                env=self.environment,
                capture_output=True,
                timeout=5,
                check=False,
            )
        self._guard.communicate()
        for daemon in self._daemons.values():
            daemon.wait()


def end_all(folder: Path) -> None:
    """Kills all processes of the cluster in ``folder``, and removes the folder."""
    # A killed process can have started another one just before: until none is left.
    ends = time.monotonic() + 30
    while (left := [*members(folder)]) and time.monotonic() < ends:
        for process, _ in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def members(folder: Path) -> Iterator[tuple[psutil.Process, str | None]]:
    """Yields the cluster's daemons, and each process that they or Slurm's commands have started, with its node if it has one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            if variables.get("SLURM_CONF") == f"{folder}/slurm.conf":
                yield process, variables.get(_NODE) or variables.get("SLURMD_NODENAME")


if __name__ == "__main__":
    if _GUARD in sys.argv:
        sys.stdin.read()
        end_all(Path(sys.argv[-1]))
    else:
        with Cluster() as shown:
            print(f"export SLURM_CONF={shown.folder}/slurm.conf", flush=True)
            with suppress(KeyboardInterrupt):
                signal.pause()
