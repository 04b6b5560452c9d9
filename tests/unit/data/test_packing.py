import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rasft.data.packing import pack


def bin_loads(lengths: list[int], replicas: list[list[list[int]]]) -> list[list[int]]:
    return [[sum(lengths[index] for index in indices) for indices in bins] for bins in replicas]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    max_tokens = draw(st.integers(1, 200))
    lengths = draw(st.lists(st.integers(1, max_tokens), max_size=60))
    return lengths, max_tokens, draw(st.integers(1, 5)), draw(st.integers(1, 4))


@settings(max_examples=500, deadline=None)
@given(cases())
def test_every_sequence_lies_once_in_bins_that_hold_it(case: tuple[list[int], int, int, int]) -> None:
    lengths, max_tokens, num_replicas, multiple = case
    replicas = pack(lengths, max_tokens, num_replicas, multiple)
    bins = [indices for replica in replicas for indices in replica]
    assert len(replicas) == num_replicas
    assert len({len(replica) for replica in replicas}) == 1
    assert len(replicas[0]) % multiple == 0
    assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in indices) <= max_tokens for indices in bins)
    assert sum(not indices for indices in bins) == max(0, len(bins) - len(lengths))
    assert replicas == pack(tuple(lengths), max_tokens, num_replicas, multiple)


def fewest_bins(lengths: list[int], max_tokens: int) -> int:
    """By trying every assignment: an independent optimum for a handful of sequences."""
    best = len(lengths)
    for assignment in itertools.product(range(len(lengths)), repeat=len(lengths)):
        loads = [0] * len(lengths)
        for length, number in zip(lengths, assignment, strict=True):
            loads[number] += length
        if max(loads) <= max_tokens:
            best = min(best, sum(load > 0 for load in loads))
    return best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_number_of_bins_is_near_the_optimum(lengths: list[int]) -> None:
    # Best fit decreasing is within 11/9 of the optimum + 6/9 (Dosa 2007).
    assert len(pack(lengths, 30, 1)[0]) <= 11 / 9 * fewest_bins(lengths, 30) + 6 / 9


def test_bins_and_replicas_are_balanced() -> None:
    generator = random.Random(0)
    lengths = [int(min(4096, generator.lognormvariate(6, 0.7))) or 1 for _ in range(2048)]
    loads = bin_loads(lengths, pack(lengths, 8192, 8))
    flat = [load for row in loads for load in row]
    assert max(flat) / (sum(flat) / len(flat)) < 1.02
    sums = [sum(row) for row in loads]
    assert max(sums) / min(sums) < 1.005
    assert len(flat) - sum(lengths) / 8192 < 2 * 8


def test_bins_too_tight_for_spreading_are_still_found() -> None:
    # 6+4, 6+4, 5+5 fill three bins; longest-first spreading would put 4 upon 5 and overflow.
    lengths = [6, 6, 5, 5, 4, 4]
    assert bin_loads(lengths, pack(lengths, 10, 1)) == [[10, 10, 10]]


def test_lone_sequences_leave_bins_empty_only_for_lack_of_sequences() -> None:
    replicas = pack([5, 3], 10, 2, multiple_of_bins=2)
    assert sorted(len(indices) for bins in replicas for indices in bins) == [0, 0, 1, 1]
    assert pack([], 10, 3) == [[], [], []]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "num_replicas", "multiple", "message"),
    [
        ([5, 11], 10, 1, 1, "sequence 1 has 11 tokens"),
        ([0], 10, 1, 1, "sequence 0 has 0 tokens"),
        ([1], 0, 1, 1, "max_tokens"),
        ([1], 1, 0, 1, "num_replicas"),
        ([1], 1, 1, 0, "multiple_of_bins"),
    ],
)
def test_impossible_request_is_refused(
    lengths: list[int], max_tokens: int, num_replicas: int, multiple: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pack(lengths, max_tokens, num_replicas, multiple)


@pytest.mark.parametrize("longest", [4096, 8192])
def test_hundred_thousand_sequences_take_seconds(longest: int) -> None:
    generator = random.Random(1)
    lengths = [generator.randint(1, longest) for _ in range(100_000)]
    start = time.perf_counter()
    pack(lengths, 8192, 64)
    assert time.perf_counter() - start < 20, (
        "a few seconds on an idle machine; the bound allows for a busy one"
    )
