"""Tokens per second of a training step: RASFT against SFT, and packed against padded, in one run.

torchrun --nproc-per-node N benchmarks/train_step.py --shape qwen2.5-1.5b --bf16 [any Megatron flag]

The model has random weights, the sequences random tokens of log-normal lengths; the first step of each kind is not
counted. The two ratios, not the absolute figures, are what can be compared between machines.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rasft.training import cpu_backend

cpu_backend.enable()
cpu_backend.use_cpu_fused_adam()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

from megatron_rasft.training import host, startup  # noqa: E402
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


def measure(trainer: host.Trainer, samples: list[TrainingSample], steps: int) -> float:
    """Median tokens per second over ``steps`` steps after one that is not counted."""
    rates = []
    for _ in range(steps + 1):
        dist.barrier()
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = trainer.step(samples, len(samples))
        torch.cuda.synchronize()
        rates.append(result.num_tokens / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def main() -> None:
    """Build once, measure each kind of step, print one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--steps", type=int, default=5, help="steps of each kind that are counted")
    parser.add_argument("--num-samples", type=int, default=32, help="sequences of the global batch")
    parser.add_argument("--mean-tokens", type=int, default=256, help="mean length of a sequence")
    options, megatron_flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if not dist.is_initialized():
            dist.init_process_group("gloo" if not torch.cuda.is_available() else "nccl")
        folder = Path(on_rank_zero(lambda: (write_model(options.shape, folder), str(folder))[1]))
        argv = ["--hf-model", str(folder), "--train-data", "unused.jsonl", "--train-iters", "1000"]
        argv += ["--lr", "1e-6", "--lr-decay-style", "constant", *megatron_flags]
        args, config, opened = startup.parse(argv)
        startup.start(args)
        trainer = host.Trainer(args, config, opened)
        samples = make_samples(options.num_samples, options.mean_tokens, args.seq_length, args.vocab_size)
        figures = {}
        for objective in ("sft", "rasft"):
            for layout in ("packed", "padded"):
                trainer.forward.config = replace(config.objective, objective=objective)
                trainer.config.run.rasft_batch_layout = layout
                figures[f"{objective} {layout}"] = round(measure(trainer, samples, options.steps), 1)
        if dist.get_rank() == 0:
            report = {
                "shape": options.shape,
                "processes": args.world_size,
                "precision": "fp8" if args.fp8 else str(args.params_dtype)[6:],
                "tokens": sum(s.num_tokens for s in samples),
                "tokens_per_s": figures,
                "rasft_step_over_sft_step": round(figures["sft packed"] / figures["rasft packed"], 3),
                "packed_over_padded": round(figures["rasft packed"] / figures["rasft padded"], 3),
            }
            print(json.dumps(report), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
