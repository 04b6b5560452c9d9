"""The adaptive weights of the rasft objective: demonstration and correct rollouts weighted by the problem's solvability.

This is plain Python on Python floats. Rank 0 calls it once per problem. The comparison of texts is passed in as a callable,
because it belongs to the package verify/.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from megatron_rasft.flags import FlagSection, Range, Share
from megatron_rasft.objective.declaration import UNSAMPLED_WEIGHT, Deduplicate
from megatron_rasft.objective.groups import (
    count_solved,
    distinct_positives,
    distinct_texts,
    wrong_attempts,
)
from megatron_rasft.types import RolloutGroup

Amount = Annotated[float, Range(at_least=0, below=math.inf, advice="0 turns it off.")]
Exponent = Annotated[
    float, Range(above=0, below=math.inf, advice="With 0 the weight would not depend on solvability.")
]

ADAPTIVE_ONLY = (
    "weighting_rollout_fall",
    "weighting_wrong_total",
    "weighting_guidance_solved",
    "weighting_guidance_threshold",
    "weighting_lr_by_mass",
    "weighting_placebo",
)
"""Flags that are refused without the adaptive rule of the rasft objective."""


@dataclass(kw_only=True)
class WeightingConfig(FlagSection):
    """Weights of the demonstration and of the policy's own correct rollouts, from solvability s.

    The adaptive rule is ``demonstration(s) = min + (max - min) (1 - s) ** demonstration_exponent`` and
    ``rollouts(s) = total * s ** rollout_exponent * (1 - s) ** rollout_fall``, which the distinct correct rollouts share. The wrong ones
    share ``-wrong(s) = -wrong_total * s * (1 - s)``. The solvability at which the
    demonstration has weight 1, the weight of an unsampled problem, follows from these values (0.417 with the defaults). It is also
    the mean of the prior.
    """

    rasft_weighting: Literal["adaptive", "published"] = "adaptive"
    """Rule of the rasft objective. adaptive: the harder the problem, the larger the weight of the demonstration. published: the
    computation of the authors' script, which ignores the flags of solvability and its weights. It also sets the script's sampling
    (--rollout-num-samples 3, --rollout-temperature 0.9, --rollout-top-p 0.95, --rollout-repetition-penalty 1.1) and its text
    filters, unless a flag says otherwise; the log lists the values."""

    weighting_normalization: Literal["problem", "tokens"] | None = None
    """Share of a problem in the loss of the rasft objective. problem: the correct rollouts share their weight by tokens, scaled to the
    length of the demonstration, and the loss is divided by the demonstration tokens of the batch; a problem's share relative to an
    unsampled problem then depends on its solvability alone, not on the number and length of its rollouts or on the other problems
    of the batch. tokens: each rollout's weight multiplies all its tokens, and the loss is divided by all response tokens of the
    batch, as in the published script. Unset: problem for adaptive, tokens for published."""

    weighting_demonstration_max: Annotated[
        float,
        Range(
            above=1,
            below=math.inf,
            advice="An unsolved problem must have a larger weight than an unsampled problem, whose weight is 1.",
        ),
    ] = 1.5
    """Demonstration weight of a problem that is never solved (s = 0)."""

    weighting_demonstration_min: Annotated[
        float,
        Range(
            above=0,
            below=1,
            advice="A solved problem must have a smaller weight than an unsampled problem, whose weight is 1. To drop its "
            "demonstration almost completely use a small positive value.",
        ),
    ] = 0.3
    """Demonstration weight of a problem that is always solved (s = 1)."""

    weighting_demonstration_exponent: Exponent = 1.0
    """Exponent of (1 - s). Below 1 the demonstration keeps a large weight until s is near 1; above 1 its weight falls early."""

    weighting_rollout_total: Amount = 0.7
    """Factor of the weight that the correct rollouts share. With --weighting-rollout-fall 0 it is their weight at s = 1. 0 trains on
    demonstrations only."""

    weighting_rollout_exponent: Exponent = 1.0
    """Exponent of s. Above 1 only rollouts of reliably solved problems have much weight."""

    weighting_rollout_fall: Annotated[float, Range(at_least=0, below=math.inf)] = 0.0
    """Exponent of (1 - s) in the weight that the correct rollouts share. 0: the weight rises with s up to an always solved problem. Any
    value above 0 makes it 0 there, because a problem that is always solved teaches nothing."""

    weighting_wrong_total: Amount = 0.0
    """Weight, below zero, that the wrong rollouts of a problem share: this times s (1 - s). A policy that solves a problem sometimes
    learns from it what to avoid. Only for problems with a correct rollout to train on. Needs the DFT factor, without which the
    loss has no lower bound. 0 trains on no wrong rollout."""

    weighting_guidance_solved: Share = 0.25
    """Weight of the attempts that the policy solves, in the decision by guided rollouts (--rollout-guided-samples). With 0 imitation must
    only help where the policy fails. With 1 it must raise the solve rate as a whole."""

    weighting_guidance_threshold: Annotated[float, Range(above=0, below=1)] = 0.05
    """The guidance is the probability that the policy does better if it begins like the demonstration. Below this threshold the steps train
    on the policy's own solutions only. A small threshold keeps the demonstrations until there is evidence that they harm: a policy that
    solves nearly nothing cannot learn from itself."""

    weighting_lr_by_mass: bool = True
    """Multiply the learning rate of a step by its mass (sum of weight x tokens, divided by D), at most 1. Adam divides a gradient by its
    own size. So without this flag a step whose problems have small weights changes the model as much as one whose problems have
    large weights."""

    weighting_prior_strength: Amount = 1.0
    """Size of the Beta prior on s, in rollouts. Its mean is the s at which the demonstration weight is 1, so a problem with
    little evidence is treated almost like an unsampled problem. 0 uses s = correct / sampled unchanged."""

    weighting_memory: Share = 0.5
    """Share of a problem's earlier rollout counts that is carried into its next estimate of s. 0 forgets them; 1 keeps all,
    although the policy has changed in the meantime."""

    weighting_placebo: bool = False
    """Exchange the solvability of the problems at random before the weights are computed from it. A control: if the method gains as much
    with it, the gain does not come from solvability."""

    @property
    def is_per_problem(self) -> bool:
        """Whether --weighting-normalization is ``problem``, by its flag or as the default of the rule."""
        default = "tokens" if self.rasft_weighting == "published" else "problem"
        return (self.weighting_normalization or default) == "problem"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupWeights:
    """Weights of one problem's demonstration and rollouts."""

    demonstration: float
    rollouts: tuple[float, ...]
    """One weight per rollout of the group, in its order; 0 for a rollout that is not trained on."""
    solvability: float | None
    """The estimate of s that the weights are computed from; None if nothing is known about the problem."""


