"""The sequences that one problem contributes to training, for each objective."""

import math
import random
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rasft.objective.declaration import Objective, SampledProblem
from megatron_rasft.objective.families import OBJECTIVES
from megatron_rasft.objective.families.likelihood import Raft
from megatron_rasft.objective.families.policy_ratio import Grpo
from megatron_rasft.objective.families.rasft import Rasft
from megatron_rasft.objective.families.self_distillation import Sdft
from megatron_rasft.objective.families.token_selective import Gft
from megatron_rasft.objective.groups import distinct_texts
from megatron_rasft.objective.samples import make_samples
from megatron_rasft.objective.token_losses import PackedTokens, token_loss_sums
from megatron_rasft.objective.weighting import (
    WeightingConfig,
    demonstration_weight,
    estimate_solvability,
    rollout_total,
    wrong_total,
)
from megatron_rasft.types import Demonstration, RolloutGroup, TrainingSample
from tests.unit.objective.sampled_groups import counted_group, demonstration, make_group, rollout

NO_PRIOR = WeightingConfig(weighting_prior_strength=0.0)


def weights_of(samples: list[TrainingSample]) -> list[tuple[str, Any]]:
    return [(s.kind, pytest.approx(s.weight)) for s in samples]


MIXED: tuple[dict[str, Any], ...] = (
    {"index": 0, "verdict": "correct"},
    {"index": 1, "verdict": "wrong"},
    {"index": 2, "verdict": "correct", "finish": "length"},
    {"index": 3, "verdict": "correct", "finish": "abort"},
    {"index": 4, "verdict": "correct", "num_tokens": 0},
    {"index": 5, "verdict": "wrong", "finish": "length"},
)


def mixed_group() -> RolloutGroup:
    return make_group(*(rollout(**fields) for fields in MIXED))


@pytest.mark.parametrize("kind", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_every_objective_trains_on_what_it_declares(kind: type[Objective]) -> None:
    kinds = {s.kind for s in make_samples(kind(), demonstration(), mixed_group(), config=NO_PRIOR)}
    expected = {
        "demonstrations": {"demonstration"},
        "rollouts": {"rollout"},
        "both": {"demonstration", "rollout"},
    }
    assert kinds == expected[kind.trains_on]


@pytest.mark.parametrize("num_tokens", [0, 8])
@pytest.mark.parametrize("rule", ["adaptive", "published"])
def test_no_denominator_is_without_demonstrations(
    rule: Literal["adaptive", "published"], num_tokens: int
) -> None:
    problem, group = demonstration(), counted_group(2, 1)
    problem.response_ids = [3] * num_tokens
    for r in group.rollouts:
        r.response_ids = [9] * 3
    config = WeightingConfig(rasft_weighting=rule, weighting_normalization="problem")
    assert make_samples(Rasft(), problem, group, config=config, max_tokens=9) == []
    assert {r.weight for r in group.rollouts} == {0.0}
    by_tokens = WeightingConfig(rasft_weighting=rule, weighting_normalization="tokens")
    samples = make_samples(Rasft(), problem, group, config=by_tokens, max_tokens=9)
    assert [(s.kind, s.is_counted) for s in samples] == [("rollout", True)] * 2


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES.values() if kind.trains_on == "demonstrations"])
def test_demonstration_objectives_ignore_rollouts(kind: type[Objective]) -> None:
    group = mixed_group()
    group.rollouts[0].weight = 9.0
    samples = make_samples(kind(), demonstration(), group, config=WeightingConfig())
    assert weights_of(samples) == [("demonstration", 1.0)]
    assert (samples[0].prompt_ids, samples[0].response_ids) == ([1, 2], [3, 4])
    assert [r.weight for r in group.rollouts] == [0.0] * 6


def test_rasft_trains_the_demonstration_and_the_complete_correct_rollouts() -> None:
    group = mixed_group()
    samples = make_samples(Rasft(), demonstration(), group, config=NO_PRIOR)
    # four attempts, one solved: s = 1/4
    # The rollout has three tokens, the demonstration two.
    assert weights_of(samples) == [("demonstration", 1.5 - 1.2 / 4), ("rollout", 0.7 / 4 * 2 / 3)]
    assert [(s.problem_id, s.prompt_ids) for s in samples] == [("p", [1, 2])] * 2
    assert [s.response_ids for s in samples] == [[3, 4], [10, 10, 10]]
    assert [r.weight for r in group.rollouts] == pytest.approx([0.175 * 2 / 3, 0, 0, 0, 0, 0])


