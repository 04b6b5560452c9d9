"""Writes the table and the plots of a comparison from the evaluations and metrics of its runs."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.benchmark_reproduction import records
from megatron_rasft import metrics
from megatron_rasft.errors import RasftError
from megatron_rasft.tools.evaluation.published import published_rows
from megatron_rasft.tools.evaluation.statistics import bootstrap_interval, paired_interval
from megatron_rasft.tools.evaluation.summary import Summary

Runs = Mapping[tuple[str, int], Path]
"""(method, seed) -> folder of one training and its evaluation."""

DEFAULT_REFERENCE = "sft"
"""Method with which the others are compared."""


@dataclass
class Curve:
    """Held-out solve rate over a training, and the training's totals. The lists have a value for each measurement."""

    steps: list[int] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    """Tokens trained before the measurement."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of steps and refreshes before the measurement, without the held-out measurements."""
    accuracy: list[float] = field(default_factory=list)
    """Solve rate of the held-out problems, in percent."""
    total_tokens: float = 0.0
    total_generated: float = 0.0
    """Response tokens sampled for training."""
    total_seconds: float = 0.0
    total_steps: int = 0


def write_comparison(
    title: str,
    runs: Runs,
    output: Path,
    compared_with: str = "",
    num_jobs: int = 1,
    reference: str = DEFAULT_REFERENCE,
) -> str:
    """Writes comparison.md, .csv and .json and the plots.

    Args:
        title: title of table and plots.
        runs: the runs to compare. Unfinished runs are listed below the table.
        output: folder of all results.
        compared_with: model whose published numbers are added, if there are any.
        num_jobs: trainings that shared the machine.
        reference: method with which the others are compared.

    Returns:
        Text of comparison.md, and the reason if there are no plots.

    Raises:
        RasftError: no run is finished, or seeds of a method were evaluated on different problems.
    """
    summaries = {key: _summaries(folder) for key, folder in runs.items()}
    missing = [folder.name for key, folder in runs.items() if not summaries[key]]
    summaries = {key: value for key, value in summaries.items() if value}
    if not summaries:
        raise RasftError(f"{output} has no finished evaluation")
    curves = {key: read_curve(runs[key] / "metrics.jsonl") for key in summaries}
    rows = _rows(summaries, curves, reference)
    notes = [
        "Accuracy in percent, mean over seeds, problems and samples; 95 % bootstrap intervals over seeds and problems. "
        f"Differences from {reference} are paired by problem, and by seed if both methods have the same seeds. Tokens and "
        "seconds are means over the seeds.",
        *records.notes(runs[key] for key in summaries),
    ]
    if num_jobs > 1:
        notes.append(
            f"{num_jobs} trainings ran at a time on one machine, so their seconds depend on each other."
        )
    if missing:
        notes.append(f"Not finished: {', '.join(missing)}.")
    lines = [f"# {title}", "", *_markdown(rows, reference), "", *_published(compared_with)]
    text = "\n".join(lines) + "\n" + "\n\n".join(notes) + "\n"
    _write_tables(text, rows, output)
    if not any(curve.steps for curve in curves.values()):
        text += "\nNo plots: no training measured a held-out solve rate, which needs --heldout-data.\n"
    elif not write_plots(curves, title, output, num_jobs):
        text += (
            "\nNo plots: matplotlib is not installed. Install it by: pip install 'megatron-rasft[plots]'\n"
        )
    return text


