"""Summaries of known samples, and the three tables with the published numbers."""

import csv
import io
import math
import re
import statistics as st
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.tools.evaluation.comparison_tables import comma_separated, latex, markdown
from megatron_rasft.tools.evaluation.published import PUBLISHED_SETS, published_rows
from megatron_rasft.tools.evaluation.statistics import bootstrap_interval, pass_at_k
from megatron_rasft.tools.evaluation.summary import Summary, summarise
from megatron_rasft.types import Rollout, Verdict
from megatron_rasft.verify.mathematics.answer_grading import grade_answer
from megatron_rasft.verify.pool import end_of_response

# Text, verdict, number of tokens, whether it was truncated
SAMPLES: list[list[tuple[str, Verdict, int, bool]]] = [
    [(r"\boxed{4}", "correct", 10, False), (r"\boxed{ 5 }", "wrong", 20, False),
     (r"\boxed{5.0}", "wrong", 30, False), ("no idea", "wrong", 40, True)],
    [(r"so \boxed{\frac12}", "correct", 50, False), (r"\boxed{0.5}", "correct", 60, False),
     ("The answer is 3", "wrong", 70, False), (r"\boxed{the cat}", "unverifiable", 80, True)],
]  # fmt: skip


@cache
def make_summary(
    name: str = "aime24", title: str = "AIME 2024", num_rows: int = 2, is_verified: bool = True
) -> Summary:
    benchmark = Benchmark(
        name=name, title=title, kind="math", path=Path("x"), sha256="abc", is_verified=is_verified,
        problems=[Problem(problem_id=f"p{i}", text="?", answer="4") for i in range(2)],
    )  # fmt: skip
    rollouts = [
        Rollout(
            problem_id=f"p{i}", sample_index=j, weight_version=0, prompt_ids=[], response_ids=[1] * tokens,
            response_logprobs=[], finish_reason="length" if cut else "stop", text=text, verdict=verdict,
        )
        for i, group in enumerate(SAMPLES)
        for j, (text, verdict, tokens, cut) in enumerate(group)
    ]  # fmt: skip
    return summarise(benchmark, rollouts, num_samples=4, ks=[1, 2, 4], num_rows=num_rows)


def test_summary_of_known_samples() -> None:
    s = make_summary()
    assert s.accuracy == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert (s.accuracy_low, s.accuracy_high) == bootstrap_interval([0.25, 0.5])
    assert s.pass_at == {k: pytest.approx((pass_at_k(4, 1, k) + pass_at_k(4, 2, k)) / 2) for k in (1, 2, 4)}
    # In the first problem, 5 and 5.0 outvote 4. In the second, the two spellings of one half vote together
    assert s.majority_at[4] == pytest.approx((0 + 1) / 2)
    assert s.truncated_frac == 2 / 8 and s.unverifiable_frac == 1 / 8
    assert s.no_answer_frac == 1 / 8 and s.no_box_frac == 2 / 8
    lengths = [tokens for group in SAMPLES for _, _, tokens, _ in group]
    assert (s.mean_tokens, s.median_tokens) == (st.mean(lengths), st.median(lengths))
    assert s.mean_tokens_correct == st.mean([10, 50, 60])
    assert s.scores == [0.25, 0.5] and s.problem_ids == ["p0", "p1"]


