"""Packing compared with optimal solutions of small cases, and its bounds and invariants on large ones."""

import itertools
import random
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rasft.data.packing import pack, split_fullest_bins


def bin_loads(lengths: list[int], replicas: list[list[list[int]]]) -> list[list[int]]:
    return [[sum(lengths[index] for index in indices) for indices in bins] for bins in replicas]


def flat_loads(lengths: list[int], replicas: list[list[list[int]]]) -> list[int]:
    return list(itertools.chain.from_iterable(bin_loads(lengths, replicas)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    max_tokens = draw(st.integers(1, 200))
    lengths = draw(st.lists(st.integers(1, max_tokens), max_size=60))
    return lengths, max_tokens, draw(st.integers(1, 5)), draw(st.integers(1, 4))


@settings(max_examples=500, deadline=None)
@given(cases())
def test_every_sequence_is_in_one_bin_that_can_hold_it(case: tuple[list[int], int, int, int]) -> None:
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


def subset_sums(lengths: list[int]) -> list[int]:
    return [
        sum(length for place, length in enumerate(lengths) if subset >> place & 1)
        for subset in range(1 << len(lengths))
    ]


def fewest_bins(lengths: list[int], capacity: int) -> int:
    """The optimal number of bins: dynamic programming over all subsets of the sequences."""
    sums, everything = subset_sums(lengths), (1 << len(lengths)) - 1
    fewest = [0] * (everything + 1)
    for subset in range(1, everything + 1):
        best, part = len(lengths), subset
        while part:
            if sums[part] <= capacity:
                best = min(best, fewest[subset ^ part] + 1)
            part = (part - 1) & subset
        fewest[subset] = best
    return fewest[everything]


def least_capacity(lengths: list[int], num_bins: int) -> int:
    """The optimal load of the fullest of ``num_bins`` bins."""
    low, high = max(lengths), sum(lengths)
    while low < high:
        middle = (low + high) // 2
        if fewest_bins(lengths, middle) <= num_bins:
            high = middle
        else:
            low = middle + 1
    return low


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The loads of best-fit-decreasing bins, by trying every bin for every sequence."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [place for place, load in enumerate(loads) if load + length <= capacity]
        if fitting:
            loads[max(fitting, key=lambda place: loads[place])] += length
        else:
            loads.append(length)
    return loads


def longest_processing_time(lengths: list[int], num_bins: int) -> list[int]:
    """The loads of LPT scheduling without a limit."""
    loads = [0] * num_bins
    for length in sorted(lengths, reverse=True):
        loads[loads.index(min(loads))] += length
    return loads


few_sequences = st.lists(st.integers(1, 30), min_size=3, max_size=9)
counts = st.integers(1, 3)


@settings(max_examples=300, deadline=None)
@given(few_sequences, counts, counts)
def test_few_sequences_are_packed_within_the_bounds_of_the_optimum(
    lengths: list[int], num_replicas: int, multiple: int
) -> None:
    step = num_replicas * multiple
    optimal = fewest_bins(lengths, 30)
    num_greedy = len(best_fit_decreasing(lengths, 30))
    # Best fit decreasing needs at most 11/9 of the optimum + 6/9 bins (Dosa 2007).
    assert optimal <= num_greedy <= Fraction(11, 9) * optimal + Fraction(6, 9)
    loads = flat_loads(lengths, pack(lengths, 30, num_replicas, multiple))
    assert step * ceil(optimal / step) <= len(loads) <= step * ceil(num_greedy / step)
    spread = longest_processing_time(lengths, len(loads))
    if max(spread) <= 30:
        # LPT's fullest bin exceeds the optimum by at most a third (Graham 1969).
        assert sorted(loads) == sorted(spread)
        bound = Fraction(4, 3) - Fraction(1, 3 * len(loads))
        assert max(loads) <= bound * least_capacity(lengths, len(loads))
    else:
        # The smallest capacity at which best fit succeeds.
        assert len(best_fit_decreasing(lengths, max(loads) - 1)) > len(loads)


@settings(max_examples=300, deadline=None)
@given(few_sequences, counts)
def test_no_fewer_bins_are_taken_than_tokens_need_and_no_more_than_spreading_needs(
    lengths: list[int], step: int
) -> None:
    num_bins = len(flat_loads(lengths, pack(lengths, 30, step)))
    least = step * ceil(sum(lengths) / 30 / step)
    assert num_bins >= least
    if max(longest_processing_time(lengths, least)) <= 30:
        assert num_bins == least


@settings(max_examples=300, deadline=None)
@given(few_sequences, st.integers(2, 4), counts)
def test_bins_of_one_place_are_similar_and_replicas_differ_by_less_than_them(
    lengths: list[int], num_replicas: int, multiple: int
) -> None:
    loads = bin_loads(lengths, pack(lengths, 30, num_replicas, multiple))
    places = list(zip(*loads, strict=True))
    for place, following in itertools.pairwise(places):
        assert min(place) >= max(following)
    # At each position the replica with the fewest tokens gets the largest bin, so differences do not add up.
    sums = [sum(replica) for replica in loads]
    assert max(sums) - min(sums) <= max(max(place) - min(place) for place in places)


def test_bins_and_replicas_are_balanced() -> None:
    generator = random.Random(0)
    lengths = [int(min(4096, generator.lognormvariate(6, 0.7))) or 1 for _ in range(2048)]
    loads = bin_loads(lengths, pack(lengths, 8192, 8))
    flat = [load for row in loads for load in row]
    assert max(flat) / (sum(flat) / len(flat)) < 1.02
    sums = [sum(row) for row in loads]
    assert max(sums) / min(sums) < 1.005
    assert len(flat) - sum(lengths) / 8192 < 2 * 8


def test_bins_too_full_for_spreading_are_still_found() -> None:
    # 6+4, 6+4, 5+5 fill three bins; spreading, longest first, would add 4 to 5 + 5 and exceed 10.
    lengths = [6, 6, 5, 5, 4, 4]
    assert bin_loads(lengths, pack(lengths, 10, 1)) == [[10, 10, 10]]


@pytest.mark.parametrize(
    ("lengths", "max_tokens"),
    [
        ([8, 10, 10, 16, 13, 8, 8, 13, 17], 30),
        ([14, 10, 9, 8, 11, 15, 23, 28, 14], 30),
        ([227, 209, 297, 184, 166, 215, 163, 258, 240], 600),
        ([175, 146, 261, 294, 253, 199, 218], 600),
        ([309, 160, 228, 246, 203, 166, 130, 275, 317], 600),
    ],
)
def test_if_spreading_fails_best_fit_takes_the_smallest_capacity_that_suffices(
    lengths: list[int], max_tokens: int
) -> None:
    num_bins = len(best_fit_decreasing(lengths, max_tokens))
    assert max(longest_processing_time(lengths, num_bins)) > max_tokens
    smallest = next(
        capacity
        for capacity in range(max(lengths), max_tokens + 1)
        if len(best_fit_decreasing(lengths, capacity)) <= num_bins
    )
    assert smallest < max(best_fit_decreasing(lengths, max_tokens))
    assert max(flat_loads(lengths, pack(lengths, max_tokens, 1))) == smallest


def test_bins_that_best_fit_leaves_unused_are_filled() -> None:
    # 12 bins of 15 tokens, cut into pieces. Spreading over 13 replicas would put 16 tokens into a bin, and best fit needs
    # 14 bins at any smaller capacity.
    lengths = [9, 6, 3, 3, 9, 1, 7, 7, 4, 5, 6, 12, 3, 4, 10, 1, 4, 8, 3, 6, 9, 3, 12, 5, 10, 7, 8, 10, 4, 1]
    assert max(longest_processing_time(lengths, 13)) == 16
    assert [len(best_fit_decreasing(lengths, capacity)) for capacity in (14, 15)] == [14, 12]
    loads = sorted(flat_loads(lengths, pack(lengths, 15, 13)))
    assert len(loads) == 13 and loads[2:] == [15] * 11 and sum(loads[:2]) == 15 and loads[0] > 0


def test_each_added_bin_gets_the_longest_sequence_of_the_fullest_bin() -> None:
    lengths = [9, 6, 5, 4, 3, 2]
    bins = [[0], [1, 5], [2, 3, 4]]  # the bins have 9, 8 and 12 tokens
    assert split_fullest_bins(lengths, bins, 3) == bins
    assert split_fullest_bins(lengths, bins, 4) == [[0], [1, 5], [3, 4], [2]]
    assert split_fullest_bins(lengths, bins, 5) == [[0], [5], [3, 4], [2], [1]]
    assert split_fullest_bins(lengths, bins, 6) == [[0], [5], [4], [2], [1], [3]]
    assert split_fullest_bins(lengths, bins, 8) == [[0], [5], [4], [2], [1], [3], [], []]
    assert bins == [[0], [1, 5], [2, 3, 4]], "the given bins must not change"


def test_empty_bins_occur_only_if_there_are_too_few_sequences() -> None:
    replicas = pack([5, 3], 10, 2, multiple_of_bins=2)
    assert sorted(len(indices) for bins in replicas for indices in bins) == [0, 0, 1, 1]
    assert pack([], 10, 3) == [[], [], []]


def test_equal_sequences_keep_their_order() -> None:
    assert pack([4, 4, 4, 4], 8, 2) == [[[0, 2]], [[1, 3]]]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "num_replicas", "multiple", "named"),
    [
        ([5, 11], 10, 1, 1, ("sequence 1 ", "11", "10")),
        ([0], 10, 1, 1, ("sequence 0 ",)),
        ([1], 0, 1, 1, ("max_tokens", "0")),
        ([1], 1, 0, 1, ("num_replicas", "0")),
        ([1], 1, 1, 0, ("multiple_of_bins", "0")),
    ],
)
def test_invalid_arguments_are_named(
    lengths: list[int], max_tokens: int, num_replicas: int, multiple: int, named: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        pack(lengths, max_tokens, num_replicas, multiple)
    assert all(text in str(error.value) for text in named)


@pytest.mark.timeout(
    300
)  # 3 s on an idle machine; an algorithm that is quadratic in the sequences takes an hour
@pytest.mark.parametrize("longest", [4096, 8192])
def test_hundred_thousand_sequences_are_packed(longest: int) -> None:
    generator = random.Random(1)
    lengths = [generator.randint(1, longest) for _ in range(100_000)]
    packed = pack(lengths, 8192, 64)
    assert sorted(i for replica in packed for bin_ in replica for i in bin_) == list(range(100_000))
