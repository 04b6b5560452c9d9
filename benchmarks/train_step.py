"""Tokens per second of a training step: RASFT against Megatron's own SFT, and packed against padded, in one run.

torchrun --nproc-per-node N benchmarks/train_step.py --shape qwen2.5-1.5b --bf16 [any flag of pretrain_rasft.py]

Megatron's SFT is the same model, optimizer, schedule and batches with Megatron's loss: GPTModel with labels and its fused
cross-entropy, and none of this project's objective. The model has random weights, the sequences random tokens of log-normal
lengths; the first step of each kind is not counted. The ratios, not the absolute figures, can be compared between machines.
"""

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_rasft.training import cpu_backend

cpu_backend.enable()
cpu_backend.use_cpu_fused_adam()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_rasft.training import host, startup  # noqa: E402
from megatron_rasft.training.batches import MicroBatch  # noqa: E402
from megatron_rasft.training.forward import Forward  # noqa: E402
from megatron_rasft.training.ranks import on_rank_zero  # noqa: E402
from megatron_rasft.types import TrainingSample  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
}


def write_model(shape: str, path: Path) -> None:
    """A Qwen2 folder of that shape with random weights."""
    config = transformers.Qwen2Config(**SHAPES[shape])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def make_samples(num: int, mean_tokens: int, max_tokens: int, vocab_size: int) -> list[TrainingSample]:
    """Sequences of log-normal length, a fifth of each the prompt."""
    draw = random.Random(0)
    samples = []
    for index in range(num):
        length = min(max_tokens, max(16, int(mean_tokens * draw.lognormvariate(-0.18, 0.6))))
        ids = [draw.randrange(vocab_size) for _ in range(length)]
        cut = max(1, length // 5)
        samples.append(
            TrainingSample(
                problem_id=str(index),
                kind="expert",
                prompt_ids=ids[:cut],
                response_ids=ids[cut:],
                weight=1.0,
                ref_logprobs=[-1.0] * (length - cut),
            )
        )
    return samples


class MegatronSft(Forward):
    """Megatron's own supervised step: GPTModel with labels, and the masked sum of its losses."""

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


def measure(trainer: host.Trainer, samples: list[TrainingSample], steps: int) -> dict[str, float]:
    """Median tokens per second over ``steps`` steps after one that is not counted, that step's loss, and the peak memory."""
    rates, losses = [], []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps + 1):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = trainer.step(samples, len(samples))
        torch.cuda.synchronize()
        rates.append(result.num_tokens / (time.perf_counter() - began))
        losses.append(result.metrics["loss"])
    return {
        "tokens_per_s": round(statistics.median(rates[1:]), 1),
        "first_loss": round(losses[0], 5),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def start_processes() -> list[str]:
    """Start torch.distributed, and return host and device of every process.

    Each process chooses its GPU first: where there is a process group already, Megatron does not choose one any more
    (_initialize_distributed in megatron/training/initialize.py).
    """
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    device = "cpu"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{torch.cuda.current_device()}"
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, f"{socket.gethostname()} {device}")
    return places


def shared_model(shape: str) -> Path:
    """A model folder of one name on every node, written by the first process of each."""
    folder = Path(on_rank_zero(lambda: tempfile.mkdtemp(prefix="train_step-")))
    if os.environ["LOCAL_RANK"] == "0":
        write_model(shape, folder)
    dist.barrier()
    return folder


def build(folder: Path, flags: list[str]) -> host.Trainer:
    """The trainer of a run with these flags. No training data is read."""
    argv = ["--hf-model", str(folder), "--train-data", "unused.jsonl", "--train-iters", "1000"]
    argv += ["--lr", "1e-6", "--lr-decay-style", "constant", *flags]
    args, config, opened = startup.parse(argv)
    startup.start(args)
    return host.Trainer(args, config, opened)


def use_megatron_loss(trainer: host.Trainer, fusion: str) -> Forward:
    """Megatron's forward step, with its cross-entropy fused where there is a GPU."""
    for chunk in trainer.chunks:
        chunk.config.cross_entropy_loss_fusion = torch.cuda.is_available()
        chunk.config.cross_entropy_fusion_impl = fusion
    return MegatronSft(trainer.config.objective, trainer.folder.shape.vocab_size)


def measure_all(
    trainer: host.Trainer, samples: list[TrainingSample], options: argparse.Namespace
) -> dict[str, Any]:
    """Each kind of step in each layout: name -> its figures."""
    rasft, sft = trainer.forward, Forward(trainer.config.objective, trainer.folder.shape.vocab_size)
    sft.config = replace(trainer.config.objective, objective="sft")
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
    """Build once, measure each kind of step, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind that are counted")
    parser.add_argument("--num-samples", type=int, default=32, help="sequences of the global batch")
    parser.add_argument("--mean-tokens", type=int, default=256, help="mean length of a sequence")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument(
        "--megatron-cross-entropy",
        choices=["native", "te"],
        default="native",
        help="which of Megatron's fused cross-entropies its own step takes; te is Transformer Engine's",
    )
    options, megatron_flags = parser.parse_known_args()
    places = start_processes()
    assert not torch.cuda.is_available() or len(set(places)) == len(places), (
        f"processes share a GPU: {places}"
    )
    folder = shared_model(options.shape)
    try:
        trainer = build(folder, megatron_flags)
        args = trainer.args
        samples = make_samples(options.num_samples, options.mean_tokens, args.seq_length, args.vocab_size)
        figures = measure_all(trainer, samples, options)
    finally:
        if os.environ["LOCAL_RANK"] == "0":
            shutil.rmtree(folder)
    rates = {name: measured["tokens_per_s"] for name, measured in figures.items()}
    if dist.get_rank() == 0:
        report = {
            "shape": options.shape,
            "processes": args.world_size,
            "places": places,
            "precision": "fp8" if args.fp8 else str(args.params_dtype)[6:],
            "tokens": sum(s.num_tokens for s in samples),
            "measured": figures,
            "megatron_cross_entropy": options.megatron_cross_entropy
            if torch.cuda.is_available()
            else "unfused",
            "rasft_step_over_megatron_sft_step": round(
                rates["megatron sft packed"] / rates["rasft packed"], 3
            ),
            "rasft_step_over_sft_step": round(rates["sft packed"] / rates["rasft packed"], 3),
            "packed_over_padded": round(rates["rasft packed"] / rates["rasft padded"], 3),
        }
        print(json.dumps(report), flush=True)
        if options.json:
            options.json.write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
