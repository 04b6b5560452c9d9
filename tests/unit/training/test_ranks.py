"""A result or a failure of rank 0 reaches every rank."""

import math
import os
import time
from array import array
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_rasft.errors import FailedElsewhere
from megatron_rasft.training.ranks import (
    gather_to_all,
    gather_to_rank_zero,
    kept_by_rank_zero,
    on_rank_zero,
    speaks_for_node,
)


def test_a_single_process_just_works() -> None:
    assert on_rank_zero(lambda: 5) == 5
    assert gather_to_all("x") == ["x"]
    assert gather_to_rank_zero("x") == ["x"] and gather_to_rank_zero(None) == []
    assert kept_by_rank_zero(lambda: 5, 0) == 5
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
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=5),
    )
    assert on_rank_zero(lambda: time.sleep(6) or "late") == "late"
    if rank == 1:
        time.sleep(6)
    assert gather_to_rank_zero(rank) == ([0, 1] if rank == 0 else [])
    Path(folder, f"done{rank}").touch()


def test_a_rank_may_take_longer_than_a_collective_of_the_others(tmp_path: Path) -> None:
    mp.spawn(_late_rank, args=(str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


def test_two_ranks_share_results_and_failures(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


def _rank_that_fails(rank: int, folder: str) -> None:
    os.environ.update({"LOCAL_RANK": str(rank % 2), "GROUP_RANK": str(rank // 2)})
    assert speaks_for_node("before they met") == (rank % 2 == 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    if rank % 2 == 0:
        time.sleep(1)  # the others wait for it
    said = speaks_for_node("met by all")
    if rank in (2, 3):
        said = (said, speaks_for_node("met by the second node"))
    if rank == 3:
        said = (*said, speaks_for_node("met by its last rank alone"))
    Path(folder, f"said{rank}").write_text(str(said))
    dist.barrier()
    dist.destroy_process_group()


def test_an_error_is_said_once_a_node_and_one_of_a_single_rank_by_that(tmp_path: Path) -> None:
    mp.spawn(_rank_that_fails, args=(str(tmp_path),), nprocs=4)
    said = [(tmp_path / f"said{rank}").read_text() for rank in range(4)]
    assert said == ["True", "False", "(True, True)", "(False, False, True)"]
