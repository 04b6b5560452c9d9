"""The command over servers without a network: which stored samples it goes on from, and which it refuses."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_rasft.tools.evaluation.server_engine import Servers
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
    assert command(model, output, questions) == 0 and len(world.bodies) == 4, "nothing was drawn again"
    other = write_questions(tmp_path / "other.jsonl", "1")
    assert command(model, output, questions, "--benchmarks", f"other={other}") == 0
    num_drawn = len(world.bodies)

    write_questions(questions, "1", "2")  # the gold answer is corrected
    capsys.readouterr()
    assert command(model, output, questions) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "sums.jsonl was drawn from" in said and "delete the samples" in said
    assert len(world.bodies) == num_drawn
    (output / "samples" / "sums.jsonl").unlink()
    assert command(model, output, questions) == 0 and len(world.bodies) == num_drawn + 4


def test_a_deadline_of_nothing_is_refused(
    model: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(model, tmp_path / "out", tmp_path / "none.jsonl", "--deadline-s", "0") == 2
    assert "--deadline-s must be > 0, got 0" in capsys.readouterr().err


def test_a_model_folder_that_names_no_positions_has_those_of_its_family(
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
    assert said.count("\n") == 1 and "--expert-model-parallel-size must be 1" in said and "got 2" in said


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
    assert "drawn with weights 'step 12 of /far', not 'step 13 of /far'" in capsys.readouterr().err
    assert len(world.bodies) == 4


def write_checkpoint(save: Path, step: int, weights: bytes) -> None:
    folder = save / f"iter_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".metadata").write_bytes(b"where the tensors lie")
    (folder / "__0_0.distcp").write_bytes(weights)
    (save / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_samples_are_kept_for_the_same_checkpoint_only_and_it_is_the_one_that_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save, output, loaded = tmp_path / "save", tmp_path / "out", []

    @contextmanager
    def open_engine(args: Any, servers: None, megatron_flags: list[str]) -> Iterator[str]:
        loaded.append(megatron_flags)
        yield "engine"

    monkeypatch.setattr(evaluate, "_open_engine", open_engine)
    monkeypatch.setattr(evaluate, "_sample_all", lambda *_: (output / "results.md").touch())
    questions = write_questions(tmp_path / "sums.jsonl", "1")
    flags = ["--model", str(model), "--checkpoint", str(save), "--benchmarks", f"sums={questions}"]
    flags += ["--output", str(output)]
    write_checkpoint(save, 7, b"first")
    assert evaluate.main(flags) == 0 and loaded == [["--ckpt-step", "7"]]
    write_checkpoint(save, 14, b"later")
    assert evaluate.main(flags) == 2 and "drawn with weights 'step 7, " in capsys.readouterr().err
    assert evaluate.main([*flags, "--ckpt-step", "7"]) == 0 and loaded[1][-2:] == ["--ckpt-step", "7"]
    write_checkpoint(save, 7, b"again")  # another training, to the same step
    assert evaluate.main(flags) == 2 and len(loaded) == 2
    assert "drawn with weights 'step 7, " in capsys.readouterr().err
