"""Curves over the steps of a run, several runs over each other."""

from collections.abc import Sequence
from typing import NamedTuple

from megatron_rasft import metrics
from megatron_rasft.tools.report.charts import MAX_POINTS, Series, legend, line_chart
from megatron_rasft.tools.report.markup import Content, tag
from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.views import RunView, colour


class Curve(NamedTuple):
    """A metric and how it is drawn."""

    metric: str
    title: str
    unit: str
    is_share: bool = False
    from_zero: bool = True
    may_be_log: bool = False


_SOLVED = (
    Curve(metrics.HELDOUT_SOLVE_RATE, "Held-out problems solved", "share of responses", is_share=True),
    Curve(metrics.HELDOUT_TRUNCATED, "Held-out responses cut by length", "share of responses", is_share=True),
    Curve(metrics.SOLVE_RATE, "Rollouts that are correct", "share of a refresh's rollouts", is_share=True),
    Curve(
        metrics.SOLVED_PROBLEMS,
        "Problems solved at least once",
        "share of a refresh's problems",
        is_share=True,
    ),
)
_OF_STEPS = (
    Curve(metrics.LOSS, "Loss of the objective", "weighted nats per response token", from_zero=False),
    Curve(
        metrics.CROSS_ENTROPY,
        "Cross-entropy of what is trained on",
        "nats per response token",
        from_zero=False,
    ),
    Curve(metrics.GRAD_NORM, "Gradient norm", "before clipping", may_be_log=True),
    Curve(metrics.LEARNING_RATE, "Learning rate", "of the optimizer, at the step"),
    Curve(metrics.TOKENS_PER_S, "Training throughput", "tokens per second of a step"),
    Curve(metrics.RATIO_MEAN, "Ratio of reference to policy", "mean, clipped", from_zero=False),
    Curve(metrics.RATIO_CLIP_FRAC, "Clipped ratios", "share of sequences", is_share=True),
    Curve(metrics.DEMONSTRATION_WEIGHT, "Weight of a demonstration", "mean of a step's demonstrations"),
    Curve(metrics.ROLLOUT_WEIGHT, "Weight of a trained rollout", "mean of a step's rollouts"),
)
_OF_REFRESHES = (
    Curve("rollout/response_tokens_mean", "Length of a rollout", "tokens, mean of a refresh"),
    Curve(
        "curriculum/difficulty_mean_nats",
        "Difficulty of the demonstrations",
        "nats per token, mean",
        from_zero=False,
    ),
    Curve("rollout/tokens_per_s", "Sampling throughput of the servers", "tokens per second"),
    Curve(metrics.LOGPROB_GAP, "Servers against trainer", "gap of log-probabilities, nats per token"),
    Curve(metrics.SYNC_S, "Weights to the servers", "seconds a sync"),
    Curve(metrics.SYNC_GB_PER_S, "Speed of a weight sync", "GB per second"),
    Curve(metrics.SYNC_FAILED_SERVERS, "Servers that a sync left out", "servers"),
)


def curves(views: Sequence[RunView]) -> Content:
    """Every curve that any of the runs has a point of."""
    curves = [(curve, RunRecords.refresh_points) for curve in _SOLVED]
    curves += [(curve, RunRecords.points) for curve in _OF_STEPS]
    curves += [(curve, RunRecords.refresh_points) for curve in _OF_REFRESHES]
    charts = []
    for curve, read in curves:
        series = [
            Series(view.name, colour(place), read(view.records, curve.metric))
            for place, view in enumerate(views)
        ]
        if curve.metric == metrics.SYNC_FAILED_SERVERS and not any(y for s in series for _, y in s.points):
            continue
        charts.append(
            line_chart(
                curve.title,
                curve.unit,
                series,
                is_share=curve.is_share,
                may_be_log=curve.may_be_log,
                from_zero=curve.from_zero,
            )
        )
    shown = [chart for chart in charts if chart is not None]
    if not shown:
        return tag("p", "No metrics: there is nothing to draw.", class_="missing")
    runs = [(view.name, colour(place)) for place, view in enumerate(views)]
    longest = max(len(view.records.steps) for view in views)
    note = f"Of more than {MAX_POINTS} points neighbours are averaged; the band is from the lowest to the highest of them."
    return [
        legend(runs) if len(runs) > 1 else None,
        tag("p", note, class_="note") if longest > MAX_POINTS else None,
        tag("div", shown, class_="grid"),
    ]
