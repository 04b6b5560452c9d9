"""A run under a real Slurm that is stopped or loses a part, and goes on, equals the undisturbed run bit for bit."""

from collections.abc import Iterator

import pytest

from tests.slurm import cluster
from tests.slurm.runs import Runs, run_all

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(3600),  # the first test waits for all runs
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "no Slurm"),
]

DISTURBED = ["stopped", "killed_rank", "killed_node"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cluster.Cluster() as started:
        yield Runs(started, tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def errors(runs: Runs) -> dict[str, BaseException | None]:
    """Runs all of them, two at a time on the four nodes."""
    return run_all(runs, ["undisturbed", *DISTURBED])


def succeeded(runs: Runs, errors: dict[str, BaseException | None], name: str) -> None:
    if error := errors[name]:
        print(runs.log(name))
        raise error


def test_run_that_plan_wrote_finishes_and_ends_at_once_when_submitted_again(
    runs: Runs, errors: dict[str, BaseException | None]
) -> None:
    succeeded(runs, errors, "undisturbed")
    assert runs.log("undisturbed").count("finished: ") == 2


@pytest.mark.parametrize("name", DISTURBED)
def test_disturbed_run_equals_the_undisturbed_one(
    runs: Runs, errors: dict[str, BaseException | None], name: str
) -> None:
    succeeded(runs, errors, "undisturbed")
    succeeded(runs, errors, name)
    runs.assert_same(name)
