"""The command line: wrong arguments, files that it finds by itself, and notes on missing files."""

import json
from pathlib import Path

import pytest

from megatron_rasft.config.data import DataConfig
from tests.unit.tools.report.reading import Page
from tests.unit.tools.report.synthetic import write_run
from tools import report


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def page_of(tmp_path: Path, *arguments: str | Path) -> Page:
    output = tmp_path / "out" / "report.html"
    assert report.main([*map(str, arguments), "--output", str(output)]) == 0
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]
    return Page(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "arguments,named",
    [
        ([], "RUN_DIR"),
        (["{run}/gone"], "RUN_DIR {run}/gone"),
        (["{empty}"], "metrics.jsonl"),
        (["{run}", "{run}"], "RUN_DIR"),
        (["{run}", "{empty}", "--metrics", "{run}/metrics.jsonl"], "--metrics"),
        (["{run}", "--rollouts", "{run}/gone.jsonl"], "--rollouts {run}/gone.jsonl"),
        (["{run}", "--num-examples", "-1"], "--num-examples"),
        (["{run}", "--max-rollouts", "0"], "--max-rollouts"),
        (["{run}", "--watch", "0"], "--watch"),
        (["--metrics", "{run}/metrics.jsonl", "--watch", "5"], "--watch"),
        (["{run}", "--problems", "p1", "gone", "--output", "{empty}/page.html"], "--problems gone"),
        (["{run}", "--output", "{run}/metrics.jsonl"], "--output {run}/metrics.jsonl"),
        (["{run}", "--output", "{run}"], "--output {run}"),
        (["{run}", "--output", "{run}/metrics.jsonl/page.html"], "--output {run}/metrics.jsonl/page.html"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(
    run: Path, tmp_path: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    before = (run / "metrics.jsonl").read_bytes()
    filled = [argument.format(run=run, empty=empty) for argument in arguments]
    assert report.main(filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named.format(run=run) in error and error.count("\n") == 1
    assert (run / "metrics.jsonl").read_bytes() == before


def test_texts_of_problems_come_from_the_training_data(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [
        {"id": f"p{n}", "problem": f"What is {n}?", "response": f"It is {n}.", "answer": str(n)}
        for n in range(8)
    ]
    rows.append({"id": "broken"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "What is 3?" in page_of(tmp_path, run, "--train-data", path, "--num-examples", "8").texts["pre"]
    config = {"rasft": {"data": {**vars(DataConfig(train_data=[str(path)]))}}, "megatron": {}}
    (run / "config.json").write_text(json.dumps(config))
    shown = page_of(tmp_path, run, "--num-examples", "8")
    assert {"What is 3?", "It is 3.", "3"} <= set(shown.texts["pre"])
    assert "li" not in shown.texts, "no note"
    (run / "config.json").unlink()
    assert "--train-data" in page_of(tmp_path, run).texts["li"][0]
    (run / "model").mkdir()
    card = f"| | |\n| --- | --- |\n| Demonstrations | {path} |\n\nWritten by megatron_rasft.\n"
    (run / "model" / "README.md").write_text(card)
    assert "What is 3?" in page_of(tmp_path, run, "--num-examples", "8").texts["pre"]
    path.unlink()
    assert "train.jsonl" in page_of(tmp_path, run).texts["li"][0]


def test_files_can_be_outside_of_the_run_folder(run: Path, tmp_path: Path) -> None:
    named = ["--metrics", run / "metrics.jsonl", "--rollouts", run / "rollouts.jsonl"]
    assert "Loss of the objective" in page_of(tmp_path, *named).lines
    other = tmp_path / "other"
    other.mkdir()
    assert page_of(tmp_path, other, *named).texts["h1"] == ["other"]
    assert "--metrics" in page_of(tmp_path, other, *named[2:]).texts["li"][0]


def test_runs_in_folders_of_one_name_get_different_names(run: Path, tmp_path: Path) -> None:
    saved = write_run(tmp_path / "third" / "checkpoints", seed=2)
    assert page_of(tmp_path, saved).texts["h1"] == ["third"]
    inside = write_run(tmp_path / "third" / "run", seed=3)
    assert page_of(tmp_path, saved, inside).texts["h1"] == ["third, run"]
    same = [write_run(tmp_path / "third" / name, seed=4) for name in ("save", "checkpoints")]
    assert page_of(tmp_path, *same).texts["h1"] == ["save, checkpoints"]
    again = write_run(tmp_path / "second" / "run", seed=1)
    assert page_of(tmp_path, run, again).texts["h1"] == [f"{tmp_path.name}/run, second/run"]


def test_named_problems_are_examples_with_all_their_rollouts(run: Path, tmp_path: Path) -> None:
    shown = page_of(tmp_path, run, "--num-examples", "0", "--problems", "p3", "p1")
    summaries = [a for tag, a in shown.elements if tag == "details" and a.get("class") == "example"]
    stored = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(summaries) == 2
    assert len([a for a in shown.tags("div") if a.get("class") == "sample"]) == sum(
        r["problem_id"] in ("p1", "p3") for r in stored
    )


def test_run_on_demonstrations_only_has_its_curves(run: Path, tmp_path: Path) -> None:
    (run / "rollouts.jsonl").unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [r for r in lines if "rollout/num_rollouts" not in r]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    shown = page_of(tmp_path, run)
    assert "demonstrations only" in shown.texts["li"][0]
    assert "Loss of the objective" in shown.lines


def test_unreadable_lines_and_repeated_rollouts_are_counted(run: Path, tmp_path: Path) -> None:
    store = run / "rollouts.jsonl"
    store.write_text(store.read_text() * 2 + '{"problem_id": "p')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event"')
    notes = " ".join(page_of(tmp_path, run).texts["li"])
    assert notes.count("1 unreadable line ") == 2 and "64 rollouts" in notes
    store.write_text("")
    assert str(store) in page_of(tmp_path, run).texts["li"][1]


def test_watched_run_is_written_when_it_changes_until_it_ends(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, metrics = tmp_path / "report.html", run / "metrics.jsonl"
    lines, status = metrics.read_text().splitlines(keepends=True), run / "status.json"
    kept = {name: (run / name).rename(tmp_path / name) for name in ("rollouts.jsonl", "metrics.jsonl")}
    status.write_text('{"state": "running"}')
    pauses, seen = [], []

    def sleep(seconds: float) -> None:
        """Goes on with the run: its first records, more records, no change, the rest and the end."""
        pauses.append(seconds)
        shown = Page(output.read_text(encoding="utf-8")) if output.stat().st_size else None
        seen.append(None if shown is None else (len(first_line(shown)), "live" in ids(shown)))
        if len(pauses) in (1, 3):
            metrics.write_text("".join(lines[: 6 * len(pauses) - 3]))
        if len(pauses) == 5:
            kept["metrics.jsonl"].rename(metrics)
            kept["rollouts.jsonl"].rename(run / "rollouts.jsonl")
            status.write_text('{"state": "finished"}')

    monkeypatch.setattr(report.time, "sleep", sleep)
    output.touch()
    assert report.main([str(run), "--watch", "7", "--output", str(output)]) == 0
    last = Page(output.read_text(encoding="utf-8"))
    assert all(pause >= 7 for pause in pauses) and len(pauses) == 5
    assert seen[0] is None and (len(first_line(last)), "live" in ids(last)) == (12, False)
    points = [point for point in seen[1:] if point is not None]
    assert points[0][0] < points[-1][0] < 12 and all(is_live for _, is_live in points)
    written = capsys.readouterr().out
    assert written.count("waiting") == 1 and written.count("wrote") < len(pauses) + 1


def first_line(shown: Page) -> list[tuple[float, float]]:
    ((_, points),) = shown.lines["Loss of the objective"].items()
    return points


def ids(shown: Page) -> set[str | None]:
    return {attributes.get("id") for _, attributes in shown.elements}
