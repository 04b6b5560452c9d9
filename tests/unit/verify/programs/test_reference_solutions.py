"""Reference solutions of the code sets pass their tests, and mutated solutions fail.

This runs a part of them; ``python benchmarks/code_verification.py --references --mutants`` runs all.
"""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.code_verification import CODE_SETS, NOT_CORRECT, Reference, mutate, read_references
from megatron_rasft.verify.programs.program_grading import run_tests
from megatron_rasft.verify.programs.sandbox import Sandbox

DATA = Path(__file__).resolve().parents[5] / "shared" / "data"
EVERY = {"evaluation/humaneval_plus": 25, "evaluation/mbpp_plus": 30, "train/kodcode_demo": 12}
# Left out, because these four take longer than all others together
SLOW = {
    "mbpp_plus Mbpp/123",
    "mbpp_plus Mbpp/271",
    "mbpp_plus Mbpp/392",
    "mbpp_plus Mbpp/599",
}


def share_of(code_set: str) -> list[Reference]:
    if not DATA.is_dir():
        pytest.skip(f"the data sets are not part of the repository, and {DATA} does not exist")
    references = list(read_references(DATA, code_set))
    return [r for r in references[:: EVERY.get(code_set, 20)] if r.name not in SLOW | set(NOT_CORRECT)]


@pytest.mark.parametrize("code_set", CODE_SETS)
def test_references_pass_and_mutants_fail(strongest_sandbox: Sandbox, code_set: str) -> None:
    references = share_of(code_set)
    assert references
    verdicts: Counter[str] = Counter()
    for reference in references:
        assert run_tests(strongest_sandbox, reference.program, reference.tests)[0] == "correct", (
            reference.name
        )
        empty = mutate(reference, "returns nothing")
        if empty is not None:
            assert run_tests(strongest_sandbox, empty, reference.tests)[0] == "wrong", reference.name
        negated = mutate(reference, "negated")
        # the mutated program's loops would not end
        if negated is not None and code_set != "train/kodcode_demo":
            verdicts[run_tests(strongest_sandbox, negated, reference.tests)[0]] += 1
    # In some programs the negated comparison has no effect on the result
    assert verdicts["correct"] <= 0.25 * verdicts.total()
