"""A parallel layout that does not fit is refused by its flag."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.config import HeldoutConfig, RolloutConfig
from megatron_rasft.model.layout_checks import (
    check_layout,
    check_sampling,
    check_served,
    check_sinks,
    check_windows,
)
from megatron_rasft.weights.families import FAMILIES
from megatron_rasft.weights.rope import read_rope
from tests.unit.training.stand_ins import config_of


def args_of(**changes: Any) -> Any:
    """8 processes, a model of 8 heads in 4 query groups."""
    sizes = {
        "world_size": 8,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "context_parallel_size": 1,
        "expert_model_parallel_size": 1,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "experimental_attention_variant": None,
        "model_source": "tables",
    }
    return SimpleNamespace(**sizes | changes)


def test_a_layout_that_fits_is_accepted() -> None:
    check_layout(args_of())


def test_a_bridged_model_is_not_offered_more_query_groups() -> None:
    with pytest.raises(ValueError, match="parallel-size 2") as refused:
        check_layout(args_of(num_attention_heads=9, num_query_groups=3, model_source="bridge"))
    assert "--rasft-query-groups" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"context_parallel_size": 4}, r"2 x 2 x 4 = 16 .* 8"),
        ({"world_size": 6}, r"2 x 2 x 1 = 4 .* 6"),
        ({"num_attention_heads": 9, "num_query_groups": 3}, r"parallel-size 2 .*--rasft-query-groups 4"),
        ({"global_batch_size": 6}, r"--global-batch-size 6 .* 2 x 2 = 4"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(changes: dict[str, int], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        check_layout(args_of(**changes))


def delta_args_of(**changes: Any) -> Any:
    heads = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "deterministic_mode": False}
    return args_of(experimental_attention_variant="gated_delta_net", **heads | changes)


def test_heads_of_delta_nets_are_spread_over_tensor_and_context_parallel_ranks() -> None:
    check_layout(delta_args_of(context_parallel_size=2))
    with pytest.raises(ValueError, match=r"parallel-size 2 .*--context-parallel-size 2 .* 2 key heads"):
        check_layout(delta_args_of(context_parallel_size=2, linear_num_key_heads=2))
    with pytest.raises(ValueError, match=r"parallel-size 2 .* 3 value heads"):
        check_layout(delta_args_of(linear_num_value_heads=3))
    with pytest.raises(ValueError, match="--deterministic-mode"):
        check_layout(delta_args_of(deterministic_mode=True))


@pytest.mark.parametrize(
    ("packages", "pattern"),
    [
        ({"rollout": RolloutConfig(rollout_engine="embedded")}, "--rollout-engine embedded"),
        (
            {
                "rollout": RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"]),
                "heldout": HeldoutConfig(heldout_data=["file.jsonl"]),
            },
            "--heldout-data",
        ),
    ],
    ids=["rollouts", "held-out problems"],
)
def test_experts_on_other_ranks_are_refused_if_the_trainer_samples(
    packages: dict[str, Any], pattern: str
) -> None:
    config = config_of(**packages)
    check_sampling(args_of(), config)
    with pytest.raises(ValueError, match=f"{pattern}.*--expert-model-parallel-size 2"):
        check_sampling(args_of(expert_model_parallel_size=2), config)


def test_experts_on_other_ranks_are_accepted_if_servers_sample() -> None:
    config = config_of(rollout=RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"]))
    check_sampling(args_of(expert_model_parallel_size=2), config)


@pytest.mark.parametrize(
    ("keys", "is_served"),
    [
        ({}, True),
        ({"attn_factor": 0.8782488562869419}, False),
        ({"attn_factor": 0.8782488562869419, "attention_factor": 1.0}, True),
        ({"attention_factor": 1.0}, False),
    ],
)
def test_yarn_that_sglang_computes_differently_is_refused(keys: dict[str, float], is_served: bool) -> None:
    """0.8782 is that of DeepSeek-R1-0528-Qwen3-8B: with it SGLang's factor is 1, transformers' 1.1386."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, **keys}
    qwen3 = FAMILIES["Qwen3ForCausalLM"]
    rope = read_rope({"rope_scaling": scaling}, qwen3)
    sglang = config_of(rollout=RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"]))
    embedded = config_of(rollout=RolloutConfig(rollout_engine="embedded"))
    check_served(qwen3, rope, embedded)
    if is_served:
        check_served(qwen3, rope, sglang)
    else:
        with pytest.raises(ValueError, match=r"--rollout-engine sglang.*attention_factor"):
            check_served(qwen3, rope, sglang)


NOT_SERVED = ("Mistral3ForConditionalGeneration", "Gemma3ForConditionalGeneration", "GptOssForCausalLM")


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_family_that_no_server_has_taken_is_not_sampled_by_one(architecture: str) -> None:
    family = FAMILIES[architecture]
    rope = read_rope({"rope_scaling": {"rope_type": "default"}}, family)
    check_served(family, rope, config_of(rollout=RolloutConfig(rollout_engine="embedded")))
    sglang = config_of(rollout=RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"]))
    if architecture in NOT_SERVED:
        with pytest.raises(ValueError, match="--rollout-engine sglang"):
            check_served(family, rope, sglang)
    else:
        check_served(family, rope, sglang)


def window_args_of(**changes: Any) -> Any:
    """A model with a window of 4,096 tokens."""
    more = {"window_size": (4095, 0), "cp_comm_type": ["p2p"], "seq_length": 8192}
    return args_of(**more | {"transformer_impl": "local", "context_parallel_size": 2} | changes)


def test_windows_are_refused_in_a_ring_of_transformer_engine() -> None:
    mistral, config = (
        FAMILIES["MistralForCausalLM"],
        config_of(rollout=RolloutConfig(rollout_engine="embedded")),
    )
    engine = {"transformer_impl": "transformer_engine"}
    check_windows(window_args_of(), mistral, config)
    check_windows(window_args_of(**engine, cp_comm_type=["a2a"]), mistral, config)
    check_windows(window_args_of(**engine, context_parallel_size=1), mistral, config)
    check_windows(window_args_of(**engine, window_size=None), mistral, config)
    with pytest.raises(ValueError, match=r"--cp-comm-type p2p .*MistralForCausalLM"):
        check_windows(window_args_of(**engine), mistral, config)


@pytest.mark.parametrize("kind", ["p2p", "all_gather", "a2a+p2p"])
def test_sinks_need_an_exchange_of_heads_in_transformer_engine(kind: str) -> None:
    family, engine = FAMILIES["GptOssForCausalLM"], {"transformer_impl": "transformer_engine"}
    check_sinks(window_args_of(cp_comm_type=[kind]), family)
    check_sinks(window_args_of(**engine, cp_comm_type=["a2a"]), family)
    check_sinks(window_args_of(**engine, cp_comm_type=[kind], context_parallel_size=1), family)
    check_sinks(window_args_of(**engine, cp_comm_type=[kind]), FAMILIES["MistralForCausalLM"])
    with pytest.raises(ValueError, match=rf"--cp-comm-type {re.escape(kind)} .*GptOssForCausalLM"):
        check_sinks(window_args_of(**engine, cp_comm_type=[kind]), family)


def test_windows_that_sglang_ignores_are_refused_if_sequences_are_longer() -> None:
    mistral = FAMILIES["MistralForCausalLM"]
    sglang = config_of(rollout=RolloutConfig(rollout_engine="sglang", rollout_urls=["http://a:1"]))
    check_windows(window_args_of(seq_length=4096), mistral, sglang)
    check_windows(window_args_of(window_size=None), mistral, sglang)
    check_windows(window_args_of(), replace(mistral, is_window_served=True), sglang)
    with pytest.raises(ValueError, match=r"--rollout-engine sglang .*4096 .*--seq-length 8192"):
        check_windows(window_args_of(), mistral, sglang)
