"""The section of a page that is read first: headline numbers, facts, and where the time went."""

from collections.abc import Sequence

from megatron_rasft import metrics
from megatron_rasft.tools.report.charts import number, strip, swatch, tick_label
from megatron_rasft.tools.report.markup import Content, Html, tag
from megatron_rasft.tools.report.records import PHASES, RunRecords
from megatron_rasft.tools.report.views import RunView, colour, duration, table


def overview(views: Sequence[RunView]) -> Content:
    """Headline numbers, a table of facts with a column for each run, and the time by phase."""
    facts = [_facts(view) for view in views]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [[name, *(one.get(name, "–") for one in facts)] for name in names]
    head = None
    if len(views) > 1:
        head = ["", *([swatch(colour(place)), view.name] for place, view in enumerate(views))]
    notes = [
        tag("li", f"{view.name}: " if len(views) > 1 else None, note) for view in views for note in view.notes
    ]
    return [
        tag("ul", notes, class_="notes") if notes else None,
        _tiles(views[0]) if len(views) == 1 else None,
        table(rows, head, class_="facts"),
        _time(views),
    ]


def _tiles(view: RunView) -> Html | None:
    """The few numbers to be read first."""
    records = view.records
    tiles = []
    heldout = records.refresh_points(metrics.HELDOUT_SOLVE_RATE)
    if heldout:
        before = f"{heldout[0][1]:.1%} → " if len(heldout) > 1 else ""
        tiles.append((f"{before}{heldout[-1][1]:.1%}", "held-out problems solved"))
    solved = records.refresh_points(metrics.SOLVE_RATE)
    if solved:
        before = f"{solved[0][1]:.1%} → " if len(solved) > 1 else ""
        tiles.append((f"{before}{solved[-1][1]:.1%}", "rollouts correct, first → last refresh"))
    losses = records.points(metrics.LOSS)
    if losses:
        tiles.append((number(losses[-1][1]), "loss of the last step"))
    if records.steps:
        tiles.append(
            (
                tick_label(sum(r.get(metrics.NUM_TOKENS, 0) for r in records.steps.values()), False),
                "tokens trained",
            )
        )
        tiles.append((duration(sum(records.seconds().values())), "on the clock"))
    if not tiles:
        return None
    return tag(
        "div", [tag("div", tag("b", value), tag("span", name)) for value, name in tiles], class_="tiles"
    )


def _facts(view: RunView) -> dict[str, str]:
    records = view.records
    facts = {
        "Objective": records.setting("objective", "objective") or records.card.get("Objective"),
        "Model": records.megatron("hf_model") or records.card.get("Base model"),
        "Parameters": records.card.get("Parameters"),
        "Demonstrations": ", ".join(records.setting("data", "train_data") or [])
        or records.card.get("Demonstrations"),
        "Layout": _layout(records),
        "Problems per step": records.megatron("global_batch_size") or records.card.get("Problems per step"),
        "Sequence length": records.megatron("seq_length"),
        "Peak learning rate": records.megatron("lr") or records.card.get("Learning rate"),
        "Rollouts from": _sampling(records),
    }
    steps = list(records.steps)
    if steps:
        planned = records.megatron("train_iters")
        facts["Steps"] = f"{steps[-1]}{f' of {planned}' if planned else ''}"
        if len(steps) < steps[-1]:
            facts["Steps"] = f"{facts['Steps']}, {len(steps)} of them recorded here"
        tokens = sum(r.get(metrics.NUM_TOKENS, 0.0) for r in records.steps.values())
        seconds = sum(r.get(metrics.STEP_S, 0.0) for r in records.steps.values())
        facts["Tokens trained"] = f"{tokens:,.0f}, prompts included"
        if seconds:
            facts["Training throughput"] = (
                f"{number(tokens / seconds, 3)} tokens/s, mean over {duration(seconds)} of steps"
            )
    if records.num_repeated:
        facts["Steps done again"] = (
            f"{records.num_repeated}, after the run was taken up again; the last record counts"
        )
    sampled = [r for r in records.refreshes.values() if r.get("rollout/num_rollouts")]
    if view.rollouts is not None and view.rollouts.refreshes:
        drawn, used = view.rollouts.num_rollouts, sum(r.num_tokens for r in view.rollouts.refreshes.values())
        facts["Rollouts"] = f"{drawn:,} at {len(view.rollouts.refreshes)} refreshes, {used:,} tokens"
    elif sampled:
        counts = [(r["rollout/num_rollouts"], r.get("rollout/response_tokens_mean", 0.0)) for r in sampled]
        facts["Rollouts"] = (
            f"{sum(n for n, _ in counts):,.0f} at {len(sampled)} refreshes, {sum(n * mean for n, mean in counts):,.0f} tokens"
        )
    solved = records.refresh_points(metrics.SOLVE_RATE)
    if solved:
        facts["Rollouts correct"] = f"{solved[-1][1]:.1%} at the last refresh, after step {solved[-1][0]:.0f}"
    heldout = records.refresh_points(metrics.HELDOUT_SOLVE_RATE)
    if heldout:
        facts["Held-out solved"] = ", ".join(
            f"{value:.1%} after step {step:.0f}" for step, value in dict.fromkeys([heldout[0], heldout[-1]])
        )
    failed = sum(r.get("rollout/failed", 0) for r in records.refreshes.values())
    if failed:
        facts["Samples that servers failed to give"] = f"{failed:,.0f}"
    return {name: str(value) for name, value in facts.items() if value}