def sized_problem(
    draw: random.Random, num_correct: int, num_wrong: int
) -> tuple[Demonstration, RolloutGroup]:
    """A problem whose demonstration and rollouts have random lengths."""
    group = counted_group(num_correct, num_wrong)
    for r in group.rollouts:
        r.response_ids = [9] * draw.randint(1, 400)
    problem = demonstration()
    problem.response_ids = [3] * draw.randint(1, 400)
    return problem, group


def mass(samples: list[TrainingSample]) -> float:
    """Weight x tokens of a problem, relative to an unsampled problem with the same demonstration."""
    return sum(s.weight * len(s.response_ids) for s in samples) / len(samples[0].response_ids)


@given(st.integers(0, 16), st.integers(0, 16), st.integers(0, 10_000), st.booleans())
def test_mass_of_a_problem_depends_on_its_solvability_alone(
    num_correct: int, num_wrong: int, seed: int, has_prior: bool
) -> None:
    config = WeightingConfig() if has_prior else NO_PRIOR
    problem, group = sized_problem(random.Random(seed), num_correct, num_wrong)
    samples = make_samples(Rasft(), problem, group, config=config)
    s = estimate_solvability(num_correct, num_correct + num_wrong, config)
    expected = 1.0 if s is None else demonstration_weight(s, config)
    if num_correct:
        assert s is not None
        expected += rollout_total(s, config)
    assert mass(samples) == pytest.approx(expected, rel=1e-12)
    assert mass(make_samples(Rasft(), problem, config=config)) == 1.0
    assert [s.is_counted for s in samples] == [True] + [False] * num_correct
    assert len({s.weight for s in samples[1:]}) <= 1, "every token of the rollouts has the same weight"


@given(st.integers(1, 16), st.integers(0, 16), st.integers(0, 10_000))
def test_mass_of_each_sign_depends_on_solvability_alone(num_correct: int, num_wrong: int, seed: int) -> None:
    config = WeightingConfig(weighting_wrong_total=2.5, weighting_rollout_fall=0.5)
    problem, group = sized_problem(random.Random(seed), num_correct, num_wrong)
    first, *samples = make_samples(Rasft(), problem, group, config=config)
    masses = {True: 0.0, False: 0.0}
    for sample in samples:
        masses[sample.weight > 0] += sample.weight * len(sample.response_ids) / len(first.response_ids)
    s = estimate_solvability(num_correct, num_correct + num_wrong, config)
    assert s is not None
    assert masses[True] == pytest.approx(rollout_total(s, config), rel=1e-12)
    assert masses[False] == pytest.approx(-wrong_total(s, config) if num_wrong else 0.0, rel=1e-12)
    assert len(samples) == num_correct + num_wrong and len({s.weight for s in samples}) <= 2
    assert not any(s.is_counted for s in samples)


def gradient_of(problems: list[list[TrainingSample]]) -> list[float]:
    """The sum of the loss's gradient over the tokens of each problem, in a batch whose tokens all have the probability 1/2."""
    samples = [sample for problem in problems for sample in problem]
    lengths = torch.tensor([len(sample.response_ids) for sample in samples])
    logprobs = torch.full((int(lengths.sum()),), math.log(0.5), dtype=torch.float64).requires_grad_()
    tokens = PackedTokens(
        logprobs=logprobs,
        loss_mask=torch.ones_like(logprobs),
        segment_ids=torch.arange(len(samples)).repeat_interleave(lengths),
        num_segments=len(samples),
        weights=torch.tensor([sample.weight for sample in samples], dtype=torch.float64),
        are_counted=torch.tensor([sample.is_counted for sample in samples]),
        ref_logprobs=logprobs.detach(),
    )
    sums = token_loss_sums(tokens, Rasft())
    (gradient,) = torch.autograd.grad(sums.loss_sum / sums.denominator, logprobs)
    sizes = [sum(len(sample.response_ids) for sample in problem) for problem in problems]
    return [float(part.sum()) for part in gradient.split(sizes)]


