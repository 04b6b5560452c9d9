"""Reads one row of a benchmark, in this project's layout or in the layout of its Hugging Face data set."""

import base64
import io
import json
import pickle
import zlib
from dataclasses import dataclass, field
from typing import Any

from megatron_rasft.data.fields import FieldError, check_text, gold_text
from megatron_rasft.tools.evaluation.known_sets import Kind
from megatron_rasft.types import Check, CodeTests, ProblemRow, ProgramCase
from megatron_rasft.verify.mathematics.answer_extraction import closed_boxes, extract_answer

TEST_FIELDS = frozenset({"tests", "test", "test_list", "public_test_cases"})
"""Names of the fields, in lower case, that hold the tests of a code problem."""


@dataclass(kw_only=True, slots=True)
class Problem:
    """One row of a benchmark."""

    problem_id: str
    text: str
    """The problem itself, without the instructions that ``questions`` adds."""
    answer: str = ""
    """Gold answer, or "" for code."""
    tests: dict[str, Any] = field(default_factory=dict)
    """Code only: tests and entry point, under the field names of the code sets (test, tests, entry_point, ...)."""
    fields: ProblemRow | None = None
    """The whole row, if --verify-function grades the samples."""

    @property
    def check(self) -> Check:
        """The gold answer, the tests or the row, in the form that the verifier takes."""
        if self.fields is not None:
            return self.fields
        if not self.tests:
            return self.answer
        entry_point = self.tests.get("entry_point", "")
        if "test_style" in self.tests:  # a row in the layout of training
            style, scripts = self.tests["test_style"], tuple(self.tests["tests"])
            return CodeTests(
                style=style, tests=scripts, entry_point=entry_point, setup=self.tests["test_setup_code"]
            )
        pairs = [test for test in self.tests.get("tests", ()) if isinstance(test, dict)]
        if pairs:
            is_functional = pairs[0]["testtype"] == "functional"
            cases = tuple(ProgramCase(input=pair["input"], output=pair["output"]) for pair in pairs)
            return CodeTests(
                style="functional" if is_functional else "stdin", entry_point=entry_point, cases=cases
            )
        script = self.tests.get("test")
        if script is not None and "def check(" in script:
            return CodeTests(style="check", tests=(script,), entry_point=entry_point, prompt=self.text)
        # MBPP+ has a script with all asserts, and beside it the base asserts, which are part of the question
        scripts = tuple(self.tests["tests"]) if script is None else (script,)
        setup = self.tests.get("test_setup_code", "")
        return CodeTests(style="asserts", tests=scripts, entry_point=entry_point, setup=setup)


def parse_row(record: dict[str, Any], kind: Kind, default_id: str) -> Problem:
    """Returns the problem of a row.

    Args:
        record: the row, with field names in any case.
        kind: whether the set is mathematical, code, or graded by --verify-function.
        default_id: id for a row without an id.

    Raises:
        FieldError: a field is missing or cannot be used.
    """
    parse = {"math": _parse_math, "code": _parse_code, "own": _parse_own}[kind]
    return parse({str(name).lower(): value for name, value in record.items()}, default_id)


def _first(record: dict[str, Any], *names: str) -> tuple[str, Any]:
    """Returns name and value of the first field that has a value.

    Raises:
        FieldError: there is none. It names the first of ``names``, which is this project's name.
    """
    for name in names:
        if record.get(name) is not None:
            return name, record[name]
    raise FieldError(f'no "{names[0]}"', f"the row has {', '.join(record) or 'no fields'}")


def _text(record: dict[str, Any], *names: str) -> str:
    name, value = _first(record, *names)
    return check_text(value, f'"{name}"')


def _id(record: dict[str, Any], default: str) -> str:
    for name in ("id", "unique_id", "task_id", "problem_id", "question_id"):
        if record.get(name) is not None:
            return str(record[name])
    return default


def _parse_math(record: dict[str, Any], default_id: str) -> Problem:
    text = _text(record, "problem", "question")
    return Problem(problem_id=_id(record, default_id), text=text, answer=_gold(record))


def _parse_own(record: dict[str, Any], default_id: str) -> Problem:
    return Problem(problem_id=_id(record, default_id), text=_text(record, "problem", "question", "prompt"))


def _gold(record: dict[str, Any]) -> str:
    """Returns the gold answer as a string without a box, from any of the fields and notations that data sets use."""
    try:
        name, value = _first(record, "answer", "final_answer", "expected_answer")
    except FieldError:
        solution = str(record.get("solution") or "")
        boxes = closed_boxes(solution)
        if not boxes:
            raise
        # As in a response, boxes that are joined by "and" or "or" are one answer
        name, value = "solution", extract_answer(solution) or boxes[-1]
    if isinstance(value, list):
        if len(value) != 1:
            raise FieldError(f'"{name}" has {len(value)} final answers, but must have one')
        text = gold_text(value[0], name).strip("$")
    else:
        text = gold_text(value, name)
    if "####" in text:  # GSM8K puts the reasoning before these marks and the answer after them
        text = text.rpartition("####")[2]
    return check_text(text, f'"{name}"').strip()


