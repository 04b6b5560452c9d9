"""Writes rows of any accepted layout as .jsonl with the default names of their fields."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rasft.data.reading import Row
from megatron_rasft.data.row_report import RowFault
from megatron_rasft.files import replacing
from megatron_rasft.verify.mathematics.answer_extraction import closed_boxes, extract_answer

_ANSWER_MARK = "####"
"""GSM8K writes the answer after this mark, at the end of the solution."""


def with_own_answer(row: Row) -> Row | RowFault:
    """Returns a row without answer and tests with the final answer of its response: after the mark of GSM8K, or in a box."""
    if row.answer is not None or row.tests is not None:
        return row
    _, mark, answer = row.response.rpartition(_ANSWER_MARK)
    if not mark:
        answer = extract_answer(row.response) or "" if closed_boxes(row.response) else ""
    if not answer.strip():
        return RowFault(
            source=row.source, reason=f"the response has no final answer in a box or after {_ANSWER_MARK}"
        )
    return replace(row, answer=answer.strip())


def as_record(row: Row) -> dict[str, Any]:
    """Returns a row as a JSON object. Only the fields that a run reads are kept, or all if --verify-function reads them."""
    if len(row.messages) == 1:
        texts: dict[str, Any] = {"problem": row.problem, "response": row.response}
    else:
        texts = {"messages": [*row.messages, {"role": "assistant", "content": row.response}]}
    return {**(row.fields or {}), "id": row.problem_id, **texts, **_check(row)}


def _check(row: Row) -> dict[str, Any]:
    fields: dict[str, Any] = {"answer": row.answer}
    if row.tests is not None:
        fields |= {
            "tests": list(row.tests.tests),
            "test_style": row.tests.style,
            "entry_point": row.tests.entry_point,
            "test_setup_code": row.tests.setup,
        }
    return {name: value for name, value in fields.items() if value}


def write_rows(rows: Iterable[Row], path: Path) -> int:
    """Writes rows to a .jsonl file, which appears when it is complete. Returns their number."""
    num_rows = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(as_record(row), ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows
