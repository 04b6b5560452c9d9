"""A flag is refused if this machine cannot run its kernels."""

import argparse
import sys
from types import ModuleType

import pytest

from megatron_rasft.config.parser import FlagParser
from megatron_rasft.machine import requirements
from megatron_rasft.machine.requirements import refuse_unrunnable


def parsed(flags: str) -> argparse.Namespace:
    parser = FlagParser()
    parser.add_argument("--fp8-format", dest="fp8")
    parser.add_argument("--fp8-recipe", default="tensorwise")
    parser.add_argument("--fp4-format", dest="fp4")
    parser.add_argument("--fp4-recipe", default="nvfp4")
    parser.add_argument("--transformer-impl", default="transformer_engine")
    parser.add_argument("--moe-permute-fusion", action="store_true")
    parser.add_argument("--objective-logprob-kernels", default="auto")
    parser.add_argument("--use-megatron-fsdp", action="store_true")
    parser.add_argument("--experimental-attention-variant")
    parser.add_argument("--hf-model", default="DIR")
    return parser.parse_args(flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--fp8-format hybrid",
        "--fp8-format hybrid --fp8-recipe delayed",
        "--fp4-format e2m1",
        "--moe-permute-fusion",
        "--transformer-impl transformer_engine",
    ],
)
def test_kernels_of_transformer_engine_need_it_and_a_gpu(flags: str) -> None:
    flag = flags.split()[0]
    with pytest.raises(ValueError, match=f"^{flag} .*GPU"):
        refuse_unrunnable(parsed(flags), has_gpu=False, has_transformer_engine=False)
    with pytest.raises(ValueError, match=rf"^{flag} .*megatron-rasft\[te\]"):
        refuse_unrunnable(parsed(flags), has_gpu=True, has_transformer_engine=False)


def test_gated_delta_nets_need_their_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed("--experimental-attention-variant gated_delta_net")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_unrunnable(args, has_gpu=False, has_transformer_engine=False)
    with pytest.raises(ValueError, match=r"--hf-model DIR .*megatron-rasft\[delta\]"):
        refuse_unrunnable(args, has_gpu=True, has_transformer_engine=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    refuse_unrunnable(args, has_gpu=True, has_transformer_engine=False)


def test_defaults_need_nothing() -> None:
    refuse_unrunnable(parsed(""), has_gpu=False, has_transformer_engine=False)
    refuse_unrunnable(parsed("--transformer-impl local"), has_gpu=False, has_transformer_engine=False)


@pytest.mark.parametrize(
    ("flags", "format_flag"),
    [("--fp8-recipe delayed", "--fp8-format"), ("--fp4-recipe nvfp4", "--fp4-format")],
)
def test_a_recipe_without_its_format_is_refused(flags: str, format_flag: str) -> None:
    recipe = flags.split()[0]
    with pytest.raises(ValueError, match=f"^{recipe} .*{format_flag}"):
        refuse_unrunnable(parsed(flags), has_gpu=True, has_transformer_engine=True)


@pytest.mark.parametrize("flag", ["--fp8-format hybrid", "--fp4-format e2m1"])
def test_fp8_is_refused_with_layers_that_compute_in_bf16(flag: str) -> None:
    args = parsed(f"{flag} --transformer-impl local")
    with pytest.raises(ValueError, match=f"^{flag.split()[0]} .*--transformer-impl local"):
        refuse_unrunnable(args, has_gpu=True, has_transformer_engine=True)


@pytest.mark.parametrize(
    ("flags", "check", "refused"),
    [
        ("--fp8-format hybrid", "check_fp8_support", "--fp8-recipe tensorwise"),
        ("--fp8-format hybrid --fp8-recipe delayed", "check_fp8_support", "--fp8-recipe delayed"),
        ("--fp8-format e4m3 --fp8-recipe mxfp8", "check_mxfp8_support", "--fp8-recipe mxfp8"),
        (
            "--fp8-format e4m3 --fp8-recipe blockwise",
            "check_fp8_block_scaling_support",
            "--fp8-recipe blockwise",
        ),
        ("--fp4-format e2m1", "check_nvfp4_support", "--fp4-recipe nvfp4"),
    ],
)
def test_a_recipe_that_the_gpu_lacks_is_refused_before_the_model_is_loaded(
    flags: str, check: str, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantization = ModuleType("transformer_engine.pytorch.quantization")
    for name in set(requirements._CHECKS.values()):
        setattr(quantization, name, lambda: (True, ""))
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(
        sys.modules["transformer_engine.pytorch"], "quantization", quantization, raising=False
    )
    monkeypatch.setitem(sys.modules, quantization.__name__, quantization)
    refuse_unrunnable(parsed(flags), has_gpu=True, has_transformer_engine=True)
    setattr(quantization, check, lambda: (False, "Device compute capability 10.0 or higher required."))
    with pytest.raises(ValueError, match=f"^{refused} .*10.0 or higher required"):
        refuse_unrunnable(parsed(flags), has_gpu=True, has_transformer_engine=True)


def test_fused_logprobs_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    asked = parsed("--objective-logprob-kernels fused")
    with pytest.raises(ValueError, match=r"^--objective-logprob-kernels fused .*GPU"):
        refuse_unrunnable(asked, has_gpu=False, has_transformer_engine=False)
    refuse_unrunnable(asked, has_gpu=True, has_transformer_engine=False)
    refuse_unrunnable(
        parsed("--objective-logprob-kernels plain"), has_gpu=False, has_transformer_engine=False
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refuse_unrunnable(asked, has_gpu=False, has_transformer_engine=False)


def test_fused_logprobs_are_refused_under_fsdp() -> None:
    asked = parsed("--objective-logprob-kernels fused --use-megatron-fsdp")
    with pytest.raises(ValueError, match=r"--objective-logprob-kernels fused.*--use-megatron-fsdp"):
        refuse_unrunnable(asked, has_gpu=True, has_transformer_engine=True)
