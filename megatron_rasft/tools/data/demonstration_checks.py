"""Grades each row's demonstration with the row's own answer or tests, to find rows whose verdicts would be wrong in a run."""

import ast
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.data.reading import Row
from megatron_rasft.data.row_report import RowFault
from megatron_rasft.types import Check, CodeTests, Rollout, Verdict
from megatron_rasft.verify.function_trial import failed
from megatron_rasft.verify.own_function import FAILED
from megatron_rasft.verify.pool import VerifierPool
from megatron_rasft.verify.programs.program_grading import find_sandbox_level, program_of
from megatron_rasft.wording import counted

_FIRST_BATCH = 8
"""Rows after which a --verify-function that has failed on all of them is not called again."""
_BATCH = 128
_NOT_RESULTS = (None, "not a result of any program")
_FAILURES: dict[Verdict, str] = {
    "wrong": "the demonstration fails its own {check}",
    "unverifiable": "its {check} cannot verify any response",
    "timeout": "grading its demonstration takes too long",
}


@dataclass(kw_only=True)
class DemonstrationReport:
    """What was found by grading demonstrations."""

    num_rows: int = 0
    """Rows with an answer or tests."""
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    """Verdict -> number of demonstrations. Rows that were not graded in time are missing."""
    failures: list[RowFault] = field(default_factory=list)
    """The rows whose answer or tests do not fit their demonstration."""
    max_s: float = 0.0
    """The time limit, seconds."""

    def describe(self) -> str:
        """Returns the report as text, without a final line break."""
        num_graded = self.verdicts.total()
        lines = [f"graded          {num_graded} of {counted(self.num_rows, 'demonstration')}"]
        if num_graded < self.num_rows:
            lines[0] += f" in {self.max_s:g} s. Raise --grade-max-s to grade all."
        lines += [f"  {num} {verdict}" for verdict, num in self.verdicts.most_common()]
        lines.append(f"unfit checks    {len(self.failures)}")
        lines += [f"  {failure}" for failure in self.failures if not failure.reason.startswith(FAILED)]
        lines += _counted_once(self.function_failures)
        return "\n".join(lines)

    @property
    def function_failures(self) -> list[RowFault]:
        """The failures of rows for which --verify-function itself failed."""
        return [failure for failure in self.failures if failure.reason.startswith(FAILED)]


def _counted_once(failures: Iterable[RowFault]) -> Iterator[str]:
    """Yields a line for each line of code at which --verify-function failed, instead of one for each row."""
    rows: dict[str, list[RowFault]] = {}
    for failure in failures:
        place = re.search(r"\(\S+:\d+\)", failure.reason)
        rows.setdefault(place[0] if place else failure.reason, []).append(failure)
    for first, *others in rows.values():
        yield f"  {first.reason}, rows: {1 + len(others)}, first: {first.source}"


class _TimeIsUpError(Exception):
    """Raised in the pool to end its call at the time limit."""


def check_demonstrations(rows: Iterable[Row], config: VerifyConfig, max_s: float) -> DemonstrationReport:
    """Grades the demonstration of every row that has an answer or tests, or that --verify-function grades.

    Tests that accept the demonstration also run on programs of the same names that always return the same value. Tests that
    accept these would give every response the verdict ``correct``.

    Args:
        rows: usable rows.
        config: limits of grading.
        max_s: time limit for all rows, seconds.

    Raises:
        ValueError: --verify-function failed on every row so far.
        SandboxError: a row has tests, and the machine does not allow ``verify_sandbox_level``.
        RasftError: grading processes cannot be started.
    """
    report = DemonstrationReport(max_s=max_s)
    deadline = time.monotonic() + max_s
    has_sandbox = False
    with VerifierPool(config) as pool:
        for batch in _batches(row for row in rows if row.check):
            report.num_rows += len(batch)
            if not has_sandbox and any(row.tests for row in batch):
                find_sandbox_level(config)
                has_sandbox = True
            if time.monotonic() < deadline:
                _check_batch(batch, pool, deadline, report)
                _refuse_broken_function(report, config)
    return report


