"""Simulates runs on 32 to 4,096 GPUs: where the time goes, and which share of the GPUs should serve. Nothing is measured here.

Usage:
    python benchmarks/cluster_simulation.py
    python benchmarks/cluster_simulation.py --setting qwen3-8b --output qwen3-8b.svg

For each number of GPUs and each share of servers, capacity planning chooses the fastest layout that fits, and gives the times of a step,
of scoring and of a weight sync. The simulation adds what these formulas leave out: lengths of responses with a long tail, sampled by
servers that refill their batch; waiting of trainer and servers for each other in every refresh (--rollout-lag 1); saves; and failures of
GPUs, each of which costs the work since the last save and a restart. The flags of tools/plan.py replace assumed speeds by your
measurements. Needs matplotlib (`pip install 'megatron-rasft[plots]'`).
"""

import argparse
import heapq
import json
import math
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.config.parser import add_flags
from megatron_rasft.tools.capacity.choosing import LayoutEstimate, estimate_layouts
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layout_tables import Table
from megatron_rasft.tools.capacity.layouts import Model
from megatron_rasft.tools.capacity.speed import decode_tokens_per_s, response_tokens, serving_tp

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
PROBLEMS = 1024
"""Problems of a step, before ``problems_of`` rounds them to a number that the trainer's replicas divide."""
TAIL = 0.8
"""Standard deviation of the logarithm of a response's length."""
FULL_BATCH = 256
"""Sequences per GPU at which the decoding speed was measured."""
GPU_HOURS_BETWEEN_FAILURES = 50_000.0
"""Published for Llama 3 405B: 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783)."""
RESTART_S = 600.0
"""Assumed time from a failure to the first step after it: requeue, node check, imports, loading, servers."""
PARTS = (
    "compute",
    "bubble",
    "communication",
    "waiting for rollouts",
    "verification",
    "scoring",
    "sync",
    "saves",
    "failures",
)
COLOURS = ("#4c78a8", "#9ecae9", "#72b7b2", "#f58518", "#ffbf79", "#54a24b", "#b279a2", "#9d755d", "#e45756")


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A simulated run."""

    num_gpus: int
    share: float
    estimate: LayoutEstimate
    seconds: dict[str, float] = field(default_factory=dict)
    """Part of ``PARTS`` -> its seconds."""
    idle_servers: float
    """Share of the run in which the servers have no requests."""

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.num_gpus


def sampling_s(num: int, slots: int, read_s: float, token_s: float, lengths: Sequence[float]) -> float:
    """Seconds in which a server samples ``num`` responses, with at most ``slots`` at a time.

    Decoding one token of every running sequence takes ``read_s`` plus ``token_s`` for each of them.
    """
    waiting = iter(lengths[:num])
    running: list[float] = []
    clock = position = 0.0
    for length in waiting:
        heapq.heappush(running, length)
        if len(running) == slots:
            break
    while running:
        ends = heapq.heappop(running)
        clock += (ends - position) * (read_s + token_s * (len(running) + 1))
        position = ends
        if (length := next(waiting, None)) is not None:
            heapq.heappush(running, position + length)
    return clock


def response_lengths(config: CapacityConfig, assumed: AssumptionConfig, num: int, seed: str) -> list[float]:
    """Lengths of responses: lognormal with capacity planning's mean, cut at --max-new-tokens."""
    draw = random.Random(seed)
    middle = math.log(response_tokens(config, assumed)) - TAIL**2 / 2
    return [min(config.max_new_tokens, draw.lognormvariate(middle, TAIL)) for _ in range(num)]


def refresh_sampling_s(
    model: Model, config: CapacityConfig, assumed: AssumptionConfig, rollout_gpus: int, seed: str
) -> float:
    """Seconds of a refresh's sampling: those of the slowest of four servers, which stand for all of them."""
    tp = serving_tp(model, config)
    assert tp is not None, "a layout with servers has a size for them"
    num_servers = rollout_gpus // tp
    num = math.ceil(config.refresh_interval * config.global_batch_size * config.num_samples / num_servers)
    read_s = 2 * model.num_active_parameters / tp / (assumed.hbm_gb_per_s * 1e9 * 0.6)
    slots = FULL_BATCH * tp
    token_s = max(0.0, 1 / (decode_tokens_per_s(model, assumed) * tp) - read_s / slots)
    times = [
        sampling_s(num, slots, read_s, token_s, response_lengths(config, assumed, num, f"{seed}-{server}"))
        for server in range(min(4, num_servers))
    ]
    return max(times)


