"""Packs sequences into micro-batches of a bounded number of tokens, equally many on every data-parallel replica."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

_NUM_CAPACITY_TRIALS = 8
"""Number of steps of the binary search for the smallest capacity, if spreading the sequences evenly fails."""


def pack(
    lengths: Sequence[int], max_tokens: int, num_replicas: int, multiple_of_bins: int = 1
) -> list[list[list[int]]]:
    """Assigns sequences to micro-batches (bins) with about equal numbers of tokens, and the bins to replicas.

    The number of bins is at most the number that best-fit-decreasing packing needs, rounded up to a multiple of
    ``num_replicas * multiple_of_bins``. The sequences are then balanced over all bins. The result is a deterministic
    function of the arguments.

    Args:
        lengths: tokens of each sequence including its padding, >= 1.
        max_tokens: maximum number of tokens in a bin.
        num_replicas: data-parallel size.
        multiple_of_bins: the number of bins per replica is a multiple of this (interleaved pipelines).

    Returns:
        For each replica its bins, each a list of indices into ``lengths``. Every index occurs once. Bins are empty
        only if there are fewer sequences than bins. Without sequences there are no bins.
    """
    for name, value in (
        ("max_tokens", max_tokens),
        ("num_replicas", num_replicas),
        ("multiple_of_bins", multiple_of_bins),
    ):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_tokens:
            raise ValueError(
                f"sequence {index} has {length} tokens, but a micro-batch holds 1 to {max_tokens}. Remove the sequence or "
                "raise the limit."
            )
    if not lengths:
        return [[] for _ in range(num_replicas)]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins = _fill_bins(lengths, order, max_tokens, num_replicas * multiple_of_bins)
    return _share_bins(lengths, bins, num_replicas)


def _fill_bins(lengths: Sequence[int], order: list[int], max_tokens: int, step: int) -> list[list[int]]:
    """Fills bins of at most ``max_tokens``.

    The number of bins is a multiple of ``step``. ``order`` lists the longest sequence first.
    """
    total = sum(lengths)
    num_bins = _round_up(-(-total // max_tokens), step)
    bins = _spread(lengths, order, num_bins, max_tokens)
    if bins is not None:
        return bins
    tight = _best_fit(lengths, order, max_tokens)
    num_bins = _round_up(len(tight), step)
    bins = _spread(lengths, order, num_bins, max_tokens)
    if bins is not None:
        return bins
    # The bins are too full for spreading evenly. Best fit succeeds at max_tokens. A binary search finds a smaller
    # capacity at which it still succeeds, because the most loaded bin determines the time of a step.
    low, high = max(-(-total // num_bins), lengths[order[0]]), max_tokens
    for _ in range(_NUM_CAPACITY_TRIALS):
        if low >= high:
            break
        capacity = (low + high) // 2
        bins = _best_fit(lengths, order, capacity)
        if len(bins) <= num_bins:
            tight, high = bins, capacity
        else:
            low = capacity + 1
    return split_fullest_bins(lengths, tight, num_bins)


def _spread(
    lengths: Sequence[int], order: list[int], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Puts each sequence, longest first, into the bin with the fewest tokens (LPT scheduling, Graham 1969).

    Returns:
        The bins, or None if one would exceed ``max_tokens``.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, bin_index) for bin_index in range(num_bins)]  # a heap, ordered by load and then by index
    for index in order:
        load, bin_index = loads[0]
        load += lengths[index]
        if load > max_tokens:
            return None
        bins[bin_index].append(index)
        heapq.heapreplace(loads, (load, bin_index))
    return bins


def _best_fit(lengths: Sequence[int], order: list[int], capacity: int) -> list[list[int]]:
    """Puts each sequence, longest first, into the fullest bin that can still hold it, else into a new bin."""
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, bin) in ascending order, without full bins
    for index in order:
        length = lengths[index]
        position = bisect_left(spaces, (length, -1))
        if position < len(spaces):
            space, bin_index = spaces.pop(position)
            bins[bin_index].append(index)
        else:
            space, bin_index = capacity, len(bins)
            bins.append([index])
        if space > length:
            insort(spaces, (space - length, bin_index))
    return bins


def split_fullest_bins(lengths: Sequence[int], bins: list[list[int]], num_bins: int) -> list[list[int]]:
    """Adds bins up to ``num_bins``, each with the longest sequence of the fullest bin that holds more than one.

    Best fit may leave bins unused, and a replica without real tokens would only wait for the others.
    """
    bins = [list(indices) for indices in bins]
    loads = [(-sum(lengths[index] for index in indices), number) for number, indices in enumerate(bins)]
    fullest = [(load, number) for load, number in loads if len(bins[number]) > 1]
    heapq.heapify(fullest)
    while len(bins) < num_bins and fullest:
        load, number = heapq.heappop(fullest)
        # the longest sequence is the first, because _best_fit appends longer sequences first
        index = bins[number].pop(0)
        bins.append([index])
        if len(bins[number]) > 1:
            heapq.heappush(fullest, (load + lengths[index], number))
    return bins + [[] for _ in range(num_bins - len(bins))]


def _share_bins(lengths: Sequence[int], bins: list[list[int]], num_replicas: int) -> list[list[list[int]]]:
    """Gives each replica equally many bins: the n-th bins of all replicas are similar in size, and so are the sums.

    Data-parallel replicas wait for each other at the end of a step, and with expert parallelism in every micro-batch.
    """
    loads = [sum(lengths[index] for index in indices) for indices in bins]
    by_load = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    replicas: list[list[list[int]]] = [[] for _ in range(num_replicas)]
    sums = [0] * num_replicas
    for start in range(0, len(bins), num_replicas):
        lightest_first = sorted(range(num_replicas), key=lambda replica: (sums[replica], replica))
        for replica, number in zip(lightest_first, by_load[start : start + num_replicas], strict=True):
            replicas[replica].append(bins[number])
            sums[replica] += loads[number]
    return replicas


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
