"""What Megatron's own flags mean to a run, and which are refused."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.training.arguments import add_megatron_arguments

from megatron_rasft.config import DataConfig
from megatron_rasft.config.parser import FlagParser
from megatron_rasft.tools.evaluation.trainer_engine import Sampler
from megatron_rasft.training import startup
from megatron_rasft.training.arguments import add_arguments
from megatron_rasft.training.background_saves import SaveQueue
from megatron_rasft.training.problems import set_length
from megatron_rasft.training.refusals import REFUSED, REFUSED_GROUPS, reasons, refuse_unsupported
from tests.tiny_policy import write_model

Parse = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def parse(model: Path, monkeypatch: pytest.MonkeyPatch) -> Parse:
    monkeypatch.setattr(sys, "argv", ["pretrain_rasft.py"])

    def parsed(*flags: object) -> Any:
        given = ["--hf-model", str(model), "--train-data", "rows.jsonl", "--global-batch-size", "8"]
        return startup.parse([*given, *map(str, flags)])[0]

    return parsed


@pytest.mark.parametrize(
    ("flags", "cumem"),
    [
        (("--rollout-engine", "sglang", "--rollout-urls", "http://a:1"), "0"),
        (("--rollout-engine", "sglang", "--rollout-urls", "http://a:1", "--sync-method", "tensor"), None),
        ((), None),
    ],
    ids=["broadcast", "the same GPU", "no servers"],
)
def test_nccl_is_prepared_for_the_servers_before_anything_uses_it(
    flags: tuple[str, ...], cumem: str | None, parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, found = parse(*flags), []
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(startup, "set_global_variables", lambda args, build_tokenizer: None)
    monkeypatch.setattr(
        startup, "initialize_megatron", lambda **_: found.append(os.environ.get("NCCL_CUMEM_ENABLE"))
    )
    startup.start(args)
    assert found == [cumem]


def test_an_evaluation_takes_no_checkpoint_to_go_on_from(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--load .*--checkpoint"):
        Sampler(["--hf-model", str(model), "--load", str(tmp_path)])


def test_published_weighting_brings_its_filters_unless_a_flag_says_otherwise(parse: Parse) -> None:
    assert not parse().verify_filter_format
    published = ("--rasft-weighting", "published")
    assert parse(*published).verify_filter_format
    assert not parse(*published, "--no-verify-filter-format").verify_filter_format


@pytest.fixture(scope="module")
def parser() -> FlagParser:
    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


@pytest.mark.parametrize(
    "name", [*REFUSED, "grpo_kl_beta", "data_path", "tokenizer_model", "eval_iters", "eval_interval"]
)
def test_a_flag_without_meaning_is_refused_with_a_way_out(parser: FlagParser, name: str) -> None:
    flag = next(a.option_strings[0] for a in parser._actions if a.dest == name)
    given = argparse.Namespace(**{name: "a value"}, given_flags={name: flag})
    with pytest.raises(ValueError) as raised:
        refuse_unsupported(parser, given)
    assert str(raised.value) == f"{flag} is refused: {reasons(parser)[name]}. Leave it out."


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        # User buffers and graphs hold one shape, and every step has another.
        ("--tp-comm-overlap", "--tp-comm-overlap is refused: .* one number of tokens"),
        ("--tp-comm-overlap-rs-dgrad", "--tp-comm-overlap-rs-dgrad is refused"),
        ("--cuda-graph-impl local", "--cuda-graph-impl is refused: .* one number of tokens"),
        ("--cuda-graph-impl transformer_engine", "--cuda-graph-impl is refused"),
        ("--cuda-graph-impl full_iteration", "--cuda-graph-impl is refused"),
        ("--enable-cuda-graph", "--enable-cuda-graph is refused"),
        ("--external-cuda-graph", "--external-cuda-graph is refused"),
        ("--inference-cuda-graph-scope layer", "--inference-cuda-graph-scope is refused"),
        # The fp32 main parameters would be made of quantized weights.
        ("--fp8-format hybrid --fp8-param-gather", "--fp8-param-gather is refused: .* exact"),
        ("--fp4-format e2m1 --fp4-param-gather", "--fp4-param-gather is refused: .* exact"),
        (
            "--async-save --async-strategy mcore",
            "--async-strategy is refused: --async-save writes on a thread",
        ),
        ("--async-save --use-persistent-ckpt-worker", "--use-persistent-ckpt-worker is refused"),
        ("--cross-entropy-loss-fusion", "--cross-entropy-loss-fusion is refused: .* --objective"),
    ],
)
def test_a_flag_that_would_crash_or_change_the_run_is_refused(parse: Parse, flags: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(*flags.split())


def test_a_background_save_copies_memory_that_training_changes_and_no_other(parse: Parse) -> None:
    args = parse("--async-save")
    assert args.async_save and not args.use_persistent_ckpt_worker
    on_gpu, on_cpu = torch.device("cuda"), torch.device("cpu")
    assert not SaveQueue.for_run(args, on_gpu)._copies_cpu_tensors
    assert SaveQueue.for_run(args, on_cpu)._copies_cpu_tensors
    args.optimizer_cpu_offload = True
    assert SaveQueue.for_run(args, on_gpu)._copies_cpu_tensors


def test_flags_of_a_later_megatron_get_our_defaults(parser: FlagParser) -> None:
    assert "save_tokenizer_assets" not in vars(parser.parse_args([]))
    later = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    later.add_argument("--no-save-tokenizer-assets", action="store_false", dest="save_tokenizer_assets")
    extended = add_arguments(later)
    assert extended.parse_args([]).save_tokenizer_assets is False
    assert "--no-save-tokenizer-assets" in " ".join(str(extended.epilog).split())


def test_flags_that_change_nothing_may_stand(parser: FlagParser) -> None:
    assert REFUSED_GROUPS.keys() <= {group.title for group in parser._action_groups}
    refuse_unsupported(
        parser,
        parser.parse_args(
            "--eval-iters 0 --seq-length 64 --num-workers 2 --tokenizer-type NullTokenizer --no-one-logger".split()
        ),
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--num-layers 3", "--num-layers 3 is refused: .*config.json says 4"),
        ("--norm-epsilon 0.1", "--norm-epsilon 0.1 is refused: .*config.json says 1e-0"),
        ("--num-experts 4", "--num-experts 4 is refused: .*config.json says None"),
        ("--hidden-dropout 0.1", "--hidden-dropout 0.1 is refused: with dropout"),
        ("--attention-dropout 0.1", "--attention-dropout 0.1 is refused: with dropout"),
        ("--train-samples 80 --train-iters 3", "--train-iters and --train-samples"),
        (
            "--train-samples 80 --lr-warmup-iters 3",
            "--lr-warmup-iters goes with --train-iters.* Give --lr-warmup-samples",
        ),
        (
            "--train-iters 3 --lr-decay-samples 3",
            "--lr-decay-samples goes with --train-samples.* Give --lr-decay-iters",
        ),
        ("--lr-warmup-fraction 1", "--lr-warmup-fraction"),
        ("--finetune", "--finetune is refused: .* --hf-model"),
        pytest.param(
            "--distributed-backend nccl",
            "--distributed-backend nccl needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
    ],
)
def test_a_flag_that_would_be_overwritten_is_refused(parse: Parse, flags: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(*flags.split())


def test_flags_that_say_what_the_model_says_may_stand(parse: Parse) -> None:
    args = parse(
        *"--num-layers 4 --hidden-dropout 0 --swiglu --disable-bias-linear --normalization RMSNorm".split()
    )
    assert (args.num_layers, args.hidden_dropout) == (4, 0.0)


@pytest.mark.parametrize(
    ("flags", "num_problems", "length", "warmup"),
    [
        ("", 200, 25, 4),
        ("", 20, 3, 1),  # the default is shortened
        ("--lr-warmup-iters 0", 20, 3, 0),
        ("--lr-warmup-iters 2", 20, 3, 2),
        ("--lr-warmup-fraction 0.5 --train-iters 9", 20, 9, 0),
        ("--train-iters 9 --lr-decay-iters 3", 20, 9, 1),
        ("--train-samples 80", 20, None, 32),
        ("--train-samples 80 --lr-warmup-samples 8", 20, None, 8),
        ("--train-samples 80 --lr-warmup-fraction 0.5", 20, None, 0),
    ],
)
def test_length_and_warmup_are_those_of_the_flags(
    parse: Parse, flags: str, num_problems: int, length: int | None, warmup: int
) -> None:
    args = parse(*flags.split())
    set_length(args, SimpleNamespace(data=DataConfig()), num_problems)  # type: ignore[arg-type]
    assert args.train_iters == length
    assert (args.lr_warmup_samples if args.train_samples else args.lr_warmup_iters) == warmup


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--lr-warmup-iters 3", "--lr-warmup-iters 3 must be less than the 3 over"),
        ("--train-samples 80 --lr-warmup-samples 80", "--lr-warmup-samples 80 must be less than the 80 over"),
        ("--train-samples 7", "--train-samples 7 is less than one step of --global-batch-size 8"),
    ],
)
def test_a_length_or_warmup_that_does_not_fit_is_refused(parse: Parse, flags: str, says: str) -> None:
    args = parse(*flags.split())
    with pytest.raises(ValueError, match=says):
        set_length(args, SimpleNamespace(data=DataConfig()), 20)  # type: ignore[arg-type]


def test_help_lists_the_defaults_that_differ_from_megatrons(parser: FlagParser) -> None:
    text = " ".join(parser.format_help().split())
    for changed in ("--lr 5e-05", "--global-batch-size 256", "--weight-decay 0.0", "--lr-warmup-iters 4"):
        assert changed in text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--objective rasff", "argument --objective: invalid choice: 'rasff'.* Did you mean rasft\\?$"),
        (
            "--rollout-temprature 0.7",
            "unrecognized arguments: --rollout-temprature 0.7. Did you mean --rollout-temperature",
        ),
        ("--attention-backend fussed", "--attention-backend: invalid choice: 'fussed' .* Did you mean fused"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'. --help lists the flags."),
    ],
)
def test_a_misspelt_flag_or_choice_is_one_line_with_what_was_meant(
    parse: Parse, flags: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        parse(*flags.split())
    assert "\n" not in str(raised.value)
