"""Flags that contradict the model or each other are refused; length and warm-up of a run follow from its flags."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_rasft.config import DataConfig
from megatron_rasft.config.parser import FlagParser
from megatron_rasft.training.arguments import add_arguments
from megatron_rasft.training.problems import set_length
from tests.unit.training.conftest import Parse


def test_published_weighting_brings_its_filters_unless_a_flag_says_otherwise(parse: Parse) -> None:
    assert not parse().verify_filter_format
    published = ("--rasft-weighting", "published")
    assert parse(*published).verify_filter_format
    assert not parse(*published, "--no-verify-filter-format").verify_filter_format


def test_published_weighting_brings_its_sampling_unless_a_flag_says_otherwise(parse: Parse) -> None:
    names = (
        "rollout_num_samples",
        "rollout_temperature",
        "rollout_top_p",
        "rollout_repetition_penalty",
    )
    published = ("--rasft-weighting", "published")
    assert [getattr(parse(*published), name) for name in names] == [3, 0.9, 0.95, 1.1]
    # A flag counts as given also if its value is the default of runs without the preset.
    given = parse(*published, "--rollout-temperature", "1.0", "--rollout-num-samples", "4")
    assert [getattr(given, name) for name in names] == [4, 1.0, 0.95, 1.1]
    other = parse(*published, "--objective", "dft")
    assert [getattr(other, name) for name in names] == [4, 1.0, 1.0, 1.0]


def test_the_stall_watch_comes_before_torchs_time_out(parse: Parse) -> None:
    args = parse()
    assert 60 * args.distributed_timeout_minutes > 3 * args.stall_deadline_s + 120


def test_flags_of_a_later_megatron_get_our_defaults(parser: FlagParser) -> None:
    assert "save_tokenizer_assets" not in vars(parser.parse_args([]))
    later = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    later.add_argument("--no-save-tokenizer-assets", action="store_false", dest="save_tokenizer_assets")
    extended = add_arguments(later)
    assert extended.parse_args([]).save_tokenizer_assets is False
    assert "--no-save-tokenizer-assets" in " ".join(str(extended.epilog).split())


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--num-layers 3", "--num-layers 3.*config.json has 4"),
        ("--norm-epsilon 0.1", "--norm-epsilon 0.1.*config.json has 1e-0"),
        ("--num-experts 4", "--num-experts 4.*config.json has None"),
        ("--hidden-dropout 0.1", "--hidden-dropout 0.1"),
        ("--attention-dropout 0.1", "--attention-dropout 0.1"),
        ("--train-samples 80 --train-iters 3", "--train-iters.*--train-samples"),
        (
            "--train-samples 80 --lr-warmup-iters 3",
            "--lr-warmup-iters.*--lr-warmup-samples",
        ),
        (
            "--train-iters 3 --lr-decay-samples 3",
            "--lr-decay-samples.*--lr-decay-iters",
        ),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction"),
        ("--finetune", "--finetune.*--hf-model"),
        pytest.param(
            "--distributed-backend nccl",
            "--distributed-backend nccl",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_a_flag_that_would_be_overwritten_is_refused(parse: Parse, flags: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        parse(*flags.split())


def test_flags_that_agree_with_the_model_are_accepted(parse: Parse) -> None:
    args = parse(
        *"--num-layers 4 --hidden-dropout 0 --swiglu --disable-bias-linear --normalization RMSNorm".split()
    )
    assert (args.num_layers, args.hidden_dropout) == (4, 0.0)


@pytest.mark.parametrize(
    ("flags", "num_problems", "length", "warmup"),
    [
        ("", 200, 25, 4),
        ("", 20, 3, 1),  # the default warm-up is shortened
        ("--lr-warmup-iters 0", 20, 3, 0),
        ("--lr-warmup-iters 2", 20, 3, 2),
        ("--lr-warmup-fraction 0.5 --train-iters 9", 20, 9, 0),
        ("--train-iters 9 --lr-decay-iters 3", 20, 9, 1),
        ("--train-samples 80", 20, None, 32),
        ("--train-samples 80 --lr-warmup-samples 8", 20, None, 8),
        ("--train-samples 80 --lr-warmup-fraction 0.5", 20, None, 0),
    ],
)
def test_length_and_warmup_follow_from_the_flags(
    parse: Parse, flags: str, num_problems: int, length: int | None, warmup: int
) -> None:
    args = parse(*flags.split())
    set_length(args, SimpleNamespace(data=DataConfig()), num_problems)  # type: ignore[arg-type]
    assert args.train_iters == length
    assert (args.lr_warmup_samples if args.train_samples else args.lr_warmup_iters) == warmup


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--lr-warmup-iters 3", "--lr-warmup-iters 3"),
        ("--train-samples 80 --lr-warmup-samples 80", "--lr-warmup-samples 80"),
        ("--train-samples 7", "--train-samples 7.*--global-batch-size 8"),
    ],
)
def test_a_length_or_warmup_that_does_not_fit_is_refused(parse: Parse, flags: str, pattern: str) -> None:
    args = parse(*flags.split())
    with pytest.raises(ValueError, match=pattern):
        set_length(args, SimpleNamespace(data=DataConfig()), 20)  # type: ignore[arg-type]


def test_help_lists_the_defaults_that_differ_from_megatrons(parser: FlagParser) -> None:
    text = " ".join(parser.format_help().split())
    for changed in ("--lr 5e-05", "--global-batch-size 256", "--weight-decay 0.0", "--lr-warmup-iters 4"):
        assert changed in text


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        ("--objective rasff", "--objective.*rasff.*rasft"),
        (
            "--rollout-temprature 0.7",
            "--rollout-temprature.*--rollout-temperature",
        ),
        ("--attention-backend fussed", "--attention-backend.*fussed.*fused"),
        ("--lr fast", "--lr.*fast"),
    ],
)
def test_a_misspelt_flag_or_choice_is_one_line_with_the_nearest_name(
    parse: Parse, flags: str, pattern: str
) -> None:
    with pytest.raises(ValueError, match=pattern) as raised:
        parse(*flags.split())
    assert "\n" not in str(raised.value)