def simulate(
    model: Model, config: CapacityConfig, assumed: AssumptionConfig, estimate: LayoutEstimate, seed: int = 0
) -> Simulated:
    """Simulates a run, refresh by refresh."""
    step, refresh = estimate.step, estimate.refresh
    per_step = {
        "compute": step.compute_s + step.reference_s,
        "bubble": step.bubble_s,
        "communication": step.tensor_s + step.context_s + step.data_s,
    }
    seconds = dict.fromkeys(PARTS, 0.0)
    left = estimate.run.num_steps
    rollouts_at = idle_s = clock = 0.0
    for number in range(estimate.run.num_refreshes):
        steps = min(config.refresh_interval, left)
        left -= steps
        sampled_s = refresh_sampling_s(model, config, assumed, estimate.rollout_gpus, f"{seed}-{number}")
        if number == 0:
            rollouts_at = clock + sampled_s
        waited = max(0.0, rollouts_at - clock)
        idle_s += max(0.0, clock - rollouts_at)
        rest = {
            "waiting for rollouts": waited,
            "verification": refresh.verification_s,
            "scoring": refresh.scoring_s,
            "sync": refresh.sync_s,
        }
        # the servers get new weights after this refresh's rollouts, and then sample the next ones during its steps
        rollouts_at = clock + waited + refresh.sync_s + sampled_s
        for part, value in (*rest.items(), *((p, v * steps) for p, v in per_step.items())):
            seconds[part] += value
            clock += value
    seconds["saves"] = estimate.run.saves_s
    total = sum(seconds.values())
    save_every_s = total / max(1, estimate.run.num_steps / config.save_interval)
    seconds["failures"] = lost_s(total, save_every_s, config.num_gpus, seed)
    return Simulated(
        num_gpus=config.num_gpus,
        share=estimate.rollout_gpus / config.num_gpus,
        estimate=estimate,
        seconds=seconds,
        idle_servers=idle_s / sum(seconds.values()),
    )


def lost_s(total_s: float, save_every_s: float, num_gpus: int, seed: int, num_trials: int = 200) -> float:
    """Mean seconds that failures add to a run of ``total_s``: restarts, and the work since the last save."""
    rate = num_gpus / (GPU_HOURS_BETWEEN_FAILURES * 3600)
    draw = random.Random(f"{seed}-{num_gpus}")
    lost = 0.0
    for _ in range(num_trials):
        done = 0.0
        while (after := draw.expovariate(rate)) < total_s - done:
            reached = done + after
            done = reached // save_every_s * save_every_s
            lost += reached - done + RESTART_S
    return lost / num_trials


def server_gpus(num_gpus: int) -> list[int]:
    """GPUs that serve, for every share: whole nodes of 8."""
    return sorted({min(num_gpus - 8, max(8, round(num_gpus * share / 8) * 8)) for share in SHARES})


def problems_of(trainer_gpus: int) -> int:
    """Returns the number of problems of a step next to ``PROBLEMS`` that 128 times the odd part of the trainer's GPUs divides."""
    unit = 128 * trainer_gpus // (trainer_gpus & -trainer_gpus)
    return max(1, round(PROBLEMS / unit)) * unit


def simulate_all(model: Model, assumed: AssumptionConfig, sizes: Sequence[int] = SIZES) -> list[Simulated]:
    """Simulates every number of GPUs with every share of servers for which a layout fits."""
    found = []
    for num_gpus in sizes:
        for rollout_gpus in server_gpus(num_gpus):
            config = CapacityConfig(
                num_gpus=num_gpus,
                rollout_gpus=rollout_gpus,
                rollout_lag=1,
                global_batch_size=problems_of(num_gpus - rollout_gpus),
                refresh_interval=8,
                recompute="any",
                save_interval=50,
                num_problems=200_000,
            )
            try:
                estimate = estimate_layouts(model, config, assumed)[0]
            except ValueError:
                continue  # no layout divides these GPUs
            if estimate.excess_gib(config) <= 0:
                found.append(simulate(model, config, assumed, estimate))
    return found


