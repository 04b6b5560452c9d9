"""Builds the trainer that a benchmark measures, from the flags of pretrain_rasft.py."""

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()
cpu_backend.use_cpu_fused_adam()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_rasft.training import startup  # noqa: E402
from megatron_rasft.training.trainer import Trainer  # noqa: E402
from megatron_rasft.types import TrainingSample  # noqa: E402


def parser(description: str) -> argparse.ArgumentParser:
    """Parses the flags that benchmarks of a trainer share; returns all others for the trainer."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--num-samples", type=int, default=32, help="sequences of the global batch")
    made.add_argument("--mean-tokens", type=int, default=256, help="mean length of a sequence")
    made.add_argument("--json", type=Path, help="file to write the figures to")
    return made


def build(flags: list[str]) -> Trainer:
    """Builds the trainer of a run with these flags, without reading training data."""
    defaults = [
        "--train-data",
        "unused.jsonl",
        "--train-iters",
        "1000",
        "--lr",
        "1e-6",
        "--lr-decay-style",
        "constant",
    ]
    args, config, folder = startup.parse([*defaults, *flags])
    startup.start(args)
    return Trainer(args, config, folder)


def make_samples(trainer: Trainer, num: int, mean_tokens: int) -> list[TrainingSample]:
    """Makes sequences of random tokens with log-normal lengths. A fifth of each is the prompt."""
    draw = random.Random(0)
    samples = []
    for index in range(num):
        length = int(mean_tokens * draw.lognormvariate(-0.18, 0.6))
        length = min(trainer.max_tokens, max(16, length))
        ids = [draw.randrange(trainer.folder.shape.vocab_size) for _ in range(length)]
        cut = length // 5
        samples.append(
            TrainingSample(
                problem_id=str(index),
                kind="demonstration",
                prompt_ids=ids[:cut],
                response_ids=ids[cut:],
                weight=1.0,
                ref_logprobs=[-1.0] * (length - cut),
            )
        )
    return samples


def report(figures: Mapping[str, Any], path: Path | None) -> None:
    """Prints the figures on rank 0, writes them to ``path``, and destroys the process group."""
    if dist.get_rank() == 0:
        text = json.dumps(figures)
        print(text, flush=True)
        if path is not None:
            path.write_text(text, encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def peak_memory_gib() -> float | None:
    """Largest memory that torch has allocated on this rank's GPU; None on a CPU."""
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None
