"""What happens to runs on the test cluster. Each function brings a run to its end; ``Runs.assert_same`` then compares it."""

import re
import sys
from collections.abc import Sequence

from tests.slurm.cluster import wait_for
from tests.slurm.layouts import SHIPPED
from tests.slurm.runs import LIMIT_S, PAUSE, PAUSED, Runs, Scenario

REAL_TORCHRUN = {"FORKED_MODULES": ""}
"""The variable that makes torchrun a process of Slurm's step."""
STOPPED_AT = f"ended with code 0 at checkpoint {PAUSED}"
FAILED_AT = r"ended with code [1-9]\d* at checkpoint 3"
_LONG_MIN = 120
"""A time limit that no run reaches, minutes."""


def undisturbed(runs: Runs) -> None:
    """The reference of all others, on two nodes, without forked programs. Afterwards it is submitted again."""
    runs.succeed(runs.submit("undisturbed", PYTHON=sys.executable, PYTHON_EXEC=sys.executable))
    metrics = (runs.folder("undisturbed") / "checkpoints" / "metrics.jsonl").read_bytes()
    runs.succeed(runs.submit("undisturbed"))
    assert (runs.folder("undisturbed") / "checkpoints" / "metrics.jsonl").read_bytes() == metrics
    assert runs.log("undisturbed").count("finished: ") == 2


def stopped(runs: Runs) -> None:
    """Gets SIGTERM, as before a maintenance: saves, ends with 0, and requeues itself."""
    job = runs.submit("stopped", **PAUSE, **REAL_TORCHRUN)
    runs.wait_for_pause("stopped")
    runs.cluster.run("scancel", "--signal=TERM", job)
    runs.finish_after_requeue(job)
    assert STOPPED_AT in runs.log("stopped")


def killed_rank(runs: Runs) -> None:
    """One of its ranks is killed."""
    job = runs.submit("killed_rank", script=runs.on_one_node, **PAUSE)
    runs.wait_for_pause("killed_rank")
    (rank,) = runs.processes("killed_rank", "pretrain_rasft.py", RANK="1")[:1]
    rank.kill()
    runs.finish_after_requeue(job)
    assert re.search(FAILED_AT, runs.log("killed_rank"))


def killed_agent(runs: Runs) -> None:
    """The torchrun of the second node is killed, and leaves its rank behind.

    Slurm then stops the other node with SIGTERM. If that rank could save in time, the checkpoint would be another one.
    """
    job = runs.submit("killed_agent", **PAUSE, **REAL_TORCHRUN, PAUSE_FOR_EVER="1")
    runs.wait_for_pause("killed_agent")
    for agent in runs.processes("killed_agent", "torch.distributed.run", SLURM_NODEID="1"):
        if "RANK" not in agent.environ():
            agent.kill()
    runs.finish_after_requeue(job)
    assert re.search(FAILED_AT, runs.log("killed_agent"))


def killed_node(runs: Runs) -> None:
    """A node loses its power and comes back. Slurm requeues the job."""
    job = runs.submit("killed_node", **PAUSE, **REAL_TORCHRUN)
    runs.wait_for_pause("killed_node")
    node = runs.nodes_of(job)[-1]
    runs.cluster.kill_node(node)
    runs.cluster.wait_until(job, "PENDING", "COMPLETING", timeout_s=LIMIT_S)
    runs.cluster.start_node(node)
    runs.finish_after_requeue(job)


def stopped_by_the_limit(runs: Runs) -> None:
    """The end of the allocation comes near: saves, ends with 0, and requeues itself. Slurm sends no signal."""
    name = "stopped_by_the_limit"
    flags = "--exit-before-end-s 420"
    job = runs.submit(
        name, "--time=10", script=runs.on_one_node, flags=flags, **PAUSE, PAUSE_BEFORE_END_S="410"
    )
    runs.continue_with_limit(job, _LONG_MIN)
    assert re.search(r"ended with code 0 at checkpoint \w+, to be continued", runs.log(name))


def signalled_before_the_limit(runs: Runs) -> None:
    """Slurm sends SIGTERM to the job script some time before the limit: saves, ends with 0, and requeues itself."""
    name = "signalled_before_the_limit"
    job = runs.submit(
        name,
        *("--signal=B:TERM@600", f"--time={_LONG_MIN}"),
        script=runs.on_one_node,
        flags="--exit-before-end-s 0",
        **PAUSE,
    )
    runs.wait_for_pause(name)
    runs.set_limit(job, runs.elapsed_min(job) + 9)
    runs.continue_with_limit(job, _LONG_MIN)
    assert STOPPED_AT in runs.log(name)


