"""What became of the rollouts: verdicts, lengths, how they ended, how old the policy was."""

from collections import Counter

from megatron_rasft.tools.report.charts import Series, columns, line_chart, number, swatch
from megatron_rasft.tools.report.markup import Content, Html, tag
from megatron_rasft.tools.report.rollouts import LENGTH_KINDS, VERDICTS, rounded_length
from megatron_rasft.tools.report.views import RunView, merged, table

_NUM_REASONS = 12
_NUM_LENGTH_BINS = 32


def outcomes(view: RunView) -> Content:
    """Charts and tables of all rollouts of a run."""
    statistics = view.rollouts
    if statistics is None or not statistics.refreshes:
        return [
            _verdict_shares(view),
            tag("p", "No stored rollouts: texts and lengths are not known.", class_="missing"),
        ]
    lengths, outcomes = statistics.total("lengths"), statistics.total("outcomes")
    truncated = Series(
        view.name,
        "v-truncated",
        [
            (step, sum(n for (_, finish), n in r.outcomes.items() if finish == "length") / r.num_rollouts)
            for step, r in statistics.refreshes.items()
        ],
    )
    charts = [
        _verdict_shares(view),
        _length_histogram(lengths),
        line_chart("Rollouts cut by length", "share, at a refresh", [truncated], is_share=True),
        _ages(statistics.total("ages")),
    ]
    total = statistics.num_rollouts
    trained = sum(r.num_trained for r in statistics.refreshes.values())
    tokens = sum(r.num_tokens for r in statistics.refreshes.values())
    text = (
        f"{total:,} rollouts, {tokens:,} tokens, {number(tokens / total)} each on average; median about "
        f"{_quantile(lengths, 0.5):,}, 95th percentile about {_quantile(lengths, 0.95):,}. "
        f"{trained:,} rollouts ({trained / total:.1%}) are trained on."
    )
    ages = statistics.total("ages")
    if set(ages) == {0}:
        text += " All were sampled from the weights of their refresh."
    return [
        tag("p", text),
        tag("div", charts, class_="grid"),
        tag(
            "div",
            tag("div", tag("h4", "Verdict and how the response ended"), _outcome_table(outcomes)),
            tag("div", tag("h4", "Why"), _reason_table(statistics.total("reasons"), total)),
            _filter_table(statistics.total("filters"), total),
            class_="grid wide",
        ),
    ]


def _verdict_shares(view: RunView) -> Html | None:
    """From the store, else from the metrics."""
    counted: list[tuple[int, list[float]]] = []
    if view.rollouts is not None and view.rollouts.refreshes:
        for step, refresh in view.rollouts.refreshes.items():
            verdicts: Counter[str] = Counter()
            for (verdict, _), count in refresh.outcomes.items():
                verdicts[verdict] += count
            counted.append((step, [float(verdicts[v]) for v in VERDICTS]))
    else:
        for step, record in view.records.refreshes.items():
            drawn = record.get("rollout/num_rollouts", 0.0)
            counted.append((step, [round(drawn * record.get(f"verify/{v}_frac", 0.0)) for v in VERDICTS]))
    labels, counts = merged(counted, len(VERDICTS))
    parts = [(v, f"v-{v}") for v in VERDICTS]
    return columns(
        "Verdicts by refresh",
        "step of the refresh",
        labels,
        parts,
        counts,
        unit="share of rollouts",
        is_share=True,
    )


def _length_histogram(lengths: Counter[tuple[str, int]]) -> Html | None:
    longest = max((length for _, length in lengths), default=0)
    width = _bin_width(longest)
    counts = [[0] * len(LENGTH_KINDS) for _ in range(longest // width + 1)]
    for (kind, length), count in lengths.items():
        counts[length // width][LENGTH_KINDS.index(kind)] += count
    labels = [f"{place * width}" for place in range(len(counts))]
    parts = [("correct", "v-correct"), ("not correct", "v-wrong"), ("cut by length", "v-truncated")]
    x_label = f"response tokens, in bins of {width}"
    return columns("Length of the rollouts", x_label, labels, parts, counts, unit="rollouts")


def _bin_width(longest: int) -> int:
    """1, 2 or 5 times a power of ten, wider than what ``rounded_length`` leaves apart."""
    least = max(
        1, (longest + 1) / _NUM_LENGTH_BINS, (longest - rounded_length(longest - 1)) if longest > 1 else 1
    )
    power = 1
    while power * 10 <= least:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least)


def _quantile(lengths: Counter[tuple[str, int]], share: float) -> int:
    by_length: Counter[int] = Counter()
    for (_, length), count in lengths.items():
        by_length[length] += count
    left = share * sum(by_length.values())
    for length, count in sorted(by_length.items()):
        left -= count
        if left <= 0:
            return length
    return 0


def _ages(ages: Counter[int]) -> Html | None:
    if not any(ages):
        return None
    counted = [(age, [float(ages[age])]) for age in sorted(ages)]
    labels, counts = merged(counted, 1)
    return columns(
        "Age of the policy that sampled",
        "optimizer steps behind",
        labels,
        [("rollouts", "c0")],
        counts,
        unit="rollouts",
    )


def _outcome_table(outcomes: Counter[tuple[str, str]]) -> Html:
    total = sum(outcomes.values())
    known = [*VERDICTS, *sorted({v for v, _ in outcomes} - set(VERDICTS))]
    finishes = sorted(
        {finish for _, finish in outcomes}, key=lambda f: ("stop", "length", "abort", f).index(f)
    )
    rows: list[list[Content]] = []
    for verdict in known:
        count = sum(outcomes[verdict, finish] for finish in finishes)
        if count:
            cells = [f"{outcomes[verdict, finish]:,}" for finish in finishes]
            rows.append([[swatch(f"v-{verdict}"), verdict], *cells, f"{count:,}", f"{count / total:.1%}"])
    sums = [sum(outcomes[verdict, finish] for verdict in known) for finish in finishes]
    rows.append(["all", *(f"{n:,} ({n / total:.1%})" for n in sums), f"{total:,}", "100%"])
    return table(rows, ["", *finishes, "all", "share"], class_="numbers")


def _reason_table(reasons: Counter[tuple[str, str]], total: int) -> Html:
    shown = reasons.most_common(_NUM_REASONS)
    rows: list[list[Content]] = [
        [[swatch(f"v-{verdict}"), verdict], reason or "–", f"{count:,}", f"{count / total:.1%}"]
        for (verdict, reason), count in shown
    ]
    left = total - sum(count for _, count in shown)
    if left:
        rows.append(["all others", "", f"{left:,}", f"{left / total:.1%}"])
    return table(rows, ["verdict", "reason", "rollouts", "share"], class_="numbers said")


def _filter_table(filters: Counter[str], total: int) -> Html | None:
    if not filters:
        return None
    rows = [[name, f"{count:,}", f"{count / total:.1%}"] for name, count in filters.most_common()]
    shares = table(rows, ["filter", "rollouts", "share"], class_="numbers")
    return tag("div", tag("h4", "Removed by quality filters"), shares)
