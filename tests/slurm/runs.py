"""Runs of the shipped job script on the test cluster, with toy sizes, and what happens to them."""

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from safetensors.torch import load_file

from megatron_rasft.tools import cli
from tests.forking import ENVIRONMENT, REPOSITORY
from tests.functional.launching import steps
from tests.ports import new_port
from tests.slurm.cluster import Cluster, wait_for
from tests.tiny_policy import write_model, write_sums
from tools import plan

STEPS = 10
PAUSED = 5
"""The step after which disturbed runs pause. Checkpoints are of steps 3, 6, 9 and 10; refreshes come before steps 1, 5, 6 and 10."""
LIMIT_S = 900.0
"""The longest wait for a job. The machine may be busy."""

PLAN = """
    --num-gpus 2 --gpus-per-node 1 --rollout-gpus 0 --seq-length 64 --max-new-tokens 12 --prompt-tokens 8
    --demonstration-tokens 16 --global-batch-size 8 --micro-batch-size 4 --refresh-interval 4 --num-problems 40 --epochs 2
    --save-interval 3 --recompute none
"""
"""Flags of tools/plan.py for a run of ``STEPS`` steps on two nodes with a process each."""

FLAGS = """
    --lr 1e-3 --lr-decay-style constant --lr-warmup-iters 0 --data-prompt-suffix= --no-verify-filter-too-short
    --verify-num-workers 1
"""
"""Further flags of pretrain_rasft.py."""


