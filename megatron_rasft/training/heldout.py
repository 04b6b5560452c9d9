"""Measures the solve rate on held-out problems, sampled with the trainer's own weights and graded as in training."""

from collections.abc import Sequence

from megatron_rasft import metrics
from megatron_rasft.config import RasftConfig
from megatron_rasft.monitoring import live
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.rollout.seeds import sample_seed
from megatron_rasft.training.policy import Policy
from megatron_rasft.training.problems import Problems
from megatron_rasft.training.refresh import Verifier, as_rollouts
from megatron_rasft.types import Request, Response, Rollout, SamplingParams
from megatron_rasft.wording import counted


class Heldout:
    """The held-out problems of a run.

    Args:
        problems: read from --heldout-data.
        policy: scores and samples with the model.
        stop_ids: token ids that end a response.
        verifier: grades the responses; None on ranks other than 0.
    """

    def __init__(
        self,
        config: RasftConfig,
        problems: Problems,
        policy: Policy,
        stop_ids: frozenset[int],
        verifier: Verifier | None,
    ) -> None:
        self._problems = problems
        self._policy = policy
        self._verifier = verifier
        self._seed = config.rollout.rollout_seed
        # Apart from its temperature, the measurement draws from the model's own distribution.
        self._params = SamplingParams(
            num_samples=config.heldout.heldout_num_samples,
            max_new_tokens=config.rollout.rollout_max_new_tokens,
            temperature=config.heldout.heldout_temperature,
            top_p=1.0,
            repetition_penalty=1.0,
            stop_ids=stop_ids,
            max_batch_size=config.rollout.rollout_batch_size,
        )

    def measure(self, iteration: int) -> dict[str, float]:
        """Returns metric name -> value on every rank; a collective of the world.

        Raises:
            Stopped: the run is to stop.
        """
        requests: list[Request] = on_rank_zero(self._requests)
        responses = self._policy.generate(requests, self._params)
        return self._policy.stop.on_rank_zero(
            lambda: heldout_values(self._graded(requests, responses, iteration))
        )

    def line(self, iteration: int, values: dict[str, float], seconds: float) -> str:
        """Returns the console line of a measurement that took ``seconds``."""
        return (
            f"held out: {values[metrics.HELDOUT_SOLVE_RATE]:.1%} of {counted(self._problems.num, 'problem')} solved after "
            f"step {iteration}, {seconds:.1f} s"
        )

    def _requests(self) -> list[Request]:
        # The seeds do not depend on the step, so that only the weights differ between two measurements.
        return [
            Request(
                prompt_ids=list(d.prompt_ids),
                seeds=[
                    sample_seed(self._seed, f"held out {d.problem_id}", 0, i)
                    for i in range(self._params.num_samples)
                ],
            )
            for d in self._problems.demonstrations
        ]

    def _graded(
        self, requests: list[Request], responses: list[list[Response]], iteration: int
    ) -> list[Rollout]:
        """Returns all responses with their verdicts. Rank 0 only."""
        assert self._verifier is not None, "a run with held-out problems needs a verifier"
        demonstrations, decode = self._problems.demonstrations, self._problems.decode
        rollouts = [
            rollout
            for demonstration, request, answers in zip(demonstrations, requests, responses, strict=True)
            for rollout in as_rollouts(
                demonstration.problem_id, request.prompt_ids, answers, iteration, decode
            )
        ]
        checks = {d.problem_id: d.check for d in demonstrations}
        with live.verifying(rollouts):
            self._verifier.verify(rollouts, checks, self._policy.stop.check_here)
        return rollouts


def heldout_values(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns metric name -> value: the shares of correct and of truncated rollouts, and the mean reward if there are rewards.

    Args:
        rollouts: at least one, all verified.
    """
    values = {
        metrics.HELDOUT_SOLVE_RATE: sum(r.verdict == "correct" for r in rollouts) / len(rollouts),
        metrics.HELDOUT_TRUNCATED: sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
    }
    rewards = [r.reward for r in rollouts if r.reward is not None]
    return values | ({metrics.HELDOUT_REWARD: sum(rewards) / len(rewards)} if rewards else {})
