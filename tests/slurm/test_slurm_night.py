"""The scenarios of tests/slurm with programs that start as they do for a user, and real servers. `make slurm-night` runs them."""

import pytest

from tests.forking import REPOSITORY
from tests.slurm import cluster
from tests.slurm.runs import Runs, run_all
from tests.slurm.scenarios import DISTURBED, heterogeneous, undisturbed

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(7200),  # the first test waits for all runs
    pytest.mark.nightly,
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "no Slurm"),
]


@pytest.fixture(scope="module")
def night(slurm: cluster.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(slurm, tmp_path_factory.mktemp("night"))


@pytest.fixture(scope="module")
def errors(night: Runs) -> dict[str, BaseException | None]:
    return run_all(night, {"undisturbed": undisturbed, **DISTURBED}, side_by_side=2)


@pytest.mark.parametrize("name", DISTURBED)
def test_disturbed_run_equals_the_undisturbed_one(
    night: Runs, errors: dict[str, BaseException | None], name: str
) -> None:
    for run in ("undisturbed", name):
        if error := errors[run]:
            print(night.log(run))
            raise error
    night.assert_same(name)


def test_killed_server_of_a_heterogeneous_job_rejoins_the_run(night: Runs) -> None:
    python = sorted(REPOSITORY.glob(".venv-sglang-[0-9]*/bin/python"))[-1]
    try:
        heterogeneous(night, {"SGLANG_PYTHON": str(python)})
    except BaseException:
        print(night.log("heterogeneous"))
        raise
