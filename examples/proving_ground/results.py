"""Tables and plot of the proving ground."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from examples.proving_ground import bar
from examples.proving_ground.kept import Result, Scores
from examples.proving_ground.worlds import KINDS, RETAINED
from megatron_rasft.errors import RasftError
from megatron_rasft.tools.evaluation.statistics import bootstrap_interval, paired_interval


@dataclass(frozen=True)
class Measure:
    """A column of the table of paired differences."""

    title: str
    scale: float
    """Factor from the values to the unit of the column."""
    values: Callable[[Result], Scores]
    """Values of one training; those at the same place belong together, such as the scores of a problem."""


MEASURES = (
    Measure("accuracy", 100, lambda result: result.scores(KINDS)),
    Measure("greedy", 100, lambda result: result.scores(KINDS, is_greedy=True)),
    Measure("pass@4", 100, lambda result: result.solved_once),
    *(Measure(kind, 100, partial(Result.scores, kinds=[kind])) for kind in KINDS),
    Measure("retained", 100, lambda result: result.scores(RETAINED)),
    Measure("retained, greedy", 100, lambda result: result.scores(RETAINED, is_greedy=True)),
    Measure("response tokens", 1, lambda r: np.array([r.sampled[kind].mean_tokens for kind in KINDS])),
    Measure("trained tokens, thousands", 1e-3, lambda result: np.array([result.trained_tokens])),
    Measure("generated tokens, thousands", 1e-3, lambda result: np.array([result.generated_tokens])),
    Measure("seconds", 1, lambda result: np.array([result.seconds])),
)


def write_results(
    results: Sequence[Result],
    output: Path,
    reference: str,
    regimes: Sequence[str] = (),
    missing: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """Writes results.md and results.png.

    Args:
        results: everything that is finished, in the order of the tables.
        output: folder of the files.
        reference: method with which the others are compared.
        regimes: lines about the base models.
        missing: world -> trainings without a result.

    Returns:
        The text of results.md.

    Raises:
        RasftError: there are no results.
    """
    if not results:
        raise RasftError(f"{output} has no finished results")
    worlds = list(dict.fromkeys(result.world for result in results))
    text = "\n".join(["# Proving ground", "", *_summary_table(results, worlds, reference)])
    rules = bar.lines(results, worlds)
    if rules:
        text += "\n".join(
            [
                "",
                "## The pre-registered rules, applied to these results",
                "",
                "They decide once all kept worlds have all seeds.",
                "",
                *(f"- {rule}" for rule in rules),
                "",
            ]
        )
    for world in worlds:
        text += "\n".join(["", f"## {world}", "", *_world_table(results, world, reference)])
        text += "\n".join(["", *_difference_table(results, world, reference)])
    text += (
        "\nPercent of samples at temperature 1 that are correct, mean over seeds, kinds and problems, with 95 % bootstrap intervals "
        f"over seeds and problems. Differences from {reference} are paired by problem and seed; those of accuracies are in points. "
        "Tokens and seconds are means over seeds; two trainings share the machine.\n"
    )
    if regimes:
        text += "\n".join(
            ["\nThe base models, as shares of samples at temperature 1:\n", *(f"- {r}" for r in regimes), ""]
        )
    unfinished = [f"- {world}: {', '.join(names)}" for world, names in missing.items() if names]
    if unfinished:
        text += "\n".join(["\nNot finished:\n", *unfinished, ""])
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.md").write_text(text, encoding="utf-8")
    _write_plot(results, worlds, output / "results.png")
    return text


def _methods(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(result.method for result in results))


def _stack(by_seed: Mapping[int, Result], kinds: Sequence[str], *, is_greedy: bool = False) -> Scores:
    return np.stack([by_seed[seed].scores(kinds, is_greedy=is_greedy) for seed in sorted(by_seed)])


def _difference(ours: Scores, theirs: Scores, scale: float = 100) -> str:
    """Returns a difference such as ``+1.2 [-0.3, +2.8]``, by default in points. Seeds are paired if there are equally many."""
    low, high = paired_interval(ours, theirs, pairs_seeds=len(ours) == len(theirs))
    return f"{scale * (ours.mean() - theirs.mean()):+.1f} [{scale * low:+.1f}, {scale * high:+.1f}]"


def _summary_table(results: Sequence[Result], worlds: Sequence[str], reference: str) -> list[str]:
    """Accuracy of each method in each world, and means over worlds for methods that are finished in all of them: accuracy at
    temperature 1, of greedy responses, and of retained skills."""
    lines = [
        f"| method | {' | '.join(worlds)} | mean | mean difference from {reference} | greedy | retained |",
        "| --- |" + " ---: |" * (len(worlds) + 4),
    ]
    theirs = _pooled(results, worlds, reference, KINDS)
    for method in _methods(results):
        cells = []
        for world in worlds:
            by_seed = bar.by_seed(results, world, method)
            cells.append(f"{100 * _stack(by_seed, KINDS).mean():.1f}" if by_seed else "")
        ours, kept = (_pooled(results, worlds, method, kinds) for kinds in (KINDS, RETAINED))
        greedy = _pooled(results, worlds, method, KINDS, is_greedy=True)
        cells.append(f"{100 * ours.mean():.1f}" if ours is not None else "")
        is_compared = ours is not None and theirs is not None and method != reference
        cells.append(_difference(ours, theirs) if is_compared else "")  # type: ignore[arg-type]
        cells += [f"{100 * scores.mean():.1f}" if scores is not None else "" for scores in (greedy, kept)]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def _pooled(
    results: Sequence[Result],
    worlds: Sequence[str],
    method: str,
    kinds: Sequence[str],
    *,
    is_greedy: bool = False,
) -> Scores | None:
    """Scores in all worlds, [seeds, problems]. None if a world is missing."""
    found = [bar.by_seed(results, world, method) for world in worlds]
    seeds = set.intersection(*(set(by_seed) for by_seed in found))
    if not seeds:
        return None
    shared = [{seed: by_seed[seed] for seed in seeds} for by_seed in found]
    return np.concatenate([_stack(by_seed, kinds, is_greedy=is_greedy) for by_seed in shared], axis=1)


def _world_table(results: Sequence[Result], world: str, reference: str) -> list[str]:
    head = [
        "method", "seeds", "accuracy", f"difference from {reference}", "greedy", "pass@4", *KINDS, "retained", "greedy",
        "response tokens", "trained tokens", "generated tokens", "seconds",
    ]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
    theirs = bar.by_seed(results, world, reference)
    for method in _methods(results):
        by_seed = bar.by_seed(results, world, method)
        if by_seed:
            other = _stack(theirs, KINDS) if theirs and method != reference else None
            lines.append(f"| {' | '.join([method, *_cells(by_seed, other)])} |")
    return [*lines, ""]


def _difference_table(results: Sequence[Result], world: str, reference: str) -> list[str]:
    """Paired differences of every measure from the reference. Empty without the reference."""
    theirs = bar.by_seed(results, world, reference)
    if not theirs:
        return []
    head = [f"difference from {reference}", *(measure.title for measure in MEASURES)]
    lines = [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * len(MEASURES)]
    for method in _methods(results):
        ours = bar.by_seed(results, world, method)
        if ours and method != reference:
            pairs = [(_values(ours, m), _values(theirs, m), m.scale) for m in MEASURES]
            lines.append(f"| {' | '.join([method, *(_difference(*pair) for pair in pairs)])} |")
    return [*lines, ""]


def _values(by_seed: Mapping[int, Result], measure: Measure) -> Scores:
    return np.stack([measure.values(by_seed[seed]) for seed in sorted(by_seed)])


def _cells(by_seed: Mapping[int, Result], other: Scores | None) -> list[str]:
    accuracy = _stack(by_seed, KINDS)
    low, high = bootstrap_interval(accuracy)
    runs = list(by_seed.values())

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    return [
        str(len(runs)),
        f"{100 * accuracy.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        "" if other is None else _difference(accuracy, other),
        f"{100 * _stack(by_seed, KINDS, is_greedy=True).mean():.1f}",
        f"{100 * mean(run.solved_once.mean() for run in runs):.1f}",
        *(f"{100 * _stack(by_seed, [kind]).mean():.0f}" for kind in KINDS),
        f"{100 * _stack(by_seed, RETAINED).mean():.1f}",
        f"{100 * _stack(by_seed, RETAINED, is_greedy=True).mean():.1f}",
        f"{mean(run.response_tokens for run in runs):.0f}",
        f"{mean(run.trained_tokens for run in runs):,.0f}",
        f"{mean(run.generated_tokens for run in runs):,.0f}",
        f"{mean(run.seconds for run in runs):.0f}",
    ]


def _write_plot(results: Sequence[Result], worlds: Sequence[str], path: Path) -> None:
    """One panel a world: accuracy of each method with its interval, over its accuracy on the retained skills."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(worlds), figsize=(4.2 * len(worlds), 4.2), squeeze=False, sharey=True
    )
    for axis, world in zip(axes[0], worlds, strict=True):
        for number, method in enumerate(_methods(results)):
            by_seed = bar.by_seed(results, world, method)
            if not by_seed:
                continue
            accuracy = _stack(by_seed, KINDS)
            low, high = bootstrap_interval(accuracy)
            y, x = 100 * accuracy.mean(), 100 * _stack(by_seed, RETAINED).mean()
            spread = [[y - 100 * low], [100 * high - y]]
            marker = "*" if method.startswith("rasft") else "o"
            axis.errorbar(
                [x], [y], yerr=spread, marker=marker, color=f"C{number % 10}", capsize=2, label=method
            )
            axis.annotate(method, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7)
        axis.set_title(world, fontsize=10)
        axis.set_xlabel("retained skills, %")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("problems like the trained ones, %")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
