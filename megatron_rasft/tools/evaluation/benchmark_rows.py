"""Reads one row of a benchmark, in this project's layout or in the layout of its Hugging Face data set."""

import base64
import io
import json
import pickle
import zlib
from dataclasses import dataclass, field
from typing import Any

from megatron_rasft.tools.evaluation.known_sets import Kind
from megatron_rasft.types import Check, CodeTests, ProgramCase
from megatron_rasft.verify.math_extraction import closed_boxes

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

    @property
    def check(self) -> Check:
        """The gold answer or the tests, in the form that the verifier takes."""
        if not self.tests:
            return self.answer
        entry_point = self.tests.get("entry_point", "")
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
        kind: whether the set is mathematical or code.
        default_id: id for a row without an id.

    Raises:
        KeyError, ValueError, TypeError: a field is missing or cannot be used.
    """
    parse = _parse_math if kind == "math" else _parse_code
    return parse({str(name).lower(): value for name, value in record.items()}, default_id)


def _first(record: dict[str, Any], *names: str) -> Any:
    """Returns the first field that has a value. A KeyError names the first of ``names``, which is this project's name."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise KeyError(names[0])


def _id(record: dict[str, Any], default: str) -> str:
    for name in ("id", "unique_id", "task_id", "problem_id", "question_id"):
        if record.get(name) is not None:
            return str(record[name])
    return default


def _parse_math(record: dict[str, Any], default_id: str) -> Problem:
    text = _first(record, "problem", "question")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the problem is empty")
    return Problem(problem_id=_id(record, default_id), text=text, answer=_gold(record))


def _gold(record: dict[str, Any]) -> str:
    """Returns the gold answer as a string without a box, from any of the fields and notations that data sets use."""
    try:
        value = _first(record, "answer", "final_answer", "expected_answer")
    except KeyError:
        boxes = closed_boxes(str(record.get("solution") or ""))
        if not boxes:
            raise
        value = boxes[-1]
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"it has {len(value)} final answers, but must have one")
        value = str(value[0]).strip("$")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str):
        value = str(value)
    if "####" in value:  # GSM8K puts the reasoning before these marks and the answer after them
        value = value.rpartition("####")[2]
    if not value.strip():
        raise ValueError("the answer is empty")
    return value.strip()


def _parse_code(record: dict[str, Any], default_id: str) -> Problem:
    is_paired = isinstance(record.get("tests"), list) and any(isinstance(t, dict) for t in record["tests"])
    if is_paired or "public_test_cases" in record:
        return _parse_contest(record, default_id)
    name = _id(record, default_id)
    if name.isdigit():
        name = f"Mbpp/{name}"
    tests: dict[str, Any] = {}
    if record.get("test"):
        tests["test"] = str(record["test"])
    asserts = record.get("tests") or record.get("test_list")
    if asserts:
        if not all(isinstance(test, str) for test in asserts):
            raise ValueError("its tests must be statements or pairs of input and output")
        tests["tests"] = list(asserts)
    if not tests:
        raise KeyError("tests")
    entry_point = record.get("entry_point")
    if entry_point:
        tests["entry_point"] = str(entry_point)
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
    if setup:
        tests["test_setup_code"] = str(setup)
    # mbpp_plus has the task as text, and again as a prompt in the form of a docstring
    text = str(_first(record, "text", "prompt", "problem"))
    return Problem(problem_id=name, text=text, tests=tests)


def _parse_contest(record: dict[str, Any], default_id: str) -> Problem:
    """Reads a row of LiveCodeBench, whose tests are pairs of input and output."""
    pairs: list[dict[str, str]] = []
    if record.get("tests"):
        pairs = list(record["tests"])
    else:
        pairs = json.loads(_first(record, "public_test_cases"))
        if record.get("private_test_cases"):
            pairs += _hidden_tests(str(record["private_test_cases"]))
    metadata = record.get("metadata") or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    tests: dict[str, Any] = {
        "tests": [{k: str(p[k]) for k in ("input", "output", "testtype")} for p in pairs]
    }
    entry_point = record.get("entry_point") or metadata.get("func_name")
    if entry_point:
        tests["entry_point"] = str(entry_point)
    if record.get("starter_code"):
        tests["starter_code"] = str(record["starter_code"])
    return Problem(
        problem_id=_id(record, default_id),
        text=str(_first(record, "prompt", "question_content")),
        tests=tests,
    )


class _NoGlobals(pickle.Unpickler):
    """Unpickles plain values only. Refuses objects that would import or call anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(
            f"its hidden tests would call {module}.{name}, which LiveCodeBench's own tests never do"
        )


def _hidden_tests(packed: str) -> list[dict[str, str]]:
    """Reads the private tests of code_generation_lite: JSON, or JSON that is pickled, compressed and in base 64."""
    try:
        return json.loads(packed)
    except json.JSONDecodeError:
        stream = io.BytesIO(zlib.decompress(base64.b64decode(packed)))
        return json.loads(_NoGlobals(stream).load())
