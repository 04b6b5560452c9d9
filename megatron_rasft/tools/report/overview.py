"""Section "Overview": headline numbers, facts of the run, and its time by phase."""

from collections.abc import Sequence
from typing import Any

from megatron_rasft import metrics
from megatron_rasft.tools.report.formats import duration, number, percent, short_count
from megatron_rasft.tools.report.records import PHASES, RunRecords
from megatron_rasft.tools.report.views import RunView
from megatron_rasft.wording import counted


def overview(views: Sequence[RunView]) -> dict[str, Any]:
    """Returns the notes, headline numbers, table of facts and time by phase of the runs."""
    facts = [_facts(view) for view in views]
    names = list(dict.fromkeys(name for one in facts for name in one))
    return {
        "names": [view.name for view in views],
        "notes": [(view.name, note) for view in views for note in view.notes],
        "tiles": _tiles(views[0].records) if len(views) == 1 else [],
        "facts": [(name, [one.get(name, "–") for one in facts]) for name in names],
        **_time([view.records for view in views]),
    }


def _tiles(records: RunRecords) -> list[tuple[str, str]]:
    """Returns the headline numbers as (value, name)."""
    tiles = []
    for metric, name in (
        (metrics.HELDOUT_SOLVE_RATE, "held-out problems solved"),
        (metrics.SOLVE_RATE, "rollouts correct, first → last refresh"),
    ):
        solved = [percent(share) for _, share in records.refresh_points(metric)]
        if solved:
            tiles.append((" → ".join([solved[0], solved[-1]][-len(solved) :]), name))
    losses = records.points(metrics.LOSS)
    if losses:
        tiles.append((number(losses[-1][1]), "loss of the last step"))
    if records.steps:
        tiles.append((short_count(records.total(metrics.NUM_TOKENS)), "tokens trained"))
        tiles.append((duration(sum(records.seconds().values())), "wall-clock time"))
    return tiles


def _facts(view: RunView) -> dict[str, str]:
    """Returns name -> value of the known facts about a run."""
    facts = _settings(view.records) | _training(view.records) | _rollouts(view)
    return {name: str(value) for name, value in facts.items() if value}


def _settings(records: RunRecords) -> dict[str, Any]:
    data = records.setting("data", "train_data") or []
    return {
        "Objective": records.setting("objective", "objective") or records.card.get("Objective"),
        "Model": records.megatron("hf_model") or records.card.get("Base model"),
        "Parameters": records.card.get("Parameters"),
        "Demonstrations": ", ".join(data) or records.card.get("Demonstrations"),
        "Layout": _layout(records),
        "Problems per step": records.megatron("global_batch_size") or records.card.get("Problems per step"),
        "Sequence length": records.megatron("seq_length"),
        "Peak learning rate": records.megatron("lr") or records.card.get("Learning rate"),
        "Rollouts from": _sampling(records),
    }


def _training(records: RunRecords) -> dict[str, Any]:
    if not records.steps:
        return {}
    last, planned = max(records.steps), records.megatron("train_iters")
    steps = f"{last} of {planned}" if planned else f"{last}"
    if len(records.steps) < last:
        steps += f", {len(records.steps)} of them in metrics.jsonl"
    tokens, seconds = records.total(metrics.NUM_TOKENS), records.total(metrics.STEP_S)
    facts = {"Steps": steps, "Tokens trained": f"{tokens:,.0f}, prompts included"}
    if seconds:
        facts["Training throughput"] = (
            f"{number(tokens / seconds, 3)} tokens/s, mean over {duration(seconds)} of steps"
        )
    if records.num_repeated:
        facts["Steps repeated"] = f"{records.num_repeated} after a resume; the last record of each counts"
    return facts


