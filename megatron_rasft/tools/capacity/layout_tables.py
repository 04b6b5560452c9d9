"""Tables of the estimates for people, and plain values for --json."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rasft.tools.capacity.choosing import DiskEstimate, LayoutEstimate
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model
from megatron_rasft.tools.capacity.memory import GIB
from megatron_rasft.tools.capacity.speed import (
    PEAK_TFLOPS,
    decode_tokens_per_s,
    matrix_share,
    response_tokens,
    serving_tp,
)
from megatron_rasft.wording import counted


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first column and the columns named in ``words`` are aligned to the left."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[str] = frozenset()

    def plain(self) -> str:
        """Formats the table with aligned columns, for a pipe or a file."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        cells = [
            "  ".join(
                cell.ljust(width) if i == 0 or name in self.words else cell.rjust(width)
                for i, (cell, width, name) in enumerate(zip(line, widths, self.header, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *(f"  {line}" for line in cells)])


def best_of_each(estimates: Sequence[LayoutEstimate]) -> list[LayoutEstimate]:
    """Keeps the first of the estimates that differ only in recomputation and interleaving, in the same order."""
    best: dict[tuple[int, ...], LayoutEstimate] = {}
    for estimate in estimates:
        at = estimate.layout
        best.setdefault((estimate.rollout_gpus, at.tp, at.pp, at.cp, at.ep), estimate)
    return list(best.values())


def layout_table(estimates: Sequence[LayoutEstimate], config: CapacityConfig) -> Table:
    """One row per layout: sizes, memory and times."""
    rows = []
    for number, estimate in enumerate(estimates, start=1):
        at, excess = estimate.layout, estimate.excess_gib(config)
        rows.append(
            (
                *(
                    str(n)
                    for n in (number, estimate.rollout_gpus, at.tp, at.pp, at.cp, at.ep, at.dp, at.chunks)
                ),
                at.recompute,
                f"{estimate.memory.total / GIB:.1f}",
                "yes" if excess <= 0 else f"{excess:.1f} over",
                f"{estimate.step.total_s:.1f}",
                f"{estimate.step.mfu:.0%}",
                f"{estimate.refresh.total_s:.0f}",
                f"{estimate.run.hours:.1f}",
                f"{estimate.run.gpu_hours:.0f}",
            )
        )
    header = "# servers tp pp cp ep dp chunks recompute GiB fits step_s MFU refresh_s hours GPU-hours".split()
    return Table(
        f"Layouts of {counted(config.num_gpus, 'GPU')} (servers: GPUs that run rollout servers)",
        tuple(header),
        tuple(rows),
        frozenset({"recompute", "fits"}),
    )


def memory_table(estimates: Sequence[LayoutEstimate]) -> Table:
    """One row per layout: memory of the fullest stage, by part."""
    parts = "weights gradients optimizer activations logits reference sync kv_cache margin total".split()
    rows = tuple(
        (
            str(number),
            str(estimate.memory.stage),
            *(f"{getattr(estimate.memory, part) / GIB:.1f}" for part in parts),
        )
        for number, estimate in enumerate(estimates, start=1)
    )
    title = "GiB on a GPU of the fullest stage (the total counts the largest of step, sync and sampling)"
    return Table(title, ("#", "stage", *parts), rows)


def time_table(estimates: Sequence[LayoutEstimate]) -> Table:
    """One row per layout: seconds of a step and of a refresh, by part."""
    step = "compute_s bubble_s tensor_s context_s data_s reference_s".split()
    refresh = "rollouts_s verification_s scoring_s sync_s".split()
    rows = tuple(
        (
            str(number),
            str(estimate.step.num_microbatches),
            *(f"{getattr(estimate.step, part):.1f}" for part in step),
            *(f"{getattr(estimate.refresh, part):.0f}" for part in refresh),
        )
        for number, estimate in enumerate(estimates, start=1)
    )
    header = [name.removesuffix("_s") for name in (*step, *refresh)]
    header[5] = "ref-pass"
    return Table(
        "Seconds of a step (compute to ref-pass) and of a refresh", ("#", "micro-batches", *header), rows
    )


def disk_table(disk: DiskEstimate, host_bytes: float, config: CapacityConfig) -> Table:
    """The sizes of a run's files, and the host memory that it needs."""
    rows = [
        ("checkpoint with optimizer", disk.checkpoint),
        ("all checkpoints of the run", disk.checkpoints),
        ("export", disk.export),
        ("rollout store", disk.rollout_store),
        ("reference cache", disk.reference_cache),
        ("tokenized rows", disk.data_cache),
        ("total", disk.total),
        ("pinned host memory of a node", host_bytes * config.gpus_per_node),
    ]
    cells = tuple((item, f"{size / GIB:.1f}") for item, size in rows)
    return Table("Disk and host memory", ("item", "GiB"), cells)


def assumption_table(
    model: Model, config: CapacityConfig, assumed: AssumptionConfig, *, precision: str = "bf16"
) -> Table:
    """Every assumption with its flag, its value and its source."""
    given = AssumptionConfig()
    basis = {
        "mfu": "published for Qwen3-30B-A3B and 235B-A22B"
        if model.top_k
        else "measured on 1 H100, Qwen2.5-1.5B, 2,048 tokens: 47k tokens/s BF16, 54k FP8",
        "peak_tflops": "H100 SXM data sheet, dense",
        "decode_tokens_per_s": "measured on 1 H100, Qwen2.5-1.5B: 40k tokens/s; scaled by active parameters",
        "hbm_gb_per_s": "H100 SXM data sheet",
        "nvlink_gb_per_s": "assumed: two thirds of 450",
        "network_gb_per_s": "assumed: 80 % of a 400 Gb/s card per GPU",
        "response_tokens": "assumed: half of --max-new-tokens",
    }
    values: dict[str, Any] = {
        **asdict(assumed),
        "mfu": matrix_share(model, assumed, precision),
        "peak_tflops": assumed.peak_tflops or PEAK_TFLOPS[precision],
        "decode_tokens_per_s": round(decode_tokens_per_s(model, assumed)),
        "response_tokens": response_tokens(config, assumed),
    }
    rows = tuple(
        (
            f"--{name.replace('_', '-')}",
            f"{value:g}",
            basis.get(name, "assumed") if getattr(assumed, name) == getattr(given, name) else "given",
        )
        for name, value in values.items()
    )
    return Table(
        "Assumptions; everything else is calculated", ("flag", "value", "basis"), rows, frozenset({"basis"})
    )


def summary(model: Model, config: CapacityConfig, *, precision: str = "bf16") -> str:
    """The model and the cluster, in two lines."""
    size = f"{model.num_parameters / 1e9:.2f}B parameters"
    if model.top_k:
        size += f", {model.num_active_parameters / 1e9:.2f}B of them active"
    tp = serving_tp(model, config)
    servers = f"; a server needs {tp} of them" if tp else ""
    return (
        f"{model.path}: {model.family.architecture}, {size}, {precision.upper()}\n"
        f"{counted(config.num_gpus, 'GPU')} of {config.gpu_memory_gib:g} GiB, {config.gpus_per_node} to a node{servers}"
    )


def as_values(estimate: LayoutEstimate, config: CapacityConfig) -> dict[str, Any]:
    """The values of one estimate for --json, in bytes, seconds and hours."""
    values = asdict(estimate)
    values["layout"]["num_gpus"] = estimate.layout.num_gpus
    values["memory"] |= {"steady": estimate.memory.steady, "total": estimate.memory.total}
    values["step"]["total_s"] = estimate.step.total_s
    values["refresh"]["total_s"] = estimate.refresh.total_s
    values["fits"] = estimate.excess_gib(config) <= 0
    return values
