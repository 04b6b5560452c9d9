"""Samples are scored in parts, and the run may stop between two of them."""

import contextlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_rasft.model.fp8_scales import DelayedScales
from megatron_rasft.monitoring.stopping import Stopped
from megatron_rasft.training.scoring import Scorer
from megatron_rasft.types import TrainingSample
from tests.unit.training.test_batch_preparation import preparer


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensor_model", "context"):
        monkeypatch.setattr(parallel_state, f"get_{name}_parallel_rank", lambda: 0)
    monkeypatch.setattr(parallel_state, "get_context_parallel_group", lambda: SimpleNamespace(size=lambda: 1))


def samples(num: int) -> list[TrainingSample]:
    """Sample i has the prompt [i] and the response [i + 10, i + 20]."""
    return [
        TrainingSample(
            problem_id="p", kind="demonstration", prompt_ids=[i], response_ids=[i + 10, i + 20], weight=1.0
        )
        for i in range(num)
    ]


class Reference:
    """A reference that records whether its context is open."""

    is_in_place = False

    @contextlib.contextmanager
    def in_place(self) -> Any:
        self.is_in_place = True
        yield
        self.is_in_place = False


class Pass:
    """A forward pass whose log-probability of a token is its negated id, 100 less for the reference's."""

    def __init__(self, reference: Reference) -> None:
        self.num_samples: list[int] = []
        self._reference = reference

    def __call__(self, batches: Sequence[Any]) -> list[torch.Tensor]:
        self.num_samples.append(sum(int((b.position_ids == 0).sum()) for b in batches))
        shift = 100.0 if self._reference.is_in_place else 0.0
        return [-b.labels.flatten().float() - shift for b in batches]


def scorer_of(
    check_stop: Callable[[], None] = lambda: None, scales: DelayedScales | None = None
) -> tuple[Scorer, Pass]:
    """A scorer on one rank, for global batches of 2 samples."""
    reference = Reference()
    forward = Pass(reference)
    scales = scales or DelayedScales(is_used=False, forward=forward)
    parts = (preparer(), forward, scales, reference, contextlib.nullcontext, check_stop, 2)
    return Scorer(*parts), forward  # type: ignore[arg-type]


@pytest.mark.parametrize(("with_reference", "shift"), [(False, 0), (True, 100)])
def test_each_response_gets_its_tokens_log_probabilities(with_reference: bool, shift: int) -> None:
    scorer, _ = scorer_of()
    scored = scorer.score(samples(5), with_reference=with_reference)
    assert [values.tolist() for values in scored] == [
        [-(i + 10) - shift, -(i + 20) - shift] for i in range(5)
    ]


def test_no_samples_need_no_pass() -> None:
    scorer, forward = scorer_of()
    assert scorer.score([], with_reference=True) == []
    assert forward.num_samples == []


def test_a_stop_is_noticed_between_two_parts() -> None:
    checks: list[int] = []

    def check() -> None:
        checks.append(1)
        if len(checks) == 2:
            raise Stopped

    scorer, forward = scorer_of(check)
    with pytest.raises(Stopped):
        scorer.score(samples(20), with_reference=False)
    assert len(forward.num_samples) == 1, "a part is a few global batches"


def test_fp8_scales_are_set_from_the_first_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def note(batches: list[Any]) -> None:
        sizes.append(sum(int((b.position_ids == 0).sum()) for b in batches))

    monkeypatch.setattr("megatron_rasft.model.fp8_scales.set_delayed_scales", lambda forward: forward())
    scorer, _ = scorer_of(scales=DelayedScales(is_used=True, forward=note))
    for num in (1, 5, 5):  # the probes of a sync with servers come first
        assert len(scorer.score(samples(num), with_reference=False)) == num
    assert sizes == [1, 2]
