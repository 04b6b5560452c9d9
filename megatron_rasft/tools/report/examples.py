"""Rollouts to read, problem by problem."""

from megatron_rasft.tools.report.charts import number, swatch
from megatron_rasft.tools.report.markup import Content, Html, tag
from megatron_rasft.tools.report.rollouts import Example, Sample
from megatron_rasft.tools.report.views import RunView

MAX_TEXT_CHARS = 6000
"""Of a text: a longer one loses its middle."""


def examples(view: RunView) -> Content:
    """A run's examples, to be opened one by one."""
    if not view.examples:
        return tag("p", "No rollouts: there is nothing to read.", class_="missing")
    assert view.rollouts is not None, "examples come from a store"
    shown = sum(len(example.samples) for example in view.examples)
    num_problems = len(view.rollouts.histories())
    text = (
        f"{len(view.examples):,} of {num_problems:,} problems and {shown:,} of {view.rollouts.num_rollouts:,} rollouts. Which "
        "ones is decided by a hash of the problem's id, so that the same are shown each time; of a problem its first and last "
        "refresh."
    )
    found = list(dict.fromkeys(example.course for example in view.examples))
    buttons = [tag("button", "all", type="button", data_course="", aria_pressed="true")]
    for course in found:
        buttons.append(tag("button", course, type="button", data_course=course, aria_pressed="false"))
    search = tag(
        "input", type="search", placeholder="text to find", aria_label="text to find in the examples"
    )
    controls = tag("div", buttons, search, tag("span", role="status"), class_="controls", hidden=True)
    return tag(
        "div",
        tag("p", text),
        controls,
        [_example(example, view) for example in view.examples],
        class_="examples",
    )


def _example(example: Example, view: RunView) -> Html:
    course = " → ".join(f"{visit.num_solved}/{visit.num_attempts}" for _, visit in example.history[-8:])
    summary = tag(
        "summary",
        tag("code", example.problem_id),
        tag("span", example.course, class_="badge"),
        tag("span", f"solved {'… → ' if len(example.history) > 8 else ''}{course}", class_="quiet"),
    )
    problem = view.problems.get(example.problem_id)
    parts: list[Content] = []
    if problem is None:
        parts.append(tag("p", "The problem's text is not at hand.", class_="missing"))
    else:
        parts += [
            tag("h5", "Problem"),
            _text(problem.text),
            tag("h5", "Checked against"),
            _text(problem.check),
        ]
        demonstration = tag("summary", f"Demonstration, {len(problem.response):,} characters")
        parts.append(tag("details", demonstration, _text(problem.response)))
    drawn = {step: visit.num_samples for step, visit in example.history}
    for step in dict.fromkeys(sample.step for sample in example.samples):
        of_step = [sample for sample in example.samples if sample.step == step]
        parts.append(tag("h5", f"Refresh after step {step}: {len(of_step)} of {drawn[step]} samples"))
        parts.extend(_sample(sample) for sample in of_step)
    return tag("details", summary, parts, class_="example", data_course=example.course)


def _sample(sample: Sample) -> Html:
    said = [
        f"sample {sample.index}",
        sample.reason or None,
        f"{sample.num_tokens:,} tokens",
        f"ended by {sample.finish_reason}",
        f"weight {number(sample.weight)}" if sample.weight else "not trained on",
        f"removed by filter {sample.filtered_by}" if sample.filtered_by else None,
        f"weights {sample.policy_age} steps behind" if sample.policy_age else None,
    ]
    verdict = tag("span", swatch(f"v-{sample.verdict}"), sample.verdict, class_="verdict")
    return tag(
        "div",
        tag("p", verdict, tag("span", " · ".join(filter(None, said)), class_="quiet")),
        _text(sample.text),
        class_="sample",
    )


def _text(text: str) -> Html:
    """A text as it stands; of a very long one the beginning and the end."""
    if len(text) > MAX_TEXT_CHARS:
        head, end = MAX_TEXT_CHARS * 2 // 3, MAX_TEXT_CHARS // 3
        left = tag("span", f"\n… {len(text) - head - end:,} characters left out …\n", class_="left-out")
        return tag("pre", text[:head], left, text[-end:])
    return tag("pre", text if text else tag("span", "(empty)", class_="left-out"))
