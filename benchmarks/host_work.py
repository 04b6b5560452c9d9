"""Measures CPU seconds and bytes that ranks spend on a refresh's samples, compared with an earlier implementation.

Usage:
    python benchmarks/host_work.py
    python benchmarks/host_work.py --objective grpo --num-samples 4000 --bars

Needs two processes and no GPU. The samples of a refresh are converted to arrays, distributed batch by batch to two replicas over
gloo, saved, and packed into micro-batches. rasft has one log-probability per response token, grpo two. The earlier implementation
pickled samples made of Python lists for every rank and saved them as JSON. CPU seconds include gloo's threads; the larger of the
two ranks' figures is reported.
"""

import argparse
import json
import pickle
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_rasft.checkpoints.state_files import write_state
from megatron_rasft.data.sample_arrays import Batch, BatchQueue, SampleArrays
from megatron_rasft.ranks import hand_out, on_rank_zero
from megatron_rasft.training.batches import BatchLayout, build_micro_batches, shard_batch
from megatron_rasft.types import TrainingSample

BARS = {
    "hand_out_s": 0.03,
    "save_s": 0.1,
    "rank_0_bytes_per_token": 12.0,
    "other_rank_queue_bytes_per_token": 0.01,
}
"""Bars: CPU seconds per million tokens, and bytes per token. Ranks other than 0 may only hold the queue's list of batch sizes."""

BATCH_SIZE = 256
"""Samples of a step: README's --global-batch-size."""
REPEATS = 7
"""Number of measurements. The smallest result counts, because other load on the machine only adds to a time."""
REPLICAS = [[0], [1]]


def make_samples(num: int, mean_tokens: int, objective: str) -> list[TrainingSample]:
    """Makes samples: half demonstrations, whose tokens are in one array, and half rollouts, whose tokens are lists.

    A fifth of each sample is its prompt.
    """
    draw = random.Random(0)
    samples = []
    for index in range(num):
        length = max(16, int(mean_tokens * draw.lognormvariate(-0.18, 0.6)))
        ids = np.array([draw.randrange(150_000) for _ in range(length)], np.int32)
        cut_at = length // 5
        logprobs = memoryview(np.array([-draw.random() for _ in range(length - cut_at)], np.float32))
        is_rollout = index % 2 == 1
        samples.append(
            TrainingSample(
                problem_id=str(index),
                kind="rollout" if is_rollout else "demonstration",
                prompt_ids=memoryview(ids[:cut_at]),
                response_ids=ids[cut_at:].tolist() if is_rollout else memoryview(ids[cut_at:]),
                weight=1.0,
                ref_logprobs=logprobs,
                old_logprobs=logprobs if objective == "grpo" else None,
            )
        )
    return samples


def as_lists(samples: list[TrainingSample]) -> list[TrainingSample]:
    """Returns the same samples in the form of the earlier implementation."""
    names = ("prompt_ids", "response_ids", "ref_logprobs", "old_logprobs")
    return [
        replace(s, **{name: list(getattr(s, name)) for name in names if getattr(s, name) is not None})
        for s in samples
    ]


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the CPU seconds that ``work`` takes in this process, and its result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def held_bytes(make: Callable[[], Any]) -> int:
    """Bytes of memory that the result of ``make`` occupies."""
    tracemalloc.start()
    kept = make()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return held


def layout_of(rank: int, seq_length: int) -> BatchLayout:
    return BatchLayout(
        micro_batch_size=1,
        seq_length=seq_length,
        is_packed=True,
        dp_rank=rank,
        dp_size=len(REPLICAS),
        cp_rank=0,
        cp_size=1,
        token_multiple=8,
    )


def queue_of(samples: list[TrainingSample]) -> BatchQueue:
    return BatchQueue(sizes_of(len(samples)), SampleArrays.of(samples))


def sizes_of(num: int) -> list[tuple[int, int]]:
    """Number of problems and of samples in each batch, which are equal here."""
    sizes = [min(BATCH_SIZE, num - start) for start in range(0, num, BATCH_SIZE)]
    return [(size, size) for size in sizes]


