"""What a run keeps of itself, without a model."""

from dataclasses import asdict

from megatron_rasft.training.run import plain
from megatron_rasft.training.window import Batch
from megatron_rasft.types import TrainingSample


def test_a_batch_is_made_plain_without_copying_its_tokens() -> None:
    sample = TrainingSample(
        problem_id="p", kind="rollout", prompt_ids=[1, 2], response_ids=[3], weight=0.5, ref_logprobs=[-0.25]
    )
    batch = Batch(num_problems=1, samples=[sample])
    made = plain(batch)
    assert made == asdict(batch)
    assert made["samples"][0]["prompt_ids"] is sample.prompt_ids
