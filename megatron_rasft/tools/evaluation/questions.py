"""Writes a problem of a benchmark as the user's message to a model."""

from collections.abc import Callable

from megatron_rasft.data.tokenizing import code_suffix
from megatron_rasft.tools.evaluation.benchmark_rows import Problem
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.tools.evaluation.known_sets import KNOWN_SETS

_BLOCK = "one ```python block"


def ask(benchmark: Benchmark, prompt_suffix: str, code_prompt_suffix: str) -> Callable[[Problem], str]:
    """Returns a function that writes a problem of this set as a message.

    Args:
        benchmark: the set.
        prompt_suffix: appended to mathematical problems, and to those that --verify-function grades.
        code_prompt_suffix: appended to the problems of the user's own code sets, which are asked as in training.
    """
    if benchmark.kind != "code":
        return lambda problem: problem.text + prompt_suffix
    if benchmark.name not in KNOWN_SETS:
        return lambda problem: (
            problem.text + code_suffix(problem.text, problem.tests.get("entry_point", ""), code_prompt_suffix)
        )
    return _ask_for_code


def _ask_for_code(problem: Problem) -> str:
    tests = problem.tests
    if "starter_code" in tests:
        return (
            f"{problem.text}\n\nComplete this class and answer with all of it in {_BLOCK}:\n\n"
            f"```python\n{tests['starter_code']}\n```"
        )
    if any(isinstance(test, dict) for test in tests.get("tests", ())):
        return (
            f"{problem.text}\n\nWrite a Python program that reads standard input and prints the answer. Answer with "
            f"{_BLOCK}."
        )
    if "tests" in tests:
        shown = "\n".join(tests["tests"])
        return f"{problem.text}\n\nThe code must pass these tests:\n\n{shown}\n\nAnswer with {_BLOCK}."
    return (
        "Complete this Python function. Answer with the whole of it, imports included, in "
        f"{_BLOCK}.\n\n```python\n{problem.text}```"
    )
