"""Measures the speed of verifying programs, and checks the verdicts on every reference solution.

    python benchmarks/code_verification.py                       checks per second against bare `python -c pass`
    python benchmarks/code_verification.py --references          all reference solutions of the code sets
    python benchmarks/code_verification.py --references --mutants --plain --results FILE.jsonl
                                                                 also mutants, compared with plain Python; can be continued

--data names the folder of the sets: evaluation/*.jsonl.gz and train/*.jsonl.gz in this project's layout. Exits with 1 if a
reference solution fails unexpectedly, or, with --plain, if a verdict differs from that of a plain interpreter. Mutants that
pass are counted, because some are equivalent to the original.
"""

import argparse
import ast
import dataclasses
import gzip
import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plain_execution import run_plainly
from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.types import CodeTests
from megatron_rasft.verify.programs.program_extraction import extract_program
from megatron_rasft.verify.programs.program_grading import run_tests
from megatron_rasft.verify.programs.sandbox import LEVELS, Sandbox

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CODE_SETS = (
    "evaluation/humaneval", "evaluation/humaneval_plus", "evaluation/mbpp", "evaluation/mbpp_plus",
    "evaluation/mbpp_sanitized", "evaluation/mbpp_validation", "evaluation/mbpp_fewshot", "train/mbpp_train",
    "train/kodcode_demo",
)  # fmt: skip
_OWN = "its tests define the function themselves and never call the program"
NOT_CORRECT = {
    "humaneval_plus HumanEval/32": "fails its published test in a plain Python 3.12 too: sum() of floats has changed",
    "mbpp_plus Mbpp/255": "one call returns a list that is 1 GB as text, over the limits on memory and output",
    **{f"kodcode_demo kodcode/Algorithm_000000{row}": _OWN for row in ("41_C", "41_I", "51_C", "51_I")},
}
"""References that are expected to fail -> the reason."""


@dataclass(frozen=True)
class Reference:
    """A reference solution and its tests."""

    name: str
    program: str
    tests: CodeTests


def read_references(data: Path, code_set: str) -> Iterator[Reference]:
    """Yields the reference solutions of one set, in order."""
    label = code_set.rpartition("/")[2]
    with gzip.open(data / f"{code_set}.jsonl.gz", "rt", encoding="utf-8") as stream:
        for line in stream:
            row = json.loads(line)
            tests = _tests_of(label, row)
            solution = row.get("canonical_solution") or row["response"]
            program = extract_program(solution, tests.entry_point, tests.prompt)
            assert program is not None, row["id"]
            yield Reference(f"{label} {row['id']}", program, tests)


def _tests_of(label: str, row: dict[str, Any]) -> CodeTests:
    name = row["entry_point"] or ""
    if label.startswith("humaneval"):
        return CodeTests(style="check", tests=(row["test"],), entry_point=name, prompt=row["prompt"])
    if label == "mbpp_plus":
        return CodeTests(style="asserts", tests=(row["test"],), entry_point=name)
    if label == "kodcode_demo":
        return CodeTests(style="pytest", tests=(row["tests"],), entry_point=name)
    return CodeTests(
        style="asserts", tests=tuple(row["tests"]), entry_point=name, setup=row["test_setup_code"]
    )


class _ReturnNothing(ast.NodeTransformer):
    def visit_Return(self, node: ast.Return) -> ast.Return:
        return ast.copy_location(ast.Return(value=ast.Constant(value=None)), node)


class _ChangeOnce(ast.NodeTransformer):
    """Changes the first possible place inside a function."""

    def __init__(self, change: Callable[[ast.AST], ast.AST | None]) -> None:
        self._change = change
        self.is_done = False

    def visit(self, node: ast.AST) -> Any:
        if not self.is_done:
            changed = self._change(node)
            if changed is not None:
                self.is_done = True
                return ast.copy_location(changed, node)
        return self.generic_visit(node)


def _off_by_one(node: ast.AST) -> ast.AST | None:
    is_integer = isinstance(node, ast.Constant) and type(node.value) is int
    return ast.Constant(value=node.value + 1) if is_integer else None  # type: ignore[attr-defined]


def _negated(node: ast.AST) -> ast.AST | None:
    return ast.UnaryOp(op=ast.Not(), operand=node) if isinstance(node, ast.Compare) else None


