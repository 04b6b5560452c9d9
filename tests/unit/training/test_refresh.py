"""What a refresh makes of answers, without a model."""

from megatron_rasft.training.refresh import as_rollouts
from megatron_rasft.types import Request, Response


def test_a_sample_that_servers_failed_to_give_does_not_move_the_others() -> None:
    answers = [
        None if seed == 11 else Response(token_ids=[seed], logprobs=[-1.0], finish_reason="stop")
        for seed in (10, 11, 12, 13)
    ]
    request = Request(prompt_ids=[1], seeds=[10, 11, 12, 13])
    rollouts = as_rollouts("p", request, answers, 5, str)
    assert [(r.sample_index, r.response_ids) for r in rollouts] == [(0, [10]), (2, [12]), (3, [13])]
