"""Micro-batches of a bounded number of tokens, the same number of them on every data-parallel replica."""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

_NUM_CAPACITY_TRIALS = 8
"""Halvings of the range in which the smallest sufficient capacity is sought, if LPT finds no room."""


def pack(
    lengths: Sequence[int], max_tokens: int, num_replicas: int, multiple_of_bins: int = 1
) -> list[list[list[int]]]:
    """Share sequences out to data-parallel replicas as micro-batches (bins) of about equal token counts.

    As few bins as greedy packing finds, rounded up to a multiple of ``num_replicas * multiple_of_bins``, then
    balanced over all of them. The result depends on the arguments only, so every rank can compute it for
    itself.

    Args:
        lengths: tokens of each sequence, >= 1, as it lies in a micro-batch (any padding already added).
        max_tokens: most tokens in one bin.
        num_replicas: data-parallel size.
        multiple_of_bins: the number of bins per replica is a multiple of it (interleaved pipelines).

    Returns:
        For each replica its bins, each a list of indices into ``lengths``. Every index occurs once; a bin is
        empty only if there are fewer sequences than bins. No sequences, no bins.
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
                f"sequence {index} has {length} tokens, a micro-batch holds 1 to {max_tokens}. Drop it or "
                "raise the limit."
            )
    if not lengths:
        return [[] for _ in range(num_replicas)]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    bins = _fill_bins(lengths, order, max_tokens, num_replicas * multiple_of_bins)
    return _share_bins(lengths, bins, num_replicas)


def _fill_bins(lengths: Sequence[int], order: list[int], max_tokens: int, step: int) -> list[list[int]]:
    """Bins of at most ``max_tokens``, a multiple of ``step`` of them. ``order`` is by falling length."""
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
    # Too tight for spreading. Best fit succeeds at max_tokens: seek the least capacity at which it does.
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
    return _occupy_all(lengths, tight, num_bins)


def _spread(
    lengths: Sequence[int], order: list[int], num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Longest first, each into the bin with the fewest tokens (LPT); None once that bin would overflow."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, bin_index) for bin_index in range(num_bins)]  # a heap: equal keys rise with the index
    for index in order:
        load, bin_index = loads[0]
        load += lengths[index]
        if load > max_tokens:
            return None
        bins[bin_index].append(index)
        heapq.heapreplace(loads, (load, bin_index))
    return bins


def _best_fit(lengths: Sequence[int], order: list[int], capacity: int) -> list[list[int]]:
    """Longest first, each into the fullest bin that still has room for it, else into a new one."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), rising; full bins are left out
    for index in order:
        length = lengths[index]
        position = bisect_left(rooms, (length, -1))
        if position < len(rooms):
            room, bin_index = rooms.pop(position)
            bins[bin_index].append(index)
        else:
            room, bin_index = capacity, len(bins)
            bins.append([index])
        if room > length:
            insort(rooms, (room - length, bin_index))
    return bins


def _occupy_all(lengths: Sequence[int], bins: list[list[int]], num_bins: int) -> list[list[int]]:
    """Add bins up to ``num_bins``, each with the longest sequence of the fullest bin that has several."""
    bins = [list(indices) for indices in bins]
    loads = [(-sum(lengths[index] for index in indices), number) for number, indices in enumerate(bins)]
    fullest = [(load, number) for load, number in loads if len(bins[number]) > 1]
    heapq.heapify(fullest)
    while len(bins) < num_bins and fullest:
        load, number = heapq.heappop(fullest)
        index = bins[number].pop(0)  # _best_fit puts the longest first
        bins.append([index])
        if len(bins[number]) > 1:
            heapq.heappush(fullest, (load + lengths[index], number))
    return bins + [[] for _ in range(num_bins - len(bins))]


def _share_bins(lengths: Sequence[int], bins: list[list[int]], num_replicas: int) -> list[list[list[int]]]:
    """The n-th bins of all replicas are alike in size, and so are the replicas' sums."""
    loads = [sum(lengths[index] for index in indices) for indices in bins]
    by_load = sorted(range(len(bins)), key=lambda number: (-loads[number], number))
    replicas: list[list[list[int]]] = [[] for _ in range(num_replicas)]
    sums = [0] * num_replicas
    for start in range(0, len(bins), num_replicas):
        behind = sorted(range(num_replicas), key=lambda replica: (sums[replica], replica))
        for replica, number in zip(behind, by_load[start : start + num_replicas], strict=True):
            replicas[replica].append(bins[number])
            sums[replica] += loads[number]
    return replicas


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