def killed_by_the_limit(runs: Runs) -> None:
    """The allocation ends during a step. The same job is submitted again."""
    name = "killed_by_the_limit"
    job = runs.submit(
        name,
        f"--time={_LONG_MIN}",
        script=runs.on_one_node,
        flags="--exit-before-end-s 0",
        **PAUSE,
        PAUSE_FOR_EVER="1",
    )
    runs.wait_for_pause(name)
    runs.set_limit(job, 1)
    facts = runs.wait_for_end(job)
    assert facts["JobState"] == "TIMEOUT", facts
    runs.succeed(runs.submit(name, script=runs.on_one_node))


def preempted(runs: Runs) -> None:
    """A job of a partition with priority needs the node. Slurm sends SIGTERM and grants a grace time."""
    job = runs.submit("preempted", script=runs.on_one_node, **PAUSE)
    runs.wait_for_pause("preempted")
    (node,) = runs.nodes_of(job)
    urgent = ("--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=true")
    runs.succeed(runs.cluster.submit(*urgent))
    runs.finish_after_requeue(job)
    assert STOPPED_AT in runs.log("preempted")


def chain(runs: Runs) -> None:
    """Three jobs of one name, without requeue: the second continues the first, the third finds the run finished."""
    options = ("--no-requeue", "--dependency=singleton", "--job-name=chain", "--open-mode=append")
    jobs = [runs.submit("chain", *options, script=runs.on_one_node, **PAUSE) for _ in range(3)]
    runs.wait_for_pause("chain")
    runs.cluster.run("scancel", "--signal=TERM", jobs[0])
    for job in jobs:
        runs.succeed(job)
    assert runs.log("chain").count("finished: ") == 2


def served(runs: Runs) -> None:
    """The reference of ``heterogeneous``: one allocation, in which all servers live."""
    options = ("--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=4")
    runs.succeed(_submit_served(runs, "served", options, {}))


def heterogeneous(runs: Runs, servers: dict[str, str] | None = None) -> None:
    """Servers in the second group of a heterogeneous job. One is killed, returns, and rejoins the run.

    Args:
        servers: variables that choose other servers than the stand-ins.
    """
    name, file = "heterogeneous", runs.folder("heterogeneous") / "servers.txt"
    group = ("--ntasks-per-node=1", "--cpus-per-task=4", "--gpus-per-node=1")
    options = (*group, "--nodes=1", ":", *group, "--nodes=2")
    job = _submit_served(runs, name, options, {**PAUSE, **(servers or {})})
    runs.wait_for_pause(name)
    before = file.read_text().split()
    assert len(before) == 2
    port = before[0].rpartition(":")[2]
    next(server for server in runs.processes(name, "sglang_on_cpu") if port in server.cmdline()).kill()

    def has_returned() -> bool:
        return len(now := file.read_text().split()) == 2 and now != before

    wait_for("the killed server", has_returned, LIMIT_S)
    (returned,) = {*file.read_text().split()} - {*before}
    (runs.folder(name) / "go").touch()
    runs.succeed(job)
    assert returned in runs.log(name)
    assert file.read_text() == "", "all servers have signed off"


def _submit_served(runs: Runs, name: str, options: Sequence[str], variables: dict[str, str]) -> str:
    """Submits the shipped script with two servers and the other runs' settings."""
    settings = runs.root / "served.sh"
    text = (runs.on_one_node.parent / "settings.sh").read_text()
    numbers = "SERVER_NODES=2 SERVERS_PER_NODE=1 SERVER_TP=1"
    settings.write_text(f"{text}\n{numbers}\n", encoding="utf-8")
    given = {**runs.shared_files(runs.model), **variables}
    return runs.submit(name, *options, script=SHIPPED, settings=settings, **given)


DISTURBED: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        stopped,
        killed_node,
        killed_agent,
        killed_rank,
        stopped_by_the_limit,
        signalled_before_the_limit,
        killed_by_the_limit,
        preempted,
        chain,
    )
}
"""Name -> what happens to the run of this name."""