def _write_tables(text: str, rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    (output / "comparison.md").write_text(text, encoding="utf-8")
    with (output / "comparison.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (output / "comparison.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def read_curve(path: Path) -> Curve:
    """Reads a metrics.jsonl. Returns an empty curve if there is none, as for the base model."""
    curve = Curve()
    if not path.is_file():
        return curve
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["event"] == "step":
            curve.total_steps = record["step"]
            curve.total_tokens += record["training/num_tokens"]
            curve.total_seconds += record["training/step_s"]
        elif "heldout/solve_rate" in record:
            curve.steps.append(record["step"])
            curve.tokens.append(curve.total_tokens)
            curve.seconds.append(curve.total_seconds)
            curve.accuracy.append(100 * record["heldout/solve_rate"])
        else:
            curve.total_generated += record.get("rollout/num_rollouts", 0) * record.get(
                "rollout/response_tokens_mean", 0
            )
            curve.total_seconds += sum(record.get(name, 0.0) for name in metrics.REFRESH_PHASES)
    return curve


def _summaries(folder: Path) -> dict[str, Summary]:
    """Benchmark -> its result in one run. Empty if the run is not finished."""
    path = folder / "evaluation" / "summary.json"
    if not path.is_file() or not (folder / "done").exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {values["name"]: Summary.from_dict(values) for values in content["benchmarks"]}


def _rows(
    summaries: Mapping[tuple[str, int], Mapping[str, Summary]],
    curves: Mapping[tuple[str, int], Curve],
    reference: str,
) -> list[dict[str, Any]]:
    """One row for each method and benchmark."""
    titles = {name: s.title for by_name in summaries.values() for name, s in by_name.items()}
    return [
        {
            "method": method,
            "benchmark": title,
            **_accuracy(_scores(summaries, method, name)),
            **_difference(summaries, method, reference, name),
            **_lengths(
                [by_name[name] for (m, _), by_name in summaries.items() if m == method and name in by_name]
            ),
            **_costs([curves[key] for key in summaries if key[0] == method]),
        }
        for method in dict.fromkeys(method for method, _ in summaries)
        for name, title in titles.items()
        if _scores(summaries, method, name)
    ]


def _accuracy(by_seed: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    scores = list(by_seed.values())
    low, high = bootstrap_interval(scores)
    return {
        "seeds": len(scores),
        "problems": len(scores[0]),
        "accuracy": _mean_percent(scores),
        "low": 100 * low,
        "high": 100 * high,
    }


def _difference(
    summaries: Mapping[tuple[str, int], Mapping[str, Summary]], method: str, reference: str, name: str
) -> dict[str, Any]:
    """Columns of the difference from the reference.

    They are empty for the reference itself, or if the reference is not finished.
    """
    ours, theirs = _scores(summaries, method, name), _scores(summaries, reference, name)
    if method == reference or not theirs:
        return dict.fromkeys(("difference", "difference_low", "difference_high"), "")
    scores, others = list(ours.values()), list(theirs.values())
    low, high = paired_interval(scores, others, pairs_seeds=ours.keys() == theirs.keys())
    return {
        "difference": _mean_percent(scores) - _mean_percent(others),
        "difference_low": 100 * low,
        "difference_high": 100 * high,
    }


def _lengths(results: Sequence[Summary]) -> dict[str, Any]:
    return {
        "truncated": 100 * statistics.fmean(result.truncated_frac for result in results),
        "response_tokens": statistics.fmean(result.mean_tokens for result in results),
    }


def _costs(curves: Sequence[Curve]) -> dict[str, Any]:
    return {
        "steps": max(curve.total_steps for curve in curves),
        "trained_tokens": statistics.fmean(curve.total_tokens for curve in curves),
        "generated_tokens": statistics.fmean(curve.total_generated for curve in curves),
        "seconds": statistics.fmean(curve.total_seconds for curve in curves),
    }


def _mean_percent(scores: Sequence[Sequence[float]]) -> float:
    return 100 * statistics.fmean(map(statistics.fmean, scores))


def _scores(
    summaries: Mapping[tuple[str, int], Mapping[str, Summary]], method: str, name: str
) -> dict[int, list[float]]:
    """Seed -> score of each problem. All seeds have the same problems.

    Raises:
        RasftError: the seeds have different problems.
    """
    found = {
        seed: by_name[name] for (m, seed), by_name in summaries.items() if m == method and name in by_name
    }
    if len({tuple(summary.problem_ids) for summary in found.values()}) > 1:
        raise RasftError(f"the seeds of {method} were evaluated on different problems of {name}")
    return {seed: found[seed].scores for seed in sorted(found)}


def _markdown(rows: Sequence[Mapping[str, Any]], reference: str) -> list[str]:
    head = (
        f"method | benchmark | seeds | accuracy | difference from {reference} | truncated | response tokens | steps | "
        "trained tokens | generated tokens | seconds"
    )
    lines = [f"| {head} |", "| --- | --- " + "| ---: " * 9 + "|"]
    for row in rows:
        difference = ""
        if row["difference"] != "":
            difference = (
                f"{row['difference']:+.1f} [{row['difference_low']:+.1f}, {row['difference_high']:+.1f}]"
            )
        cells = [
            row["method"],
            row["benchmark"],
            str(row["seeds"]),
            f"{row['accuracy']:.1f} [{row['low']:.1f}, {row['high']:.1f}]",
            difference,
            f"{row['truncated']:.1f}",
            f"{row['response_tokens']:.0f}",
            str(row["steps"]),
            f"{row['trained_tokens']:,.0f}",
            f"{row['generated_tokens']:,.0f}",
            f"{row['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _published(model: str) -> list[str]:
    published = published_rows(model)
    if not published:
        return []
    lines = [
        f"Published for {model}, avg@16 in percent (trained on 100,000 rows unless noted):",
        "",
    ]
    names = list(next(iter(published.values())))
    lines += ["| method | " + " | ".join(names) + " |", "| --- " + "| ---: " * len(names) + "|"]
    for method, values in published.items():
        cells = [f"{values[name]:.2f}" if name in values else "" for name in names]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def write_plots(curves: Mapping[tuple[str, int], Curve], title: str, output: Path, num_jobs: int = 1) -> bool:
    """Writes accuracy.png: held-out solve rate over steps, trained tokens and seconds.

    Returns:
        False if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), sharey=True)
    methods = [m for m in dict.fromkeys(method for method, _ in curves) if m != "base"]
    for place, method in enumerate(methods):
        of_method = [c for (m, _), c in curves.items() if m == method and c.steps]
        if not of_method:
            continue
        length = min(len(c.steps) for c in of_method)
        mean = [statistics.fmean(c.accuracy[i] for c in of_method) for i in range(length)]
        spread = [
            statistics.stdev(c.accuracy[i] for c in of_method) / math.sqrt(len(of_method))
            if len(of_method) > 1
            else 0.0
            for i in range(length)
        ]
        for axis, name in zip(axes, ("steps", "tokens", "seconds"), strict=True):
            at = [statistics.fmean(getattr(c, name)[i] for c in of_method) for i in range(length)]
            axis.errorbar(
                at, mean, yerr=spread, label=method, color=f"C{place}", marker="o", markersize=3, capsize=2
            )
    seconds = "seconds of training" + (f", {num_jobs} trainings at a time" if num_jobs > 1 else "")
    for axis, label in zip(axes, ("steps", "trained tokens", seconds), strict=True):
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out solve rate, %")
    axes[0].legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(output / "accuracy.png", dpi=120)
    pyplot.close(figure)
    return True
