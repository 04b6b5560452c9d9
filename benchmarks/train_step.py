"""Measures tokens per second of a training step: RASFT and Megatron's own SFT, packed and padded, in one run.

torchrun --nproc-per-node N benchmarks/train_step.py --shape qwen2.5-1.5b --bf16 [any flag of pretrain_rasft.py]

Megatron's SFT has the same model, optimizer, schedule and batches, but Megatron's loss: GPTModel with labels and its fused
cross-entropy, without this project's objective. The model has random weights, the sequences random tokens of log-normal
lengths. The first step of each kind is a warm-up. Compare ratios between machines, not absolute figures.
"""

import argparse
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import trainers
from benchmarks.shapes import SHAPES, write_model
from megatron_rasft.data.sample_arrays import Batch, SampleArrays
from megatron_rasft.objective.families.likelihood import Sft
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.training import startup
from megatron_rasft.training.batches import MicroBatch
from megatron_rasft.training.forward import Forward
from megatron_rasft.training.trainer import Trainer
from megatron_rasft.types import TrainingSample


class MegatronSft(Forward):
    """A training step of Megatron's own SFT: GPTModel with labels, and the masked sum of its losses."""

    def train_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable]:
        batch = next(data_iterator)
        losses = model(
            batch.tokens,
            batch.position_ids,
            None,
            labels=batch.labels.view_as(batch.tokens),
            packed_seq_params=batch.packed_seq_params,
        )
        return losses, partial(self._masked_sum, batch)

    def _masked_sum(self, batch: MicroBatch, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss_sum, count = (losses.flatten() * batch.loss_mask).sum(), batch.loss_mask.sum()
        return loss_sum, count.to(torch.int), {"loss": torch.stack([loss_sum.detach(), count])}


def measure(trainer: Trainer, samples: list[TrainingSample], steps: int) -> dict[str, float | None]:
    """Measures median tokens per second over ``steps`` steps after a warm-up step, the warm-up's loss, and the peak memory."""
    rates, losses = [], []
    batch = Batch(num_problems=len(samples), samples=SampleArrays.of(samples))
    torch.cuda.reset_peak_memory_stats()
    prepared = trainer.prepare(batch)
    for _ in range(steps + 1):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        following = trainer.prepare(batch)  # as in a run, the next batch is prepared during this step
        result = trainer.train(prepared)
        torch.cuda.synchronize()
        rates.append(result.num_tokens / (time.perf_counter() - began))
        losses.append(result.metrics["loss"])
        prepared = following
    return {
        "tokens_per_s": round(statistics.median(rates[1:]), 1),
        "first_loss": round(losses[0], 5),
        "peak_memory_gib": trainers.peak_memory_gib(),
    }


def start_processes() -> list[str]:
    """Starts torch.distributed, and returns host and device of every process.

    Each process selects its GPU here, because Megatron does not select one if a process group exists already
    (_initialize_distributed in megatron/training/initialize.py).
    """
    startup.stand_in_for_launcher()
    os.environ.setdefault("LOCAL_RANK", "0")
    device = "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{torch.cuda.current_device()}"
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, f"{socket.gethostname()} {device}")
    return places


def shared_model(shape: str) -> Path:
    """Returns a model folder with the same name on every node, which the first process of each node writes."""
    folder = Path(on_rank_zero(lambda: tempfile.mkdtemp(prefix="train_step-")))
    if os.environ["LOCAL_RANK"] == "0":
        write_model(shape, folder)
    dist.barrier()
    return folder


def use_megatron_loss(trainer: Trainer, fusion: str) -> Forward:
    """Megatron's forward step, with its fused cross-entropy on a GPU."""
    for chunk in trainer.chunks:
        chunk.config.cross_entropy_loss_fusion = torch.cuda.is_available()
        chunk.config.cross_entropy_fusion_impl = fusion
    return MegatronSft(Sft(), trainer.config.loss, trainer.folder.shape.vocab_size)


def measure_all(
    trainer: Trainer, samples: list[TrainingSample], options: argparse.Namespace
) -> dict[str, Any]:
    """Measures each kind of step in each layout; returns name -> figures."""
    rasft, sft = trainer.forward, Forward(Sft(), trainer.config.loss, trainer.folder.shape.vocab_size)
    kinds = {
        "megatron sft": use_megatron_loss(trainer, options.megatron_cross_entropy),
        "sft": sft,
        "rasft": rasft,
    }
    figures = {}
    for layout in ("packed", "padded"):
        trainer.config.run.rasft_batch_layout = layout
        for name, forward in kinds.items():
            trainer.forward = forward
            figures[f"{name} {layout}"] = measure(trainer, samples, options.steps)
    return figures


def main() -> None:
    """Builds the trainer once, measures each kind of step, and prints one JSON line."""
    parser = trainers.parser(__doc__ or "")
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--steps", type=int, default=5, help="number of measured steps of each kind")
    parser.add_argument(
        "--megatron-cross-entropy",
        choices=["native", "te"],
        default="native",
        help="fused cross-entropy of Megatron's own step; te is Transformer Engine's",
    )
    options, megatron_flags = parser.parse_known_args()
    places = start_processes()
    assert not torch.cuda.is_available() or len(set(places)) == len(places), (
        f"processes share a GPU: {places}"
    )
    folder = shared_model(options.shape)
    try:
        trainer = trainers.build(["--hf-model", str(folder), *megatron_flags])
        args = trainer.args
        samples = trainers.make_samples(trainer, options.num_samples, options.mean_tokens)
        figures = measure_all(trainer, samples, options)
    finally:
        if os.environ["LOCAL_RANK"] == "0":
            shutil.rmtree(folder)
    rates = {name: measured["tokens_per_s"] for name, measured in figures.items()}
    report = {
        "shape": options.shape,
        "processes": args.world_size,
        "places": places,
        "precision": "fp8" if args.fp8 else str(args.params_dtype)[6:],
        "tokens": sum(s.num_tokens for s in samples),
        "measured": figures,
        "megatron_cross_entropy": options.megatron_cross_entropy if torch.cuda.is_available() else "unfused",
        "rasft_step_over_megatron_sft_step": round(rates["megatron sft packed"] / rates["rasft packed"], 3),
        "rasft_step_over_sft_step": round(rates["sft packed"] / rates["rasft packed"], 3),
        "packed_over_padded": round(rates["rasft packed"] / rates["rasft padded"], 3),
    }
    trainers.report(report, options.json)


if __name__ == "__main__":
    sys.exit(main())