def neutral_solvability(config: WeightingConfig) -> float:
    """The s at which ``demonstration_weight`` is 1, the weight of an unsampled problem. Strictly between 0 and 1."""
    spread = config.weighting_demonstration_max - config.weighting_demonstration_min
    share = (UNSAMPLED_WEIGHT - config.weighting_demonstration_min) / spread
    return 1.0 - math.pow(share, 1.0 / config.weighting_demonstration_exponent)


def demonstration_weight(solvability: float, config: WeightingConfig) -> float:
    """Demonstration weight at s. Falls strictly from weighting_demonstration_max at 0 to weighting_demonstration_min at 1."""
    spread = config.weighting_demonstration_max - config.weighting_demonstration_min
    return config.weighting_demonstration_min + spread * math.pow(
        1.0 - solvability, config.weighting_demonstration_exponent
    )


def rollout_total(solvability: float, config: WeightingConfig) -> float:
    """Weight that all correct rollouts of a problem share at s: 0 at 0, and weighting_rollout_total at 1 unless weighting_rollout_fall
    makes it 0 there too."""
    rising = math.pow(solvability, config.weighting_rollout_exponent)
    return (
        config.weighting_rollout_total * rising * math.pow(1.0 - solvability, config.weighting_rollout_fall)
    )


def wrong_total(solvability: float, config: WeightingConfig) -> float:
    """Weight that all wrong rollouts of a problem share at s, as a positive number: largest at 1/2, and 0 at 0 and 1."""
    return config.weighting_wrong_total * solvability * (1.0 - solvability)


