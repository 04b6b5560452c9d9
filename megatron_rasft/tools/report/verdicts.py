"""Section "Rollouts": verdicts, lengths, finish reasons, and the age of the weights that sampled."""

from collections import Counter
from typing import Any

from megatron_rasft.tools.report.charts import Chart, Part, Series, columns, line_chart, merged
from megatron_rasft.tools.report.rollouts import (
    LENGTH_KINDS,
    VERDICTS,
    RefreshRollouts,
    RolloutStatistics,
    rounded_length,
)
from megatron_rasft.tools.report.views import RunView

_NUM_REASONS = 12
_NUM_LENGTH_BINS = 32
_FINISH_ORDER = ("stop", "length", "abort")


def verdicts(view: RunView) -> dict[str, Any]:
    """Returns charts and tables of all rollouts of a run.

    Without stored rollouts there is only the chart of verdicts, drawn from the metrics, and ``total`` is 0.
    """
    statistics = view.rollouts
    if statistics is None or not statistics.refreshes:
        return {"charts": [chart for chart in [_verdicts_by_refresh(view)] if chart is not None], "total": 0}
    refreshes = statistics.refreshes.values()
    lengths, ages = statistics.total("lengths"), statistics.total("ages")
    charts = [
        _verdicts_by_refresh(view),
        _length_histogram(lengths),
        _cut_by_length(view.name, statistics),
        _age_histogram(ages) if any(ages) else None,
    ]
    total = statistics.num_rollouts
    return {
        "charts": [chart for chart in charts if chart is not None],
        "total": total,
        "num_trained": sum(refresh.num_trained for refresh in refreshes),
        "num_tokens": sum(refresh.num_tokens for refresh in refreshes),
        "median": _quantile(lengths, 0.5),
        "percentile_95": _quantile(lengths, 0.95),
        "is_on_policy": set(ages) == {0},
        **_outcomes(statistics.total("outcomes")),
        **_reasons(statistics.total("reasons"), total),
        "filters": statistics.total("filters").most_common(),
    }


def _verdicts_by_refresh(view: RunView) -> Chart | None:
    """Verdicts from the stored rollouts, or from the metrics if none are stored."""
    if view.rollouts is not None and view.rollouts.refreshes:
        counted = [(step, _count_verdicts(refresh)) for step, refresh in view.rollouts.refreshes.items()]
    else:
        counted = [(step, _verdicts_of_metrics(record)) for step, record in view.records.refreshes.items()]
    labels, counts = merged(counted, len(VERDICTS))
    return columns(
        "Verdicts by refresh",
        "step of the refresh",
        labels,
        [Part(verdict, f"verdict-{verdict}") for verdict in VERDICTS],
        counts,
        unit="share of rollouts",
        is_share=True,
    )


def _count_verdicts(refresh: RefreshRollouts) -> list[float]:
    counts: Counter[str] = Counter()
    for (verdict, _), count in refresh.outcomes.items():
        counts[verdict] += count
    return [counts[verdict] for verdict in VERDICTS]


def _verdicts_of_metrics(record: dict[str, float]) -> list[float]:
    num_rollouts = record.get("rollout/num_rollouts", 0.0)
    return [round(num_rollouts * record.get(f"verify/{verdict}_frac", 0.0)) for verdict in VERDICTS]


def _length_histogram(lengths: Counter[tuple[str, int]]) -> Chart | None:
    longest = max((length for _, length in lengths), default=0)
    width = _bin_width(longest)
    counts = [[0] * len(LENGTH_KINDS) for _ in range(longest // width + 1)]
    for (kind, length), count in lengths.items():
        counts[length // width][LENGTH_KINDS.index(kind)] += count
    return columns(
        "Length of the rollouts",
        f"response tokens, in bins of {width}",
        [f"{place * width}" for place in range(len(counts))],
        [
            Part("correct", "verdict-correct"),
            Part("not correct", "verdict-wrong"),
            Part("cut by length", "verdict-truncated"),
        ],
        counts,
        unit="rollouts",
    )


def _bin_width(longest: int) -> int:
    """Returns a bin width: 1, 2 or 5 times a power of ten, at least the distance between two values of ``rounded_length``."""
    distance = longest - rounded_length(longest - 1) if longest > 1 else 1
    least = max(1, (longest + 1) / _NUM_LENGTH_BINS, distance)
    power = 1
    while power * 10 <= least:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _quantile(lengths: Counter[tuple[str, int]], share: float) -> int:
    """Returns the length that at least ``share`` of the rollouts do not exceed."""
    by_length: Counter[int] = Counter()
    for (_, length), count in lengths.items():
        by_length[length] += count
    remaining = share * by_length.total()
    for length, count in sorted(by_length.items()):
        remaining -= count
        if remaining <= 0:
            return length
    return 0


def _cut_by_length(name: str, statistics: RolloutStatistics) -> Chart | None:
    points = [
        (
            step,
            sum(n for (_, finish), n in refresh.outcomes.items() if finish == "length")
            / refresh.num_rollouts,
        )
        for step, refresh in statistics.refreshes.items()
    ]
    series = [Series(name, "verdict-truncated", points)]
    return line_chart("Rollouts cut by length", "share of a refresh's rollouts", series, is_share=True)


def _age_histogram(ages: Counter[int]) -> Chart | None:
    labels, counts = merged([(age, [ages[age]]) for age in sorted(ages)], 1)
    parts = [Part("rollouts", "run-0")]
    return columns(
        "Age of the weights that sampled", "optimizer steps behind", labels, parts, counts, unit="rollouts"
    )


def _outcomes(outcomes: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Rollouts by verdict and finish reason. Unknown verdicts come last."""
    finishes = sorted({finish for _, finish in outcomes}, key=_finish_rank)
    known = [*VERDICTS, *sorted({verdict for verdict, _ in outcomes} - set(VERDICTS))]
    rows = [(verdict, [outcomes[verdict, finish] for finish in finishes]) for verdict in known]
    return {
        "finishes": finishes,
        "outcomes": [(verdict, counts) for verdict, counts in rows if any(counts)],
        "finish_totals": [sum(outcomes[verdict, finish] for verdict in known) for finish in finishes],
    }


def _finish_rank(finish: str) -> tuple[int, str]:
    return _FINISH_ORDER.index(finish) if finish in _FINISH_ORDER else len(_FINISH_ORDER), finish


def _reasons(reasons: Counter[tuple[str, str]], total: int) -> dict[str, Any]:
    """The most frequent reasons of verdicts, and the number of rollouts with other reasons."""
    shown = reasons.most_common(_NUM_REASONS)
    return {"reasons": shown, "num_other_reasons": total - sum(count for _, count in shown)}
