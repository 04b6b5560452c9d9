"""Help and wrong flags are answered before torch is imported, and no flag of Megatron is taken for a wrong one."""

import subprocess
import sys
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_rasft.config import RasftConfig, help
from megatron_rasft.config.command_line import answer_early, check_flags, run_parser
from megatron_rasft.config.parser import FlagParser, add_flags
from megatron_rasft.config.suggestions import OTHER_NAMES, suggest
from megatron_rasft.flags import flag_name
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.training.arguments import add_arguments, megatron_help

REPOSITORY = Path(__file__).parents[3]
OWN_FLAGS = [flag_name(name) for section in RasftConfig.sections().values() for name in section.flag_fields()]


@pytest.fixture(scope="module")
def full_parser() -> FlagParser:
    """The parser of a run: Megatron's flags and this package's."""
    return add_arguments(add_megatron_arguments(FlagParser()))


def test_overview_names_every_own_flag_in_150_lines() -> None:
    lines = help.overview().splitlines()
    listed = [word for line in lines if line.startswith("  --") for word in line.split() if word[:2] == "--"]
    assert len(lines) <= 150 and max(map(len, lines)) <= 145
    assert set(OWN_FLAGS) <= set(listed)


@pytest.mark.parametrize(
    ("word", "shown", "hidden"),
    [
        ("rollouts", "--rollout-num-samples", "--sync-port"),  # a group
        ("held-out-solve-rate", "--heldout-interval", "--rollout-num-samples"),  # a title of several words
        ("clip_low", "--objective-iw-clip-low", "--rollout-num-samples"),  # a part of a name
        ("SQLite", "--rasft-ref-cache", "--hf-model"),  # a word of a text
    ],
)
def test_help_on_a_word(word: str, shown: str, hidden: str) -> None:
    text = help.about(word)
    assert f"  {shown}" in text and f"  {hidden}" not in text


def test_help_on_megatron_marks_refused_flags() -> None:
    text = " ".join(megatron_help("megatron").split())
    assert "--skip-train [REFUSED" in text and "--lr LR" in text and "--hf-model TEXT" not in text
    assert "[REFUSED" not in megatron_help("lr-warmup-iters")
    assert "--lr-warmup-init" in megatron_help("megatron:lr") and "--seq-length" not in megatron_help(
        "megatron:lr"
    )
    with pytest.raises(ValueError, match="--help=frobnicate"):
        megatron_help("frobnicate")