def estimate_solvability(
    num_correct: float,
    num_samples: int,
    config: WeightingConfig,
    remembered: tuple[float, float] | None = None,
) -> float | None:
    """Posterior mean of s from the counts of this refresh, the discounted counts of earlier refreshes and a Beta prior.

    Args:
        num_correct: solved attempts of this refresh, or the sum of their rewards.
        num_samples: attempts of this refresh; 0 if the problem was not sampled.
        config: weighting_prior_strength is the size of the prior.
        remembered: (solve rate, number of rollouts) of earlier refreshes, discounted by the curriculum.

    Returns:
        s in [0, 1], or None if the problem was never sampled.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct must lie in 0 .. num_samples = {num_samples}, got {num_correct}.")
    correct, samples = float(num_correct), float(num_samples)
    if remembered is not None:
        past_solvability, past_samples = remembered
        if not (0 <= past_solvability <= 1 and past_samples >= 0):
            raise ValueError(f"remembered must be (0 .. 1, >= 0), got {remembered}.")
        correct += past_samples * past_solvability
        samples += past_samples
    if samples <= 0:
        return None
    prior = config.weighting_prior_strength
    # In [0, 1] also when rounded, because rounding never changes an order.
    return (correct + prior * neutral_solvability(config)) / (samples + prior)


def exchanged(solvability: Mapping[str, float], seed: str) -> dict[str, float]:
    """Gives every problem the solvability of another problem (--weighting-placebo).

    Args:
        solvability: problem -> s. A single problem keeps its own.
        seed: fixes the exchange.
    """
    order = list(solvability)
    random.Random(seed).shuffle(order)
    # Each takes the value of the next in a random circle, so nobody keeps its own and every value is used once.
    return {order[i - 1]: solvability[order[i]] for i in range(len(order))}


def adaptive_weights(
    group: RolloutGroup | None,
    config: WeightingConfig,
    *,
    remembered: tuple[float, float] | None = None,
    deduplicate: Deduplicate = distinct_texts,
    borrowed: float | None = None,
    guidance: float | None = None,
) -> GroupWeights:
    """Weighs the demonstration less, and the policy's own solutions more, the higher the solvability is.

    The sum of the weights depends on the group only through s. So it does not grow with the number of rollouts, and it is at most
    weighting_demonstration_max + weighting_rollout_total. With the defaults it falls from 1.5 to 1.

    Args:
        borrowed: another problem's solvability, which replaces this problem's own (--weighting-placebo).
        guidance: probability that imitation helps (``Guidance.confidence``). From weighting_guidance_threshold on no rollout is trained on,
            below no demonstration. None without evidence: both are trained on.
    """
    rollouts = [] if group is None else group.rollouts
    solvability = estimate_solvability(*count_solved(rollouts), config, remembered)
    weights = [0.0] * len(rollouts)
    imitates = guidance is None or guidance >= config.weighting_guidance_threshold
    practises = guidance is None or not imitates
    if solvability is None:
        return GroupWeights(
            demonstration=imitates * UNSAMPLED_WEIGHT, rollouts=tuple(weights), solvability=None
        )
    solvability = solvability if borrowed is None else borrowed
    trained = distinct_positives(rollouts, deduplicate) if practises else []
    for i in trained:
        weights[i] = rollout_total(solvability, config) / len(trained)
    wrong = wrong_attempts(group) if trained else []
    for i in wrong:
        weights[i] = -wrong_total(solvability, config) / len(wrong)
    return GroupWeights(
        demonstration=imitates * demonstration_weight(solvability, config),
        rollouts=tuple(weights),
        solvability=solvability,
    )
