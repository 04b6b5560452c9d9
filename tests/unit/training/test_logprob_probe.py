"""A server's and the trainer's log-probabilities of a few demonstrations are compared."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_rasft.errors import ServerError
from megatron_rasft.training.logprob_probe import logprob_gap
from megatron_rasft.types import TrainingSample
from tests.unit.sync.stand_ins import StandIn


class Prober(StandIn):
    """A server that gives every token a log-probability of -1.5. Like SGLang it refuses prompts that exceed its context."""

    def __init__(self, **limits: Any) -> None:
        super().__init__("http://a:1")
        self.change(**limits)
        self.context = min(
            v["max_position_embeddings"] if isinstance(v, dict) else v for v in limits.values()
        )

    def generate(self, body: dict[str, Any]) -> Any:
        ids = json.loads(json.dumps(body))["input_ids"]
        if len(ids) >= self.context - 6:
            raise ServerError(self.url, "Input length exceeds the maximum allowed length", 400)
        return {
            "meta_info": {"input_token_logprobs": [[None, ids[0], None], *([-1.5, i, None] for i in ids[1:])]}
        }


def probe(num_prompt: int, num_response: int) -> TrainingSample:
    return TrainingSample(
        problem_id="a",
        kind="demonstration",
        # memoryviews, like those of the row cache
        prompt_ids=memoryview(np.arange(num_prompt, dtype=np.int32)),  # type: ignore[arg-type]
        response_ids=memoryview(np.arange(100, 100 + num_response, dtype=np.int32)),  # type: ignore[arg-type]
        weight=1.0,
    )


@pytest.mark.parametrize(
    "limits",
    [
        {"context_length": 64},
        {"model_config": {"max_position_embeddings": 64}},
        {"context_length": 4096, "max_total_tokens": 64},
    ],
    ids=["flag", "config.json", "cache"],
)
def test_responses_are_compared_as_far_as_they_fit_the_servers_context(limits: dict[str, Any]) -> None:
    server = Prober(**limits).record()
    probes = [probe(10, 20), probe(10, 54), probe(64, 5)]
    expected = [[-1.0] * len(p.response_ids) for p in probes]
    assert logprob_gap(server, probes, expected) == pytest.approx(0.5)
    assert logprob_gap(server, probes[:1], [[-2.0] * 20]) == pytest.approx(0.5)
    assert isinstance(logprob_gap(server, probes[2:], expected[2:]), str), (
        "no probe fits: nothing was compared"
    )


def test_without_probes_there_is_no_difference() -> None:
    assert logprob_gap(Prober(context_length=64).record(), [], []) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"meta_info": {"input_token_logprobs": []}},
        {"meta_info": {"input_token_logprobs": [[-1.5, 100, None], [None, 101, None]]}},
        {"meta_info": {"input_token_logprobs": [[-1.5, 100, None], [-1.5, 7, None]]}},
    ],
    ids=["nothing", "no entries", "no value", "another token"],
)
def test_an_answer_without_these_log_probabilities_is_a_reason_not_a_difference(answer: Any) -> None:
    class Broken(Prober):
        def generate(self, body: dict[str, Any]) -> Any:
            return answer

    assert isinstance(logprob_gap(Broken(context_length=64).record(), [probe(3, 2)], [[-1.0, -1.0]]), str)


def test_a_failing_server_is_a_reason_not_a_difference() -> None:
    class Failing(Prober):
        def generate(self, body: dict[str, Any]) -> Any:
            raise ServerError(self.url, "is out of order")

    found = logprob_gap(Failing(context_length=64).record(), [probe(3, 2)], [[-1.0, -1.0]])
    assert found == "is out of order"
