"""tools/evaluate.py as a user runs it: from a folder, a checkpoint and a server, on two ranks, after a kill, and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rasft.rollout.store import read_rollouts
from megatron_rasft.tools.evaluation.output_folder import OutputFolder
from megatron_rasft.types import Rollout
from tests.functional import launching
from tests.functional.conftest import Workshop
from tests.functional.launching import ENVIRONMENT, REPOSITORY
from tests.servers.running import NEWEST, ServerPool
from tests.tiny_policy import write_sums
from tools import evaluate

TOOL = REPOSITORY / "tools" / "evaluate.py"
NUM_PROBLEMS, NUM_SAMPLES = 12, 4


def command(workshop: Workshop, output: Path, *more: str) -> list[str]:
    questions = workshop.root / "questions.jsonl"
    if not questions.exists():
        write_sums(questions, NUM_PROBLEMS, seed=7)
    return [
        *("run", "--output", str(output), "--benchmarks", f"sums={questions}", "--prompt-suffix", ""),
        *("--num-samples", str(NUM_SAMPLES), "--max-new-tokens", "12", "--batch-size", "16"),
        *("--verify-num-workers", "1", *more),
    ]


def run_command(flags: list[str]) -> str:
    """Runs the command that a user types, in a new interpreter; returns its standard output."""
    done = subprocess.run(
        [sys.executable, str(TOOL), *flags],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(folder: Path, flags: list[str], world_size: int = 1) -> str:
    """Runs the tool in forked processes, which saves ten seconds of imports each; returns their output."""
    outcome = launching.run(folder, flags, world_size, program=TOOL, has_launcher=world_size > 1)
    assert outcome.codes == [0] * world_size, outcome.output
    return outcome.output


def samples(output: Path) -> list[Rollout]:
    return list(read_rollouts(output / "samples" / "sums.jsonl"))


@pytest.fixture(scope="module")
def evaluated(workshop: Workshop) -> Path:
    """The output folder of an evaluation of the policy."""
    output = workshop.root / "evaluated"
    flags = command(workshop, output, "--model", str(workshop.policy))
    assert "sums: 48 of 48 samples" in run_command(flags)
    return output


def test_samples_are_graded_and_tabulated(evaluated: Path, capsys: pytest.CaptureFixture) -> None:
    rollouts = samples(evaluated)
    assert len(rollouts) == NUM_PROBLEMS * NUM_SAMPLES
    golds = {
        f"sum{i}": row for i, row in enumerate(map(json.loads, (evaluated.parent / "questions.jsonl").open()))
    }
    for rollout in rollouts:
        last = rollout.text.rpartition("=")[2].strip()
        is_right = last == golds[rollout.problem_id]["answer"]
        assert (rollout.verdict == "correct") == is_right or not last.isdigit(), rollout.text
    accuracy = sum(r.verdict == "correct" for r in rollouts) / len(rollouts)
    assert 0 < accuracy < 1, "the policy solves some problems"
    label, (summary,) = OutputFolder(evaluated).read_summaries()
    assert label == "policy" and summary.accuracy == pytest.approx(accuracy)
    assert f"{100 * accuracy:.2f} [" in (evaluated / "results.md").read_text()
    assert (evaluated / "results.csv").exists() and (evaluated / "results.tex").exists()

    assert evaluate.main(["show", str(evaluated), "--verdict", "wrong", "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("sample ") == 2 and "wrong" in shown and "correct" not in shown
    assert evaluate.main(["table", str(evaluated), str(evaluated), "--format", "latex"]) == 0
    assert capsys.readouterr().out.count("policy") == 2


def test_server_gives_the_same_samples_as_its_folder(
    workshop: Workshop, server_pool: ServerPool, tmp_path: Path
) -> None:
    server = server_pool.get(NEWEST, workshop.policy, "--dtype", "float32")
    greedy = ["--model", str(workshop.policy), "--temperature", "0", "--num-samples", "1"]
    run(tmp_path / "logs", command(workshop, tmp_path / "folder", *greedy))
    run(tmp_path / "logs", command(workshop, tmp_path / "server", *greedy, "--server", server.url))
    answers = [
        {r.problem_id: (r.response_ids, r.finish_reason, r.verdict) for r in samples(tmp_path / name)}
        for name in ("folder", "server")
    ]
    assert len(answers[0]) == NUM_PROBLEMS and answers[0] == answers[1]


def test_killed_evaluation_continues_to_the_same_result(
    workshop: Workshop, evaluated: Path, tmp_path: Path
) -> None:
    flags = command(workshop, tmp_path / "out", "--model", str(workshop.policy))
    output = tmp_path / "out"
    (output / "samples").mkdir(parents=True)
    (output / "protocol.json").write_text((evaluated / "protocol.json").read_text())
    whole = (evaluated / "samples" / "sums.jsonl").read_bytes()
    (output / "samples" / "sums.jsonl").write_bytes(whole[: int(len(whole) * 0.45)])
    said = run(tmp_path / "logs", flags)
    assert " of 48 samples are stored" in said and "sums: 0 of 48 samples are" not in said
    # In another batch, log-probabilities may be rounded differently. Responses and verdicts are the same
    said_then = {(r.problem_id, r.sample_index): (r.response_ids, r.verdict) for r in samples(evaluated)}
    assert {(r.problem_id, r.sample_index): (r.response_ids, r.verdict) for r in samples(output)} == said_then
    scores = [OutputFolder(folder).read_summaries()[1][0].scores for folder in (output, evaluated)]
    assert scores[0] == scores[1]


def test_checkpoint_on_two_ranks_gives_the_samples_of_its_exported_folder(
    workshop: Workshop, tmp_path: Path
) -> None:
    save, folder = tmp_path / "save", tmp_path / "folder"
    workshop.train(save, ["--train-iters", "2", "--export-hf", str(folder), "--objective", "sft"])
    run(tmp_path / "logs", command(workshop, tmp_path / "a", "--model", str(folder)))
    parallel = ["--checkpoint", str(save), "--tensor-model-parallel-size", "2"]
    run(tmp_path / "logs-parallel", command(workshop, tmp_path / "b", *parallel), world_size=2)
    a, b = samples(tmp_path / "a"), samples(tmp_path / "b")
    assert [(r.problem_id, r.response_ids, r.verdict) for r in a] == [
        (r.problem_id, r.response_ids, r.verdict) for r in b
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--temperature", "0.5"], "temperature 1.0, not 0.5"),
        (["--num-samples", "0"], "--num-samples"),
        (["--temperature", "0"], "--temperature 0"),
        (["--pass-k", "9"], "--pass-k"),
        (["--benchmarks", "mathematics"], "--benchmarks: 'mathematics'"),
        (["--benchmarks", "aime24"], "--data-folder"),
        (["--chat-template", "nowhere.jinja"], "chat_template None"),
    ],
)
def test_error_is_one_line_and_comes_before_a_model_is_loaded(
    more: list[str], message: str, workshop: Workshop, evaluated: Path, capsys: pytest.CaptureFixture
) -> None:
    assert evaluate.main(command(workshop, evaluated, "--model", str(workshop.policy), *more)) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and message in printed


def test_error_of_both_ranks_is_printed_once(workshop: Workshop, tmp_path: Path) -> None:
    flags = command(workshop, tmp_path, "--model", str(workshop.policy), "--tensor-model-parallel-size", "4")
    outcome = launching.run(tmp_path / "logs", flags, 2, program=TOOL)
    assert not {0, None} & {*outcome.codes}, outcome.output
    lines = [line for line in outcome.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "4" in lines[0], outcome.output


def test_missing_model_results_and_checkpoint_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    benchmark = tmp_path / "own.jsonl"
    benchmark.write_text('{"problem": "1+1", "answer": "2"}\n')
    flags = ["--output", str(tmp_path / "out"), "--benchmarks", f"own={benchmark}"]
    assert evaluate.main(flags) == 2, "run is the default command"
    assert "--model" in capsys.readouterr().err
    assert evaluate.main([*flags, "--checkpoint", str(tmp_path)]) == 2
    assert f"{tmp_path}/config.json" in capsys.readouterr().err
    assert evaluate.main([*flags, "--checkpoint", str(tmp_path), "--model", str(tmp_path)]) == 1
    assert f"--checkpoint {tmp_path}" in capsys.readouterr().err
    assert evaluate.main(["table", str(tmp_path)]) == 1
    assert f"{tmp_path} is not a folder of an evaluation" in capsys.readouterr().err
    assert evaluate.main(["show", str(tmp_path)]) == 1
    assert f"{tmp_path} is not a folder of an evaluation" in capsys.readouterr().err
