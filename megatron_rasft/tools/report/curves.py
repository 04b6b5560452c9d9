"""Section "Curves": metrics over the steps, with a line for each run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_rasft import metrics
from megatron_rasft.tools.report.charts import (
    MAX_POINTS,
    Chart,
    Part,
    Point,
    Series,
    line_chart,
    run_colour,
    run_dash,
)
from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.views import RunView


class Curve(NamedTuple):
    """A metric, and the options for drawing it, which ``charts.line_chart`` explains."""

    metric: str
    title: str
    unit: str
    is_share: bool = False
    from_zero: bool = True
    may_be_log: bool = False


_SOLVED = (
    Curve(metrics.HELDOUT_SOLVE_RATE, "Held-out problems solved", "share of responses", is_share=True),
    Curve(metrics.HELDOUT_TRUNCATED, "Held-out responses cut by length", "share of responses", is_share=True),
    Curve(metrics.HELDOUT_REWARD, "Mean reward of held-out responses", "of --verify-function"),
    Curve(metrics.REWARD, "Mean reward of the rollouts", "of --verify-function, a refresh"),
    Curve(metrics.SOLVE_RATE, "Correct rollouts", "share of a refresh's rollouts", is_share=True),
    Curve(
        metrics.GUIDED_SOLVE_RATE,
        "Correct guided rollouts",
        "share of a refresh's guided rollouts",
        is_share=True,
    ),
    Curve(
        metrics.GUIDANCE,
        "Imitation helps",
        "probability, from guided rollouts",
        is_share=True,
    ),
    Curve(
        metrics.SOLVED_PROBLEMS,
        "Problems solved at least once",
        "share of a refresh's problems",
        is_share=True,
    ),
)
_OF_STEPS = (
    Curve(metrics.LOSS, "Loss of the objective", "weighted nats per response token", from_zero=False),
    Curve(metrics.CROSS_ENTROPY, "Cross-entropy", "nats per trained response token", from_zero=False),
    Curve(metrics.GRAD_NORM, "Gradient norm", "before clipping", may_be_log=True),
    Curve(metrics.LEARNING_RATE, "Learning rate", "of the optimizer, at the step"),
    Curve(metrics.TOKENS_PER_S, "Training throughput", "tokens per second of a step"),
    Curve(metrics.RATIO_MEAN, "Ratio of reference to policy", "mean, clipped", from_zero=False),
    Curve(metrics.RATIO_CLIP_FRAC, "Clipped ratios", "share of sequences", is_share=True),
    Curve(metrics.DEMONSTRATION_WEIGHT, "Weight of a demonstration", "mean of a step's demonstrations"),
    Curve(metrics.ROLLOUT_WEIGHT, "Weight of a trained rollout", "mean of a step's rollouts"),
    Curve(metrics.WRONG_ROLLOUT_WEIGHT, "Weight of a wrong rollout", "mean of a step's, below zero"),
)
_OF_REFRESHES = (
    Curve("rollout/response_tokens_mean", "Length of a rollout", "tokens, mean of a refresh"),
    Curve(
        "curriculum/difficulty_mean_nats",
        "Difficulty of the demonstrations",
        "nats per token, mean",
        from_zero=False,
    ),
    Curve("rollout/tokens_per_s", "Sampling throughput of the rollout servers", "tokens per second"),
    Curve(metrics.LOGPROB_GAP, "Log-probabilities: servers against trainer", "absolute gap, nats per token"),
    Curve(metrics.SYNC_S, "Duration of a weight sync", "seconds"),
    Curve(metrics.SYNC_GB_PER_S, "Speed of a weight sync", "GB per second"),
)
_FAILED_SERVERS = Curve(metrics.SYNC_FAILED_SERVERS, "Servers that a sync left out", "servers")


def curves(views: Sequence[RunView]) -> dict[str, Any]:
    """Returns a chart of each metric that at least one run recorded."""
    charts = [_draw(curve, views, RunRecords.refresh_points) for curve in _SOLVED]
    charts += [_draw(curve, views, RunRecords.points) for curve in _OF_STEPS]
    charts += [_draw(curve, views, RunRecords.refresh_points) for curve in _OF_REFRESHES]
    if any(value for view in views for _, value in view.records.refresh_points(_FAILED_SERVERS.metric)):
        charts.append(_draw(_FAILED_SERVERS, views, RunRecords.refresh_points))
    return {
        "charts": [chart for chart in charts if chart is not None],
        "runs": [Part(view.name, run_colour(place)) for place, view in enumerate(views)],
        "averaged_from": MAX_POINTS if any(len(view.records.steps) > MAX_POINTS for view in views) else None,
    }


def _draw(
    curve: Curve, views: Sequence[RunView], read: Callable[[RunRecords, str], list[Point]]
) -> Chart | None:
    series = [
        Series(view.name, run_colour(place), read(view.records, curve.metric), run_dash(place))
        for place, view in enumerate(views)
    ]
    return line_chart(
        curve.title,
        curve.unit,
        series,
        is_share=curve.is_share,
        may_be_log=curve.may_be_log,
        from_zero=curve.from_zero,
    )
