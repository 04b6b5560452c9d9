"""Micro-batches have the same tokens, labels, masks and log-probabilities as a slow, simple construction."""

import pickle
import random
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from megatron_rasft.data.sample_arrays import Batch, SampleArrays
from megatron_rasft.model.attention import zigzag_positions
from megatron_rasft.training.batches import (
    WIDTH_SLACK,
    BatchLayout,
    MicroBatch,
    build_micro_batches,
    response_values,
    shard_batch,
)
from megatron_rasft.types import TrainingSample


def micro_batches(samples: list[TrainingSample], layout: BatchLayout) -> list[MicroBatch]:
    """One rank's micro-batches, built from the shard that rank 0 sends as bytes."""
    batch = Batch(num_problems=len(samples), samples=SampleArrays.of(samples))
    shard = pickle.loads(pickle.dumps(shard_batch(batch, layout)[layout.dp_rank]))
    return [micro_batch.to(torch.device("cpu")) for micro_batch in build_micro_batches(shard, layout)]


def some_samples(num: int, has_logprobs: bool = True) -> list[TrainingSample]:
    draw = random.Random(num)
    out = []
    for index in range(num):
        prompt = [draw.randrange(1, 1000) for _ in range(draw.randint(1, 9))]
        response = [draw.randrange(1, 1000) for _ in range(draw.randint(1, 22))]
        out.append(
            TrainingSample(
                problem_id=str(index),
                kind="demonstration",
                prompt_ids=prompt,
                response_ids=response,
                weight=index + 0.5,
                is_counted=index % 3 != 1,
                ref_logprobs=[-index - t / 64 for t in range(len(response))] if has_logprobs else None,
                old_logprobs=[-index - t / 32 for t in range(len(response))] if has_logprobs else None,
                teacher_logprobs=[-index - t / 16 for t in range(len(response))] if has_logprobs else None,
            )
        )
    return out


def a_layout(**changes: Any) -> BatchLayout:
    values: dict[str, Any] = {
        "micro_batch_size": 2,
        "seq_length": 32,
        "is_packed": True,
        "dp_rank": 0,
        "dp_size": 1,
        "cp_rank": 0,
        "cp_size": 1,
        "token_multiple": 1,
    }
    return BatchLayout(**{**values, **changes})


