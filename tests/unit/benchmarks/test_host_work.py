"""benchmarks/host_work.py and benchmarks/data_start.py run and print their figures. No time is compared here."""

import json
import os
from pathlib import Path

import torch.multiprocessing as mp

from benchmarks import data_start, host_work
from tests.forking import ENVIRONMENT, ON_CPU


def test_a_refresh_is_measured_on_two_ranks(tmp_path: Path) -> None:
    os.environ.update(ENVIRONMENT)
    with ON_CPU.forks():
        mp.start_processes(
            host_work.measure, args=(str(tmp_path), 300, 200, "grpo"), nprocs=2, start_method="forkserver"
        )
    figures = json.loads((tmp_path / "figures.json").read_text())
    now, formerly = figures["now"], figures["formerly"]
    assert host_work.BARS.keys() <= now.keys()
    assert all(value > 0 for value in (*now.values(), *formerly.values()))
    # bytes are the same on every machine; the bar allows for 21 further bytes per sample of 200 tokens
    assert now["rank_0_bytes_per_token"] < 12 < 50 < formerly["every_rank_bytes_per_token"]
    assert now["saved_bytes_per_token"] < 12 < formerly["saved_bytes_per_token"]


def test_a_start_is_measured_without_and_with_the_cache(tmp_path: Path) -> None:
    data_start.write_rows(tmp_path / "rows.jsonl", 60, 30)
    data_start.write_tokenizer(tmp_path / "model", tmp_path / "rows.jsonl")
    first, second = data_start.start(tmp_path), data_start.start(tmp_path)
    assert first["rows"] == second["rows"] == 60
    assert first["first_refresh_tokens"] == second["first_refresh_tokens"] > 60
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert data_start.BARS.keys() <= second.keys()