def test_share_of_a_problem_in_the_loss_does_not_depend_on_its_neighbours() -> None:
    draw = random.Random(4)
    hard, hard_group = sized_problem(draw, 0, 4)
    unsampled, _ = sized_problem(draw, 0, 0)
    neighbour, _ = sized_problem(draw, 0, 0)
    gradients = []
    for num_correct, num_wrong in ((0, 1), (1, 0), (3, 1), (16, 0)):
        _, group = sized_problem(draw, num_correct, num_wrong)
        problems = [
            make_samples(Rasft(), hard, hard_group, config=NO_PRIOR),
            make_samples(Rasft(), unsampled, config=NO_PRIOR),
            make_samples(Rasft(), neighbour, group, config=NO_PRIOR),
        ]
        gradients.append(gradient_of(problems))
        s = num_correct / (num_correct + num_wrong)
        lengths = [len(d.response_ids) for d in (hard, unsampled, neighbour)]
        masses = [1.5, 1.0, demonstration_weight(s, NO_PRIOR) + rollout_total(s, NO_PRIOR)]
        expected = [-0.5 * m * n / sum(lengths) for m, n in zip(masses, lengths, strict=True)]
        assert gradients[-1] == pytest.approx(expected, rel=1e-9)
    assert len({tuple(round(value, 12) for value in part[:2]) for part in gradients}) == 1


def test_normalization_follows_the_rule_unless_its_flag_says_otherwise() -> None:
    adaptive, published = WeightingConfig(), WeightingConfig(rasft_weighting="published")
    assert adaptive.is_per_problem and not published.is_per_problem
    problem, group = sized_problem(random.Random(1), 2, 1)
    for config in (WeightingConfig(weighting_normalization="tokens", weighting_prior_strength=0), published):
        samples = make_samples(Rasft(), problem, group, config=config)
        assert all(s.is_counted for s in samples)
        of_rasft = Rasft().weigh(sampled(group, config))
        assert [s.weight for s in samples[1:]] == list(of_rasft.rollouts.values())
    both = WeightingConfig(rasft_weighting="published", weighting_normalization="problem")
    assert mass(make_samples(Rasft(), problem, group, config=both)) == pytest.approx(
        0.1551 + 2 * 0.005, abs=5e-5
    )


def sampled(group: RolloutGroup, config: WeightingConfig) -> SampledProblem:
    return SampledProblem(
        group=group, weighting=config, remembered=None, deduplicate=distinct_texts, similarity=None
    )


def test_rollouts_that_are_too_long_leave_their_share_to_the_others() -> None:
    group = make_group(rollout(0, num_tokens=7), rollout(1, num_tokens=2), rollout(2, num_tokens=8))
    samples = make_samples(Rasft(), demonstration(), group, config=NO_PRIOR, max_tokens=9)
    assert [len(s.response_ids) for s in samples] == [2, 7, 2]
    assert mass(samples) == pytest.approx(0.3 + 0.7)
    assert group.rollouts[2].weight == 0.0
    (alone,) = make_samples(Rasft(), demonstration(), group, config=NO_PRIOR, max_tokens=4)[:1]
    assert alone.kind == "demonstration"
    assert make_samples(Rasft(), demonstration(), group, config=NO_PRIOR, max_tokens=3) == []


@pytest.mark.parametrize("normalization", ["problem", "tokens"])
def test_wrong_rollouts_are_left_out_without_a_trained_correct_one(
    normalization: Literal["problem", "tokens"],
) -> None:
    def kinds(total: float, max_tokens: int) -> list[str]:
        group = make_group(rollout(0, num_tokens=8), rollout(1, "wrong", num_tokens=2))
        config = WeightingConfig(
            weighting_wrong_total=4.0, weighting_rollout_total=total, weighting_normalization=normalization
        )
        samples = make_samples(Rasft(), demonstration(), group, config=config, max_tokens=max_tokens)
        assert [r.weight for r in group.rollouts if r.weight] == [s.weight for s in samples[1:]]
        return [sample.kind for sample in samples]

    assert kinds(0.7, max_tokens=10) == ["demonstration", "rollout", "rollout"]
    assert kinds(0.7, max_tokens=9) == kinds(0.0, max_tokens=10) == ["demonstration"]


