"""Setting the scales of FP8's delayed recipe, and permission to unpickle a checkpoint's scales."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.model import fp8_scales
from megatron_rasft.model.fp8_scales import UNPICKLE, DelayedScales, own_scales_loaded

DELAYED: Any = SimpleNamespace(fp8="hybrid", fp8_recipe="delayed")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records the micro-batches of each call that sets the scales."""
    seen: list[Any] = []
    monkeypatch.setattr(fp8_scales, "set_delayed_scales", lambda forward: seen.append(forward()))
    return seen


def test_scales_of_a_few_probes_are_set_again_from_a_whole_batch(passes: list[Any]) -> None:
    scales = DelayedScales(is_used=True, forward=lambda batches: batches)
    scales.set_from(lambda: ["probes"], is_whole=False)
    assert scales.are_missing
    scales.set_from(lambda: ["a global batch"])
    scales.set_from(lambda: ["another"])
    assert passes == [["probes"], ["a global batch"]]
    assert not scales.are_missing


def test_other_recipes_set_no_scales(passes: list[Any]) -> None:
    scales = DelayedScales(is_used=False, forward=lambda batches: batches)
    scales.set_from(lambda: ["a global batch"])
    assert passes == []
    assert scales.state_dict() == {"has_fp8_scales": False}


@pytest.mark.parametrize(
    ("state", "is_used", "are_missing"),
    [
        ({"has_fp8_scales": True}, True, False),
        ({"has_fp8_scales": False}, True, True),  # the state that a run in BF16 saves
        ({"has_fp8_scales": False}, False, False),
    ],
)
def test_scales_that_a_checkpoint_lacks_are_set_after_a_resume(
    state: dict[str, bool], is_used: bool, are_missing: bool
) -> None:
    scales = DelayedScales(is_used=is_used, forward=lambda batches: batches)
    scales.load_state_dict(state)
    assert scales.are_missing == are_missing


def test_a_checkpoint_knows_whether_it_has_the_scales(passes: list[Any]) -> None:
    scales = DelayedScales(is_used=True, forward=lambda batches: batches)
    assert scales.state_dict() == {"has_fp8_scales": False}
    scales.set_from(list)
    assert scales.state_dict() == {"has_fp8_scales": True}


@pytest.mark.parametrize(
    ("args", "is_own", "is_allowed"),
    [
        (DELAYED, True, True),
        (DELAYED, False, False),
        (SimpleNamespace(fp8="hybrid", fp8_recipe="tensorwise"), True, False),
        (SimpleNamespace(fp8=None, fp8_recipe="delayed"), True, False),
    ],
)
def test_only_scales_of_the_runs_own_checkpoints_are_unpickled(
    args: Any, is_own: bool, is_allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(UNPICKLE, raising=False)
    with own_scales_loaded(args, is_own=is_own):
        assert (UNPICKLE in os.environ) == is_allowed
    assert UNPICKLE not in os.environ


def test_the_users_own_setting_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNPICKLE, "0")
    with own_scales_loaded(DELAYED, is_own=True):
        assert os.environ[UNPICKLE] == "0"
    assert os.environ[UNPICKLE] == "0"
