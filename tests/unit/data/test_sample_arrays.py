"""SampleArrays keep every value of the samples when they are sliced, selected and saved."""

import json
import random
import tracemalloc
from array import array

import numpy as np
import pytest

from megatron_rasft.data.sample_arrays import Batch, BatchQueue, SampleArrays, views
from megatron_rasft.types import BatchSize, TrainingSample


def some_samples(num: int, *, has_old: bool = True) -> list[TrainingSample]:
    """Samples whose values are alternately lists, arrays and memoryviews, with log-probabilities that fp32 represents exactly."""
    draw = random.Random(5)
    samples = []
    for index in range(num):
        prompt = [draw.randrange(200_000) for _ in range(draw.randint(1, 7))]
        response = [draw.randrange(200_000) for _ in range(draw.randint(1, 9))]
        ref = [-draw.randrange(1000) / 64 for _ in response]
        samples.append(
            TrainingSample(
                problem_id=str(index),
                kind="rollout" if index % 3 else "demonstration",
                prompt_ids=prompt if index % 2 else memoryview(np.array(prompt, np.int32)),  # type: ignore[arg-type]
                response_ids=array("i", response) if index % 2 else response,
                weight=index / 10,
                is_counted=index % 4 != 1,
                ref_logprobs=memoryview(np.array(ref, np.float32)) if index % 2 else ref,  # type: ignore[arg-type]
                old_logprobs=[v / 2 for v in ref] if has_old else None,
                teacher_logprobs=[v / 4 for v in ref],
            )
        )
    return samples


def plain(samples: SampleArrays) -> list[tuple]:
    """The values of every sample as Python lists."""
    rows, token, answer = [], 0, 0
    for i in range(len(samples)):
        num_prompt, num_response = int(samples.prompt_lengths[i]), int(samples.response_lengths[i])
        ids = samples.tokens[token : token + num_prompt + num_response].tolist()
        logprobs = [
            None if flat is None else flat[answer : answer + num_response].tolist()
            for flat in (samples.ref_logprobs, samples.old_logprobs, samples.teacher_logprobs)
        ]
        kind = "rollout" if samples.are_rollouts[i] else "demonstration"
        rows.append(
            (
                kind,
                ids[:num_prompt],
                ids[num_prompt:],
                float(samples.weights[i]),
                bool(samples.are_counted[i]),
                *logprobs,
            )
        )
        token, answer = token + num_prompt + num_response, answer + num_response
    return rows


def expected(samples: list[TrainingSample]) -> list[tuple]:
    return [
        (
            s.kind,
            list(s.prompt_ids),
            list(s.response_ids),
            s.weight,
            s.is_counted,
            list(s.ref_logprobs or ()),
            None if s.old_logprobs is None else list(s.old_logprobs),
            None if s.teacher_logprobs is None else list(s.teacher_logprobs),
        )
        for s in samples
    ]


@pytest.mark.parametrize("has_old", [True, False])
def test_arrays_hold_the_samples(has_old: bool) -> None:
    samples = some_samples(9, has_old=has_old)
    arrays = SampleArrays.of(samples)
    assert plain(arrays) == expected(samples)
    assert plain(arrays.slice(2, 7)) == expected(samples[2:7])
    assert plain(arrays.slice(2, 7).slice(1, 3)) == expected(samples[3:5])
    assert plain(arrays.take([4, 0, 8])) == expected([samples[i] for i in (4, 0, 8)])
    assert plain(arrays.take([])) == []
    assert plain(SampleArrays.load(arrays.arrays())) == expected(samples)


def test_all_samples_of_an_older_checkpoint_count() -> None:
    arrays = SampleArrays.of(some_samples(5)).arrays()
    del arrays["are_counted"]
    assert SampleArrays.load(arrays).are_counted.tolist() == [True] * 5