def measure(rank: int, folder: str, num: int, mean_tokens: int, objective: str) -> None:
    """Runs one rank. Rank 0 writes the figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    samples = make_samples(num, mean_tokens, objective) if rank == 0 else []
    lists = as_lists(samples)
    layout = layout_of(rank, 8 * mean_tokens)
    on_rank_zero(lambda: None)  # makes the group

    def now() -> BatchQueue:
        made = queue_of(samples) if rank == 0 else BatchQueue(sizes_of(num))
        for place in range(len(made)):
            batch = made.batch(place)
            hand_out(lambda batch=batch: shard_batch(batch, layout), REPLICAS)  # type: ignore[misc]
        return made

    def formerly() -> Any:
        return on_rank_zero(lambda: lists)

    seconds: dict[str, float] = {}
    dist.barrier()
    for way, work in (("formerly", formerly), ("now", now)):
        times = []
        for _ in range(REPEATS):
            dist.barrier()
            taken, result = cpu_seconds(work)
            times.append(taken)
        seconds[way] = min(times)
    queue: BatchQueue = result
    every: list[Any] = [None, None]
    dist.all_gather_object(every, seconds)
    other_bytes = held_bytes(lambda: BatchQueue(sizes_of(num)))
    if rank == 0:
        figures = rank_zero_figures(samples, lists, queue, layout, Path(folder))
        tokens = sum(s.num_tokens for s in samples)
        million = tokens / 1e6
        figures["now"]["hand_out_s"] = max(s["now"] for s in every) / million
        figures["formerly"]["hand_out_s"] = max(s["formerly"] for s in every) / million
        figures["now"]["other_rank_queue_bytes_per_token"] = other_bytes / tokens
        Path(folder, "figures.json").write_text(json.dumps({"tokens": tokens, **figures}))
    dist.destroy_process_group()


def rank_zero_figures(
    samples: list[TrainingSample],
    lists: list[TrainingSample],
    queue: BatchQueue,
    layout: BatchLayout,
    folder: Path,
) -> dict[str, dict[str, float]]:
    """Measures the work that only rank 0 does, and the work that every rank does without communication."""
    tokens = sum(s.num_tokens for s in samples)
    million = tokens / 1e6
    save_s, _ = cpu_seconds(lambda: write_state(folder / "saved", {"queue": queue.sizes}, queue.arrays()))
    plain = [{name: getattr(s, name) for name in s.__slots__} for s in lists]
    json_s, text = cpu_seconds(lambda: json.dumps(plain))
    batch = Batch(num_problems=len(samples), samples=SampleArrays.of(samples))
    (shard, _) = shard_batch(batch, layout)
    cut_s, _ = cpu_seconds(lambda: build_micro_batches(shard, layout))
    cut_tokens = int(shard.samples.lengths.sum())
    return {
        "now": {
            "save_s": save_s / million,
            "saved_bytes_per_token": sum(p.stat().st_size for p in (folder / "saved").iterdir()) / tokens,
            "rank_0_bytes_per_token": held_bytes(lambda: queue_of(samples)) / tokens,
            "cut_s": cut_s / cut_tokens * 1e6,
        },
        "formerly": {
            "save_s": json_s / million,
            "saved_bytes_per_token": len(text) / tokens,
            "every_rank_bytes_per_token": held_bytes(lambda: pickle.loads(pickle.dumps(lists))) / tokens,
        },
    }


def main() -> int:
    """Measures in two processes and prints one JSON line.

    Returns:
        1 if --bars is given and a figure exceeds its bar, otherwise 0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--objective", choices=["rasft", "grpo"], default="rasft")
    parser.add_argument("--num-samples", type=int, default=1000, help="samples of the refresh")
    parser.add_argument("--mean-tokens", type=int, default=1000, help="mean length of a sample")
    parser.add_argument("--bars", action="store_true", help="exit with 1 if a figure exceeds its bar")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        given = (folder, options.num_samples, options.mean_tokens, options.objective)
        mp.spawn(measure, args=given, nprocs=2)
        figures = json.loads(Path(folder, "figures.json").read_text())
    missed = {name: bar for name, bar in BARS.items() if figures["now"][name] > bar}
    rounded = {
        way: {name: float(f"{value:.3g}") for name, value in figures[way].items()}
        for way in ("now", "formerly")
    }
    print(
        json.dumps({"tokens": figures["tokens"], **rounded, "bars": BARS, "missed": list(missed)}, indent=1)
    )
    return 1 if options.bars and missed else 0


if __name__ == "__main__":
    sys.exit(main())
