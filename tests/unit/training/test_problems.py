"""Reading a run's problems: errors name the file and its flag, and every row that is left out is listed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rasft.config import DataConfig, HeldoutConfig, RasftConfig, RolloutConfig, VerifyConfig
from megatron_rasft.errors import DataError
from megatron_rasft.objective.families.likelihood import Sft
from megatron_rasft.objective.families.self_distillation import Sdft
from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.training.problems import Problems, open_replay, read_problems
from megatron_rasft.types import Rollout
from tests.tiny_policy import write_model, write_sums


@pytest.fixture(scope="module")
def args(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    model = write_model(tmp_path_factory.mktemp("hf") / "model")
    return SimpleNamespace(hf_model=str(model), seq_length=128, save=None)


@pytest.mark.parametrize("flag", ["--train-data", "--heldout-data"])
@pytest.mark.parametrize("content", [None, "", "\n\n"], ids=["missing", "empty", "no rows"])
def test_an_unusable_file_is_named_with_its_flag(
    flag: str, content: str | None, args: SimpleNamespace, tmp_path: Path
) -> None:
    good, bad = write_sums(tmp_path / "good.jsonl", 4), tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    files = {"--train-data": str(good), "--heldout-data": str(good), flag: str(bad)}
    config = RasftConfig(
        data=DataConfig(train_data=[files["--train-data"]]),
        heldout=HeldoutConfig(heldout_data=[files["--heldout-data"]]),
    )
    with pytest.raises(DataError) as raised:
        read_problems(args, config)
    message = str(raised.value)
    assert "bad.jsonl" in message and flag in message
    assert message.count("-data") == 1, "the other flag is not named"


def test_own_function_grades_the_first_demonstration_before_the_model_is_built(
    args: SimpleNamespace, tmp_path: Path
) -> None:
    rows, function = tmp_path / "rows.jsonl", tmp_path / "own.py"
    row = {"problem": "1+1=", "response": "2", "wanted": [2]}
    rows.write_text(json.dumps(row) + "\n" + json.dumps({"problem": "?", "response": "3"}))
    function.write_text("def grade(row, response): return int(response) in row['wanted']")
    verify = VerifyConfig(verify_function=f"{function}:grade", verify_num_workers=1)
    config = RasftConfig(data=DataConfig(train_data=[str(rows)]), verify=verify)
    problems, _ = read_problems(args, config)
    assert problems.num == 2, "rows need neither an answer nor tests"
    assert problems.demonstrations[0].check == row
    assert "own.py:grade" in problems.summary and "correct" in problems.summary
    rows.write_text(json.dumps({"problem": "?", "response": "3"}))
    with pytest.raises(ValueError, match=r"--verify-function.*rows.jsonl:1.*KeyError.*own.py:1"):
        read_problems(args, config)


def test_sdft_needs_demonstrations_without_answers_and_gives_them_to_the_teacher(
    args: SimpleNamespace, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"problem": "1+1=", "response": "2"}))
    config = RasftConfig(
        data=DataConfig(train_data=[str(rows)], data_prompt_suffix=""),
        objective=Sdft(objective_sdft_template="{demonstration}-{problem}"),
    )
    problems, _ = read_problems(args, config)
    (row,) = problems.demonstrations
    assert problems.decode(list(row.teacher_prompt_ids)) == "2-1+1=\n"
    assert (
        not read_problems(args, RasftConfig(data=config.data, objective=Sft()))[0]
        .demonstrations[0]
        .teacher_prompt_ids
    )
    rows.write_text(json.dumps({"problem": "1+1="}))
    with pytest.raises(DataError, match="response"):
        read_problems(args, config)


def test_stored_rollouts_are_counted_before_the_model_is_built(args: SimpleNamespace, tmp_path: Path) -> None:
    data = DataConfig(train_data=[str(write_sums(tmp_path / "sums.jsonl", 4))])
    problems, _ = read_problems(args, RasftConfig(data=data))
    assert open_replay(RasftConfig(data=data), problems) is None
    store = RolloutStore(tmp_path / "rollouts.jsonl")
    store.append(
        Rollout(
            problem_id=d.problem_id,
            sample_index=0,
            weight_version=0,
            prompt_ids=list(d.prompt_ids),
            response_ids=[1],
            response_logprobs=[-1.0],
            finish_reason="stop",
            text="",
        )
        for d in problems.demonstrations[:3]
    )
    rollout = RolloutConfig(rollout_engine="replay", rollout_replay=[str(store.path)])
    assert open_replay(RasftConfig(data=data, rollout=rollout), problems) is not None
    assert problems.summary.endswith("replayed        3 (have stored rollouts)")


def test_every_row_that_is_left_out_is_listed_in_save(args: SimpleNamespace, tmp_path: Path) -> None:
    args = SimpleNamespace(**vars(args) | {"save": str(tmp_path)})
    data = write_sums(tmp_path / "rows.jsonl", 2)
    long = json.dumps({"problem": "1 + 1", "response": "1" * 200, "answer": "2"})
    with data.open("a") as file:
        file.write("{\n" * 12 + f"{long}\n" * 11)
    config = DataConfig(train_data=[str(data)], data_bad_rows="skip")
    problems = Problems(args, config, True)
    left_out = tmp_path / "train-data-left-out.txt"
    places = [line.split(": ")[0] for line in left_out.read_text().splitlines()]
    assert places == [f"{data}:{line}" for line in range(3, 26)]
    assert f"and 2 more: {left_out}" in problems.summary
    assert f"and 1 more: {left_out}" in problems.summary


def test_held_out_rows_that_are_left_out_are_counted_on_the_console(
    args: SimpleNamespace, tmp_path: Path
) -> None:
    data = write_sums(tmp_path / "rows.jsonl", 2)
    assert Problems(args, DataConfig(train_data=[str(data)]), True, "--heldout-data").left_out_lines() == []
    with data.open("a") as file:
        file.write("{\n")
    config = DataConfig(train_data=[str(data)], data_bad_rows="skip")
    lines = Problems(args, config, True, "--heldout-data").left_out_lines()
    assert "--heldout-data" in lines[0] and "usable          2" in lines and "faulty          1" in lines