def test_answers_are_counted_by_the_rule_of_the_grader() -> None:
    texts = [
        r"<think>\boxed{4}</think> I ran out of time.",
        r"<think>It is \boxed{4}, but",
        r"\boxed{4}" + "x" * VerifyConfig().verify_max_response_chars,
        r"<think>\boxed{5}</think> \boxed{4}",
    ]
    rollouts = [
        Rollout(
            problem_id="p", sample_index=i, weight_version=0, prompt_ids=[], response_ids=[1], response_logprobs=[],
            finish_reason="stop", text=text, verdict=grade_answer(end_of_response(text, 200_000), "4")[0],
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    benchmark = Benchmark(
        name="aime24", title="AIME", kind="math", path=Path("x"), sha256="", is_verified=True,
        problems=[Problem(problem_id="p", text="?", answer="4")],
    )  # fmt: skip
    summary = summarise(benchmark, rollouts, num_samples=4, ks=[1], num_rows=1)
    assert summary.accuracy == 1 / 4
    assert summary.no_answer_frac == summary.no_box_frac == 3 / 4


def test_summary_survives_json() -> None:
    import json

    summary = make_summary()
    assert Summary.from_dict(json.loads(json.dumps(summary.as_dict()))) == summary


def test_published_rows_are_those_of_the_papers() -> None:
    for model, method, mean in [
        ("Qwen2.5-Math-1.5B", "DFT", 31.58),
        ("/models/Qwen2.5-Math-1.5B/", "base", 15.92),
        ("qwen2.5-math-7b", "iw-SFT", 39.60),
        ("Llama-3.2-3B", "SFT", 3.24),
        ("Qwen2.5-Math-1.5B", "DFT on verified self-samples", 35.43),
        ("Qwen2.5-7B", "ASFT", 28.75),
    ]:
        # The mean is calculated from the five sets if they are known, and must agree with the published mean
        assert published_rows(model)[method]["mean"] == pytest.approx(mean, abs=0.011)
    assert published_rows("Qwen2.5-Math-1.5B-Instruct") == {} and published_rows("") == {}


def test_markdown_shows_published_numbers() -> None:
    results = {"mine": [make_summary(name, name) for name in PUBLISHED_SETS]}
    text = markdown(results, "Qwen2.5-Math-1.5B")
    low, high = bootstrap_interval([0.25, 0.5])
    cell = f"37.50 [{100 * low:.1f}, {100 * high:.1f}]"
    assert "| mine | " + " | ".join([cell] * 5) + " | 37.50 |" in text
    assert "| published: DFT | 64.89 | 20.94 | 27.08 | 6.87 | 38.13 | 31.58 |" in text
    assert "| published: GRPO |  |  |  |  |  | 32.00 |" in text
    assert "\\*" not in text and "first problems" not in text
    widths = {line.count("|") for line in text.split("\n\n")[0].splitlines()}
    assert len(widths) == 1


def test_markdown_marks_results_that_are_not_comparable() -> None:
    text = markdown({"a": [make_summary(num_rows=30)], "b": [make_summary(is_verified=False)]})
    assert "AIME 2024 2 of 30" in text
    assert "*" in next(line for line in text.splitlines() if line.startswith("| b |"))
    assert "\\*" in text, "a note explains the star"
    assert "mean of 5" not in text


def test_csv_has_one_line_per_benchmark_with_every_number() -> None:
    text = comma_separated({"m, 1": [make_summary()]}, "Llama-3.2-3B")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {len(line) for line in csv.reader(io.StringIO(text))} == {24}
    mine = rows[0]
    assert mine["label"] == "m, 1" and float(mine["accuracy"]) == 37.5 and float(mine["pass@4"]) == 100.0
    assert float(mine["no_box"]) == 25.0 and mine["verified"] == "true"
    published = {(row["label"], row["benchmark"]): row["accuracy"] for row in rows[1:]}
    assert float(published["DFT", "math500"]) == 12.79
    assert math.isclose(float(published["DFT", "mean"]), 4.65, abs_tol=0.011)


def test_latex_is_balanced_and_escaped() -> None:
    text = latex({"50% of_it & more": [make_summary()]}, "Qwen2.5-Math-1.5B")
    assert r"50\% of\_it \& more" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {2}
    assert text.count("{") == text.count("}") and text.startswith(r"\begin{tabular}{lrr}")
    assert "*" not in text


@pytest.mark.parametrize("fault", [{"num_rows": 30}, {"is_verified": False}])
def test_sets_that_are_cut_or_unknown_have_a_star_and_so_has_their_mean(fault: dict[str, Any]) -> None:
    sets = [make_summary(name, name) for name in PUBLISHED_SETS]
    results = {"whole": sets, "spoilt": [make_summary(sets[0].name, sets[0].name, **fault), *sets[1:]]}
    for write, star in ((markdown, " *"), (latex, "$^{*}$")):
        text = write(results, "")
        whole, spoilt = (next(row for row in text.splitlines() if label in row) for label in results)
        assert "*" not in whole
        assert f"37.50{star}" in spoilt, "the mean has a star, too"
        assert spoilt.count("*") == 2
        assert text.count("{") == text.count("}")


def test_code_without_a_program_is_no_answer() -> None:
    problems = [Problem(problem_id="p", text="?", tests={"tests": ["assert f() == 1"]})]
    benchmark = Benchmark(
        name="mbpp", title="MBPP", kind="code", path=Path("x"), problems=problems, sha256="", is_verified=True
    )
    texts = ["", "<think>a = 1</think>\n", "```python\ndef f(): return 1\n```", "def f(): return 1"]
    rollouts = [
        Rollout(
            problem_id="p", sample_index=i, weight_version=0, prompt_ids=[], response_ids=[1],
            response_logprobs=[], finish_reason="stop", text=text, verdict="wrong",
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    summary = summarise(benchmark, rollouts, num_samples=4, ks=[1], num_rows=1)
    assert summary.no_answer_frac == 0.5 and summary.no_box_frac == 0 and not summary.majority_at