@dataclass
class Runs:
    """The files that all runs share, and the cluster on which they run."""

    cluster: Cluster
    root: Path
    more_planned: str = ""
    """Further flags of tools/plan.py, which replace those of ``PLAN``."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Name of a run -> the number of its newest job."""
    script: Path = field(init=False)
    """rasft.sbatch as tools/plan.py has written it."""

    def __post_init__(self) -> None:
        model = write_model(self.root / "model")
        data = write_sums(self.root / "sums.jsonl", 40)
        planned = self.root / "planned"
        words = ["--hf-model", str(model), "--train-data", str(data), "--slurm", str(planned)]
        words += [*PLAN.split(), *self.more_planned.split()]
        assert cli.run(plan.main, words) == 0
        self.script = planned / "rasft.sbatch"
        checkout = self.root / "checkout"
        checkout.mkdir()
        for name in ("megatron_rasft", "tools", "examples"):
            (checkout / name).symlink_to(REPOSITORY / name)
        shutil.copy(Path(__file__).with_name("paused_program.py"), checkout / "pretrain_rasft.py")

    def folder(self, name: str) -> Path:
        return self.root / name

    def submit(
        self,
        name: str,
        *options: str,
        script: Path | None = None,
        first: str = "",
        flags: str = "",
        **variables: str,
    ) -> str:
        """Submits a run in a folder of its own; returns the job's number.

        Args:
            options: of sbatch.
            script: another job script.
            first: its first argument, the settings.
            flags: further flags of pretrain_rasft.py.
        """
        given = {
            **ENVIRONMENT,
            "CHECKOUT": str(self.root / "checkout"),
            "REAL_CHECKOUT": str(REPOSITORY),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "HEAD_ADDRESS": "127.0.0.1",
            "HEAD_PORT": str(new_port()),
            "CPU": "1",
            "RUN": str(self.folder(name)),
            **variables,
        }
        log = f"--output={self.root}/{name}.log"
        words = [str(script or self.script), *([first] if first else []), *FLAGS.split(), *flags.split()]
        self.jobs[name] = self.cluster.submit(log, *options, *words, variables=given)
        return self.jobs[name]

    def log(self, name: str) -> str:
        """The job's log and those of its steps."""
        paths = [self.root / f"{name}.log", *sorted(self.folder(name).glob("logs/*.log"))]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')}" for p in paths if p.exists())

    def wait_for_pause(self, name: str) -> None:
        wait_for(f"pause of {name}", (self.folder(name) / "paused").exists, LIMIT_S)

    def wait_for_end(self, job: str) -> dict[str, str]:
        """Waits for the end of a job; returns its facts."""
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        return self.cluster.wait_until(job, *ends, timeout_s=LIMIT_S)

    def finish_after_requeue(self, job: str) -> None:
        """Starts a requeued job at once, and waits until it has succeeded."""
        self.cluster.start_now(job, 1, LIMIT_S)
        facts = self.wait_for_end(job)
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "1"), facts

    def nodes_of(self, job: str) -> list[str]:
        nodes = self.cluster.wait_until(job, "RUNNING")["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", nodes).split()

    def processes(self, name: str, words: str, **variables: str) -> list[psutil.Process]:
        """The processes of a run whose command line has ``words`` and whose environment has these values."""
        found = []
        expected = {"RUN": str(self.folder(name)), **variables}
        for process in self.cluster.processes():
            with suppress(psutil.Error):
                if words in " ".join(process.cmdline()) and expected.items() <= process.environ().items():
                    found.append(process)
        return found

    # ---- what happens to a run

    def undisturbed(self) -> None:
        """The reference of all others. Afterwards it is submitted again."""
        facts = self.wait_for_end(self.submit("undisturbed"))
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), facts
        metrics = (self.folder("undisturbed") / "checkpoints" / "metrics.jsonl").read_bytes()
        facts = self.wait_for_end(self.submit("undisturbed"))
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), facts
        assert (self.folder("undisturbed") / "checkpoints" / "metrics.jsonl").read_bytes() == metrics

    def stopped(self) -> None:
        """Gets SIGTERM, as before a maintenance: saves, ends with 0, and requeues itself."""
        job = self.submit("stopped", PAUSE_AFTER=str(PAUSED))
        self.wait_for_pause("stopped")
        self.cluster.run("scancel", "--signal=TERM", job)
        self.finish_after_requeue(job)
        assert f"ended with code 0 at checkpoint {PAUSED}" in self.log("stopped")

    def killed_rank(self) -> None:
        """One of its ranks is killed."""
        job = self.submit("killed_rank", PAUSE_AFTER=str(PAUSED))
        self.wait_for_pause("killed_rank")
        (rank,) = self.processes("killed_rank", "pretrain_rasft.py", RANK="1")[:1]
        rank.kill()
        self.finish_after_requeue(job)
        assert re.search(r"ended with code [1-9]\d* at checkpoint 3", self.log("killed_rank"))

    def killed_node(self) -> None:
        """A node loses its power and comes back. Slurm requeues the job."""
        job = self.submit("killed_node", PAUSE_AFTER=str(PAUSED))
        self.wait_for_pause("killed_node")
        node = self.nodes_of(job)[-1]
        self.cluster.kill_node(node)
        self.cluster.wait_until(job, "PENDING", "COMPLETING", timeout_s=LIMIT_S)
        self.cluster.start_node(node)
        self.finish_after_requeue(job)

    # ---- what takes longer, for every night

    def killed_agent(self) -> None:
        """The torchrun of the second node is killed, and leaves its rank behind."""
        job = self.submit("killed_agent", PAUSE_AFTER=str(PAUSED))
        self.wait_for_pause("killed_agent")
        agents = self.processes("killed_agent", "torch.distributed.run", SLURM_NODEID="1")
        for agent in agents:
            if "RANK" not in agent.environ():
                agent.kill()
        self.finish_after_requeue(job)
        assert re.search(r"ended with code [1-9]\d* at checkpoint 3", self.log("killed_agent"))

    def stopped_by_the_limit(self) -> None:
        """The end of the allocation comes near: saves, ends with 0, and requeues itself. Slurm sends no signal."""
        job = self.submit(
            "stopped_by_the_limit",
            "--time=6",
            PAUSE_AFTER=str(PAUSED),
            PAUSE_BEFORE_END_S="90",
            flags="--exit-before-end-s 100",
        )
        self.finish_after_requeue(job)
        assert f"ended with code 0 at checkpoint {PAUSED}" in self.log("stopped_by_the_limit")

    def killed_by_the_limit(self) -> None:
        """The allocation ends during a step. The same job is submitted again."""
        job = self.submit(
            "killed_by_the_limit", "--time=3", PAUSE_AFTER=str(PAUSED), flags="--exit-before-end-s 0"
        )
        facts = self.wait_for_end(job)
        assert facts["JobState"] == "TIMEOUT", facts
        facts = self.wait_for_end(self.submit("killed_by_the_limit"))
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), facts

    def preempted(self) -> None:
        """A job of a partition with priority needs the nodes. Slurm sends SIGTERM and grants a grace time."""
        job = self.submit("preempted", PAUSE_AFTER=str(PAUSED))
        self.wait_for_pause("preempted")
        urgent = self.cluster.submit(
            "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=true"
        )
        self.wait_for_end(urgent)
        self.finish_after_requeue(job)
        assert f"ended with code 0 at checkpoint {PAUSED}" in self.log("preempted")

    def chain(self) -> None:
        """Three jobs of one name, without requeue: the second continues the first, the third finds the run finished."""
        options = ("--no-requeue", "--dependency=singleton", "--job-name=chain", "--open-mode=append")
        jobs = [self.submit("chain", *options, PAUSE_AFTER=str(PAUSED)) for _ in range(3)]
        self.wait_for_pause("chain")
        self.cluster.run("scancel", "--signal=TERM", jobs[0])
        for job in jobs:
            facts = self.wait_for_end(job)
            assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0"), (
                facts
            )
        assert self.log("chain").count("finished: ") == 2

    def heterogeneous(self) -> None:
        """Servers in the second group of a heterogeneous job. One is killed, returns, and rejoins the run."""
        name, servers = "heterogeneous", self.folder("heterogeneous") / "servers.txt"
        group = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=4")
        shipped = REPOSITORY / "examples" / "slurm" / "rasft.sbatch"
        settings = self.root / "served.sh"
        text = (self.script.parent / "settings.sh").read_text()
        text = text.replace("SERVER_NODES=0", "SERVER_NODES=2").replace(
            "SERVERS_PER_NODE=0", "SERVERS_PER_NODE=1"
        )
        settings.write_text(text)
        python = sorted(REPOSITORY.glob(".venv-sglang-[0-9]*/bin/python"))[-1]
        self.submit(
            name,
            *(*group, "--gpus-per-node=1", ":", *group, "--gpus-per-node=1"),
            script=shipped,
            first=str(settings),
            PAUSE_AFTER=str(PAUSED),
            SGLANG_PYTHON=str(python),
            MODEL=str(self.root / "model"),
            TRAIN_DATA=str(self.root / "sums.jsonl"),
        )
        self.wait_for_pause(name)
        before = servers.read_text().split()
        assert len(before) == 2
        launched = [
            p for p in self.processes(name, "sglang_on_cpu") if before[0].rpartition(":")[2] in p.cmdline()
        ]
        launched[0].kill()

        def has_returned() -> bool:
            return len(now := servers.read_text().split()) == 2 and now != before

        wait_for("the killed server", has_returned, LIMIT_S)
        (returned,) = {*servers.read_text().split()} - {*before}
        (self.folder(name) / "go").touch()
        job = self.jobs[name]
        facts = self.wait_for_end(job)
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), facts
        assert returned in self.log(name)
        assert servers.read_text() == "", "all servers have signed off"

    def assert_same(self, name: str) -> None:
        """Compares a run with the undisturbed one: metrics without times, rollouts and weights."""
        ours, reference = self.folder(name), self.folder("undisturbed")
        records = steps(reference / "checkpoints")
        assert list(records) == list(range(1, STEPS + 1))
        assert steps(ours / "checkpoints") == records
        stored = [run / "checkpoints" / "rollouts.jsonl" for run in (ours, reference)]
        assert stored[0].read_bytes() == stored[1].read_bytes()
        weights, expected = (load_file(run / "hf" / "model.safetensors") for run in (ours, reference))
        assert weights.keys() == expected.keys()
        assert not [name for name, tensor in expected.items() if not tensor.equal(weights[name])]


def run_all(runs: Runs, names: list[str]) -> dict[str, BaseException | None]:
    """Runs several at once, as far as the nodes suffice. Returns the error of each, or None."""

    def attempt(name: str) -> BaseException | None:
        try:
            getattr(runs, name)()
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(attempt, names), strict=True))
