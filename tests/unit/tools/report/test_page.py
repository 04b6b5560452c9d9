"""The page shows the run's numbers, and what a model wrote stays text."""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.tools.report.examples import MAX_TEXT_CHARS
from megatron_rasft.tools.report.markup import data, embedded, tag
from megatron_rasft.tools.report.page import page
from megatron_rasft.tools.report.records import read_run
from megatron_rasft.tools.report.rollouts import pick_examples, read_statistics
from megatron_rasft.tools.report.views import Problem, RunView
from tests.unit.tools.report.reading import Page
from tests.unit.tools.report.synthetic import write_run

HOSTILE = "</script></pre><img src=x onerror=alert(1)><!-- \" ' & ]]> <script>alert(2)</script>"


def view_of(folder: Path, **problems: Problem) -> RunView:
    records = read_run(folder)
    view = RunView(records, problems=problems)
    if records.rollouts_path is not None:
        view.rollouts = read_statistics(records.rollouts_path)
        view.examples = pick_examples(records.rollouts_path, view.rollouts.histories(), 3)
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
    assert f"Tokens trained{tokens:,}, prompts included" in shown.rows
    assert f"Rollouts{len(rollouts)} at {len(refreshes)} refreshes, {sampled:,} tokens" in shown.rows
    assert (
        f"Rollouts correct{refreshes[-1]['verify/solve_rate']:.1%} at the last refresh, after step 9"
        in shown.rows
    )
    assert "Held-out solved12.5% after step 0, 43.8% after step 12" in shown.rows
    correct = sum(r["verdict"] == "correct" for r in rollouts)
    share = f"{correct / len(rollouts):.1%}"
    assert any(row.startswith("correct") and row.endswith(share) for row in shown.rows)
    for title, name in {
        "Loss of the objective": "objective/loss",
        "Gradient norm": "training/grad_norm",
    }.items():
        ((series,), expected) = (shown.lines[title], [(r["step"], r[name]) for r in steps])
        assert [p[2] for p in series["points"]] == [step for step, _ in expected]
        assert [p[3] for p in series["points"]] == pytest.approx([value for _, value in expected], rel=1e-4)
    (series,) = shown.lines["Held-out problems solved"]
    assert [p[2:] for p in series["points"]] == [[0, 0.125], [12, 0.4375]]
    histories = view_of(folder).rollouts.histories()  # type: ignore[union-attr]
    never = [
        i for i in histories if not any(r["verdict"] == "correct" for r in rollouts if r["problem_id"] == i)
    ]
    assert any(row.startswith("never solved") and f"ever right{len(never)}" in row for row in shown.rows)


def test_what_a_model_wrote_stays_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / HOSTILE.replace("/", "|"))
    rollouts = lines_of(folder / "rollouts.jsonl")
    for rollout in rollouts:
        rollout["problem_id"] += HOSTILE
        for name in ("text", "verdict", "verdict_reason", "finish_reason", "filtered_by"):
            rollout[name] = HOSTILE
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    rooms = {"objective": {"objective": HOSTILE}, "data": {"train_data": [HOSTILE]}}
    (folder / "config.json").write_text(json.dumps({"rasft": rooms, "megatron": {"hf_model": HOSTILE}}))
    ids = {rollout["problem_id"] for rollout in rollouts}
    view = view_of(folder, **dict.fromkeys(ids, Problem(HOSTILE, HOSTILE, HOSTILE)))
    view.notes.append(HOSTILE)
    shown = Page(page([view]))
    assert not shown.tags("img")
    assert HOSTILE in shown.texts["pre"] and HOSTILE in shown.texts["td"]
    scripts = [a for a in shown.tags("script") if "type" not in a]
    assert len(scripts) == 1, "the page's own"
    names = {name for _, attributes in shown.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name == "src"}


def test_page_asks_for_nothing_and_runs_its_own_script_only(tmp_path: Path) -> None:
    shown = Page(page([view_of(write_run(tmp_path / "run"))]))
    assert all((a.get("href") or "#").startswith("#") for _, a in shown.elements)
    assert not shown.tags("link") and "url(" not in shown.texts["style"][0]
    (policy,) = (
        a["content"] or "" for a in shown.tags("meta") if a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(shown.texts["script"][-1].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_what_is_embedded_cannot_end_its_element() -> None:
    assert json.loads(Page(data([HOSTILE])).texts["script"][0]) == [HOSTILE]
    with pytest.raises(ValueError, match="holds the end"):
        embedded("style", "a {} </STYLE>")
    assert Page(tag("p", "a\x00b\ud800c\td")).texts["p"] == ["a\ufffdb\ufffdc\td"]


def test_long_text_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rollouts = lines_of(folder / "rollouts.jsonl")
    for rollout in rollouts:
        rollout["text"] = "begin " + "x" * 100_000 + " \\boxed{7}"
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    texts = Page(page([view_of(folder)])).texts["pre"]
    assert texts and all(len(text) < MAX_TEXT_CHARS + 100 for text in texts)
    assert all(
        t.startswith("begin ") and t.endswith("\\boxed{7}") and "94,016 characters left out" in t
        for t in texts
    )


def test_several_runs_are_drawn_over_each_other_and_their_settings_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))]
    for folder, lr in zip(folders, ("1e-05", "2e-05")):
        rooms = {
            "objective": {"objective": "rasft"},
            "rollout": {"rollout_engine": "sglang", "rollout_num_samples": 4},
        }
        (folder / "config.json").write_text(json.dumps({"rasft": rooms, "megatron": {"lr": lr, "tp": "2"}}))
    shown = Page(page([view_of(folder) for folder in folders]))
    assert [series["label"] for series in shown.lines["Loss of the objective"]] == ["first", "second"]
    assert shown.texts["h3"].count("first") == 3, "solvability, rollouts, examples"
    compared = next(t for t in shown.texts["table"] if "--lr" in t and "--tp" not in t)
    assert compared == "flagdefaultfirstsecond--lr–1e-052e-05"
    assert "--rollout-engineembeddedsglangsglang" in shown.rows
    assert "--objectiverasftrasftrasft" in shown.rows


def test_page_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    only_rollouts = Page(page([view_of(folder)]))
    assert "No metrics" in only_rollouts.text and "Verdicts by refresh" in only_rollouts.texts["figcaption"]
    write_run(tmp_path / "run")
    (folder / "rollouts.jsonl").unlink()
    only_metrics = Page(page([view_of(folder)]))
    assert (
        "No stored rollouts" in only_metrics.text
        and "Verdicts by refresh" in only_metrics.texts["figcaption"]
    )
    assert "Loss of the objective" in only_metrics.lines
    (folder / "rollouts.jsonl").write_text("")
    (folder / "metrics.jsonl").write_text("")
    nothing = Page(page([view_of(folder)]))
    assert "No metrics" in nothing.text and "No rollouts" in nothing.text
