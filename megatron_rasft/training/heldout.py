"""The solve rate on held-out problems, by the live weights and the run's own verifier."""

from megatron_rasft import metrics
from megatron_rasft.config import RasftConfig
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.rollout.seeds import sample_seed
from megatron_rasft.training.problems import Problems
from megatron_rasft.training.refresh import Policy, as_rollouts
from megatron_rasft.types import Request, Response, SamplingParams
from megatron_rasft.verify.pool import VerifierPool


class Heldout:
    """Held-out problems of a run. ``measure`` is a collective of the whole world."""

    def __init__(
        self,
        config: RasftConfig,
        problems: Problems,
        policy: Policy,
        stop_ids: frozenset[int],
        verifier: VerifierPool | None,
    ) -> None:
        self.num_problems = problems.num
        self._problems = problems
        self._policy = policy
        self._verifier = verifier
        self._seed = config.rollout.rollout_seed
        self._num_samples = config.heldout.heldout_num_samples
        self._params = SamplingParams(
            num_samples=self._num_samples,
            max_new_tokens=config.rollout.rollout_max_new_tokens,
            temperature=config.heldout.heldout_temperature,
            top_p=1.0,
            repetition_penalty=1.0,
            stop_ids=stop_ids,
            max_batch_size=config.rollout.rollout_batch_size,
        )

    def measure(self, iteration: int) -> dict[str, float]:
        """Solve rate and share of truncated responses, the same on every rank."""
        requests: list[Request] = on_rank_zero(self._requests)
        responses = self._policy.generate(requests, self._params)
        return self._policy.stop.on_rank_zero(lambda: self._graded(requests, responses, iteration))

    def _requests(self) -> list[Request]:
        # Seeds do not depend on the step: two measurements differ by the weights alone.
        return [
            Request(
                prompt_ids=list(d.prompt_ids),
                seeds=[
                    sample_seed(self._seed, f"held out {d.problem_id}", 0, i)
                    for i in range(self._num_samples)
                ],
            )
            for d in self._problems.demonstrations
        ]

    def _graded(
        self, requests: list[Request], responses: list[list[Response]], iteration: int
    ) -> dict[str, float]:
        assert self._verifier is not None, "a run with held-out problems has a verifier"
        rollouts = []
        for demonstration, request, answers in zip(
            self._problems.demonstrations, requests, responses, strict=True
        ):
            rollouts += as_rollouts(
                demonstration.problem_id, request, answers, iteration, self._problems.decode
            )
        checks = {d.problem_id: d.check for d in self._problems.demonstrations}
        self._verifier.verify(rollouts, checks, self._policy.stop.check_here)
        return {
            metrics.HELDOUT_SOLVE_RATE: sum(r.verdict == "correct" for r in rollouts) / len(rollouts),
            metrics.HELDOUT_TRUNCATED: sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        }
