"""A run under a real Slurm that is stopped or loses a part, and goes on, equals the undisturbed run bit for bit."""

import pytest

from tests.slurm import cluster
from tests.slurm.arrays import array
from tests.slurm.layouts import LAYOUTS, killed_and_resumed
from tests.slurm.runs import Runs, Scenario, run_all
from tests.slurm.scenarios import DISTURBED, heterogeneous, served, undisturbed

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(3600),  # the first test waits for all runs
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "no Slurm"),
]

SIDE_BY_SIDE = 6
"""Runs at the same time. Most of them wait for something most of the time."""
LIKE_OTHERS = ("qwen3-8b", "qwen2.5-72b")
"""Settings with the layout of another one: for every night."""
SCENARIOS: dict[str, Scenario] = {
    **{scenario.__name__: scenario for scenario in (undisturbed, heterogeneous, served, array)},
    **DISTURBED,
    **{name: killed_and_resumed(name) for name in LAYOUTS},
}
NEEDED = {**dict.fromkeys(DISTURBED, "undisturbed"), "heterogeneous": "served"}
"""Name of a run -> the run with which it is compared."""

Errors = dict[str, BaseException | None]


@pytest.fixture(scope="module")
def errors(runs: Runs, request: pytest.FixtureRequest) -> Errors:
    """Brings the runs of the selected tests to their end."""
    tests = [item for item in request.session.items if getattr(item, "module", None) is request.module]
    names = {item.callspec.params["name"] for item in tests if isinstance(item, pytest.Function)}
    names |= {NEEDED[name] for name in names & NEEDED.keys()}
    chosen = {name: scenario for name, scenario in SCENARIOS.items() if name in names}
    return run_all(runs, chosen, SIDE_BY_SIDE)


def check(runs: Runs, errors: Errors, *names: str) -> None:
    for name in names:
        if error := errors[name]:
            print(runs.log(name))
            raise error


@pytest.mark.parametrize("name", ["undisturbed"])
def test_run_that_plan_wrote_finishes_and_ends_at_once_when_submitted_again(
    runs: Runs, errors: Errors, name: str
) -> None:
    check(runs, errors, name)


@pytest.mark.parametrize("name", NEEDED)
def test_disturbed_run_equals_the_undisturbed_one(runs: Runs, errors: Errors, name: str) -> None:
    check(runs, errors, NEEDED[name], name)
    runs.assert_same(name, NEEDED[name])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.nightly] * (name in LIKE_OTHERS)) for name in LAYOUTS]
)
def test_shipped_setting_resumes_with_its_layout(runs: Runs, errors: Errors, name: str) -> None:
    check(runs, errors, name)


@pytest.mark.parametrize("name", ["array"])
def test_job_array_that_stops_before_its_limit_goes_on_when_submitted_again(
    runs: Runs, errors: Errors, name: str
) -> None:
    check(runs, errors, name)
