"""Flags in TOML files: they become words of the command line, and errors name the file and the line."""

import math
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.command_line import check_flags, run_parser
from megatron_rasft.config.config_file import flags_text, naming_lines, read_flags
from megatron_rasft.config.parser import FlagParser
from megatron_rasft.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(folder: Path, text: str, *flags: str) -> Namespace:
    (folder / "run.toml").write_text(text, encoding="utf-8")
    argv = ["--config", "run.toml", *flags]
    with naming_lines(argv):
        return check_flags(argv)


def test_keys_are_flags_with_hyphens_or_underscores(folder: Path) -> None:
    args = parse(
        folder,
        """
        objective = "dft"
        micro-batch-size = 2
        [numbers]
        lr = 1e-5
        clip_grad = 1
        [data]
        train_data = ["a.jsonl", "b.jsonl"]
        data_prompt_suffix = "--x = 1"
        data_code_prompt_suffix = ""
        [switches]
        bf16 = true
        no_rope_fusion = true
        objective_dft_factor = false
        [plan]
        num_gpus = 8
        """,
    )
    assert (args.objective, args.micro_batch_size, args.lr, args.clip_grad) == ("dft", 2, 1e-5, 1.0)
    assert args.train_data == ["a.jsonl", "b.jsonl"] and args.config == ["run.toml"]
    assert (args.data_prompt_suffix, args.data_code_prompt_suffix) == ("--x = 1", "")
    assert args.bf16 and not args.apply_rope_fusion and not args.objective_dft_factor
    assert args.given_flags["lr"] == "--lr" and "num_layers" not in args.given_flags


def test_later_files_and_the_command_line_win(folder: Path) -> None:
    (folder / "base.toml").write_text("lr = 1\nseed = 1\nobjective_dft_factor = false", encoding="utf-8")
    flags = ["--objective-dft-factor", "--seed", "3"]
    for files in (["base.toml", "run.toml"], ["base.toml", "--config", "run.toml"]):
        (folder / "run.toml").write_text("lr = 2", encoding="utf-8")
        args = check_flags([*flags, "--config", *files])
        assert (args.lr, args.seed, args.objective_dft_factor) == (2.0, 3, True)


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("lr = 1\nlearning_rate = 1", 2, "--lr"),
        ("[numbers]\n# seed = 1\n\nseed = 'one'", 4, "--seed"),
        ("lr = true", 1, "--lr"),
        ("seq_length = [1, 2]", 1, "--seq-length takes a single value"),
        ("seq_length = 4096.5", 1, "--seq-length"),
        ("bf16 = false", 1, "--bf16 can only be switched on"),
        ("bf16 = 1", 1, "--bf16"),
        ("\nskip-train = true", 2, "--skip-train is refused"),
        ("rollout_top_p = 2", 1, "--rollout-top-p"),
        ("objective_dft_factor = false\nrollout_num_samples = -1", 2, "--rollout-num-samples"),
        ("objective = 'rasf'", 1, "rasft"),
        ("rollout_lag = 1", 1, "--rollout-lag"),
        ("[a]\nlr = 1\n[b]\nlr = 2", 2, "lr is set before"),
        ("micro-batch-size = 1\nmicro_batch_size = 1", 2, "micro_batch_size is set before"),
        ("[a.b]\nlr = 1", 1, "b is neither"),
        ("save = 2026-11-30", 1, "save is neither"),
        ("config = 'another.toml'", 1, "config"),
        ("fp8 = 'hybrid'", 1, "--fp8-format"),
        ("plan = 3", 1, "--plan"),
    ],
)
def test_wrong_key_or_value_names_its_line(folder: Path, text: str, line: int, named: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse(folder, text)
    message = str(raised.value)
    assert message.startswith(f"run.toml, line {line}: ") and named in message


def test_value_of_a_list_may_begin_with_a_hyphen(folder: Path) -> None:
    args = parse(folder, "train_data = ['-a.jsonl', '--lr=5.jsonl', 'b.jsonl']\nseed = 3")
    assert args.train_data == ["-a.jsonl", "--lr=5.jsonl", "b.jsonl"] and args.seed == 3
    assert "lr" not in args.given_flags and args.given_values["train_data"] == args.train_data
    with pytest.raises(ValueError, match=r"^run\.toml, line 1: .*--curriculum") as raised:
        parse(folder, "curriculum_mode = '-off'")
    assert "\0" not in str(raised.value)


def test_wrong_file_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"missing\.toml"):
        check_flags(["--config", "missing.toml"])
    with pytest.raises(ValueError, match=r"run\.toml.*line 2"):
        parse(folder, "lr = 1\nobjective = rasft")
    with pytest.raises(ValueError, match="--config"):
        check_flags(["--config"])
    (folder / "binary.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"binary\.toml"):
        check_flags(["--config", "binary.toml"])


def test_typed_flag_is_not_blamed_on_a_file(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^--rollout-top-p must be"):
        parse(folder, "rollout_top_p = 0.5", "--rollout-top-p", "2")


def test_errors_of_files_name_the_line_too(folder: Path) -> None:
    (folder / "run.toml").write_text("hf_model = 'missing'", encoding="utf-8")
    with pytest.raises(DataError, match=r"^run\.toml, line 1: "), naming_lines(["--config", "run.toml"]):
        raise DataError("--hf-model missing is no folder")
    with pytest.raises(DataError, match=r"^a disk"), naming_lines(["--config", "run.toml"]):
        raise DataError("a disk is full")


def test_table_of_a_tool_is_for_that_tool(folder: Path) -> None:
    (folder / "run.toml").write_text("lr = 1\n[plan]\nnum_gpus = 8\n", encoding="utf-8")
    assert [flag.name for flag in read_flags("run.toml")] == ["lr"]
    assert [(flag.name, flag.line) for flag in read_flags("run.toml", "plan")] == [("num_gpus", 3)]


@pytest.mark.parametrize(
    "value",
    [
        "text",
        'quotes " and \\',
        "lines\nand\ttabs",
        "\x7f\x1b ü ∑ 🙂",
        1,
        -1,
        1e-5,
        1e22,
        math.inf,
        True,
        ["a", 'b"'],
        [1, 2],
    ],
)
def test_written_values_are_read_back(value: Any) -> None:
    text = flags_text({"group": {"flag": value, "unset": None, "empty": []}}, "comment")
    assert tomllib.loads(text) == {"group": {"flag": value}}


def test_words_after_two_hyphens_are_no_flags() -> None:
    parser = FlagParser()
    parser.add_argument("--lr", type=float)
    parser.add_argument("others", nargs="*")
    args = parser.parse_args(["--", "--lr", "3"])
    assert args.lr is None and args.given_flags == {} and args.others == ["--lr", "3"]


def test_given_values_are_those_of_a_file(folder: Path) -> None:
    parser, _ = run_parser()
    words = "--bf16 --no-rope-fusion --no-objective-dft-factor --lr 1e-5 --train-data a b --seed=3 --attention-backend flash"
    given = parser.parse_args(words.split()).given_values
    assert given == {
        "bf16": True,
        "no_rope_fusion": True,
        "objective_dft_factor": False,
        "lr": 1e-5,
        "train_data": ["a", "b"],
        "seed": 3,
        "attention_backend": "flash",
    }
    (folder / "again.toml").write_text(flags_text({"given": given}, ""), encoding="utf-8")
    assert parser.parse_args(["--config", "again.toml"]).given_values == {**given, "config": ["again.toml"]}