def mutate(reference: Reference, mutation: str) -> str | None:
    """Applies the mutation ``returns nothing``, ``off by one`` or ``negated``; returns None if it does not apply."""
    tree = ast.parse(reference.program)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    wanted = [n for n in functions if n.name == reference.tests.entry_point] or functions
    if not wanted:
        return None
    before = ast.dump(tree)
    target = wanted[-1]
    if mutation == "returns nothing":
        _ReturnNothing().visit(target)
    else:
        changer = _ChangeOnce(_off_by_one if mutation == "off by one" else _negated)
        target.body = [changer.visit(statement) for statement in target.body]
    return None if ast.dump(tree) == before else ast.unparse(ast.fix_missing_locations(tree))


MUTATIONS = ("returns nothing", "off by one", "negated")


@dataclass(frozen=True)
class Result:
    """The verdict on a reference solution or on a mutant of it."""

    code_set: str
    reference: str
    mutation: str
    """Empty for the reference itself."""
    verdict: str
    reason: str
    plain: str = ""
    """``correct``, ``wrong`` or ``timeout`` of a plain interpreter; empty if it was not asked."""

    @property
    def is_expected(self) -> bool:
        """Whether a reference is correct or is known to fail, and a verdict is the one of a plain interpreter."""
        if self.reference in NOT_CORRECT:
            return True
        is_right = bool(self.mutation) or self.verdict == "correct"
        # Which of the two exceeds a deadline depends on the machine
        return is_right and (
            not self.plain or "timeout" in (self.verdict, self.plain) or self.verdict == self.plain
        )