def test_a_response_of_one_token_is_kept_at_every_place() -> None:
    samples = [
        TrainingSample(
            problem_id="p",
            kind="rollout",
            prompt_ids=[10 * i + j for j in range(num_prompt)],
            response_ids=[10 * i + 9 for _ in range(num_response)],
            weight=float(i),
            ref_logprobs=[-float(i)] * num_response,
            old_logprobs=[-float(i) / 2] * num_response,
        )
        for i, (num_prompt, num_response) in enumerate([(1, 1), (3, 1), (2, 4), (1, 1)])
    ]
    arrays = SampleArrays.of(samples)
    assert arrays.lengths.tolist() == [2, 4, 6, 2]
    assert arrays.response_lengths.tolist() == [1, 1, 4, 1]
    for place in range(4):
        assert plain(arrays.slice(place, place + 1)) == expected(samples[place : place + 1])
        assert plain(arrays.take([place])) == expected(samples[place : place + 1])
    assert plain(arrays.take([3, 1, 0])) == expected([samples[i] for i in (3, 1, 0)])


def test_logprobs_are_left_out_on_request_and_if_a_sample_lacks_them() -> None:
    samples = some_samples(4)
    assert SampleArrays.of(samples, with_logprobs=False).ref_logprobs is None
    samples[2].old_logprobs = None
    arrays = SampleArrays.of(samples)
    assert arrays.old_logprobs is None and arrays.ref_logprobs is not None


def test_a_slice_copies_nothing() -> None:
    arrays = SampleArrays.of(some_samples(6))
    assert np.shares_memory(arrays.slice(1, 4).tokens, arrays.tokens)
    assert np.shares_memory(arrays.slice(1, 4).ref_logprobs, arrays.ref_logprobs)  # type: ignore[arg-type]


def test_the_queue_yields_each_batch_once_and_saves_the_remaining_ones() -> None:
    samples = some_samples(9)
    sizes = [(3, 4, 0), (2, 0, 7), (3, 5, 20)]
    queue = BatchQueue(sizes, SampleArrays.of(samples))
    elsewhere = BatchQueue(sizes)
    ahead = queue.batch(2)
    assert ahead is not None and plain(ahead.samples) == expected(samples[4:])
    for start, (num_problems, num, num_uncomputed) in zip((0, 4, 4), sizes, strict=True):
        resumed = BatchQueue(json.loads(json.dumps(queue.sizes)), SampleArrays.load(queue.arrays()))
        for one in (queue, resumed):
            batch = one.batch(0)
            assert batch is not None
            assert (batch.num_problems, batch.num_uncomputed) == (num_problems, num_uncomputed)
            assert plain(batch.samples) == expected(samples[start : start + num])
        assert elsewhere.batch(0) is None and len(elsewhere) == len(queue) == len(resumed)
        queue.popleft()
        elsewhere.popleft()
    assert len(queue) == len(elsewhere) == 0
    assert queue.arrays() == {}, "batches that have been trained on are not saved"


def test_samples_that_are_not_computed_are_counted_by_their_response_tokens() -> None:
    samples = some_samples(3)
    samples[1].is_computed = False
    batch = Batch.of(samples, 2)
    assert plain(batch.samples) == expected([samples[0], samples[2]])
    assert (batch.num_problems, batch.num_uncomputed) == (2, len(samples[1].response_ids))
    assert BatchSize.of([samples, []]) == (2, 2, batch.num_uncomputed)


def test_a_queued_token_takes_at_most_twelve_bytes() -> None:
    """The size includes both log-probabilities. A Python list takes 8 bytes for an entry and 24 or 28 for its number."""
    num, num_prompt, num_response = 200, 100, 900
    numbers = list(range(1000, 1000 + num_response))
    samples = [
        TrainingSample(
            problem_id="p",
            kind="rollout",
            prompt_ids=numbers[:num_prompt],
            response_ids=numbers,
            weight=1.0,
            ref_logprobs=[-0.5] * num_response,
            old_logprobs=[-0.5] * num_response,
        )
        for _ in range(num)
    ]
    tracemalloc.start()
    queue = BatchQueue([(num, num)], SampleArrays.of(samples))
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(queue) == 1
    assert held <= 12 * num * (num_prompt + num_response)


def test_views_split_an_array_without_a_copy() -> None:
    flat = np.arange(6, dtype=np.float32)
    parts = views(flat, np.array([2, 0, 4]))
    assert [part.tolist() for part in parts] == [[0.0, 1.0], [], [2.0, 3.0, 4.0, 5.0]]
    flat[5] = 9.0
    assert parts[2][3] == 9.0
