"""Megatron's flags that have no effect in a run, or break it, are refused by name."""

import argparse

import pytest

from megatron_rasft.config.parser import FlagParser
from megatron_rasft.config.refusals import REFUSED, REFUSED_GROUPS, reasons, refuse_unsupported
from tests.unit.training.conftest import Parse


@pytest.mark.parametrize(
    "name", [*REFUSED, "grpo_kl_beta", "data_path", "tokenizer_model", "eval_iters", "eval_interval"]
)
def test_a_flag_without_effect_is_refused_with_its_reason(parser: FlagParser, name: str) -> None:
    flag = next(a.option_strings[0] for a in parser._actions if a.dest == name)
    given = argparse.Namespace(**{name: "a value"}, given_flags={name: flag})
    with pytest.raises(ValueError) as raised:
        refuse_unsupported(parser, given)
    assert flag in str(raised.value) and reasons(parser)[name] in str(raised.value)


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        # User buffers and graphs hold one shape, and every step has another.
        ("--tp-comm-overlap", "--tp-comm-overlap"),
        ("--tp-comm-overlap-rs-dgrad", "--tp-comm-overlap-rs-dgrad"),
        ("--cuda-graph-impl local", "--cuda-graph-impl"),
        ("--cuda-graph-impl transformer_engine", "--cuda-graph-impl"),
        ("--cuda-graph-impl full_iteration", "--cuda-graph-impl"),
        ("--enable-cuda-graph", "--enable-cuda-graph"),
        ("--external-cuda-graph", "--external-cuda-graph"),
        ("--inference-cuda-graph-scope layer", "--inference-cuda-graph-scope"),
        # The fp32 main parameters would be copies of quantized weights.
        ("--fp8-format hybrid --fp8-param-gather", "--fp8-param-gather"),
        ("--fp4-format e2m1 --fp4-param-gather", "--fp4-param-gather"),
        (
            "--async-save --async-strategy mcore",
            "--async-strategy.*--async-save",
        ),
        ("--async-save --use-persistent-ckpt-worker", "--use-persistent-ckpt-worker"),
        # nvidia-resiliency-ext
        ("--inprocess-restart", "--inprocess-restart.*--stall-deadline-s"),
        ("--enable-ft-package", "--enable-ft-package.*--stall-deadline-s"),
        ("--log-straggler", "--log-straggler.*--straggler-factor"),
        ("--fault-injector-num-ranks 1", "--fault-injector-num-ranks"),
        ("--replication", "--replication.*--save-interval"),
        ("--cross-entropy-loss-fusion", "--cross-entropy-loss-fusion.*--objective"),
    ],
)
def test_a_flag_that_would_crash_or_change_the_run_is_refused(parse: Parse, flags: str, pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        parse(*flags.split())


def test_flags_that_repeat_a_default_are_accepted(parser: FlagParser) -> None:
    assert REFUSED_GROUPS.keys() <= {group.title for group in parser._action_groups}
    refuse_unsupported(
        parser,
        parser.parse_args(
            "--eval-iters 0 --seq-length 64 --num-workers 2 --tokenizer-type NullTokenizer --no-one-logger".split()
        ),
    )
