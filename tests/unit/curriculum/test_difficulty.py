"""Thresholds, band and routes, against numpy and the vectors of the published script."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rasft.config.curriculum import CurriculumConfig
from megatron_rasft.curriculum.difficulty import (
    Thresholds,
    calibrate_thresholds,
    difficulty_band,
    interpolated_quantile,
    route_difficulty,
)

VECTOR = Thresholds(easy_floor=0.1, low_start=0.2, high_start=0.45, low_end=0.5, high_end=0.75, ceiling=0.9)
finite = st.floats(0, 20, allow_nan=False)


@pytest.mark.parametrize(("step", "edges"), [(0, (0.2, 0.45)), (500, (0.35, 0.60)), (1000, (0.5, 0.75))])
def test_band_slides_linearly(step, edges):
    assert difficulty_band(VECTOR, step / 1000) == pytest.approx(edges)


@pytest.mark.parametrize(("progress", "same_as"), [(-0.5, 0.0), (1.5, 1.0)])
def test_band_stops_at_its_ends(progress, same_as):
    assert difficulty_band(VECTOR, progress) == difficulty_band(VECTOR, same_as)


def test_routes_of_the_published_vector():
    difficulties = [0.05, 0.1, 0.15, 0.2, 0.45, 0.46, 0.9, 0.95]
    routes = [route_difficulty(d, VECTOR, 0.0) for d in difficulties]
    assert routes == ["easy", "easy", "rest", "middle", "middle", "hard", "hard", "rest"]


@settings(deadline=None)  # numpy's first quantile in a process is slow
@given(st.lists(finite, min_size=1, max_size=60), st.floats(0, 1))
def test_quantile_is_the_linear_one(values, q):
    assert interpolated_quantile(sorted(values), q) == pytest.approx(
        np.quantile(values, q), rel=1e-9, abs=1e-9
    )


@given(st.lists(finite, min_size=1, max_size=60), finite, st.floats(0, 1))
def test_thresholds_are_ordered_and_every_problem_has_a_route(values, difficulty, progress):
    t = calibrate_thresholds(values, CurriculumConfig())
    low, high = difficulty_band(t, progress)
    slack = 1e-9
    assert t.easy_floor <= low + slack and low <= high + slack and high <= t.ceiling + slack
    assert route_difficulty(difficulty, t, progress) in ("easy", "middle", "hard", "rest")


def test_thresholds_sit_at_the_configured_quantiles():
    t = calibrate_thresholds(range(101), CurriculumConfig())
    assert (t.easy_floor, t.low_start, t.high_start, t.low_end, t.high_end, t.ceiling) == pytest.approx(
        (10, 20, 45, 50, 75, 90)
    )


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_calibration_refuses_what_is_not_a_difficulty(values):
    with pytest.raises(ValueError, match="finite"):
        calibrate_thresholds(values, CurriculumConfig())


@pytest.mark.parametrize(
    ("fields", "flag"),
    [
        ({"curriculum_mode": "some"}, "--curriculum-mode"),
        ({"curriculum_calibration_rows": 0}, "--curriculum-calibration-rows"),
        ({"curriculum_hard_frac": 1.5}, "--curriculum-hard-frac"),
        ({"curriculum_easy_floor": 0.3}, "--curriculum-low-start"),
        ({"curriculum_low_start": 0.5}, "--curriculum-high-start"),
        ({"curriculum_ceiling": 0.7}, "--curriculum-ceiling"),
    ],
)
def test_config_names_the_wrong_flag(fields, flag):
    with pytest.raises(ValueError, match=flag):
        CurriculumConfig(**fields)
