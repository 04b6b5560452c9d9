"""The scenarios of tests/slurm that take minutes: time limits, preemption, chains of jobs, servers. `make slurm-night` runs them."""

from collections.abc import Iterator

import pytest

from tests.slurm import cluster
from tests.slurm.runs import Runs

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(3600),  # the first test waits for all runs
    pytest.mark.nightly,
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "no Slurm"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cluster.Cluster() as started:
        made = Runs(started, tmp_path_factory.mktemp("slurm"))
        made.undisturbed()
        yield made


@pytest.mark.parametrize(
    "name", ["killed_agent", "stopped_by_the_limit", "killed_by_the_limit", "preempted", "chain"]
)
def test_disturbed_run_equals_the_undisturbed_one(runs: Runs, name: str) -> None:
    try:
        getattr(runs, name)()
    except BaseException:
        print(runs.log(name))
        raise
    runs.assert_same(name)


def test_killed_server_of_a_heterogeneous_job_rejoins_the_run(runs: Runs) -> None:
    try:
        runs.heterogeneous()
    except BaseException:
        print(runs.log("heterogeneous"))
        raise
