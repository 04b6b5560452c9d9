"""Profiles one training step on a GPU with torch.profiler.

torchrun --nproc-per-node 1 benchmarks/step_profile.py --hf-model DIR [any flag of pretrain_rasft.py]

``first_kernel_after_ms`` is the time before a step's first kernel, in which the GPU is idle. ``idle_frac`` is the share of the time
from the first to the last kernel in which no kernel ran. Without a GPU both are null.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.trainers import build, make_samples, parser, peak_memory_gib, report
from megatron_rasft.data.sample_arrays import Batch, SampleArrays

WARM_UP_STEPS = 3
NUM_LISTED = 8
LABEL = "rasft step"


def busy_us(spans: Sequence[tuple[float, float]]) -> float:
    """Returns the length of the union of (start, end) spans."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def figures_of(events: Sequence[Any]) -> dict[str, Any]:
    """Returns the figures of one profiled step.

    Args:
        events: the profiler's events, with times in microseconds.
    """
    step = next(e for e in events if e.name == LABEL and e.device_type == torch.autograd.DeviceType.CPU)
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and e.name != LABEL]
    spans = [(e.time_range.start, e.time_range.end) for e in kernels]
    figures: dict[str, Any] = {
        "step_ms": round((step.time_range.end - step.time_range.start) / 1e3, 3),
        "num_kernels": len(kernels),
        "first_kernel_after_ms": None,
        "idle_frac": None,
    }
    if not spans:
        return figures
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    figures["first_kernel_after_ms"] = round((first - step.time_range.start) / 1e3, 3)
    figures["idle_frac"] = round(1 - busy_us(spans) / (last - first), 4)
    time_us: Counter[str] = Counter()
    for event in kernels:
        time_us[event.name] += event.time_range.end - event.time_range.start
    figures["kernels_ms"] = {name[:80]: round(us / 1e3, 3) for name, us in time_us.most_common(NUM_LISTED)}
    return figures


def main() -> None:
    """Profiles one step and prints one JSON line."""
    options, flags = parser(__doc__).parse_known_args()
    trainer = build(flags)
    samples = make_samples(trainer, options.num_samples, options.mean_tokens)
    batch = Batch(num_problems=len(samples), samples=SampleArrays.of(samples))
    prepared = trainer.prepare(batch)
    for _ in range(WARM_UP_STEPS):
        trainer.train(prepared)
        prepared = trainer.prepare(batch)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    torch.cuda.synchronize()
    with profile(activities=activities) as profiler, record_function(LABEL):
        trainer.prepare(batch)  # as in a run, the next batch is prepared during this step
        result = trainer.train(prepared)
        torch.cuda.synchronize()
    figures = figures_of(profiler.events())
    figures |= {"data_ms": round(1e3 * result.data_s, 3), "optimizer_ms": round(1e3 * result.optimizer_s, 3)}
    report(figures | {"peak_memory_gib": peak_memory_gib()}, options.json)


if __name__ == "__main__":
    sys.exit(main())
