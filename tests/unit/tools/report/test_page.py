"""The page shows the numbers of the run's files, and shows texts that a model wrote as plain text."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.tools.report.archive import Archive
from megatron_rasft.tools.report.page import page
from megatron_rasft.tools.report.records import read_run
from megatron_rasft.tools.report.rollouts import pick_examples, read_statistics
from megatron_rasft.tools.report.texts import MAX_TEXT_CHARS
from megatron_rasft.tools.report.views import Problem, RunView, read_view
from tests.unit.tools.report.reading import Page
from tests.unit.tools.report.synthetic import write_run

HOSTILE = "</script></pre><img src=x onerror=alert(1)><!-- \" ' & ]]> <script>alert(2)</script>"


def view_of(folder: Path, **problems: Problem) -> RunView:
    records = read_run(folder)
    view = RunView(records, problems=problems)
    if records.rollouts_path is not None:
        view.archive = Archive(folder.parent, 100_000)
        view.rollouts = read_statistics(records.rollouts_path, view.archive)
        view.examples = pick_examples(records.rollouts_path, view.rollouts.histories(), 3)
    return view


def hostile_view(tmp_path: Path) -> RunView:
    """A run whose name, settings, problems and rollouts hold markup."""
    folder = write_run(tmp_path / HOSTILE.replace("/", "|"))
    rollouts = lines_of(folder / "rollouts.jsonl")
    for rollout in rollouts:
        rollout["problem_id"] += HOSTILE
        for name in ("text", "verdict", "verdict_reason", "finish_reason", "filtered_by"):
            rollout[name] = HOSTILE
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    settings = {"objective": {"objective": HOSTILE}, "data": {"train_data": [HOSTILE]}}
    (folder / "config.json").write_text(json.dumps({"rasft": settings, "megatron": {"hf_model": HOSTILE}}))
    ids = {rollout["problem_id"] for rollout in rollouts}
    view = view_of(folder, **dict.fromkeys(ids, Problem(HOSTILE, HOSTILE, HOSTILE)))
    view.notes.append(HOSTILE)
    return view


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_numbers_on_the_page_are_those_of_the_files(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    shown = Page(page([view_of(folder)]))
    records, rollouts = lines_of(folder / "metrics.jsonl"), lines_of(folder / "rollouts.jsonl")
    steps = [r for r in records if r["event"] == "step"]
    refreshes = [r for r in records if "verify/solve_rate" in r]
    tokens = sum(r["training/num_tokens"] for r in steps)
    sampled = sum(len(r["response_ids"]) for r in rollouts)
    last_solved = f"{refreshes[-1]['verify/solve_rate']:.1%}"
    assert_rows(shown, ["Tokens trained", f"{tokens:,}"])
    assert_rows(shown, ["Rollouts", f"{len(rollouts)}", f"{len(refreshes)} refreshes", f"{sampled:,} tokens"])
    assert_rows(shown, ["Rollouts correct", last_solved, "step 9"])
    assert_rows(shown, ["Held-out solved", "12.5% after step 0", "43.8% after step 12"])
    correct = sum(r["verdict"] == "correct" for r in rollouts)
    assert_rows(shown, ["correct", f"{correct / len(rollouts):.1%}"])
    histories = view_of(folder).rollouts.histories()  # type: ignore[union-attr]
    solved = {r["problem_id"] for r in rollouts if r["verdict"] == "correct"}
    assert_rows(shown, ["never solved", f"{len(set(histories) - solved)}"])


def assert_rows(shown: Page, texts: list[str]) -> None:
    """Asserts that a row of the page begins with the first text and contains the others."""
    assert any(row.startswith(texts[0]) and all(t in row for t in texts) for row in shown.rows), texts


@pytest.mark.parametrize(
    "title,metric", [("Loss of the objective", "objective/loss"), ("Gradient norm", "training/grad_norm")]
)
def test_curve_of_the_steps_holds_the_values_of_the_file(title: str, metric: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    steps = [r for r in lines_of(folder / "metrics.jsonl") if r["event"] == "step"]
    ((_, points),) = Page(page([view_of(folder)])).lines[title].items()
    assert [step for step, _ in points] == [r["step"] for r in steps]
    assert [value for _, value in points] == pytest.approx([r[metric] for r in steps], rel=1e-5)


@pytest.mark.parametrize(
    ("title", "event", "metric"),
    [
        ("Weight of a wrong rollout", "step", "objective/wrong_rollout_weight_mean"),
        ("Mean reward of the rollouts", "refresh", "verify/reward_mean"),
        ("Mean reward of held-out responses", "refresh", "heldout/reward_mean"),
    ],
)
def test_metrics_that_few_runs_have_get_a_curve_if_there_are_any(
    title: str, event: str, metric: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run")
    assert title not in Page(page([view_of(folder)])).charts
    records = lines_of(folder / "metrics.jsonl")
    for record in records:
        if record["event"] == event:
            record[metric] = 0.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    ((_, points),) = Page(page([view_of(folder)])).lines[title].items()
    assert {value for _, value in points} == {0.25}


def test_formulas_of_examples_are_mathml_beside_the_rollouts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    problem = Problem(r"Find $\frac{a}{b}$.", r"\(x\) or $\frac{$.", "3")
    shown = Page(page([view_of(folder, **{f"p{n}": problem for n in range(8)})]))
    assert shown.tags("mfrac") and shown.tags("menclose")
    assert any(r"$\frac{$" in text for text in shown.texts["pre"]), "broken LaTeX stays text"
    num_examples = len([a for a in shown.tags("details") if a.get("class") == "example"])
    assert len([a for a in shown.tags("div") if a.get("class") == "beside"]) == num_examples > 0


def test_curve_of_held_out_measurements_holds_the_values_of_the_file(tmp_path: Path) -> None:
    lines = Page(page([view_of(write_run(tmp_path / "run"))])).lines["Held-out problems solved"]
    assert list(lines.values()) == [[(0, 0.125), (12, 0.4375)]]


def test_texts_of_a_model_stay_text(tmp_path: Path) -> None:
    shown = Page(page([hostile_view(tmp_path)]))
    assert not shown.tags("img")
    assert HOSTILE in shown.texts["pre"] and HOSTILE in shown.texts["td"]
    assert len([a for a in shown.tags("script") if "type" not in a]) == 4, "Vega's and the page's three"
    names = {name for _, attributes in shown.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name == "src"}


def test_unprintable_characters_are_replaced(tmp_path: Path) -> None:
    view = view_of(write_run(tmp_path / "run"))
    view.notes.append("a\x00b\ud800c\td")
    assert Page(page([view])).texts["li"] == ["a\ufffdb\ufffdc\td"]


def test_policy_allows_the_scripts_of_the_page_only(tmp_path: Path) -> None:
    shown = Page(page([view_of(write_run(tmp_path / "run"))]))
    assert all((a.get("href") or "#").startswith("#") for _, a in shown.elements)
    assert not shown.tags("link") and "url(" not in shown.texts["style"][0]
    (policy,) = (
        a["content"] or "" for a in shown.tags("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    scripts = [t for t, a in zip(shown.texts["script"], shown.tags("script")) if "type" not in a]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert "default-src 'none'" in policy
    assert f"script-src {' '.join(f"'sha256-{digest}'" for digest in hashes)};" in policy


def test_long_text_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rollouts = lines_of(folder / "rollouts.jsonl")
    for rollout in rollouts:
        rollout["text"] = "begin " + "x" * 100_000 + " \\boxed{7}"
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    texts = Page(page([view_of(folder)])).texts["pre"]
    assert texts and all(len(text) < MAX_TEXT_CHARS + 100 for text in texts)
    assert all(t.startswith("begin ") and t.endswith("\\boxed{7}") and "94,016" in t for t in texts)


def test_several_runs_share_charts_and_their_settings_are_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    for folder, lr in zip(folders, ("1e-05", "2e-05")):
        settings = {
            "objective": {"objective": "rasft"},
            "rollout": {"rollout_engine": "sglang", "rollout_num_samples": 4},
        }
        config = {"rasft": settings, "megatron": {"lr": lr, "tp": "2"}}
        (folder / "config.json").write_text(json.dumps(config))
    shown = Page(page([view_of(folder) for folder in folders]))
    assert list(shown.lines["Loss of the objective"]) == ["first", "second"]
    assert shown.texts["h3"].count("first") == 4, "problems, rollouts, search, examples"
    compared = next(t for t in shown.texts["table"] if "--lr" in t and "--tp" not in t)
    assert "".join(compared.split()) == "flagdefaultfirstsecond--lr–1e-052e-05"
    assert "--rollout-engineembeddedsglangsglang" in shown.rows
    assert "--objectiverasftrasftrasft" in shown.rows


@pytest.mark.parametrize("missing", ["metrics.jsonl", "rollouts.jsonl"])
def test_page_without_one_of_the_files_shows_the_other(missing: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / missing).unlink()
    shown = Page(page([view_of(folder)]))
    assert "Verdicts by refresh" in shown.charts, "from the rollouts, or from the metrics"
    assert ("Loss of the objective" in shown.charts) == (missing != "metrics.jsonl")
    assert ("Length of the rollouts" in shown.charts) == (missing != "rollouts.jsonl")
    assert "missing" in {a.get("class") for a in shown.tags("p")}


def test_page_of_empty_files_has_no_charts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (folder / name).write_text("")
    assert Page(page([view_of(folder)])).charts == {}


def test_fields_that_an_own_function_reads_stand_beside_its_problem(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    row = {
        "problem": "an order",
        "response": "{}",
        "answer": {"no": "gold answer"},
        "wanted": {"city": "Oslo"},
    }
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"id": f"p{i}", **row}) + "\n" for i in range(8)))
    flags = {"verify": {"verify_function": "own.py:grade"}, "data": {"train_data": [str(data)]}}
    (folder / "config.json").write_text(json.dumps({"rasft": flags, "megatron": {}}))
    text = Page(page([read_view(read_run(folder), None, 3)])).text
    assert "an order" in text
    assert "Oslo" in text and "gold answer" in text