@pytest.mark.parametrize(
    ("flags", "code", "printed"),
    [
        (["--help"], 0, "--rollout-num-samples"),
        (["--hf-model", "x", "--help=dedup"], 0, "--verify-dedup-ngram"),
        (["--rollout-num-samples", "0"], 2, "--rollout-num-samples"),
        (["--rollout-num-sample", "4"], 2, "--rollout-num-samples"),
        (["--skip-train"], 2, "--skip-train"),
        (["--lr", "1e-5"], 2, "--hf-model"),
        (["--config", "missing.toml"], 2, "missing.toml"),
    ],
)
def test_answers_without_torch(flags: list[str], code: int, printed: str) -> None:
    script = (
        "import runpy, sys; sys.argv = ['pretrain_rasft.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('pretrain_rasft.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *flags], check=False, capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == code
    assert done.stdout.endswith("False\n")
    assert printed in (done.stderr if code else done.stdout) and "Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["megatron", "megatron:lr", "sequence-parallel"])
def test_help_on_megatron_is_left_to_its_parser(word: str, capsys: pytest.CaptureFixture) -> None:
    answer_early(["--hf-model", "x", f"--help={word}"])
    assert capsys.readouterr().out == ""


def test_help_finds_whole_words_in_texts() -> None:
    assert "--verify-filter-format" not in help.about("lr")  # its text has "already"


def test_only_the_first_process_of_a_node_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as stop:
        answer_early(["--no-such-flag"])
    assert stop.value.code == 2 and capsys.readouterr().err == ""
    assert "--no-such-flag" in (tmp_path / "error.json").read_text(), "for torchrun's last lines"


def test_flags_of_megatron_pass() -> None:
    check_flags(
        ["--tensor-model-parallel-size=2", "--lr", "-1", "--train-data", "a.jsonl", "b.jsonl", "--bf16"]
    )
    check_flags(["--attention-backend", "flash", "--no-rope-fusion", "--tokenizer-type", "NullTokenizer"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--objective", "rasf"], "rasft"),
        (["--rollout-top-p", "1.5"], "--rollout-top-p"),
        (["--curriculum-low-end", "nan"], "--curriculum-low-end"),
        (["--train-iter", "3"], "--train-iters"),
        (["--max_steps", "3"], "--train-iters"),
        (["--num-rollout-samples=4"], "--rollout-num-samples"),
        (["--tensor-parallel-size", "2"], "--tensor-model-parallel-size"),
        (["--fp8", "hybrid"], "--fp8-format"),
        (["--sample-num-rollout", "4"], "--rollout-num-samples"),  # order and number of two words
        (["--overlap-gradient-reduction"], "--overlap-grad-reduce"),
        (["--chat-template", "a.jinja"], "--chat-template is refused"),
        (["--chat-templates", "a.jinja"], "--data-chat-template"),  # not the refused one
        (["--lr", "high"], "--lr: invalid float value"),
        (["--micro-batch-size", "1.5"], "--micro-batch-size: invalid int value"),
        (["--skip-train"], "--skip-train is refused"),
        (["-lr", "3"], "mean --lr[?]"),
        (["--learning-rate", "1e-5"], "mean --lr[?]"),
        (["--learning", "rate", "3"], "mean --lr[?]"),
        (["--global", "batch-size", "3"], "mean --global-batch-size[?]"),
        (["--gradient_checkpointing"], "mean --recompute-granularity[?]"),
        (["--lr", "1e-5", "1e-4"], "--lr takes a single value, so '1e-4'"),
        (["--bf16", "True"], "--bf16 takes no value, so 'True'"),
        (["--seed", "3", "two words"], "--seed takes a single value, so 'two words'"),
        (["own.jsonl", "--bf16"], "'own.jsonl' stands before"),
        (
            ["--num-epochs", "3", "--learning-rate=1"],
            "--data-epochs for --num-epochs, --lr for --learning-rate",
        ),
        (["--tokenizer-type", "GPT2BPETokenizer"], "--tokenizer-type is refused"),
    ],
)
def test_wrong_flag_is_named_with_the_way_out(flags: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_flags(flags)


def test_suggestions(full_parser: FlagParser) -> None:
    known = [option for action in full_parser._actions for option in action.option_strings]
    for typed, meant in (
        ("--fp8", "--fp8-format"),
        ("--tensor-parallel", "--tensor-model-parallel-size"),  # the fewest missing words
        ("--num-samples", "--rollout-num-samples"),
        ("--server-file", "--rollout-server-file"),
        ("--dft-factor", "--objective-dft-factor"),
        ("--sandbox", "--verify-sandbox-level"),
        ("--keep-checkpoints", "--rasft-keep-checkpoints"),
    ):
        assert suggest(typed, run_parser()[0].suggestible()) == meant
    assert suggest("--frobnicate", known) == ""
    tool = FlagParser(add_help=False)
    add_flags(tool, EvaluationConfig)
    of_evaluation = {*tool.suggestible(), "--model", "--dtype", "--output", "--checkpoint", "--server"}
    for name, flags in OTHER_NAMES.items():
        in_training = [flag for flag in flags.split() if flag in run_parser()[0].suggestible()]
        assert set(flags.split()) <= {*in_training, *of_evaluation}, name
        assert suggest(f"--{name}", known) == (in_training or [suggest(f"--{name}", known)])[0]