def test_grpo_trains_wrong_rollouts_beside_a_correct_one_that_is_too_long() -> None:
    group = make_group(rollout(0, num_tokens=8), rollout(1, "wrong", num_tokens=2))
    (wrong,) = make_samples(Grpo(), demonstration(), group, config=WeightingConfig(), max_tokens=9)
    assert wrong.weight < 0


@pytest.mark.parametrize("kind", [kind for kind in OBJECTIVES.values() if kind is not Rasft])
def test_other_objectives_count_all_their_tokens(kind: type[Objective]) -> None:
    assert all(s.is_counted for s in make_samples(kind(), demonstration(), mixed_group(), config=NO_PRIOR))


def test_rasft_published_uses_the_published_rule() -> None:
    samples = make_samples(
        Rasft(), demonstration(), counted_group(1, 2), config=WeightingConfig(rasft_weighting="published")
    )
    assert [s.weight for s in samples] == pytest.approx([0.2779, 0.00869], abs=5e-5)


def test_rasft_uses_earlier_refreshes_and_the_given_comparisons_of_texts() -> None:
    pooled = make_samples(
        Rasft(),
        demonstration(),
        counted_group(2, 0),
        config=NO_PRIOR,
        remembered=(0.0, 2.0),
        deduplicate=lambda texts: [0],
    )
    # Two of two solved now, none of two before: s = 1/2. One of the two solved rollouts is distinct.
    assert weights_of(pooled) == [("demonstration", 1.5 - 1.2 / 2), ("rollout", 0.7 / 2 * 2 / 3)]

    published = WeightingConfig(rasft_weighting="published")
    one_text = make_samples(
        Rasft(), demonstration(), counted_group(2, 1), config=published, deduplicate=lambda texts: [0]
    )
    assert weights_of(one_text) == [("demonstration", 1.0)], "equal rewards of demonstration and rollout"
    like = make_samples(
        Rasft(), demonstration(), counted_group(1, 1), config=published, similarity=lambda wrong, correct: 1.0
    )
    # Without the wrong text, which is like the correct one, the rewards are 2 and 1: one deviation above and below their mean.
    expected = math.tanh(0.4) / 2
    assert [s.weight for s in like] == pytest.approx([expected, 0.25 * 0.02], abs=1e-5)


def test_rasft_without_rollout_weight_trains_no_rollout() -> None:
    config = WeightingConfig(weighting_rollout_total=0.0)
    assert len(make_samples(Rasft(), demonstration(), counted_group(3, 1), config=config)) == 1


def test_raft_trains_distinct_correct_rollouts_only() -> None:
    group = make_group(rollout(0, text="a"), rollout(1, text="a"), *mixed_group().rollouts[1:])
    samples = make_samples(Raft(), demonstration(), group, config=WeightingConfig())
    assert weights_of(samples) == [("rollout", 1.0)]
    assert make_samples(Raft(), demonstration(), counted_group(0, 3), config=WeightingConfig()) == []
    assert make_samples(Raft(), demonstration(), config=WeightingConfig()) == []


def test_grpo_trains_every_delivered_rollout_with_its_advantage() -> None:
    group = mixed_group()
    samples = make_samples(Grpo(), demonstration(), group, config=WeightingConfig())
    assert [s.response_ids[0] for s in samples] == [10, 11, 12, 15]
    # the correct response that was truncated by the length limit has reward 0
    x = np.array([1.0, 0.0, 0.0, 0.0])
    assert [s.weight for s in samples] == pytest.approx(list((x - 0.25) / (x.std(ddof=1) + 1e-6)))
    assert [r.weight for r in group.rollouts if r.weight] == [s.weight for s in samples]


@pytest.mark.parametrize(
    ("objective", "num_samples"),
    [
        (Grpo(), 4),
        (Grpo(weighting_skip_degenerate=True), 0),
        (Grpo(objective_grpo_dapo=True), 0),
        (Grpo(objective_grpo_dapo=True, weighting_skip_degenerate=True), 0),
        (Grpo(objective_grpo_dapo=True, weighting_skip_degenerate=False), 4),
    ],
)
def test_groups_with_equal_rewards_are_kept_or_skipped(objective: Objective, num_samples: int) -> None:
    for group in (counted_group(4, 0), counted_group(0, 4)):
        samples = make_samples(objective, demonstration(), group, config=WeightingConfig())
        assert [s.weight for s in samples] == [0.0] * num_samples
    assert len(make_samples(objective, demonstration(), counted_group(3, 1), config=WeightingConfig())) == 4
    assert make_samples(objective, demonstration(), config=WeightingConfig()) == []


