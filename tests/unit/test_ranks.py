"""Rank 0's result or failure reaches every rank."""

import math
import time
from array import array
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rasft.errors import FailedElsewhere
from megatron_rasft.ranks import (
    gather_to_all,
    gather_to_rank_zero,
    hand_out,
    kept_by_rank_zero,
    on_rank_zero,
)
from tests.forking import call_on_ranks


def test_a_single_process_just_works() -> None:
    assert on_rank_zero(lambda: 5) == 5
    assert gather_to_all("x") == ["x"]
    assert gather_to_rank_zero("x") == ["x"] and gather_to_rank_zero(None) == []
    assert kept_by_rank_zero(lambda: 5, 0) == 5
    assert hand_out(lambda: ["mine"], [[0]]) == "mine"
    with pytest.raises(KeyError):
        on_rank_zero(lambda: {}["missing"])


def _rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    calls: list[int] = []

    def work() -> dict[str, int]:
        calls.append(rank)
        return {"from": rank}

    assert on_rank_zero(work) == {"from": 0}
    assert calls == ([0] if rank == 0 else [])
    assert gather_to_all(rank * 10) == [0, 10]
    assert gather_to_rank_zero(rank * 10) == ([0, 10] if rank == 0 else [])
    exact = array("d", [0.1, -1e-300, math.inf])
    assert gather_to_rank_zero(exact if rank == 1 else None) == ([exact] if rank == 0 else [])
    assert gather_to_rank_zero("alone" if rank == 0 else None) == (["alone"] if rank == 0 else [])
    assert kept_by_rank_zero(lambda: "kept", "nothing") == ("kept" if rank == 0 else "nothing")

    def fail() -> None:
        raise ValueError("no such file")

    for share in (on_rank_zero, lambda work: kept_by_rank_zero(work, None)):
        with pytest.raises(ValueError if rank == 0 else FailedElsewhere, match="no such file"):
            share(fail)
    assert on_rank_zero(lambda: None) is None, "the group still works, and None is a result"
    Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


def _late_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5))  # not earlier: both ranks must join in time
    assert on_rank_zero(lambda: time.sleep(2) or "late") == "late"
    if rank == 1:
        time.sleep(2)
    assert gather_to_rank_zero(rank) == ([0, 1] if rank == 0 else [])
    Path(folder, f"done{rank}").touch()


def test_a_rank_may_take_longer_than_a_collective_of_the_others(tmp_path: Path) -> None:
    call_on_ranks(_late_rank, tmp_path, 2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


def test_two_ranks_share_results_and_failures(tmp_path: Path) -> None:
    call_on_ranks(_rank, tmp_path, 2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


REPLICAS = [
    [[0], [1], [2], [3], [4]],
    [[0, 1, 2, 3, 4]],
    [[0, 2], [1, 3], [4]],
    [[0], [1, 2, 3, 4]],
]


def _rank_of_a_replica(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=5)
    for number, replicas in enumerate(REPLICAS):
        calls: list[int] = []

        def work(number: int = number, replicas: list = replicas, calls: list = calls) -> list:
            calls.append(rank)
            return [(number, i, np.full(1000 * i, i, np.int32)) for i in range(len(replicas))]

        found = hand_out(work, replicas)
        mine = next(i for i, ranks in enumerate(replicas) if rank in ranks)
        assert found[:2] == (number, mine) and found[2].tolist() == [mine] * 1000 * mine
        assert calls == ([0] if rank == 0 else [])

    def fail() -> list[int]:
        raise ValueError("no batch")

    with pytest.raises(ValueError if rank == 0 else FailedElsewhere, match="no batch"):
        hand_out(fail, REPLICAS[0])
    assert hand_out(lambda: [0, 10, 20, 30, 40], REPLICAS[0]) == 10 * rank, "the group still works"
    Path(folder, f"done{rank}").touch()
    dist.destroy_process_group()


def test_each_replica_is_handed_its_own_value(tmp_path: Path) -> None:
    call_on_ranks(_rank_of_a_replica, tmp_path, 5)
    assert all((tmp_path / f"done{rank}").exists() for rank in range(5))


def _rank_that_counts_bytes(rank: int, folder: str) -> None:
    """Counts the bytes that this rank sends while 8 MB are sent to another replica."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    on_rank_zero(lambda: None)  # makes the group
    sent: list[int] = []
    for name in ("send", "isend"):
        plain = getattr(dist, name)

        def counted(tensor: torch.Tensor, *args: Any, plain: Any = plain, **options: Any) -> Any:
            sent.append(tensor.numel())
            return plain(tensor, *args, **options)

        setattr(dist, name, counted)
    hand_out(lambda: [bytes(100), bytes(8_000_000)], [[0], [1, 2]])
    assert [num for num in sent if num > 1000] == ([] if rank == 2 else [pytest.approx(8_000_000, abs=100)])
    dist.destroy_process_group()


def test_rank_zero_sends_a_replica_one_copy_and_itself_none(tmp_path: Path) -> None:
    call_on_ranks(_rank_that_counts_bytes, tmp_path, 3)
