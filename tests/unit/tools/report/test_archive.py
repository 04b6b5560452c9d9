"""The compressed rollouts of the search: which ones a page has, and what is in them."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

from megatron_rasft.tools.report import archive as archives
from megatron_rasft.tools.report.archive import Archive, Blocks
from megatron_rasft.tools.report.records import read_run
from megatron_rasft.tools.report.rollouts import read_statistics
from megatron_rasft.tools.report.views import read_view
from tests.unit.tools.report.synthetic import write_run


def unpacked(blocks: Blocks) -> list[tuple[int, list[Any], list[str]]]:
    """(step, row, texts) of every row, in order."""
    found = []
    for block, content in blocks.contents():
        rows, texts, _ = (zlib.decompress(base64.b64decode(part)).decode() for part in content.split(" "))
        parsed, separate = json.loads(rows), texts.split("\0")
        size = len(separate) // len(parsed)
        assert len(parsed) == block.num_rows <= archives.MAX_BLOCK_ROWS
        found += [(block.group, row, separate[i * size : (i + 1) * size]) for i, row in enumerate(parsed)]
    return found


def stored(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]


def test_archive_has_every_rollout_in_the_order_of_the_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=30, num_problems=200)
    archive = Archive(tmp_path, 100_000)
    read_statistics(run / "rollouts.jsonl", archive)
    rows = unpacked(archive.rollouts)
    assert [
        (step, row[0], row[1], row[2], row[6], row[7], text) for step, row, (text,) in rows
    ] == [
        (r["weight_version"], r["problem_id"], r["sample_index"], r["verdict"], len(r["response_ids"]), r["weight"], r["text"])
        for r in stored(run)
    ]  # fmt: skip
    assert len(archive.rollouts.blocks) > 10, "blocks hold one refresh each, and a limited number of rows"


def test_solved_column_agrees_with_the_solve_rates(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_problems=60)
    archive = Archive(tmp_path, 100_000)
    statistics = read_statistics(run / "rollouts.jsonl", archive)
    solved = [row[9] for _, row, _ in unpacked(archive.rollouts)]
    visits = [visit for refresh in statistics.refreshes.values() for visit in refresh.visits.values()]
    assert solved.count(True) == sum(visit.num_solved for visit in visits)
    assert solved.count(None) == sum(visit.num_samples - visit.num_attempts for visit in visits) > 0


def test_repeated_refreshes_are_in_the_archive_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    store = run / "rollouts.jsonl"
    lines = store.read_text().splitlines(keepends=True)
    again = [line for line in lines if json.loads(line)["weight_version"] >= 6]
    store.write_text("".join(lines) + "".join(again).replace("answer", "repeated"))
    archive = Archive(tmp_path, 100_000)
    read_statistics(store, archive)
    rows = unpacked(archive.rollouts)
    assert len(rows) == len(lines)
    assert {step for step, _, (text,) in rows if "repeated" in text} == {6, 9}
    assert not any("repeated" not in text for step, _, (text,) in rows if step >= 6)


def test_archive_keeps_the_newest_rollouts_within_its_limit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=12, interval=3, num_problems=8)
    archive = Archive(tmp_path, 40)
    read_statistics(run / "rollouts.jsonl", archive)
    assert {step for step, _, _ in unpacked(archive.rollouts)} == {6, 9}
    assert archive.rollouts.num_rows == 32


def test_problems_have_their_texts_and_their_history(tmp_path: Path) -> None:
    run, data = write_run(tmp_path / "run"), tmp_path / "train.jsonl"
    rows = [
        {"id": f"p{n}", "problem": f"Is it {n}?\0", "response": "é" * 9000, "answer": f"{n}"}
        for n in range(5)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    archive = Archive(tmp_path, 100_000)
    view = read_view(read_run(run), [str(data)], 0, archive=archive)
    assert view.rollouts is not None
    histories = view.rollouts.histories()
    found = {row[0]: (row, texts) for _, row, texts in unpacked(archive.problems)}
    assert found.keys() == histories.keys()
    for problem_id, (row, (problem, check, response)) in found.items():
        assert row[2] == [
            [step, v.num_samples, v.num_attempts, v.num_solved, v.solve_rate]
            for step, v in histories[problem_id]
        ]
        number = int(problem_id[1:])
        if number < 5:
            assert (row[3], problem, check) == (True, f"Is it {number}?\ufffd", f"{number}")
            assert "3,000 characters" in response and len(response) < 6100
        else:
            assert (row[3], problem, check, response) == (False, "", "", "")
