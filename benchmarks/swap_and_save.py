"""Measures two things that a run does between steps: swapping the reference's weights, and saving.

torchrun --nproc-per-node N benchmarks/swap_and_save.py --hf-model DIR --save DIR [--async-save] [any flag of pretrain_rasft.py]

The first swap is reported separately, because it allocates pinned memory. With --async-save the trainer takes steps during the
save, whose time is printed next to that of other steps.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.trainers import build, make_samples, parser, peak_memory_gib, report
from megatron_rasft.checkpoints.checkpointer import Checkpointer
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.training.trainer import Trainer
from megatron_rasft.types import TrainingSample
from megatron_rasft.weights.tracker import TRACKER_FILE

NUM_SWAPS, NUM_STEPS = 4, 4
MOST_STEPS = 200
"""Maximum number of steps to train during a background save before waiting for it."""


def seconds(work: Callable[[], object]) -> float:
    """Measures the wall time of a call, including the GPU work that it starts."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def swap(trainer: Trainer) -> None:
    """Swaps the reference's weights into the model and the policy's weights back."""
    assert trainer.reference is not None
    with trainer.reference.in_place():
        pass


def measure_save(trainer: Trainer, samples: list[TrainingSample]) -> dict[str, float | int | None]:
    """Saves once, and continues training while a background save writes."""
    folder = Path(trainer.args.save)
    began = time.perf_counter()
    checkpoints = Checkpointer(trainer.args, trainer, Resume(), trainer.sampler.device)
    blocked_s = seconds(lambda: checkpoints.save(lambda: ({}, {})))
    meanwhile = []
    while not (folder / TRACKER_FILE).exists() and len(meanwhile) < MOST_STEPS:
        meanwhile.append(seconds(lambda: trainer.step(samples, len(samples))))
        checkpoints.finish(is_blocking=False)
    checkpoints.finish()
    written_s = time.perf_counter() - began
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {
        "blocked_s": round(blocked_s, 3),
        "until_written_s": round(written_s, 3),
        "gb": round(num_bytes / 1e9, 3),
        "steps_meanwhile": len(meanwhile),
        "step_s_meanwhile": round(statistics.median(meanwhile), 4) if meanwhile else None,
    }


def main() -> None:
    """Measures swap and save, and prints one JSON line."""
    options, flags = parser(__doc__).parse_known_args()
    trainer = build(flags)
    samples = make_samples(trainer, options.num_samples, options.mean_tokens)
    trainer.step(samples, len(samples))  # the first step allocates the optimizer's states
    swaps = [seconds(lambda: swap(trainer)) for _ in range(NUM_SWAPS)]
    steps = [seconds(lambda: trainer.step(samples, len(samples))) for _ in range(NUM_STEPS)]
    figures = {
        "first_swap_s": round(swaps[0], 3),
        "swap_s": round(statistics.median(swaps[1:]), 4),
        "step_s": round(statistics.median(steps), 4),
        "save": measure_save(trainer, samples),
        "peak_memory_gib": peak_memory_gib(),
    }
    report(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