def _rollouts(view: RunView) -> dict[str, Any]:
    facts, records = {}, view.records
    sampled = [r for r in records.refreshes.values() if r.get("rollout/num_rollouts")]
    if view.rollouts is not None and view.rollouts.refreshes:
        tokens = sum(refresh.num_tokens for refresh in view.rollouts.refreshes.values())
        facts["Rollouts"] = (
            f"{view.rollouts.num_rollouts:,} in {counted(len(view.rollouts.refreshes), 'refresh', 'refreshes')}, {tokens:,} tokens"
        )
    elif sampled:
        counts = [(r["rollout/num_rollouts"], r.get("rollout/response_tokens_mean", 0.0)) for r in sampled]
        total, tokens_mean = sum(n for n, _ in counts), sum(n * mean for n, mean in counts)
        facts["Rollouts"] = (
            f"{total:,.0f} in {counted(len(sampled), 'refresh', 'refreshes')}, {tokens_mean:,.0f} tokens"
        )
    solved = records.refresh_points(metrics.SOLVE_RATE)
    if solved:
        facts["Rollouts correct"] = (
            f"{percent(solved[-1][1])} in the last refresh, after step {solved[-1][0]:.0f}"
        )
    heldout = records.refresh_points(metrics.HELDOUT_SOLVE_RATE)
    if heldout:
        ends = dict.fromkeys([heldout[0], heldout[-1]])
        facts["Held-out solved"] = ", ".join(
            f"{percent(share)} after step {step:.0f}" for step, share in ends
        )
    failed = sum(r.get("rollout/failed", 0) for r in records.refreshes.values())
    if failed:
        facts["Failed samples"] = f"{failed:,.0f}, which no server returned"
    return facts


def _layout(records: RunRecords) -> str | None:
    """Processes, parallel sizes above 1, and precision."""
    if not records.config.get("megatron"):
        return None
    sizes = {
        "tp": "tensor_model_parallel_size",
        "pp": "pipeline_model_parallel_size",
        "cp": "context_parallel_size",
        "ep": "expert_model_parallel_size",
        "dp": "data_parallel_size",
    }
    parts = [
        f"{name} {records.megatron(key)}"
        for name, key in sizes.items()
        if records.megatron(key) not in (None, "1")
    ]
    device = {"nccl": "GPU", "gloo": "CPU"}.get(records.megatron("distributed_backend") or "", "")
    precision = (records.megatron("params_dtype") or "").removeprefix("torch.")
    fp8 = records.megatron("fp8")
    size = records.megatron("world_size") or "?"
    noun = f"{device} process".strip()
    count = counted(int(size), noun, f"{noun}es") if size.isdecimal() else f"{size} {noun}es"
    return ", ".join(filter(None, [count, " ".join(parts), precision, f"FP8 {fp8}" if fp8 else ""]))


def _sampling(records: RunRecords) -> str | None:
    """Engine and settings of the rollouts."""
    if records.refreshes and not any(r.get("rollout/num_rollouts") for r in records.refreshes.values()):
        return "none: this run trains on demonstrations only"
    engine = records.setting("rollout", "rollout_engine")
    if engine is None:
        return records.card.get("Rollout engine")
    return (
        f"{engine}: {records.setting('rollout', 'rollout_num_samples')} per problem, at most "
        f"{records.setting('rollout', 'rollout_max_new_tokens')} tokens, temperature "
        f"{records.setting('rollout', 'rollout_temperature')}"
    )


def _time(runs: Sequence[RunRecords]) -> dict[str, Any]:
    """Returns seconds and shares of each phase, by run."""
    seconds = [records.seconds() for records in runs]
    totals = [sum(one.values()) for one in seconds]
    phases = [phase for phase in PHASES if any(one[phase] for one in seconds)]

    def cell(one: dict[str, float], total: float, phase: str) -> str:
        return f"{duration(one[phase])} ({percent(one[phase] / total)})" if total else "–"

    return {
        "bars": [
            (records.name, [(phase, PHASES[phase], one[phase], cell(one, total, phase)) for phase in phases])
            for records, one, total in zip(runs, seconds, totals)
            if total
        ],
        "phases": [
            (phase, PHASES[phase], [cell(one, total, phase) for one, total in zip(seconds, totals)])
            for phase in phases
        ],
        "totals": [duration(total) for total in totals],
    }