def _layout(records: RunRecords) -> str | None:
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
    where = {"nccl": "GPU", "gloo": "CPU"}.get(records.megatron("distributed_backend") or "", "")
    precision = (records.megatron("params_dtype") or "").removeprefix("torch.")
    fp8 = records.megatron("fp8")
    count = f"{records.megatron('world_size') or '?'} {where} process(es)"
    return ", ".join(filter(None, [count, " ".join(parts), precision, f"FP8 {fp8}" if fp8 else ""]))


def _sampling(records: RunRecords) -> str | None:
    if records.refreshes and not any(r.get("rollout/num_rollouts") for r in records.refreshes.values()):
        return "none: this run trains on demonstrations only"
    engine = records.setting("rollout", "rollout_engine")
    if engine is None:
        return records.card.get("Rollout engine")
    return (
        f"{engine}: {records.setting('rollout', 'rollout_num_samples')} a problem, at most "
        f"{records.setting('rollout', 'rollout_max_new_tokens')} tokens, temperature "
        f"{records.setting('rollout', 'rollout_temperature')}"
    )


def _time(views: Sequence[RunView]) -> Content:
    """Where the time went."""
    split = {view.name: view.records.seconds() for view in views}
    used = [(phase, text) for phase, text in PHASES.items() if any(one[phase] for one in split.values())]
    if not used:
        return None
    bars: list[Content] = []
    for view in views:
        seconds = split[view.name]
        total = sum(seconds.values())
        if total:
            parts = [
                (
                    text,
                    f"p-{phase}",
                    seconds[phase],
                    f"{duration(seconds[phase])}, {seconds[phase] / total:.1%}",
                )
                for phase, text in used
            ]
            bars.append(tag("p", view.name, class_="bar-name") if len(views) > 1 else None)
            bars.append(strip(parts))
    rows: list[list[Content]] = []
    for phase, text in used:
        cells: list[Content] = []
        for one in split.values():
            total = sum(one.values())
            cells.append(f"{duration(one[phase])} ({one[phase] / total:.1%})" if total else "–")
        rows.append([[swatch(f"p-{phase}"), text], *cells])
    rows.append(["on the clock", *(duration(sum(one.values())) for one in split.values())])
    head = ["phase", *(view.name for view in views)] if len(views) > 1 else ["phase", "time and share"]
    return [tag("h3", "Where the time went"), bars, table(rows, head, class_="numbers")]