def _parse_code(record: dict[str, Any], default_id: str) -> Problem:
    is_paired = isinstance(record.get("tests"), list) and any(isinstance(t, dict) for t in record["tests"])
    if is_paired or "public_test_cases" in record:
        return _parse_contest(record, default_id)
    name = _id(record, default_id)
    if name.isdigit():
        name = f"Mbpp/{name}"
    tests: dict[str, Any] = {}
    if record.get("test"):
        tests["test"] = check_text(record["test"], '"test"')
    field, asserts = next(((n, record[n]) for n in ("tests", "test_list") if record.get(n)), ("tests", None))
    if asserts is not None:
        if not isinstance(asserts, list):
            raise FieldError(f'"{field}" is not a list of statements or of pairs of input and output')
        tests["tests"] = [check_text(test, f'"{field}"') for test in asserts]
    if not tests:
        raise FieldError('no "tests"', f"the row has {', '.join(record) or 'no fields'}")
    entry_point = record.get("entry_point")
    if entry_point:
        tests["entry_point"] = check_text(entry_point, '"entry_point"')
    setup = record.get("test_setup_code") or _joined_imports(record.get("test_imports"))
    if setup:
        tests["test_setup_code"] = check_text(setup, '"test_setup_code"')
    # mbpp_plus has the task as text, and again as a prompt in the form of a docstring
    return Problem(problem_id=name, text=_text(record, "text", "prompt", "problem"), tests=tests)


def _joined_imports(imports: Any) -> str:
    lines = imports if isinstance(imports, list) else [] if imports is None else [imports]
    return "\n".join(check_text(line, '"test_imports"') for line in lines)


def _parse_contest(record: dict[str, Any], default_id: str) -> Problem:
    """Reads a row of LiveCodeBench, whose tests are pairs of input and output."""
    if record.get("tests"):
        pairs = _pairs(record["tests"], "tests")
    else:
        name, packed = _first(record, "public_test_cases")
        pairs = _pairs(packed, name)
        if record.get("private_test_cases"):
            pairs += _pairs(_hidden_tests(str(record["private_test_cases"])), "private_test_cases")
    if not pairs:
        raise FieldError('"tests" is empty')
    metadata = _unpacked(record.get("metadata") or {}, "metadata")
    if not isinstance(metadata, dict):
        raise FieldError('"metadata" is not an object')
    tests: dict[str, Any] = {"tests": pairs}
    entry_point = record.get("entry_point") or metadata.get("func_name")
    if entry_point:
        tests["entry_point"] = check_text(entry_point, '"entry_point"')
    if record.get("starter_code"):
        tests["starter_code"] = check_text(record["starter_code"], '"starter_code"')
    return Problem(
        problem_id=_id(record, default_id),
        text=_text(record, "prompt", "question_content"),
        tests=tests,
    )


def _unpacked(value: Any, name: str) -> Any:
    """Parses a field that some layouts store as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise FieldError(f'"{name}" is not JSON', str(error)[:80]) from None


def _pairs(value: Any, name: str) -> list[dict[str, str]]:
    """Returns the tests of a field as pairs of input and output, each with the key "testtype"."""
    pairs = _unpacked(value, name)
    keys = ("input", "output", "testtype")
    if not isinstance(pairs, list) or not all(isinstance(p, dict) and p.keys() >= set(keys) for p in pairs):
        raise FieldError(f'"{name}" is not a list of objects with {", ".join(keys)}')
    return [{key: str(pair[key]) for key in keys} for pair in pairs]


class _ForeignPickle(FieldError):
    """Raised for a pickle that would run code."""


class _NoGlobals(pickle.Unpickler):
    """Unpickles plain values only. Refuses objects that would import or call anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise _ForeignPickle(
            f"its hidden tests would call {module}.{name}, which LiveCodeBench's own tests never do"
        )


def _hidden_tests(packed: str) -> Any:
    """Reads the private tests of code_generation_lite: JSON, or JSON that is pickled, compressed and in base 64."""
    try:
        return json.loads(packed)
    except (ValueError, RecursionError):
        pass
    try:
        stream = io.BytesIO(zlib.decompress(base64.b64decode(packed)))
        return json.loads(_NoGlobals(stream).load())
    except _ForeignPickle:
        raise
    except Exception as error:  # damaged pickles raise many kinds of errors
        raise FieldError(
            '"private_test_cases" is neither JSON nor the packed form of LiveCodeBench', str(error)[:80]
        ) from None
