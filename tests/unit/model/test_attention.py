"""Plain torch layers compared with formulas: context parallelism, packed sequences and RMSNorm."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_rasft.model import attention
from megatron_rasft.model.attention import RMSNorm, SdpaCoreAttention, zigzag_positions

HEADS, GROUPS, DIM = 4, 2, 8
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 5])
def test_zigzag_divides_positions_so_that_ranks_have_the_same_work(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    shares = [zigzag_positions(length, rank, size).tolist() for rank in range(size)]
    assert sorted(position for share in shares for position in share) == list(range(length))
    assert all(share == sorted(share) and len(share) == length // size for share in shares)
    work = {sum(share) for share in shares}
    assert len(work) == 1


def test_zigzag_of_two_ranks() -> None:
    assert zigzag_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 1, 2).tolist() == [2, 3, 4, 5]


def test_zigzag_refuses_a_length_that_is_not_a_multiple_of_its_chunks() -> None:
    with pytest.raises(AssertionError, match="6"):
        zigzag_positions(6, 0, 2)


class Group:
    """Stands in for the context-parallel process group of one rank."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = lambda: rank
        self.size = lambda: size


def core_attention(
    rank: int = 0,
    size: int = 1,
    dropout: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> SdpaCoreAttention:
    config: Any = SimpleNamespace(
        attention_dropout=dropout,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=[1, 0],
        softmax_type="vanilla" if sinks is None else "learnable",
        num_attention_heads=HEADS,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
    )
    groups: Any = SimpleNamespace(cp=Group(rank, size), tp=Group())
    made = SdpaCoreAttention(config, 1, pg_collection=groups)
    if sinks is not None:
        made.load_state_dict({"softmax_offset": sinks})
    return made


def random_heads(*shape: int) -> list[Tensor]:
    """Query [*shape, n, d], key and value [*shape, n_kv, d]."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS)]


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """[s, b, n * d] causal attention of complete sequences, within a window and with sinks, by its formula, in fp64."""
    key, value = (x.repeat_interleave(HEADS // GROUPS, 2).double() for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query.double(), key) / DIM**0.5
    is_hidden = ~torch.ones(len(query), len(query)).tril().triu(1 - (window or len(query))).bool()
    scores = scores.masked_fill(is_hidden, float("-inf"))
    weights = scores.softmax(-1)
    if sinks is not None:
        total = scores.exp().sum(-1, keepdim=True) + sinks.double().exp()[:, None, None]
        weights = scores.exp() / total
    return torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2)


def gather_from(monkeypatch: pytest.MonkeyPatch, gathered: list[Tensor]) -> None:
    """Makes the all-gathers of key and value return ``gathered`` in turn."""
    answers = itertools.cycle(gathered)
    monkeypatch.setattr(attention, "gather_from_sequence_parallel_region", lambda mine, group: next(answers))


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8])
def test_one_rank_attends_causally(window: int | None) -> None:
    heads = random_heads(7, 2)
    found = core_attention(window=window)(*heads, None)
    torch.testing.assert_close(found.double(), attended(*heads, window), atol=1e-6, rtol=1e-5)


def test_only_some_layers_have_the_window() -> None:
    windows = {"window_size": (4, 0), "window_attn_skip_freq": [1, 0, 1]}
    config: Any = SimpleNamespace(attention_dropout=0.0, softmax_type="vanilla", **windows)
    group: Any = SimpleNamespace(cp=Group())
    layers = [SdpaCoreAttention(config, number, pg_collection=group) for number in (1, 2, 3)]
    assert [layer.window for layer in layers] == [5, None, 5]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("size", [2, 4])
def test_context_parallel_ranks_compute_causal_attention_of_the_whole_sequence(
    size: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 16
    query, key, value = random_heads(length, 2)
    expected = attended(query, key, value, window)
    order = torch.cat([zigzag_positions(length, rank, size) for rank in range(size)])
    for rank in range(size):
        mine = zigzag_positions(length, rank, size)
        gather_from(monkeypatch, [key[order], value[order]])
        found = core_attention(rank, size, window=window)(query[mine], key[mine], value[mine], None)
        torch.testing.assert_close(found.double(), expected[mine], atol=1e-6, rtol=1e-5)


def packed(bounds: list[int]) -> PackedSeqParams:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


@pytest.mark.parametrize("sinks", [None, SINKS])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("size", [1, 2])
def test_packed_sequences_attend_only_to_themselves(
    size: int, window: int | None, sinks: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = [0, 4, 4, 12, 20]  # the second sequence is empty
    query, key, value = random_heads(bounds[-1])
    segments = list(itertools.pairwise(bounds))
    expected = torch.cat(
        [
            attended(*(x[begin:end, None] for x in (query, key, value)), window, sinks)[:, 0]
            for begin, end in segments
        ]
    )
    places = [
        torch.cat([begin + zigzag_positions(end - begin, rank, size) for begin, end in segments])
        for rank in range(size)
    ]
    for rank, mine in enumerate(places):
        gather_from(monkeypatch, [key[torch.cat(places)], value[torch.cat(places)]])
        heads = (x[mine] for x in (query, key, value))
        layer = core_attention(rank, size, window=window, sinks=sinks)
        found = layer(*heads, None, packed_seq_params=packed(bounds))
        torch.testing.assert_close(found.double(), expected[mine], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_sinks_have_the_gradient_of_the_formula(window: int | None) -> None:
    heads = random_heads(7, 2)
    layer = core_attention(window=window, sinks=SINKS)
    found = layer(*heads, None)
    factors = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
    (found * factors).sum().backward()
    sinks = SINKS.double().requires_grad_()
    (attended(*heads, window, sinks) * factors).sum().backward()
    assert (
        layer.softmax_offset is not None and layer.softmax_offset.grad is not None and sinks.grad is not None
    )
    torch.testing.assert_close(layer.softmax_offset.grad.double(), sinks.grad, atol=1e-5, rtol=1e-5)


def test_padded_bounds_take_precedence_over_unpadded_ones() -> None:
    heads = random_heads(8)
    params = packed([0, 3, 6])
    params.cu_seqlens_q_padded = torch.tensor([0, 4, 8], dtype=torch.int32)
    found = core_attention()(*heads, None, packed_seq_params=params)
    expected = torch.cat([attended(*(x[i : i + 4, None] for x in heads))[:, 0] for i in (0, 4)])
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_cudnn_attention_is_switched_off_because_it_prepares_a_plan_for_each_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switched: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    core_attention()
    assert switched == [False]


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--attention-dropout 0\.1"):
        core_attention(dropout=0.1)


@pytest.mark.parametrize("is_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_divides_by_the_root_mean_square_in_fp32(dtype: torch.dtype, is_centered: bool) -> None:
    config: Any = SimpleNamespace(
        use_cpu_initialization=True,
        params_dtype=dtype,
        sequence_parallel=True,
        layernorm_zero_centered_gamma=is_centered,
    )
    norm = RMSNorm(config, 6, eps=1e-3)
    assert torch.equal(norm.weight + is_centered, torch.ones(6)), "the initial factor is 1"
    assert norm.weight.sequence_parallel, "finalize_model_grads sums the gradients of marked weights"
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6) / 4)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    root = (x.double().pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = x.double() / root * (norm.weight.double() + is_centered)
    assert norm(x).dtype == dtype
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(norm(x).double(), expected, atol=1e-5, rtol=rtol)
