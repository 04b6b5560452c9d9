"""The figures of one refresh: collected while it runs, then logged as metrics and printed as one line."""

import math
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain

from megatron_rasft import metrics
from megatron_rasft.config import RasftConfig
from megatron_rasft.flags import flag_name
from megatron_rasft.types import Rollout, RolloutGroup, TrainingSample
from megatron_rasft.verify.grading_order import GIVEN_UP
from megatron_rasft.verify.own_function import FAILED
from megatron_rasft.wording import counted


@dataclass
class RefreshReport:
    """Counts, means and seconds of one refresh. A mean of no values is NaN and is not logged."""

    num_problems: int = 0
    """Problems that the next steps train on."""
    num_rollouts: int = 0
    """All rollouts, graded or not."""
    num_sampled: int = 0
    """Problems with rollouts, including problems of the hard pool that are not trained in this refresh."""
    verdicts: Counter[str] = field(default_factory=Counter)
    """Verdict -> number of rollouts; empty if the objective needs no verdicts."""
    num_truncated: int = 0
    """Rollouts that were cut by length."""
    num_too_long: int = 0
    """Rollouts that exceed the sequence length after the teacher's prompt, and are not trained on."""
    filters: Counter[str] = field(default_factory=Counter)
    """Text filter -> number of rollouts that it removed."""
    unverifiable: Counter[str] = field(default_factory=Counter)
    """Reason -> number of rollouts that could not be verified."""
    num_given_up: int = 0
    """Rollouts that were not graded, because the gradings before them exceeded their deadlines."""
    num_failed: int = 0
    """Rollouts for which --verify-function raised or returned no judgement."""
    mean_reward: float = float("nan")
    """Mean of the rewards of --verify-function."""
    guided_solve_rate: float = float("nan")
    """Correct guided rollouts / guided rollouts. No other figure counts guided rollouts."""
    guidance: float = float("nan")
    """``Guidance.confidence`` after this refresh."""
    num_solved: int = 0
    """Problems with at least one correct rollout."""
    num_left_out: int = 0
    """Problems of the next steps without a training sample."""
    mean_response_tokens: float = 0.0
    mean_difficulty: float = float("nan")
    """Mean cross-entropy of the demonstrations under the policy, nats per token. Only --curriculum-mode band computes it."""
    demonstration_weight: float = float("nan")
    """Mean objective weight of the demonstrations."""
    rollout_weight: float = float("nan")
    """Mean objective weight of the rollouts that are trained on, without those of a weight below zero."""
    wrong_rollout_weight: float = float("nan")
    """Mean objective weight of the rollouts whose weight is below zero."""
    score_s: float = 0.0
    """Seconds for computing the difficulties."""
    generate_s: float = 0.0
    """Seconds for sampling, including the weight sync before it."""
    verify_s: float = 0.0
    reference_s: float = 0.0
    """Seconds for computing the log-probabilities under the reference, the old policy and the teacher."""
    servers: dict[str, float] = field(default_factory=dict)
    """Metric name -> value, for the weight sync and the sampling of rollout servers."""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the seconds of a block to the field ``name``. A block inside a block of the same name counts once."""
        began, before = time.monotonic(), getattr(self, name)
        try:
            yield
        finally:
            setattr(self, name, before + time.monotonic() - began)

    def count_rollouts(self, groups: Collection[RolloutGroup], *, are_graded: bool = True) -> None:
        """Counts the rollouts, and if ``are_graded`` their verdicts and filters."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        self.num_rollouts = len(rollouts)
        self.num_sampled = len(groups)
        self.num_truncated = sum(rollout.finish_reason == "length" for rollout in rollouts)
        self.mean_response_tokens = sum(len(r.response_ids) for r in rollouts) / max(1, len(rollouts))
        if are_graded:
            self._count_verdicts(groups, rollouts)

    def _count_verdicts(self, groups: Collection[RolloutGroup], rollouts: list[Rollout]) -> None:
        self.verdicts = Counter(rollout.verdict or "unverifiable" for rollout in rollouts)
        self.filters = Counter(rollout.filtered_by for rollout in rollouts if rollout.filtered_by)
        self.unverifiable = Counter(r.verdict_reason for r in rollouts if r.verdict in (None, "unverifiable"))
        self.num_given_up = sum(rollout.verdict_reason.startswith(GIVEN_UP) for rollout in rollouts)
        self.num_failed = sum(rollout.verdict_reason.startswith(FAILED) for rollout in rollouts)
        self.mean_reward = _mean([rollout.reward for rollout in rollouts if rollout.reward is not None])
        guided = [rollout for group in groups for rollout in group.guided]
        self.guided_solve_rate = _mean([float(rollout.verdict == "correct") for rollout in guided])
        self.num_solved = sum(group.num_correct > 0 for group in groups)

    def count_samples(self, samples: Collection[Collection[TrainingSample]]) -> None:
        """Counts the problems without training samples, and averages the weights by kind, those of rollouts by sign.

        Args:
            samples: the samples of each problem.
        """
        self.num_left_out = sum(not part for part in samples)
        weights: dict[str, list[float]] = {"demonstration": [], "rollout": [], "wrong_rollout": []}
        for sample in chain.from_iterable(samples):
            is_wrong = sample.kind == "rollout" and sample.weight < 0
            weights["wrong_rollout" if is_wrong else sample.kind].append(sample.weight)
        self.demonstration_weight = _mean(weights["demonstration"])
        self.rollout_weight = _mean(weights["rollout"])
        self.wrong_rollout_weight = _mean(weights["wrong_rollout"])

    @property
    def solve_rate(self) -> float:
        """Correct rollouts / all rollouts; NaN without graded rollouts."""
        return self.verdicts["correct"] / self.num_rollouts if self.verdicts else float("nan")

    @property
    def has_ungraded(self) -> bool:
        """Whether there are rollouts, and the objective needs no verdicts."""
        return bool(self.num_rollouts) and not self.verdicts

    def shares(self) -> dict[str, float]:
        """Metric name -> share of the rollouts that were cut by length, filtered, unverifiable, or too long for the teacher."""
        counts = {metrics.TRUNCATED: self.num_truncated}
        if self.has_ungraded:
            counts[metrics.TOO_LONG] = self.num_too_long
        else:
            counts[metrics.FILTERED] = self.filters.total()
            counts[metrics.UNVERIFIABLE] = self.verdicts["unverifiable"]
        return {name: count / max(1, self.num_rollouts) for name, count in counts.items()}

    def values(self) -> dict[str, float]:
        """Metric name -> value."""
        num_rollouts = max(1, self.num_rollouts)
        return {
            metrics.SOLVE_RATE: self.solve_rate,
            metrics.SOLVED_PROBLEMS: self.num_solved / self.num_sampled if self.verdicts else float("nan"),
            metrics.DEMONSTRATION_WEIGHT: self.demonstration_weight,
            metrics.ROLLOUT_WEIGHT: self.rollout_weight,
            metrics.WRONG_ROLLOUT_WEIGHT: self.wrong_rollout_weight,
            metrics.NUM_ROLLOUTS: self.num_rollouts,
            metrics.RESPONSE_TOKENS: self.mean_response_tokens,
            metrics.GIVEN_UP: float("nan") if self.has_ungraded else self.num_given_up / num_rollouts,
            metrics.REWARD: self.mean_reward,
            metrics.GUIDED_SOLVE_RATE: self.guided_solve_rate,
            metrics.GUIDANCE: self.guidance,
            **({metrics.FUNCTION_FAILED: self.num_failed / num_rollouts} if self.num_failed else {}),
            **{f"verify/{verdict}_frac": n / num_rollouts for verdict, n in self.verdicts.items()},
            **self.shares(),
            metrics.LEFT_OUT: self.num_left_out,
            metrics.SAMPLED_PROBLEMS: self.num_sampled,
            metrics.DIFFICULTY: self.mean_difficulty,
            metrics.GENERATE_S: self.generate_s,
            metrics.VERIFY_S: float("nan") if self.has_ungraded else self.verify_s,
            metrics.SCORE_S: self.score_s,
            metrics.REFERENCE_S: self.reference_s,
            **self.servers,
        }

    def line(self, total_s: float) -> str:
        """The console line; ``total_s`` is the duration of the whole refresh."""
        line = f"refresh: {counted(self.num_problems, 'problem')}"
        if self.num_left_out:
            line += f" ({self.num_left_out} left out: no training sample)"
        if self.score_s:
            line += f", score {self.score_s:.1f} s"
        if self.num_rollouts:
            graded, failed = self._verdict_texts()
            line += (
                f", {counted(self.num_rollouts, 'rollout')} of {self.num_sampled}, {graded}{self.shares()[metrics.TRUNCATED]:.1%} cut "
                f"by length, {failed}, {counted(round(self.mean_response_tokens), 'token')} each; generate {self.generate_s:.1f} s,"
                + ("" if self.has_ungraded else f" verify {self.verify_s:.1f} s,")
            )
        return f"{line} reference {self.reference_s:.1f} s, {total_s:.1f} s in all"

    def _verdict_texts(self) -> tuple[str, str]:
        """The parts of the line about solved rollouts, and about those that are not trained on."""
        shares = self.shares()
        if self.has_ungraded:
            return "", f"{self.num_too_long} too long after the teacher's prompt"
        reward = "" if math.isnan(self.mean_reward) else f"mean reward {self.mean_reward:.3f}, "
        return (
            f"{self.solve_rate:.1%} correct, {reward}{self._describe_guidance()}{self.num_solved} solved at least once, ",
            f"{shares[metrics.FILTERED]:.1%} filtered, {shares[metrics.UNVERIFIABLE]:.1%} unverifiable",
        )

    def _describe_guidance(self) -> str:
        if math.isnan(self.guided_solve_rate):
            return ""
        return f"{self.guided_solve_rate:.1%} with a guide (guidance {self.guidance:.2f}), "

    def warnings(self, config: RasftConfig) -> list[str]:
        """Console lines about each of ``shares`` above --rasft-warn-frac, with the flags that change it."""
        limit = config.run.rasft_warn_frac
        return [
            f"warning: {share:.1%} of the rollouts {self._explain(name, config)} (--rasft-warn-frac {limit:g})"
            for name, share in self.shares().items()
            if share > limit
        ]

    def _explain(self, share: str, config: RasftConfig) -> str:
        if share == metrics.TOO_LONG:
            return (
                "exceed the sequence length after the teacher's prompt, and are not trained on: raise --seq-length, or lower "
                f"--rollout-max-new-tokens {config.rollout.rollout_max_new_tokens}"
            )
        if share == metrics.TRUNCATED:
            unsolved = ", and none of them counts as solved" if config.grades_rollouts else ""
            return (
                f"were cut by length{unsolved}: raise --rollout-max-new-tokens "
                f"{config.rollout.rollout_max_new_tokens}, or --seq-length if prompts leave less room"
            )
        if share == metrics.FILTERED:
            ((name, count),) = self.filters.most_common(1)
            flag = flag_name(f"no_verify_filter_{name}")
            return f"were dropped by text filters, {count} of them by the filter that {flag} turns off"
        ((reason, count),) = self.unverifiable.most_common(1)
        return f"could not be verified, {count} of them with the reason {reason!r} (verdict_reason in the stored rollouts)"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