def _batches(rows: Iterator[Row]) -> Iterator[tuple[Row, ...]]:
    yield tuple(islice(rows, _FIRST_BATCH))
    yield from iter(lambda: tuple(islice(rows, _BATCH)), ())


def _refuse_broken_function(report: DemonstrationReport, config: VerifyConfig) -> None:
    failures = report.function_failures
    if failures and len(failures) == report.num_rows:
        raise ValueError(
            f"--verify-function {config.verify_function} failed on every row that was graded "
            f"({counted(len(failures), 'row')}). On {failures[0].source}: {failures[0].reason.removeprefix(FAILED)}. Correct the function."
        )


def _check_batch(
    batch: tuple[Row, ...], pool: VerifierPool, deadline: float, report: DemonstrationReport
) -> None:
    demonstrations = [Rollout.of_text(row.problem_id, row.response) for row in batch]
    checks: dict[str, Check] = {row.problem_id: row.check for row in batch}
    _verify(pool, demonstrations, checks, deadline)
    trivial = {
        row.problem_id: [Rollout.of_text(row.problem_id, text) for text in _trivial_responses(row)]
        for row, demonstration in zip(batch, demonstrations, strict=True)
        if row.tests and demonstration.verdict == "correct"
    }
    _verify(pool, [rollout for rollouts in trivial.values() for rollout in rollouts], checks, deadline)
    for row, demonstration in zip(batch, demonstrations, strict=True):
        if demonstration.verdict is None:
            continue
        report.verdicts[demonstration.verdict] += 1
        accepted = [rollout.verdict == "correct" for rollout in trivial.get(row.problem_id, [])]
        failure = _failure_of(row, demonstration, accepts_anything=bool(accepted) and all(accepted))
        if failure:
            report.failures.append(RowFault(source=row.source, reason=failure))


def _verify(pool: VerifierPool, rollouts: list[Rollout], checks: dict[str, Check], deadline: float) -> None:
    """Grades until the deadline. Rollouts that are not graded by then have no verdict."""

    def stop_at_deadline() -> None:
        if time.monotonic() > deadline:
            raise _TimeIsUpError

    try:
        pool.verify(rollouts, checks, stop_at_deadline, warns=False)
    except _TimeIsUpError:
        return


def _failure_of(row: Row, demonstration: Rollout, accepts_anything: bool) -> str:
    if accepts_anything:
        return "its tests cannot fail: they accept a program that returns the same value for every input"
    assert demonstration.verdict is not None
    if row.fields is not None and failed(demonstration):
        return FAILED + demonstration.verdict_reason.removeprefix(FAILED)
    reason = _FAILURES.get(demonstration.verdict)
    if reason is None:
        return ""
    check = "tests" if row.tests else f"answer {(row.answer or '')[:50]!r}"
    if row.fields is not None:
        check = "--verify-function"
    return f"{reason.format(check=check)} ({demonstration.verdict_reason})"


def _trivial_responses(row: Row) -> Iterator[str]:
    """Yields responses with the functions of a row's program, which return the same value for every input."""
    assert isinstance(row.tests, CodeTests)
    program = program_of(row.response, row.tests)
    for value in _NOT_RESULTS:
        trivial = _with_constant_functions(program or "", value)
        if trivial is not None:
            yield f"```python\n{trivial}\n```"


def _with_constant_functions(program: str, value: str | None) -> str | None:
    """Returns a program whose functions and methods all return ``value``, or None if it has none or is not valid."""
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    replacer = _ConstantFunctions(value)
    changed = replacer.visit(tree)
    return ast.unparse(ast.fix_missing_locations(changed)) if replacer.num_functions else None


class _ConstantFunctions(ast.NodeTransformer):
    """Replaces the bodies of functions and methods by one return. Special methods such as ``__init__`` are kept."""

    def __init__(self, value: str | None) -> None:
        self._value = value
        self.num_functions = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        return self._replace(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        return self._replace(node)

    def _replace[Function: (ast.FunctionDef, ast.AsyncFunctionDef)](self, node: Function) -> Function:
        if not node.name.startswith("__"):
            self.num_functions += 1
            node.body = [ast.Return(value=ast.Constant(value=self._value))]
            node.decorator_list = [d for d in node.decorator_list if isinstance(d, ast.Name)]
        return node
