"""The estimate of a weight sync's time."""

import pytest

from megatron_rasft.tools.capacity.sync_time import SyncCosts, estimate_sync

COSTS = SyncCosts(gather=100.0, network=10.0, load=50.0, request_s=0.5, control_s=2.0)


def test_the_slower_of_gathering_and_sending_counts_once_they_overlap() -> None:
    estimate = estimate_sync(1000.0, 10, COSTS)
    assert estimate.gather_s == pytest.approx(10)
    assert estimate.send_s == pytest.approx(100 + 20 + 5)
    assert estimate.total_s == pytest.approx(1 + 125 + 2)  # the first bucket's gather is not hidden
    apart = estimate_sync(1000.0, 10, COSTS, overlaps=False)
    assert apart.total_s == pytest.approx(10 + 125 + 2)


def test_a_slow_gather_hides_the_sending() -> None:
    slow = SyncCosts(gather=1.0, network=10.0, load=50.0, request_s=0.5, control_s=2.0)
    assert estimate_sync(1000.0, 10, slow).total_s == pytest.approx(1000 + 2)


def test_each_stage_has_a_first_bucket() -> None:
    one, four = (estimate_sync(1000.0, 40, COSTS, num_stages=n).total_s for n in (1, 4))
    assert four - one == pytest.approx(3 * 10 / 40)


def test_a_proof_by_checksums_is_part_of_the_gather() -> None:
    proven = SyncCosts(gather=100.0, network=10.0, load=50.0, request_s=0.5, control_s=2.0, proof=5.0)
    estimate = estimate_sync(1000.0, 10, proven)
    assert estimate.proof_s == pytest.approx(200)
    assert estimate.total_s == pytest.approx(1 + (10 + 200 - 1) + 2)
