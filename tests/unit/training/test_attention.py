"""The zigzag cut of context parallelism, and attention over it."""

from types import SimpleNamespace

import pytest
import torch

from megatron_rasft.training.attention import SdpaCoreAttention, zigzag_positions


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 5])
def test_zigzag_shares_out_every_position_once_and_causal_work_alike(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    shares = [zigzag_positions(length, rank, size).tolist() for rank in range(size)]
    assert sorted(position for share in shares for position in share) == list(range(length))
    assert all(share == sorted(share) and len(share) == length // size for share in shares)
    work = {sum(share) for share in shares}
    assert len(work) == 1


def test_zigzag_of_two_ranks() -> None:
    assert zigzag_positions(8, 0, 2).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 1, 2).tolist() == [2, 3, 4, 5]


def test_zigzag_refuses_a_length_that_does_not_split() -> None:
    with pytest.raises(AssertionError, match="multiple of 2"):
        zigzag_positions(6, 0, 2)


def test_the_plain_attention_keeps_torch_from_building_a_plan_for_each_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switched: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    config = SimpleNamespace(attention_dropout=0.0)
    SdpaCoreAttention(config, 1, pg_collection=SimpleNamespace(cp=None))  # type: ignore[arg-type]
    assert switched == [False]


@pytest.mark.parametrize("size", [2, 4])
def test_attention_on_zigzag_shares_is_causal_attention_on_the_whole(size: int) -> None:
    attention = SdpaCoreAttention.__new__(SdpaCoreAttention)
    torch.nn.Module.__init__(attention)
    attention.softmax_scale = None
    length, batch, heads, groups, dim = 16, 2, 4, 2, 8
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(length, batch, heads, dim, generator=generator)
    key, value = (torch.randn(length, batch, groups, dim, generator=generator) for _ in range(2))
    spread_key, spread_value = (x.repeat_interleave(heads // groups, 2).double() for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query.double(), spread_key) / dim**0.5
    scores = scores.masked_fill(~torch.ones(length, length).tril().bool(), float("-inf"))
    expected = torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), spread_value)
    order = torch.cat([zigzag_positions(length, rank, size) for rank in range(size)])
    for rank in range(size):
        mine = zigzag_positions(length, rank, size)
        found = attention._attend_zigzag(query[mine], key[order], value[order], rank, size)
        torch.testing.assert_close(found.double(), expected[mine], atol=1e-6, rtol=1e-5)
