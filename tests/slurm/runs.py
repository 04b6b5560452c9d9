"""Runs of the shipped job script on the test cluster, with toy sizes, and what happens to them."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
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
ENDS = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
"""Slurm's states of a job that is over."""
PAUSE = {"PAUSE_AFTER": str(PAUSED)}
"""The variable of a run that pauses."""
LIMIT_S = 1800.0
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
    interpreter: dict[str, str] = field(default_factory=lambda: {"PYTHON": sys.executable})
    """The variables that choose the interpreter of a job's programs."""
    on_emulated_gpus: dict[str, str] = field(default_factory=dict)
    """The variables that choose an interpreter whose programs have emulated GPUs."""
    jobs: dict[str, str] = field(default_factory=dict)
    """Name of a run -> the number of its newest job."""
    script: Path = field(init=False)
    """rasft.sbatch as tools/plan.py has written it, for two nodes with a process each."""
    on_one_node: Path = field(init=False)
    """The same for one node with two processes."""

    def __post_init__(self) -> None:
        write_model(self.model)
        write_sums(self.data, 40)
        self.script = self.planned("planned", self.more_planned)
        self.on_one_node = self.planned("planned_on_one_node", "--gpus-per-node 2")
        # copied, because its programs look for others beside them
        shutil.copytree(REPOSITORY / "examples", self.checkout / "examples")
        for name in ("megatron_rasft", "tools"):
            (self.checkout / name).symlink_to(REPOSITORY / name)
        shutil.copy(Path(__file__).with_name("paused_program.py"), self.checkout / "pretrain_rasft.py")

    @property
    def checkout(self) -> Path:
        return self.root / "checkout"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def data(self) -> Path:
        return self.root / "sums.jsonl"

    def planned(self, name: str, flags: str) -> Path:
        """Returns the job script that tools/plan.py writes with these flags in addition to ``PLAN``."""
        words = ["--hf-model", str(self.model), "--train-data", str(self.data)]
        words += ["--slurm", str(self.root / name), *PLAN.split(), *flags.split()]
        assert cli.run(plan.main, words) == 0
        return self.root / name / "rasft.sbatch"

    def shared_files(self, model: Path) -> dict[str, str]:
        """The variables that the shipped script needs, and whose values tools/plan.py writes into its script."""
        servers = self.root / "served_stand_in"
        program = Path(__file__).with_name("served_stand_in.py")
        servers.write_text(
            f'#!/bin/sh\nexport PYTHONPATH={REPOSITORY}\nexec "$PYTHON" {program} "$@"\n', encoding="utf-8"
        )
        servers.chmod(0o755)
        return {"MODEL": str(model), "TRAIN_DATA": str(self.data), "SGLANG_PYTHON": str(servers)}

    def folder(self, name: str) -> Path:
        return self.root / name

    def submit(
        self,
        name: str,
        *options: str,
        script: Path | None = None,
        settings: Path | None = None,
        flags: str = "",
        **variables: str,
    ) -> str:
        """Submits a run of a job script of examples/slurm in a folder of its own; returns the job's number.

        Args:
            options: of sbatch.
            script: another job script than ``self.script``.
            settings: its first argument, which a script of tools/plan.py does not need.
            flags: further flags of pretrain_rasft.py.
        """
        given = [str(settings)] if settings else []
        return self.submit_script(
            name, script or self.script, [*given, *FLAGS.split(), *flags.split()], options, **variables
        )

    def submit_script(
        self, name: str, script: Path, arguments: Sequence[str], options: Sequence[str] = (), **variables: str
    ) -> str:
        """Submits any job script from the tests' checkout. ``RUN`` is the run's folder."""
        given = {
            **ENVIRONMENT,
            "CHECKOUT": str(self.checkout),
            "REAL_CHECKOUT": str(REPOSITORY),
            **self.interpreter,
            "PYTHONPATH": str(REPOSITORY),
            "HEAD_ADDRESS": "127.0.0.1",
            "HEAD_PORT": str(new_port()),
            "CPU": "1",
            "RUN": str(self.folder(name)),
            **variables,
        }
        log = f"--output={self.root}/{name}.log"
        self.jobs[name] = self.cluster.submit(
            log, *options, str(script), *arguments, variables=given, folder=self.checkout
        )
        return self.jobs[name]

    def log(self, name: str) -> str:
        """The job's log and those of its steps."""
        paths = [self.root / f"{name}.log", *sorted(self.folder(name).glob("logs/*.log"))]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')}" for p in paths if p.exists())

    def wait_for_pause(self, name: str) -> None:
        """Waits until a run pauses. Raises AssertionError if its job ends before."""

        def is_paused() -> bool:
            state = self.cluster.facts(self.jobs[name]).get("JobState")
            assert state not in ENDS, f"{name} is {state} before its pause"
            return (self.folder(name) / "paused").exists()

        wait_for(f"pause of {name}", is_paused, LIMIT_S, every_s=1.0)

    def wait_for_end(self, job: str) -> dict[str, str]:
        """Waits for the end of a job; returns its facts."""
        return self.cluster.wait_until(job, *ENDS, timeout_s=LIMIT_S, every_s=1.0)

    def finish_after_requeue(self, job: str) -> None:
        """Starts a requeued job at once, and waits until it has succeeded."""
        self.cluster.start_now(job, 1, LIMIT_S)
        self.succeed(job, num_restarts=1)

    def succeed(self, job: str, num_restarts: int = 0) -> None:
        """Waits until a job has succeeded."""
        facts = self.wait_for_end(job)
        expected = ("COMPLETED", "0:0", str(num_restarts))
        assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == expected, facts

    def nodes_of(self, job: str) -> list[str]:
        nodes = self.cluster.wait_until(job, "RUNNING")["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", nodes).split()

    def continue_with_limit(self, job: str, minutes: int) -> None:
        """Waits until a job that stops has requeued itself, starts it at once with another time limit, and waits until it has succeeded."""

        def is_requeued() -> bool:
            facts = self.cluster.facts(job)
            return (facts.get("JobState"), facts.get("Restarts")) == ("PENDING", "1")

        wait_for(f"requeue of job {job}", is_requeued, LIMIT_S)
        self.set_limit(job, minutes)
        self.finish_after_requeue(job)

    def elapsed_min(self, job: str) -> int:
        """Returns for how many whole minutes a job has run."""
        days, _, clock = self.cluster.facts(job)["RunTime"].rpartition("-")
        hours, minutes, _ = map(int, clock.split(":"))
        return int(days or 0) * 24 * 60 + hours * 60 + minutes

    def set_limit(self, job: str, minutes: int) -> None:
        """Changes the time limit of a job."""
        self.cluster.run("scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}")

    def processes(self, name: str, words: str, **variables: str) -> list[psutil.Process]:
        """The processes of a run whose command line has ``words`` and whose environment has these values."""
        found = []
        expected = {"RUN": str(self.folder(name)), **variables}
        for process in self.cluster.processes():
            with suppress(psutil.Error):
                if words in " ".join(process.cmdline()) and expected.items() <= process.environ().items():
                    found.append(process)
        return found

    def assert_same(self, name: str, reference_name: str = "undisturbed", num_steps: int = STEPS) -> None:
        """Compares a run with the undisturbed one: metrics without times, rollouts and weights."""
        ours, reference = self.folder(name), self.folder(reference_name)
        records = steps(reference / "checkpoints")
        assert list(records) == list(range(1, num_steps + 1))
        assert steps(ours / "checkpoints") == records
        stored = [run / "checkpoints" / "rollouts.jsonl" for run in (ours, reference)]
        assert stored[0].read_bytes() == stored[1].read_bytes()
        weights, expected = (load_file(run / "hf" / "model.safetensors") for run in (ours, reference))
        assert weights.keys() == expected.keys()
        assert not [name for name, tensor in expected.items() if not tensor.equal(weights[name])]


Scenario = Callable[[Runs], None]
"""Brings a run to its end."""


def run_all(
    runs: Runs, scenarios: Mapping[str, Scenario], side_by_side: int
) -> dict[str, BaseException | None]:
    """Runs several, some of them side by side. Returns the error of each, or None."""

    def attempt(scenario: Scenario) -> BaseException | None:
        try:
            scenario(runs)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(side_by_side) as pool:
        return dict(zip(scenarios, pool.map(attempt, scenarios.values()), strict=True))
