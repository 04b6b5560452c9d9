"""Samples of mathematical and code sets get the right verdict; programs are run."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.tools.evaluation.benchmark_grading import Grader, verify_config
from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.benchmarks import Benchmark, find_file, read_benchmark
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.tools.evaluation.known_sets import KNOWN_SETS
from megatron_rasft.types import FinishReason, Rollout

DATA = Path(__file__).parents[5] / "shared" / "data" / "evaluation"
CONFIG = EvaluationConfig(verify_num_workers=1, verify_timeout_s=60, sandbox_level="limits")


def respond(problem_id: str, text: str, finish_reason: FinishReason = "stop") -> Rollout:
    return Rollout(
        problem_id=problem_id, sample_index=0, weight_version=0, prompt_ids=[], response_ids=[],
        response_logprobs=[], finish_reason=finish_reason, text=text,
    )  # fmt: skip


def verdicts(benchmark: Benchmark, rollouts: list[Rollout]) -> list[str | None]:
    with Grader(benchmark, CONFIG) as grade:
        grade(rollouts, {problem.problem_id: problem for problem in benchmark.problems})
    return [rollout.verdict for rollout in rollouts]


def test_minerva_is_rounded_and_truncated_samples_are_graded() -> None:
    problems = [Problem(problem_id="p", text="?", answer="3.14159")]
    benchmark = Benchmark(
        name="m", title="m", kind="math", path=Path("m"), problems=problems, sha256="", is_verified=True,
        rel_tolerance=KNOWN_SETS["minerva_math"].rel_tolerance,
    )  # fmt: skip
    answers = [respond("p", rf"\boxed{{{n}}}", "length") for n in ("3.14159", "3.1416", "3.15")]
    assert verdicts(benchmark, answers) == ["correct", "correct", "wrong"]
    benchmark.rel_tolerance = 0.0
    assert verdicts(benchmark, answers) == ["correct", "wrong", "wrong"]


@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus", "mbpp", "mbpp_sanitized", "mbpp_plus"])
def test_reference_solutions_pass_and_others_fail(name: str) -> None:
    if not DATA.is_dir():
        pytest.skip(f"the benchmarks are not part of the repository, and {DATA} does not exist")
    benchmark = read_benchmark(KNOWN_SETS[name], find_file(KNOWN_SETS[name], DATA))
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line, _ in zip(lines, range(3), strict=False)]
    rollouts = []
    for row in rows:
        whole = (row["prompt"] if name.startswith("humaneval") else "") + row["canonical_solution"]
        rollouts.append(respond(row["id"], f"Here it is.\n```python\n{whole}\n```\nDone."))
        rollouts.append(respond(row["id"], f"```python\ndef {row['entry_point']}(*_):\n    return None\n```"))
    assert verdicts(benchmark, rollouts) == ["correct", "wrong"] * 3


def test_programs_run_under_the_limits_of_the_flags() -> None:
    made = verify_config(EvaluationConfig(code_timeout_s=7.0, code_memory_mib=128, code_output_mib=2))
    limits = (made.verify_code_timeout_s, made.verify_code_memory_mib, made.verify_code_output_mib)
    assert limits == (7.0, 128, 2)


@pytest.mark.parametrize(
    ("field", "value"), [("code_timeout_s", 0.0), ("code_memory_mib", 63), ("code_output_mib", 0)]
)
def test_limits_out_of_range_name_their_flag(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} "):
        EvaluationConfig(**{field: value})  # type: ignore[arg-type]


def test_contest_programs_run_by_input_and_output(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "Add.", "tests": [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]},
        {"id": "b", "prompt": "Add.", "starter_code": "class Solution:\n    def add(self, a, b):", "entry_point": "add",
         "tests": [{"input": "1\n2", "output": "3", "testtype": "functional"}]},
    ]  # fmt: skip
    path = tmp_path / "lcb.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = read_benchmark(KNOWN_SETS["livecodebench_v1_public"], path, accept_unknown=True)
    method = "class Solution:\n    def add(self, a, b):\n        return a {} b"
    rollouts = [
        respond("a", "```python\nprint(sum(map(int, input().split())))\n```"),
        respond("a", "```python\nprint(4)\n```"),
        respond("b", f"```python\n{method.format('+')}\n```"),
        respond("b", f"```python\n{method.format('-')}\n```"),
    ]
    assert verdicts(benchmark, rollouts) == ["correct", "wrong", "correct", "wrong"]
