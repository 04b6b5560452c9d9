"""Every layout of examples/slurm, built as Megatron builds it, needs the memory that capacity planning calculates."""

from pathlib import Path

import pytest

from benchmarks import planned_memory
from tests.slurm_settings import SETTINGS

TOLERANCE = 0.02


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_fullest_rank_holds_what_is_calculated(path: Path) -> None:
    comparison = planned_memory.compare(path)
    assert comparison.built.weights > 2**30
    for part in ("weights", "gradients", "optimizer"):
        assert comparison.ratio(part) == pytest.approx(1.0, abs=TOLERANCE), (part, comparison)
