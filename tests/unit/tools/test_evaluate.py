"""The command with servers that need no network: the stored samples from which it continues, and those it refuses."""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_rasft.tools.evaluation.benchmark_sampling import Engine
from megatron_rasft.tools.evaluation.server_engine import Servers
from megatron_rasft.types import Request, Response, SamplingParams
from tests.tiny_policy import write_model
from tests.unit.tools.evaluation.conftest import World
from tools import evaluate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(["12", "12"])
    transport = httpx.MockTransport(world)
    monkeypatch.setattr(evaluate, "Servers", partial(Servers, transport=transport, async_transport=transport))
    return world


def command(model: Path, output: Path, questions: Path, *more: str, server: str = "http://a:1") -> int:
    flags = ["run", "--model", str(model), "--output", str(output), "--server", server]
    flags += [
        "--benchmarks",
        f"sums={questions}",
        "--num-samples",
        "2",
        "--verify-num-workers",
        "1",
        "--prompt-suffix",
        "",
        *more,
    ]
    return evaluate.main(flags)


def write_questions(path: Path, *answers: str) -> Path:
    rows = [{"problem": f"{number}+1=", "answer": answer} for number, answer in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_are_kept_for_the_same_file_only(
    model: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, questions = tmp_path / "out", write_questions(tmp_path / "sums.jsonl", "1", "3")
    assert command(model, output, questions) == 0
    assert command(model, output, questions) == 0 and len(world.bodies) == 4, "no sample is drawn twice"
    other = write_questions(tmp_path / "other.jsonl", "1")
    assert command(model, output, questions, "--benchmarks", f"other={other}") == 0
    num_drawn = len(world.bodies)

    write_questions(questions, "1", "2")  # changes a gold answer
    capsys.readouterr()
    assert command(model, output, questions) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "sums.jsonl" in said and "sha256" in said and "--output" in said
    assert len(world.bodies) == num_drawn
    (output / "samples" / "sums.jsonl").unlink()
    assert command(model, output, questions) == 0 and len(world.bodies) == num_drawn + 4


def test_flags_in_a_file(
    model: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions, config = write_questions(tmp_path / "sums.jsonl", "1", "3"), tmp_path / "evaluate.toml"
    config.write_text(
        f'prompt_suffix = ""\ntemperature = 0\nnum_samples = 1\nbenchmarks = ["sums={questions}"]\n'
    )
    flags = ["--model", str(model), "--output", str(tmp_path / "out"), "--server", "http://a:1"]
    flags += ["--config", str(config), "--verify-num-workers", "1"]
    assert evaluate.main(flags) == 0 and len(world.bodies) == 2
    config.write_text("num_samples = 1\ntemprature = 0\n")
    assert evaluate.main(flags) == 2
    assert f"{config}, line 2: " in capsys.readouterr().err
    config.write_text("num_samples = 'one'\n")
    assert evaluate.main(["run", *flags]) == 2
    assert f"{config}, line 1: --num-samples" in capsys.readouterr().err


def test_deadline_of_zero_is_refused(
    model: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(model, tmp_path / "out", tmp_path / "none.jsonl", "--deadline-s", "0") == 2
    assert "--deadline-s" in capsys.readouterr().err


def test_context_of_the_family_is_used_if_the_model_folder_names_none(
    model: Path, world: World, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert command(folder, tmp_path / "out", write_questions(tmp_path / "sums.jsonl", "1")) == 0


@pytest.mark.parametrize(
    "flags", [["--expert-model-parallel-size", "2"], ["--bf16", "--expert-model-parallel-size=2"]]
)
def test_expert_parallelism_is_refused_before_anything_is_read(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--model", str(tmp_path / "gone"), "--output", str(tmp_path / "out"), *flags]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--expert-model-parallel-size" in said and "got 2" in said


def test_error_of_one_rank_names_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--model",
        str(tmp_path / "gone"),
        "--output",
        str(tmp_path),
        "--expert-model-parallel-size",
        "2",
    ]
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    assert evaluate.main(flags) == 2
    assert "rank 1" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first rank of the node prints it
    assert evaluate.main(flags) == 2
    assert capsys.readouterr().err == ""


def test_samples_are_kept_for_the_same_served_weights_only(
    model: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, questions = tmp_path / "out", write_questions(tmp_path / "sums.jsonl", "1", "3")
    assert command(model, output, questions) == 0
    assert command(model, output, questions, server="http://b:2") == 0, "another server of these weights"
    assert len(world.bodies) == 4
    world.labels["a"] = "13"
    capsys.readouterr()
    assert command(model, output, questions) == 2
    said = capsys.readouterr().err
    assert "weights" in said and "'step 12 of /far'" in said and "'step 13 of /far'" in said
    assert len(world.bodies) == 4


def write_checkpoint(save: Path, step: int, weights: bytes) -> None:
    folder = save / f"iter_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".metadata").write_bytes(b"where the tensors lie")
    (folder / "__0_0.distcp").write_bytes(weights)
    (save / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_samples_are_kept_for_the_same_checkpoint_only_and_it_is_the_one_that_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save, output, loaded = tmp_path / "save", tmp_path / "out", []

    @contextmanager
    def open_engine(args: Any, servers: Any, megatron_flags: list[str]) -> Iterator[Engine]:
        loaded.append(megatron_flags)
        yield FixedEngine()

    questions = write_questions(tmp_path / "sums.jsonl", "1")
    flags = ["--model", str(model), "--checkpoint", str(save), "--benchmarks", f"sums={questions}"]
    flags += ["--output", str(output), "--num-samples", "1", "--verify-num-workers", "1"]

    def run(*more: str) -> int:
        return evaluate.main([*flags, *more], open_engine)

    write_checkpoint(save, 7, b"first")
    assert run() == 0 and loaded == [["--ckpt-step", "7"]]
    write_checkpoint(save, 14, b"later")
    assert run() == 2 and "'step 7, " in capsys.readouterr().err
    assert run("--ckpt-step", "7") == 0 and loaded[1][-2:] == ["--ckpt-step", "7"]
    write_checkpoint(save, 7, b"again")  # weights of another training run at the same step
    assert run("--ckpt-step", "7") == 2 and len(loaded) == 2
    assert "'step 7, " in capsys.readouterr().err


class FixedEngine:
    """An engine that always gives the same response."""

    max_positions = 100

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        response = Response(token_ids=[7, 8, 9], logprobs=[-1.0] * 3, finish_reason="stop")
        return [[response] * len(request.seeds) for request in requests]


def test_own_function_grades_samples_that_are_kept_for_the_same_code_only(
    model: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, questions, function = tmp_path / "out", tmp_path / "own.jsonl", tmp_path / "own.py"
    questions.write_text(json.dumps({"problem": "1+1=", "reward": 0.4}))
    function.write_text("def grade(row, response): return row['reward'], f'saw {len(response)}'")
    flags = ["--verify-function", f"{function}:grade", "--verify-correct-reward", "0.4"]
    assert command(model, output, questions, *flags) == 0
    summary = json.loads((output / "summary.json").read_text())["benchmarks"][0]
    assert (summary["kind"], summary["accuracy"], summary["mean_reward"]) == ("own", 1.0, 0.4)
    assert summary["majority_at"] == {} and summary["no_answer_frac"] == 0
    assert "mean reward 0.4" in (output / "results.md").read_text()
    stored = [json.loads(line) for line in (output / "samples" / "sums.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in stored] == [0.4, 0.4]

    num_drawn = len(world.bodies)
    for wrong in (["--verify-correct-reward", "0.5"], []):
        capsys.readouterr()
        if not wrong:
            function.write_text("def grade(row, response): return True")
        assert command(model, output, questions, *flags, *wrong) == 2
        said = capsys.readouterr().err
        assert "graded_by" in said and "own.py:grade" in said and "--output" in said
    function.write_text("def grade(row, response): return row['absent']")
    assert command(model, tmp_path / "other", questions, *flags) == 2
    assert "KeyError" in capsys.readouterr().err
    assert len(world.bodies) == num_drawn, "nothing is sampled for a function that fails"


class WatchedEngine(FixedEngine):
    """An engine that returns its responses after the live line has shown how many samples are finished."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.num_finished = 0

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        printed = ""
        while f"sums: {self.num_finished} of 4 samples" not in printed:
            time.sleep(0.01)
            printed += self.capsys.readouterr().out
        self.num_finished += sum(len(request.seeds) for request in requests)
        return super().generate(requests, params)


def test_progress_is_shown_while_a_batch_is_sampled(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = WatchedEngine(capsys)

    @contextmanager
    def open_engine(args: Any, servers: Any, megatron_flags: list[str]) -> Iterator[Engine]:
        yield engine

    questions = write_questions(tmp_path / "sums.jsonl", "1", "2")
    flags = ["--model", str(model), "--benchmarks", f"sums={questions}", "--output", str(tmp_path / "out")]
    flags += ["--num-samples", "2", "--verify-num-workers", "1", "--batch-size", "2", "--live-s", "0.01"]
    assert evaluate.main(flags, open_engine) == 0
    assert engine.num_finished == 4 and "sums: 4 of 4 samples" in capsys.readouterr().out


def test_a_folder_that_is_missing_or_not_of_an_evaluation_is_said_with_others_near_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "protocol.json").touch()
    (tmp_path / "checkpoints").mkdir()
    for command in ("table", "show"):
        for wrong in ("befor", "checkpoints", "."):
            assert evaluate.main([command, str(tmp_path / wrong)]) == 1
            said = capsys.readouterr().err
            assert str(tmp_path / wrong) in said and "--output" in said and str(tmp_path / "before") in said
            assert "summary.json does not exist" not in said
    assert evaluate.main(["table", str(tmp_path / "before")]) == 1
    assert "summary.json does not exist" in capsys.readouterr().err


def test_a_command_has_its_own_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    monkeypatch.setattr(evaluate, "use_own_folder", lambda: made.append(True))
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "table", "absent"])
    assert evaluate.main() == 1 and made == [True]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("run --output out --samples 4", "--num-samples"),
        ("run --output out --server http://a:1 --model-name-or-path x", "--model[?]"),
        ("run --output out --max-tokens 4", "--max-new-tokens"),
        ("run --output out --tensor-parallel-size 2", "--tensor-model-parallel-size"),
        ("run --output out --num-samples 4 5", "--num-samples takes a single value"),
        ("show out --limt 3", "--limit"),
    ],
)
def test_a_wrong_flag_is_met_by_the_commands_own_flags(
    capsys: pytest.CaptureFixture[str], words: str, meant: str
) -> None:
    assert evaluate.main(words.split()) == 2
    assert re.search(meant, capsys.readouterr().err)