class Results:
    """The results of a run, in a file with one JSON object a line, so that an interrupted run can continue.

    Args:
        path: the file, or None to keep them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.known: dict[tuple[str, str], Result] = {}
        if path is not None and path.exists():
            whole, _, _ = path.read_text().rpartition("\n")
            for line in whole.splitlines():
                self._enter(Result(**json.loads(line)))
            # A run that was killed may have written half a line. The lines are ASCII
            os.truncate(path, len(whole) + bool(whole))
        self._stream = None if path is None else path.open("a")

    def add(self, result: Result) -> None:
        """Keeps a result, and writes it to the file at once."""
        self._enter(result)
        if self._stream is not None:
            self._stream.write(json.dumps(dataclasses.asdict(result)) + "\n")
            self._stream.flush()

    def _enter(self, result: Result) -> None:
        self.known[result.reference, result.mutation] = result


@dataclass(frozen=True)
class Checker:
    """Checks references and mutants that have no result yet.

    Args:
        sandbox: runs the references.
        mutant_sandbox: runs the mutants, of which many do not end.
        results: where results are kept.
        has_mutants: whether to check mutants.
        asks_plain_python: whether to run the same in a plain interpreter.
    """

    sandbox: Sandbox
    mutant_sandbox: Sandbox
    results: Results
    has_mutants: bool
    asks_plain_python: bool

    def check(self, code_set: str, reference: Reference) -> None:
        """Checks one reference and, if it passes, its mutants."""
        self._run(self.sandbox, code_set, reference, reference.program, "")
        if not self.has_mutants or self.results.known[reference.name, ""].verdict != "correct":
            return
        for mutation in MUTATIONS:
            mutant = mutate(reference, mutation)
            if mutant is not None:
                self._run(self.mutant_sandbox, code_set, reference, mutant, mutation)

    def _run(
        self, sandbox: Sandbox, code_set: str, reference: Reference, program: str, mutation: str
    ) -> None:
        if (reference.name, mutation) in self.results.known:
            return
        verdict, reason = run_tests(sandbox, program, reference.tests)
        limits, plain = sandbox.allowance, ""
        if self.asks_plain_python:
            plain = run_plainly(program, reference.tests, limits.timeout_s, limits.memory_bytes)
        result = Result(code_set, reference.name, mutation, verdict, reason, plain)
        self.results.add(result)
        if not result.is_expected:
            print(
                f"  {reference.name} {mutation}: {verdict}, {reason}"
                + (f"; plain Python: {plain}" if plain else ""),
                flush=True,
            )


def print_summary(results: Iterable[Result]) -> None:
    """Prints the verdicts of each set and mutation, and beside them those of a plain interpreter."""
    counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for result in results:
        pair = f"{result.verdict} (plain: {result.plain})" if result.plain else result.verdict
        counts[result.code_set, result.mutation or "references"][pair] += 1
    for (code_set, kind), verdicts in counts.items():
        print(f"{code_set}, {kind}: {verdicts.total()}, of them {dict(verdicts)}", flush=True)


def check_references(data: Path, checker: Checker, every: int) -> bool:
    """Checks all sets and prints a summary. Returns whether every result is as expected."""
    references = {code_set: list(read_references(data, code_set))[::every] for code_set in CODE_SETS}
    for code_set, chosen in references.items():
        for reference in chosen:
            checker.check(code_set, reference)
    print_summary(checker.results.known.values())
    unexpected = [r for r in checker.results.known.values() if not r.is_expected]
    print(f"{len(checker.results.known)} results, {len(unexpected)} unexpected")
    return not unexpected


def measure(num_checks: int, num_workers: int, levels: list[str]) -> None:
    """Measures checks per second at each level, compared with starting an interpreter in the same run."""
    program = "def f(x):\n    return x * x"
    tests = CodeTests(style="asserts", tests=("assert f(2) == 4", "assert f(3) == 9"), entry_point="f")

    def start_bare(_: int) -> None:
        subprocess.run([sys.executable, "-I", "-c", "pass"], check=True)

    def report(name: str, seconds: float, bare_rate: float | None) -> float:
        rate = num_checks / seconds / num_workers
        versus = "" if bare_rate is None else f", {rate / bare_rate:.2f} times bare python -c"
        print(f"{name}: {rate:.1f} per second and core{versus}", flush=True)
        return rate

    with ThreadPoolExecutor(num_workers) as threads:
        began = time.monotonic()
        list(threads.map(start_bare, range(num_checks)))
        bare_rate = report("python -c pass", time.monotonic() - began, None)
        for level in levels:
            config = VerifyConfig(verify_sandbox_level="limits")
            sandboxes = [Sandbox(config, [level]) for _ in range(num_workers)]  # type: ignore[list-item]

            def check_share(sandbox: Sandbox) -> None:
                for _ in range(num_checks // num_workers):
                    assert sandbox.judge(program, tests)[0] == "correct"

            began = time.monotonic()
            list(threads.map(check_share, sandboxes))
            report(f"sandbox, {level}", time.monotonic() - began, bare_rate)
            for sandbox in sandboxes:
                sandbox.close()


def main() -> int:
    """Runs the parts that the flags select."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--references", action="store_true", help="Run the reference solutions instead.")
    parser.add_argument("--mutants", action="store_true", help="Run mutated reference solutions, too.")
    parser.add_argument(
        "--plain", action="store_true", help="Run the same in a plain interpreter, without protection."
    )
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="Keep results here; skip those that it has."
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="Take every Nth reference.")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help=f"Default: {DATA}")
    parser.add_argument(
        "--level",
        choices=LEVELS,
        help="Use only this level. Default: the strongest for --references, all for speed.",
    )
    limits = EvaluationConfig()
    parser.add_argument(
        "--timeout-s", type=float, default=limits.code_timeout_s, help="Deadline of a reference."
    )
    parser.add_argument("--mutant-timeout-s", type=float, default=10.0, help="Deadline of a mutant.")
    parser.add_argument("--memory-mib", type=int, default=limits.code_memory_mib)
    parser.add_argument("--output-mib", type=int, default=limits.code_output_mib)
    parser.add_argument("--num-checks", type=int, default=200, help="Checks to time.")
    parser.add_argument("--num-workers", type=int, default=len(os.sched_getaffinity(0)), help="Cores to use.")
    args = parser.parse_args()
    if not args.references:
        measure(args.num_checks, args.num_workers, [args.level] if args.level else list(LEVELS))
        return 0
    config = VerifyConfig(
        verify_code_timeout_s=args.timeout_s,
        verify_code_memory_mib=args.memory_mib,
        verify_code_output_mib=args.output_mib,
        verify_sandbox_level="limits",
    )
    brief = dataclasses.replace(config, verify_code_timeout_s=args.mutant_timeout_s)
    levels = [args.level] if args.level else LEVELS
    with Sandbox(config, levels) as sandbox, Sandbox(brief, levels) as mutant_sandbox:
        print(f"level {sandbox.level}, Python {sys.version.split()[0]}")
        checker = Checker(sandbox, mutant_sandbox, Results(args.results), args.mutants, args.plain)
        return 0 if check_references(args.data, checker, args.every) else 1


if __name__ == "__main__":
    sys.exit(main())