def test_gft_standardises_demonstration_and_rollouts_together() -> None:
    samples = make_samples(Gft(), demonstration(), counted_group(1, 2), config=WeightingConfig())
    assert [s.kind for s in samples] == ["demonstration", "rollout", "rollout", "rollout"]
    assert [s.weight for s in samples] == pytest.approx(
        [0.75**0.5, 0.75**0.5, -(0.75**0.5), -(0.75**0.5)], abs=1e-5
    )
    samples = make_samples(Gft(), demonstration(), counted_group(1, 3), config=WeightingConfig())
    x = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    assert [s.weight for s in samples] == pytest.approx(list((x - x.mean()) / x.std(ddof=1)), abs=1e-5)


@pytest.mark.parametrize(
    "group",
    [
        None,
        make_group(),
        counted_group(3, 0),
        make_group(rollout(0, "unverifiable"), rollout(1, "unverifiable")),
    ],
)
def test_gft_falls_back_to_the_demonstration(group: RolloutGroup | None) -> None:
    assert weights_of(make_samples(Gft(), demonstration(), group, config=WeightingConfig())) == [
        ("demonstration", 1.0)
    ]


@pytest.mark.parametrize("objective", [Rasft(), Raft(), Grpo(), Gft()])
@pytest.mark.parametrize("weighting", ["adaptive", "published"])
def test_no_positive_weight_on_incomplete_or_undelivered_rollouts(
    objective: Objective, weighting: Any
) -> None:
    rng = random.Random(1)
    config = WeightingConfig(rasft_weighting=weighting)
    for _ in range(300):
        group = make_group(
            *(
                rollout(
                    i,
                    rng.choice(["correct", "wrong", "unverifiable", "timeout"]),
                    finish=rng.choice(["stop", "length", "abort"]),
                    num_tokens=rng.choice([0, 3]),
                )
                for i in range(8)
            )
        )
        samples = make_samples(objective, demonstration(), group, config=config)
        assert all(s.response_ids for s in samples)
        for r in group.rollouts:
            assert r.weight <= 0 or (r.finish_reason == "stop" and r.verdict == "correct")
            assert r.weight == 0 or (r.response_ids and r.finish_reason != "abort")
        assert sum(s.kind == "demonstration" for s in samples) == (objective.trains_on == "both")


def test_misuse_is_named() -> None:
    with pytest.raises(AssertionError, match="other"):
        make_samples(Rasft(), demonstration(), RolloutGroup(problem_id="other"), config=WeightingConfig())
    with pytest.raises(AssertionError, match="no verdict"):
        make_samples(Rasft(), demonstration(), make_group(rollout(0, None)), config=WeightingConfig())


# ---- sdft


def test_sdft_trains_on_every_attempt_without_a_verdict() -> None:
    group = mixed_group()
    for attempt in group.rollouts:
        attempt.verdict = None
    samples = make_samples(Sdft(), demonstration(), group, config=NO_PRIOR)
    assert [(s.kind, s.weight, s.is_counted) for s in samples] == [("rollout", 1.0, True)] * 4
    assert [r.weight for r in group.rollouts] == [1.0, 1.0, 1.0, 0.0, 0.0, 1.0], "aborted and empty ones"
    assert make_samples(Sdft(), demonstration(), None, config=NO_PRIOR) == []


@pytest.mark.parametrize(("num_teacher", "num_trained"), [(0, 2), (7, 2), (8, 1), (15, 0)])
def test_a_rollout_that_does_not_fit_behind_the_teachers_prompt_is_left_out(
    num_teacher: int, num_trained: int
) -> None:
    problem = replace(demonstration(), prompt_ids=[1], teacher_prompt_ids=[1] * num_teacher)
    group = make_group(rollout(index=0, num_tokens=2), rollout(index=1, num_tokens=3))
    samples = make_samples(Sdft(), problem, group, config=NO_PRIOR, max_tokens=10)
    assert [len(s.response_ids) for s in samples] == [2, 3][:num_trained]
    assert sum(r.weight for r in group.rollouts) == num_trained