def whole(shards: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """Reassembles one micro-batch's per-token fields from its context-parallel shards."""
    size = len(shards)
    params = shards[0].packed_seq_params
    rows, width = shards[0].tokens.shape
    bounds = (
        list(range(0, rows * width * size + 1, width * size))
        if params is None
        else params.cu_seqlens_q.tolist()
    )
    fields = {}
    for name in (
        "tokens",
        "position_ids",
        "labels",
        "loss_mask",
        "segment_ids",
        "ref_logprobs",
        "old_logprobs",
        "teacher_logprobs",
    ):
        parts = [getattr(shard, name).flatten() for shard in shards]
        put = torch.full((bounds[-1],), -12345.0, dtype=torch.float64)
        for begin, end in pairwise(bounds):
            for rank, part in enumerate(parts):
                where = zigzag_positions(end - begin, rank, size)
                put[begin + where] = part[begin // size : end // size].double()
        assert not bool((put == -12345.0).any()), "every token belongs to one shard"
        fields[name] = put
    return fields


@pytest.mark.parametrize("is_packed", [True, False])
@pytest.mark.parametrize("cp_size", [1, 2])
@pytest.mark.parametrize("dp_size,multiple,bins", [(1, 1, 1), (2, 8, 1), (3, 1, 2)])
@pytest.mark.parametrize("num", [1, 5, 13])
def test_every_value_has_its_place_in_every_layout(
    is_packed: bool, cp_size: int, dp_size: int, multiple: int, bins: int, num: int
) -> None:
    samples = some_samples(num)
    seen: list[int] = []
    shapes, counts = set(), set()
    for dp_rank in range(dp_size):
        ranks = [
            micro_batches(
                samples,
                a_layout(
                    is_packed=is_packed,
                    dp_rank=dp_rank,
                    dp_size=dp_size,
                    cp_rank=cp_rank,
                    cp_size=cp_size,
                    token_multiple=multiple,
                    micro_batch_multiple=bins,
                ),
            )
            for cp_rank in range(cp_size)
        ]
        counts.add(len(ranks[0]))
        for shards in zip(*ranks, strict=True):
            shapes.update(tuple(shard.tokens.shape) for shard in shards)
            check_micro_batch(list(shards), samples, is_packed)
            seen.extend(shards[0].sample_indices)
    assert sorted(seen) == list(range(num))
    assert len(shapes) == len(counts) == 1
    assert counts.pop() % bins == 0
    rows, width = shapes.pop()
    assert rows * width * cp_size % multiple == 0


@pytest.mark.parametrize(
    ("changes", "num_widths"),
    [
        ({"is_packed": True, "micro_batch_size": 1}, 12),  # nearly full bins
        (
            {"is_packed": False, "micro_batch_size": 4},
            90,
        ),  # the longest sample, of 1,000 to 4,096 tokens, determines the width
    ],
)
def test_a_thousand_steps_have_few_widths_and_little_padding(
    changes: dict[str, Any], num_widths: int
) -> None:
    draw = random.Random(0)
    plain, coarse = set(), set()
    for _ in range(1000):
        samples = [a_sample(int(4096 * draw.random() ** 3) + 2) for _ in range(32)]
        batch = Batch(num_problems=32, samples=SampleArrays.of(samples))
        rows, exact = shard_batch(batch, a_layout(seq_length=4096, token_multiple=8, **changes))[0].shape
        layout = a_layout(seq_length=4096, token_multiple=8, width_slack=WIDTH_SLACK, **changes)
        _, width = shard_batch(batch, layout)[0].shape
        assert (
            exact <= width <= min(1.03 * exact, 4096) and width % 8 == 0 and rows == layout.micro_batch_size
        )
        plain.add(exact)
        coarse.add(width)
    assert len(coarse) <= num_widths < len(plain)


def a_sample(num_tokens: int) -> TrainingSample:
    return TrainingSample(
        problem_id="", kind="demonstration", prompt_ids=[1], response_ids=[1] * (num_tokens - 1), weight=1.0
    )


@pytest.mark.parametrize("is_packed", [True, False])
def test_rounding_the_width_up_changes_nothing_but_the_padding(is_packed: bool) -> None:
    samples = some_samples(13)
    exact = micro_batches(samples, a_layout(is_packed=is_packed))
    coarse = micro_batches(samples, a_layout(is_packed=is_packed, width_slack=0.9))
    assert coarse[0].tokens.shape[1] > exact[0].tokens.shape[1]
    for before, after in zip(exact, coarse, strict=True):
        check_micro_batch([after], samples, is_packed)
        kept, added = before.loss_mask > 0, after.loss_mask > 0
        for name in ("labels", "position_ids", "segment_ids", "ref_logprobs"):
            found, expected = getattr(after, name).flatten(), getattr(before, name).flatten()
            assert torch.equal(found[added], expected[kept]), name
        if is_packed:  # the padding is a sequence of its own, so that no sample attends to it
            assert before.packed_seq_params is not None and after.packed_seq_params is not None
            bounds = before.packed_seq_params.cu_seqlens_q.tolist()[: before.num_segments + 1]
            assert after.packed_seq_params.cu_seqlens_q.tolist()[: len(bounds)] == bounds


def lone_sample(num_prompt: int, num_response: int, first: int = 1) -> TrainingSample:
    """Tokens ``first``, ``first + 1``, ... in prompt and response; each response token's log-probability is -token."""
    ids = list(range(first, first + num_prompt + num_response))
    return TrainingSample(
        problem_id="",
        kind="rollout",
        prompt_ids=ids[:num_prompt],
        response_ids=ids[num_prompt:],
        weight=1.0,
        ref_logprobs=[-float(token) for token in ids[num_prompt:]],
        old_logprobs=[-float(token) / 2 for token in ids[num_prompt:]],
    )


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_response_of_one_token_trains_the_last_prompt_position_alone(is_packed: bool) -> None:
    samples = [lone_sample(1, 1, 10), lone_sample(3, 1, 20), lone_sample(2, 2, 30)]
    (batch,) = micro_batches(samples, a_layout(is_packed=is_packed, micro_batch_size=3, seq_length=8))
    trained = batch.loss_mask > 0
    by_segment: dict[int, list[tuple[int, int, float]]] = {}
    assert batch.ref_logprobs is not None
    for segment, token, label, ref in zip(
        batch.segment_ids[trained].tolist(),
        batch.tokens.flatten()[trained].tolist(),
        batch.labels[trained].tolist(),
        batch.ref_logprobs[trained].tolist(),
        strict=True,
    ):
        by_segment.setdefault(batch.sample_indices[segment], []).append((token, label, ref))
    assert by_segment == {0: [(10, 11, -11.0)], 1: [(22, 23, -23.0)], 2: [(31, 32, -32.0), (32, 33, -33.0)]}
    found = response_values(batch.ref_logprobs, batch, Group(1))  # type: ignore[arg-type]
    assert {i: values.tolist() for i, values in found.items()} == {0: [-11.0], 1: [-23.0], 2: [-32.0, -33.0]}


def test_without_context_parallelism_packed_sequences_have_no_padding_between_them() -> None:
    samples = [lone_sample(2, 3), lone_sample(1, 2), lone_sample(4, 3)]
    (batch,) = micro_batches(samples, a_layout(token_multiple=4, seq_length=16))
    params = batch.packed_seq_params
    assert params is not None
    lengths = [samples[i].num_tokens for i in batch.sample_indices]
    assert sorted(lengths) == [3, 5, 7]
    # 15 tokens, rounded up to 16: only the end is padded, as a sequence of its own.
    bounds = [0, *(sum(lengths[: n + 1]) for n in range(3)), 16]
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == bounds
    assert batch.tokens.shape == (1, 16)
    assert batch.position_ids.flatten().tolist() == [p for n in [*lengths, 1] for p in range(n)]


@pytest.mark.parametrize(
    ("cp_size", "lengths", "multiple", "max_seqlen"),
    [
        (1, [5, 3], 1, 5),
        (2, [5, 3], 1, 8),  # padded to multiples of 2 * cp
        (1, [2, 2, 1], 16, 11),  # the padding at the end is the longest sequence
    ],
)
def test_max_seqlen_is_the_longest_distance_of_the_bounds(
    cp_size: int, lengths: list[int], multiple: int, max_seqlen: int
) -> None:
    samples = [lone_sample(1, n - 1) for n in lengths]
    layout = a_layout(cp_size=cp_size, token_multiple=multiple, seq_length=16)
    (batch,) = micro_batches(samples, layout)
    params = batch.packed_seq_params
    assert params is not None
    assert params.max_seqlen_q == params.max_seqlen_kv == max_seqlen
    assert max(end - start for start, end in pairwise(params.cu_seqlens_q.tolist())) == max_seqlen


@pytest.mark.parametrize(
    ("changes", "num_tokens", "width"),
    [
        ({}, 1, 1),
        ({}, 63, 63),
        ({"token_multiple": 8}, 17, 24),
        ({"cp_size": 2}, 17, 20),
        ({"cp_size": 2, "token_multiple": 6}, 13, 24),  # a multiple of both 4 and 6
        ({"width_slack": 0.5}, 7, 8),  # in steps of 2, the largest power of two that is at most half of 7
        ({"width_slack": 0.5}, 9, 12),  # in steps of 4
        ({"width_slack": 0.25}, 33, 40),  # in steps of 8
        (
            {"width_slack": 0.8},
            10,
            16,
        ),  # in steps of 8, the largest power of two that is at most 0.8 * 10 = 8
        ({"width_slack": 0.25, "token_multiple": 2}, 33, 40),  # 17 units of 2, in steps of 4
        ({"width_slack": 0.9}, 61, 64),  # at most the token budget, 2 * 32
        ({"width_slack": 0.9, "is_packed": False}, 31, 32),  # at most the length of one sample
    ],
)
def test_width_is_rounded_to_units_and_steps_within_the_budget(
    changes: dict[str, Any], num_tokens: int, width: int
) -> None:
    assert a_layout(**changes).width(num_tokens) == width


@pytest.mark.parametrize(
    ("num_samples", "multiple", "num_micro_batches"), [(1, 1, 1), (4, 1, 1), (5, 1, 2), (5, 3, 3), (13, 2, 4)]
)
def test_padded_samples_are_dealt_in_turn(num_samples: int, multiple: int, num_micro_batches: int) -> None:
    layout = a_layout(is_packed=False, dp_size=2, micro_batch_size=2, micro_batch_multiple=multiple)
    samples = some_samples(num_samples)
    shards = shard_batch(Batch(num_problems=1, samples=SampleArrays.of(samples)), layout)
    for replica, shard in enumerate(shards):
        mine = list(range(replica, num_samples, 2))
        expected = [mine[i : i + 2] for i in range(0, len(mine), 2)]
        expected += [[]] * (num_micro_batches - len(expected))
        assert shard.micro_batches == expected
        ids = [token for i in mine for token in (*samples[i].prompt_ids, *samples[i].response_ids)]
        assert shard.samples.tokens.tolist() == ids


def test_facts_count_tokens_and_average_weights_per_kind() -> None:
    samples = [lone_sample(2, 3), lone_sample(1, 1), a_sample(7)]
    samples[1].weight, samples[2].is_counted = 4.0, False
    facts = shard_batch(Batch(num_problems=5, samples=SampleArrays.of(samples)), a_layout())[0].facts
    assert (facts.num_problems, facts.num_samples, facts.num_tokens) == (5, 3, 5 + 2 + 7)
    assert facts.squared_tokens == 25 + 4 + 49
    assert facts.num_counted == sum(len(s.response_ids) for s in samples[:2])
    assert facts.mean_weights == {"rollout": 2.5, "demonstration": 1.0}
    masses = [sample.weight * len(sample.response_ids) for sample in samples]
    assert facts.mass == pytest.approx(sum(masses) / facts.num_counted), "rollouts outside D have a mass too"


@pytest.mark.parametrize("cp_size", [1, 2])
def test_tokens_that_are_not_computed_enter_one_denominator(cp_size: int) -> None:
    batch = Batch(num_problems=9, samples=SampleArrays.of(some_samples(9)), num_uncomputed=17)
    counted = []
    for dp_rank, cp_rank in product(range(2), range(cp_size)):
        layout = a_layout(dp_size=2, dp_rank=dp_rank, cp_size=cp_size, cp_rank=cp_rank)
        shard = shard_batch(batch, layout)[dp_rank]
        counted += [int(made.num_uncomputed) for made in build_micro_batches(shard, layout)]
    assert sorted(counted)[-2:] == [0, 17] and sum(counted) == 17
    samples = batch.samples
    assert shard.facts.num_counted == int(samples.response_lengths[samples.are_counted].sum()) + 17
    mass = float((samples.weights * samples.response_lengths).sum())
    assert shard.facts.mass == pytest.approx(mass / shard.facts.num_counted)


def test_facts_average_weights_below_zero_apart() -> None:
    samples = [lone_sample(2, 3) for _ in range(3)]
    for sample, weight in zip(samples, (0.5, -0.25, -0.75), strict=True):
        sample.kind, sample.weight = "rollout", weight
    facts = shard_batch(Batch(num_problems=1, samples=SampleArrays.of(samples)), a_layout())[0].facts
    assert facts.mean_weights == {"rollout": 0.5, "wrong_rollout": -0.5}
    assert facts.mass == pytest.approx((0.5 + 0.25 + 0.75) / 3), "opposite weights both change the model"


def test_a_batch_without_samples_has_no_micro_batches() -> None:
    layout = a_layout(dp_size=3)
    shards = shard_batch(Batch(num_problems=2, samples=SampleArrays.of([])), layout)
    assert [build_micro_batches(shard, layout) for shard in shards] == [[], [], []]
    assert shards[0].facts.num_problems == 2 and shards[0].facts.mean_weights == {}
    assert shards[0].facts.mass == 0


def check_micro_batch(shards: list[MicroBatch], samples: list[TrainingSample], is_packed: bool) -> None:
    fields, batch = whole(shards), shards[0]
    width = batch.tokens.shape[1] * len(shards)
    start, trained = 0, 0
    assert batch.weights.tolist() == ([samples[i].weight for i in batch.sample_indices] or [0.0])
    assert batch.are_counted.tolist() == ([samples[i].is_counted for i in batch.sample_indices] or [True])
    for place, index in enumerate(batch.sample_indices):
        sample = samples[index]
        start = start if is_packed else place * width
        ids = [*sample.prompt_ids, *sample.response_ids]
        assert sample.ref_logprobs is not None and sample.old_logprobs is not None
        assert sample.teacher_logprobs is not None
        for t, token in enumerate(ids):
            at = start + t
            assert fields["tokens"][at] == token
            assert fields["position_ids"][at] == t
            assert fields["segment_ids"][at] == place
            answer = t + 1 - len(sample.prompt_ids)
            is_trained = 0 <= answer < len(sample.response_ids)
            assert fields["loss_mask"][at] == is_trained
            if is_trained:
                trained += 1
                assert fields["labels"][at] == sample.response_ids[answer]
                assert fields["ref_logprobs"][at] == pytest.approx(sample.ref_logprobs[answer], abs=1e-6)
                assert fields["old_logprobs"][at] == pytest.approx(sample.old_logprobs[answer], abs=1e-6)
                teacher = pytest.approx(sample.teacher_logprobs[answer], abs=1e-6)
                assert fields["teacher_logprobs"][at] == teacher
        if is_packed:
            assert batch.packed_seq_params is not None
            params = batch.packed_seq_params
            assert params.cu_seqlens_q is params.cu_seqlens_q_padded, (
                "Transformer Engine concludes from the identity that no padding lies between sequences"
            )
            bounds = params.cu_seqlens_q.tolist()
            assert bounds[place] == start
            assert bounds[place + 1] >= start + len(ids)
            start = bounds[place + 1]
    assert float(fields["loss_mask"].sum()) == trained
    assert float(fields["labels"].min()) >= 0


def test_logprobs_are_none_if_samples_lack_them() -> None:
    for batch in micro_batches(some_samples(4, has_logprobs=False), a_layout()):
        assert batch.ref_logprobs is None and batch.old_logprobs is None


@pytest.mark.parametrize("is_packed", [True, False])
def test_pinning_copies_every_tensor_unchanged(is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = micro_batches(some_samples(3), a_layout(is_packed=is_packed))[0]
    moved = batch.pinned()
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 11 and {id(tensor) for tensor in tensors.values()} <= set(pinned)
    for name, tensor in tensors.items():
        assert torch.equal(getattr(moved, name), tensor) and getattr(moved, name) is not tensor
    assert moved.sample_indices == batch.sample_indices
    if is_packed:
        before, after = batch.packed_seq_params, moved.packed_seq_params
        assert before is not None and after is not None
        assert after.cu_seqlens_q is not before.cu_seqlens_q and id(before.cu_seqlens_q) in pinned
        assert torch.equal(after.cu_seqlens_q, before.cu_seqlens_q)
        assert after.max_seqlen_q == before.max_seqlen_q


def test_a_replica_without_samples_gets_a_micro_batch_of_zeros() -> None:
    (batch,) = micro_batches(some_samples(1), a_layout(dp_rank=1, dp_size=2))
    assert batch.sample_indices == [] and batch.num_segments == 1
    assert batch.ref_logprobs is not None and batch.old_logprobs is not None
    assert float(batch.loss_mask.sum()) == 0
    assert batch.weights.tolist() == [0.0]


class Group:
    """Stands in for a context-parallel process group of ``size`` ranks."""

    def __init__(self, size: int) -> None:
        self.size = lambda: size


@pytest.mark.parametrize("is_packed", [True, False])
def test_response_values_are_sorted_by_sample(is_packed: bool) -> None:
    samples = some_samples(9)
    found: dict[int, Any] = {}
    for batch in micro_batches(samples, a_layout(is_packed=is_packed)):
        assert batch.ref_logprobs is not None
        found.update(response_values(batch.ref_logprobs, batch, Group(1)))  # type: ignore[arg-type]
    assert found == {i: pytest.approx(s.ref_logprobs, abs=1e-6) for i, s in enumerate(samples)}


def test_an_empty_response_has_no_values() -> None:
    samples = [lone_sample(2, 3), lone_sample(2, 0)]
    (batch,) = micro_batches(samples, a_layout(is_packed=False))
    assert batch.ref_logprobs is not None and batch.sample_indices == [0, 1]
    found = response_values(batch.ref_logprobs, batch, Group(1))  # type: ignore[arg-type]
    assert {i: values.tolist() for i, values in found.items()} == {0: [-3.0, -4.0, -5.0], 1: []}


@pytest.mark.parametrize("is_packed", [True, False])
def test_response_values_are_gathered_over_context_parallel_ranks(
    is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, size = some_samples(9), 2
    cp_group = Group(size)
    ranks = [
        micro_batches(samples, a_layout(is_packed=is_packed, cp_rank=r, cp_size=size)) for r in range(size)
    ]
    found: dict[int, Any] = {}
    for shards in zip(*ranks, strict=True):

        def all_gather(parts: list, mine: torch.Tensor, group: Any, shards: Any = shards) -> None:
            for part, s in zip(parts, shards, strict=True):
                rows = [s.ref_logprobs, s.loss_mask, s.segment_ids, s.position_ids.flatten()]
                part.copy_(torch.stack([row.double() for row in rows]))
            assert torch.equal(parts[1], mine) and group is cp_group

        monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
        found.update(response_values(shards[1].ref_logprobs, shards[1], cp_group))  # type: ignore[arg-type]
    assert found == {i: pytest.approx(s.ref_logprobs, abs=1e-6) for i, s in enumerate(samples)}
