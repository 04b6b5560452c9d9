"""Writes results as tables beside the published numbers, in Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Mapping, Sequence

from megatron_rasft.tools.evaluation.published import PUBLISHED_SETS, published_rows
from megatron_rasft.tools.evaluation.summary import Summary

Results = Mapping[str, Sequence[Summary]]
"""Label of a row -> summaries of its benchmarks."""

_CSV_COLUMNS = (
    "source label benchmark problems samples accuracy low high truncated no_answer no_box unverifiable timeout mean_tokens "
    "median_tokens p95_tokens verified sha256"
).split()
_LATEX_STAR = "$^{*}$"
_NOT_COMPARABLE = "not comparable with published numbers: not a published set, other content than the published set, or not all problems."


def markdown(results: Results, compared_with: str = "") -> str:
    """Returns a table of accuracies with intervals, and a table of all other results per benchmark.

    Args:
        results: the rows.
        compared_with: model whose published rows are added; "" adds none.
    """
    names, titles = _columns(results)
    published = published_rows(compared_with)
    has_mean = bool(published) or any(_has_mean({s.name: s for s in ss}) for ss in results.values())
    head = ["", *titles, *(["mean of 5"] if has_mean else [])]
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)])]
    for label, summaries in results.items():
        by_name = {s.name: s for s in summaries}
        cells = [_interval(by_name.get(name)) for name in names]
        lines.append(_row([label, *cells, *([_mean_cell(by_name)] if has_mean else [])]))
    for method, values in published.items():
        cells = [_published(values.get(name)) for name in names]
        lines.append(_row([f"published: {method}", *cells, _published(values["mean"])]))
    notes = _notes(results)
    return "\n".join([*lines, "", *notes, *([""] if notes else []), _details(results)]) + "\n"


def latex(results: Results, compared_with: str = "") -> str:
    """Returns the table of accuracies as a tabular for the package booktabs; arguments as for ``markdown``."""
    names, titles = _columns(results)
    lines = [
        r"\begin{tabular}{l" + "r" * (len(names) + 1) + "}",
        r"\toprule",
        " & ".join(["", *map(_escaped, titles), "Mean of 5"]) + r" \\",
        r"\midrule",
    ]
    for label, summaries in results.items():
        by_name = {s.name: s for s in summaries}
        cells = [_latex_interval(by_name.get(name)) for name in names]
        row = [_escaped(label), *cells, _mean_cell(by_name, "--", _LATEX_STAR)]
        lines.append(" & ".join(row) + r" \\")
    published = published_rows(compared_with)
    if published:
        lines.append(r"\midrule")
    for method, values in published.items():
        cells = [_published(values.get(name), "--") for name in names]
        row = [_escaped(f"{method} (published)"), *cells, _published(values["mean"], "--")]
        lines.append(" & ".join(row) + r" \\")
    lines.append(r"\bottomrule")
    if not all(_is_comparable(s) for summaries in results.values() for s in summaries):
        lines.append(
            rf"\multicolumn{{{len(names) + 2}}}{{l}}{{\footnotesize {_LATEX_STAR} {_NOT_COMPARABLE}}} \\"
        )
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def comma_separated(results: Results, compared_with: str = "") -> str:
    """Returns one line per label and benchmark, with fractions in percent. Published rows only have the accuracy.

    The arguments are those of ``markdown``.
    """
    ks = _all_ks(results)
    columns = [*_CSV_COLUMNS, *(f"pass@{k}" for k in ks), *(f"maj@{k}" for k in ks)]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for label, summaries in results.items():
        writer.writerows(["measured", label, *_csv_cells(summary, ks)] for summary in summaries)
    for method, values in published_rows(compared_with).items():
        for name, value in values.items():
            row = ["published", method, name, "", "16", f"{value:.4f}"]
            writer.writerow(row + [""] * (len(columns) - len(row)))
    return stream.getvalue()


def _csv_cells(s: Summary, ks: Sequence[int]) -> list[str]:
    """Returns the cells of a summary, from the column "benchmark" on."""
    fractions = (
        *(s.accuracy, s.accuracy_low, s.accuracy_high, s.truncated_frac, s.no_answer_frac, s.no_box_frac),
        *(s.unverifiable_frac, s.timeout_frac),
    )
    lengths = (s.mean_tokens, s.median_tokens, s.p95_tokens)
    return [
        *(s.name, str(s.num_problems), str(s.num_samples)),
        *(f"{100 * fraction:.4f}" for fraction in fractions),
        *(f"{length:.1f}" for length in lengths),
        *(str(s.is_verified).lower(), s.sha256),
        *(f"{100 * s.pass_at[k]:.4f}" if k in s.pass_at else "" for k in ks),
        *(f"{100 * s.majority_at[k]:.4f}" if k in s.majority_at else "" for k in ks),
    ]


def _all_ks(results: Results) -> list[int]:
    return sorted({k for summaries in results.values() for s in summaries for k in s.pass_at})


def _columns(results: Results) -> tuple[list[str], list[str]]:
    titles = {s.name: s.title for summaries in results.values() for s in summaries}
    return list(titles), list(titles.values())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _is_comparable(summary: Summary) -> bool:
    return summary.is_verified and summary.num_problems == summary.num_rows


def _interval(summary: Summary | None) -> str:
    if summary is None:
        return ""
    s = summary
    mark = "" if _is_comparable(s) else " *"
    return f"{100 * s.accuracy:.2f} [{100 * s.accuracy_low:.1f}, {100 * s.accuracy_high:.1f}]{mark}"


def _latex_interval(summary: Summary | None) -> str:
    if summary is None:
        return "--"
    low, high = 100 * summary.accuracy_low, 100 * summary.accuracy_high
    mark = "" if _is_comparable(summary) else _LATEX_STAR
    return rf"{100 * summary.accuracy:.2f}{mark} {{\scriptsize [{low:.1f}, {high:.1f}]}}"


def _has_mean(by_name: Mapping[str, Summary]) -> bool:
    return all(name in by_name for name in PUBLISHED_SETS)


def _mean_cell(by_name: Mapping[str, Summary], missing: str = "", star: str = " *") -> str:
    """Returns the unweighted mean over the five published sets in percent, or ``missing`` if a set is missing."""
    if not _has_mean(by_name):
        return missing
    summaries = [by_name[name] for name in PUBLISHED_SETS]
    mean = 100 * sum(s.accuracy for s in summaries) / len(summaries)
    return f"{mean:.2f}" + ("" if all(map(_is_comparable, summaries)) else star)


def _published(value: float | None, missing: str = "") -> str:
    return missing if value is None else f"{value:.2f}"


def _notes(results: Results) -> list[str]:
    notes = ["Accuracy in percent, mean over samples, with the 95 % bootstrap interval over problems."]
    every = [s for summaries in results.values() for s in summaries]
    if not all(map(_is_comparable, every)):
        notes.append(f"\\* {_NOT_COMPARABLE}")
    cut = sorted(
        {f"{s.title} {s.num_problems} of {s.num_rows}" for s in every if s.num_problems < s.num_rows}
    )
    notes += [f"{s.title}: mean reward {s.mean_reward:.4f}." for s in every if s.mean_reward is not None]
    if cut:
        notes.append(f"Only the first problems: {', '.join(cut)}.")
    return notes


def _details(results: Results) -> str:
    ks = _all_ks(results)
    head = ["", "benchmark", "problems", "samples"]
    head += [f"pass@{k}" for k in ks] + [f"maj@{k}" for k in ks if k > 1]
    head += ["truncated", "no answer", "no box", "unverifiable", "timeout", "tokens mean", "median", "95 %"]
    lines = [_row(head), _row(["---", "---", *["---:"] * (len(head) - 2)])]
    for label, summaries in results.items():
        for s in summaries:
            cells = [label, s.title, str(s.num_problems), str(s.num_samples)]
            cells += [_percent(s.pass_at.get(k)) for k in ks]
            cells += [_percent(s.majority_at.get(k)) for k in ks if k > 1]
            cells += [
                _percent(share)
                for share in (
                    s.truncated_frac,
                    s.no_answer_frac,
                    s.no_box_frac if s.kind == "math" else None,
                    s.unverifiable_frac,
                    s.timeout_frac,
                )
            ]
            cells += [f"{n:.0f}" for n in (s.mean_tokens, s.median_tokens, s.p95_tokens)]
            lines.append(_row(cells))
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _escaped(text: str) -> str:
    return "".join(r"\textbackslash{}" if c == "\\" else f"\\{c}" if c in "&%$#_{}" else c for c in text)
