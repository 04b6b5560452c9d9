"""Refuses flags that this machine cannot run, before the model is loaded."""

import argparse
import importlib.util
import os

_TRANSFORMER_ENGINE_FLAGS = (
    "fp8",
    "fp4",
    "te_precision_config_file",
    "use_transformer_engine_op_fuser",
    "use_te_activation_func",
    "fused_residual_rmsnorm",
    "moe_permute_fusion",
    "moe_router_fusion",
)
"""Destinations of flags whose kernels are in Transformer Engine.

Without it Megatron ignores some of them and fails late on others.
"""

_FORMATS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}

_CHECKS = {
    "delayed": "check_fp8_support",
    "tensorwise": "check_fp8_support",
    "blockwise": "check_fp8_block_scaling_support",
    "mxfp8": "check_mxfp8_support",
    "nvfp4": "check_nvfp4_support",
}
"""Recipe -> the function of transformer_engine.pytorch.quantization that returns whether this GPU has its kernels."""


def refuse_unrunnable(args: argparse.Namespace, *, has_gpu: bool, has_transformer_engine: bool) -> None:
    """Refuses kernels that need a missing GPU or Transformer Engine, and recipes for which the GPU has no kernels.

    Raises:
        ValueError: this machine cannot run a flag; the message names the flag, the reason and the way out.
    """
    _refuse_fused_logprobs(args, has_gpu=has_gpu)
    _require_delta_kernels(args, has_gpu=has_gpu)
    for name, format_flag in _FORMATS.items():
        recipe = args.given_flags.get(f"{name}_recipe")
        if recipe and getattr(args, name) is None:
            raise ValueError(
                f"{recipe} has no effect without {format_flag}. Give {format_flag} too, or leave it out."
            )
    for name in _needing_transformer_engine(args):
        flag = args.given_flags[name]
        if not has_gpu:
            raise ValueError(
                f"{flag} needs a GPU with Transformer Engine, and this machine has no usable GPU. Leave the flag out."
            )
        if not has_transformer_engine:
            raise ValueError(
                f"{flag} needs Transformer Engine, which cannot be imported here. Install it (pip install --no-build-isolation "
                "'megatron-rasft[te]'), or leave the flag out."
            )
        if name in _FORMATS:
            if args.transformer_impl != "transformer_engine":
                raise ValueError(
                    f"{flag} has no effect with --transformer-impl {args.transformer_impl}, whose layers compute in BF16. Leave one "
                    "of the two out."
                )
            _check_recipe(_FORMATS[name], f"--{name}-recipe", str(getattr(args, f"{name}_recipe")))


def _refuse_fused_logprobs(args: argparse.Namespace, *, has_gpu: bool) -> None:
    if args.objective_logprob_kernels != "fused":
        return
    # Triton's interpreter runs the kernels on a CPU. It is too slow for a run, but tests use it.
    if not has_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "--objective-logprob-kernels fused needs a GPU, and this machine has no usable GPU. Leave the flag out."
        )
    if args.use_megatron_fsdp:
        raise ValueError(
            "--objective-logprob-kernels fused cannot be combined with --use-megatron-fsdp, which shards the output layer's weight: "
            "the kernels need all of it. Leave the flag out."
        )


def _require_delta_kernels(args: argparse.Namespace, *, has_gpu: bool) -> None:
    if args.experimental_attention_variant != "gated_delta_net" or not has_gpu:
        return
    if importlib.util.find_spec("fla") is None:
        raise ValueError(
            f"the model in --hf-model {args.hf_model} has gated delta nets, which need flash-linear-attention on a GPU. Install it: "
            "pip install 'megatron-rasft[delta]'."
        )


def _needing_transformer_engine(args: argparse.Namespace) -> list[str]:
    names = [name for name in _TRANSFORMER_ENGINE_FLAGS if name in args.given_flags and getattr(args, name)]
    if "transformer_impl" in args.given_flags and args.transformer_impl == "transformer_engine":
        names.append("transformer_impl")
    return names


def _check_recipe(format_flag: str, recipe_flag: str, recipe: str) -> None:
    """Refuses a recipe without kernels for this GPU. Transformer Engine itself raises only in the first forward pass."""
    if recipe not in _CHECKS:  # a recipe that the user has written
        return
    from transformer_engine.pytorch import quantization

    is_supported, reason = getattr(quantization, _CHECKS[recipe])()
    if not is_supported:
        raise ValueError(
            f"{recipe_flag} {recipe} cannot run on this GPU: {reason.rstrip('.')}. Choose another recipe, or leave {format_flag} out."
        )
