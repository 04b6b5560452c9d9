"""Layouts: which pieces of Hugging Face tensors make up a rank's shard of a Megatron parameter.

The pieces are concatenated along one dimension. Loading copies them in and exporting copies them out, so each layout is described once.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from megatron_rasft.weights.families.shape import ModelShape


class Piece(NamedTuple):
    """Rows (or columns) ``start:stop`` of an entry's Hugging Face tensor number ``tensor``."""

    tensor: int
    start: int
    stop: int


class ShardLayout(NamedTuple):
    """The layout of one rank's shard."""

    dim: int
    """Dimension along which the pieces are concatenated."""
    length: int
    """Size of the shard along ``dim``. If the pieces are shorter, zeros pad the rest."""
    pieces: tuple[Piece, ...]


Layout = Callable[[ModelShape, int, int, Sequence[int] | None], ShardLayout]
"""A function of the model's shape, tp_rank, tp_size and the shape of the shard in the model, which returns the shard's layout.

Only layouts that allow padding (vocabulary, query groups) use the last argument; None means no padding.
"""


def share(total: int, tp_rank: int, tp_size: int) -> tuple[int, int]:
    if total % tp_size:
        raise ValueError(
            f"--tensor-model-parallel-size {tp_size} does not divide {total}, the size of a weight."
        )
    return total // tp_size * tp_rank, total // tp_size * (tp_rank + 1)


def padded_share(total: int, size: int | None, tp_rank: int, tp_size: int) -> tuple[int, int, int]:
    """Returns the size of a rank's shard, and the part of ``total`` that it holds. The padding comes after ``total``.

    If ``size`` times ``tp_size`` is less than ``total``, the size is wrong. The result is then the layout without padding, so
    that the caller's comparison of shapes reports the mismatch.
    """
    if size is None or size * tp_size < total:
        start, stop = share(total, tp_rank, tp_size)
        return stop - start, start, stop
    return size, min(size * tp_rank, total), min(size * (tp_rank + 1), total)


def replicated(size: Callable[[ModelShape], int]) -> Layout:
    def layout(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        return ShardLayout(0, size(shape), (Piece(0, 0, size(shape)),))

    return layout


def output_split(size: Callable[[ModelShape], int]) -> Layout:
    """A column-parallel weight: every rank holds a range of rows, or all of them."""

    def layout(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        if shard is not None and shard[0] == size(shape):
            return ShardLayout(0, size(shape), (Piece(0, 0, size(shape)),))
        start, stop = share(size(shape), tp_rank, tp_size)
        return ShardLayout(0, stop - start, (Piece(0, start, stop),))

    return layout


def input_split(size: Callable[[ModelShape], int]) -> Layout:
    """A row-parallel weight: every rank holds a range of columns. The columns of added query groups come last."""

    def layout(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        width = None if shard is None else shard[1]
        length, start, stop = padded_share(size(shape), width, tp_rank, tp_size)
        return ShardLayout(1, length, (Piece(0, start, stop),) if start < stop else ())

    return layout


def gate_then_up(size: Callable[[ModelShape], int]) -> Layout:
    """The rank's rows of the gate projection, followed by its rows of the up projection."""

    def layout(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        start, stop = share(size(shape), tp_rank, tp_size)
        return ShardLayout(0, 2 * (stop - start), (Piece(0, start, stop), Piece(1, start, stop)))

    return layout


def query_key_value(
    shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None
) -> ShardLayout:
    """Each query group consists of its queries, its key and its value; ranks split the sequence of groups evenly.

    With fewer groups than ranks a group is split between ranks, and Megatron gathers it in the forward pass
    (SelfAttention.get_query_key_value_tensors). If the model has more groups than the folder, the added groups are padding
    at the end.
    """
    d = shape.head_dim
    q = shape.num_attention_heads // shape.num_query_groups * d
    rows = None if shard is None else shard[0]
    length, start, stop = padded_share(shape.num_query_groups * (q + 2 * d), rows, tp_rank, tp_size)
    pieces, position = [], 0
    for group in range(shape.num_query_groups):
        for tensor, size in ((0, q), (1, d), (2, d)):
            low, high = max(start, position), min(stop, position + size)
            if low < high:
                offset = group * size - position
                pieces.append(Piece(tensor, low + offset, high + offset))
            position += size
    return ShardLayout(0, length, tuple(pieces))


def stacked(layout: Layout, sizes: Callable[[ModelShape], tuple[int, ...]]) -> Layout:
    """Returns the layout of the same shard if one Hugging Face tensor stacks the tensors that ``layout`` refers to."""

    def fused(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
        starts = [0, *accumulate(sizes(shape))]
        plain = layout(shape, tp_rank, tp_size, shard)
        pieces = (Piece(0, starts[p.tensor] + p.start, starts[p.tensor] + p.stop) for p in plain.pieces)
        return plain._replace(pieces=tuple(pieces))

    return fused


def vocabulary(shape: ModelShape, tp_rank: int, tp_size: int, shard: Sequence[int] | None) -> ShardLayout:
    """A range of token rows. The vocabulary is padded at its end, so the last ranks may hold padding only."""
    rows = None if shard is None else shard[0]
    if rows is not None and rows * tp_size < shape.vocab_size:
        raise ValueError(
            f"--padded-vocab-size {rows * tp_size} is smaller than the folder's vocabulary "
            f"of {shape.vocab_size}."
        )
    length, start, stop = padded_share(shape.vocab_size, rows, tp_rank, tp_size)
    return ShardLayout(0, length, (Piece(0, start, stop),) if start < stop else ())
