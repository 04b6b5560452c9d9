"""Self-distillation: the teacher is the model itself, with the demonstration in its prompt (arXiv 2601.19897, 2601.18734)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_rasft.objective.declaration import Objective, SampledProblem, SampleWeights, Teacher
from megatron_rasft.objective.groups import is_attempt

if TYPE_CHECKING:
    from megatron_rasft.objective.token_losses import PackedTokens, TokenTerms


@dataclass(kw_only=True)
class Sdft(Objective):
    """Self-distillation: every rollout is pulled towards the model with the demonstration in its prompt (arXiv 2601.19897)."""

    name = "sdft"
    trains_on = "rollouts"
    trains_on_wrong_rollouts = True
    needs_verdicts = False

    objective_sdft_teacher: Literal["reference", "refresh"] = "reference"
    """Weights of the teacher. reference: those with which the run began; refresh: those of the policy at the last refresh."""

    objective_sdft_template: str = (
        "{problem}\n\nThis is an example of a response to the problem:\n\n{demonstration}\n\n"
        "Now respond to the problem in your own words, including your reasoning."
    )
    """The teacher's last user message. {problem} stands for the last user message of the plain prompt, with --data-prompt-suffix, and
    {demonstration} for the demonstration. The chat template is applied to it as to the plain prompt."""

    def check(self) -> None:
        for part in ("{problem}", "{demonstration}"):
            if self.objective_sdft_template.count(part) != 1:
                raise self.refusal(
                    "objective_sdft_template",
                    f"must contain {part} once: the teacher's prompt holds the problem and the demonstration.",
                )

    def teacher(self) -> Teacher:
        return Teacher(
            template=self.objective_sdft_template, is_reference=self.objective_sdft_teacher == "reference"
        )

    def remarks(self) -> list[str]:
        began = "the weights with which the run began"
        weights = began if self.teacher().is_reference else "the policy's weights at the last refresh"
        return [f"the teacher of sdft has {weights} (--objective-sdft-teacher)"]

    def weigh(self, problem: SampledProblem) -> SampleWeights:
        """Every attempt with weight 1, also one that the length limit cut. The demonstration is seen by the teacher only."""
        rollouts = [] if problem.group is None else problem.group.rollouts
        return SampleWeights(
            demonstration=None,
            rollouts={i: 1.0 for i, rollout in enumerate(rollouts) if is_attempt(rollout)},
        )

    def token_terms(self, tokens: "PackedTokens") -> "TokenTerms":
        """A (log p - log p of the teacher)^2 / 2, whose gradient in log p is A times their difference."""
        return tokens.teacher_distance()