def best_of(found: Sequence[Simulated]) -> list[Simulated]:
    """The fastest share of servers for each number of GPUs."""
    sizes = sorted({each.num_gpus for each in found})
    return [min((each for each in found if each.num_gpus == size), key=lambda s: s.hours) for size in sizes]


def table(best: Sequence[Simulated]) -> Table:
    """One row per number of GPUs, with its best share of servers."""
    rows = []
    for each in best:
        at, total = each.estimate.layout, sum(each.seconds.values())
        rows.append(
            (
                str(each.num_gpus),
                f"{each.num_gpus - each.estimate.rollout_gpus} + {each.estimate.rollout_gpus}",
                f"tp {at.tp} pp {at.pp} cp {at.cp} dp {at.dp}",
                f"{each.hours:.1f}",
                f"{each.gpu_hours:.0f}",
                *(f"{each.seconds[part] / total:.0%}" for part in PARTS),
                f"{each.idle_servers:.0%}",
            )
        )
    header = ("GPUs", "train + serve", "layout", "hours", "GPU-hours", *PARTS, "servers idle")
    title = "Calculated, not measured: the best share of servers, and where the trainer's time goes"
    return Table(title, header, tuple(rows), frozenset({"train + serve", "layout"}))


def draw(found: Sequence[Simulated], name: str, output: Path) -> None:
    """Draws where the time goes, and the GPU-hours of every share of servers."""
    import matplotlib

    matplotlib.use("svg")
    # text that can be searched, and the same file on every call
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": name}
    from matplotlib import pyplot

    best = best_of(found)
    labels = [f"{each.num_gpus:,}" for each in best]
    figure, (parts, shares) = pyplot.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    bottom = [0.0] * len(best)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        heights = [100 * each.seconds[part] / sum(each.seconds.values()) for each in best]
        parts.bar(labels, heights, bottom=bottom, label=part, color=colour)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    parts.set(
        title="Where the time goes (best share of servers)", xlabel="GPUs", ylabel="% of the run (calculated)"
    )
    parts.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    for size, label in zip((each.num_gpus for each in best), labels, strict=True):
        row = sorted((e.share, e.hours) for e in found if e.num_gpus == size)
        fastest = min(hours for _, hours in row)
        shares.plot(
            [100 * s for s, _ in row], [h / fastest for _, h in row], marker="o", label=f"{label} GPUs"
        )
    shares.set(
        title="Length of the run by share of servers",
        xlabel="% of the GPUs that serve",
        ylabel="relative to the best (calculated)",
    )
    shares.set_ylim(0.95, 2.5)
    shares.legend(fontsize=7)
    figure.suptitle(
        f"{name}, about {PROBLEMS:,} problems a step, BF16, GPUs of 80 GiB: calculated, not measured"
    )
    figure.savefig(output, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> None:
    from tests.slurm_settings import MODELS, model_folder

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--setting", default="llama-3.3-70b", choices=sorted(MODELS), help="the model (default: %(default)s)"
    )
    parser.add_argument(
        "--num-gpus", type=int, nargs="+", default=list(SIZES), help="numbers of GPUs, multiples of 16"
    )
    parser.add_argument("--output", type=Path, help="file for the plot, SVG")
    add_flags(parser.add_argument_group("assumptions", AssumptionConfig.__doc__), AssumptionConfig)
    parser.add_argument("--json", action="store_true", help="print every simulated run")
    args = parser.parse_args(argv)
    if wrong := [size for size in args.num_gpus if size < 16 or size % 16]:
        parser.error(f"--num-gpus {wrong[0]} must be a positive multiple of 16. Use two or more nodes of 8.")
    with tempfile.TemporaryDirectory() as folder:
        model = Model.read(model_folder(args.setting, Path(folder)))
    found = simulate_all(model, AssumptionConfig.from_args(args), args.num_gpus)
    if not found:
        parser.error(f"{args.setting} does not fit any of --num-gpus {args.num_gpus}. Give larger numbers.")
    if args.json:
        rows = [
            {"gpus": e.num_gpus, "servers": e.estimate.rollout_gpus, "hours": e.hours, **e.seconds}
            for e in found
        ]
        print(json.dumps(rows, indent=1))
    else:
        print(table(best_of(found)).plain())
    if args.output is not None:
        draw(found, args.setting, args.output)


if __name__ == "__main__":
    main()
