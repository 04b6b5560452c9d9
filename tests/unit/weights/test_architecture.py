"""Compares the defaults of each family with transformers' configuration classes, and reads config.json with any values."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.architecture import (
    ModelDescription,
    megatron_args,
    read_family,
    read_rope,
    read_shape,
)
from megatron_rasft.weights.config_values import BRIDGE
from megatron_rasft.weights.families import FAMILIES, REFUSED, Family
from megatron_rasft.weights.windows import window_args
from tests.tiny_models import hf_config_class


def transformers_config(architecture: str, **values: Any) -> Any:
    """Builds transformers' configuration for a config.json with only these values."""
    if FAMILIES[architecture].text_model_type is not None:
        return transformers.AutoConfig.for_model(FAMILIES[architecture].text_model_type, **values)
    return hf_config_class(architecture.removesuffix("ForCausalLM"))(**values)


def has_window(family: Family) -> bool:
    """Whether a family's configuration class has a sliding window."""
    return hasattr(transformers_config(family.architecture), "sliding_window")


def whole_config(family: Family, text: dict[str, Any]) -> dict[str, Any]:
    """The config.json whose language model is ``text``."""
    return text if family.text_model_type is None else {"text_config": text}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_defaults_are_those_of_transformers(architecture: str) -> None:
    """Folders may omit keys that equal the defaults of transformers' configuration class."""
    family = FAMILIES[architecture]
    # in families with a switch transformers drops the window unless the switch is on; a hidden size other than
    # the default distinguishes a fixed head_dim from a computed one
    has_switch = hasattr(transformers_config(architecture), "use_sliding_window")
    switch = {"use_sliding_window": True} if has_switch else {}
    config = transformers_config(architecture, hidden_size=1024, **switch)
    assert family.default_max_position_embeddings == config.max_position_embeddings
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    theta = (family.default_rope or {}).get("rope_theta", family.default_rope_theta)
    assert theta == rope["rope_theta"]
    local = config.rope_parameters.get("sliding_attention", {})
    assert family.default_local_rope_theta == local.get("rope_theta")
    assert family.default_partial_rotary == rope.get("partial_rotary_factor", 1.0)
    assert family.default_norm_eps == config.rms_norm_eps
    assert family.default_sliding_window == getattr(config, "sliding_window", None)
    computed = 1024 // config.num_attention_heads
    assert family.has_latent_attention or (family.default_head_dim or computed) == (
        getattr(config, "head_dim", None) or computed
    )
    assert family.has_window_switch == has_switch
    assert family.reads_layer_types == (has_window(family) and hasattr(config, "layer_types"))
    assert family.has_experts == hasattr(config, "num_experts_per_tok")


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
"""Keys that every config.json must have."""


def test_families_can_be_keys() -> None:
    """Caches of tables have them as keys."""
    assert (
        len({*FAMILIES.values(), *FAMILIES["Mistral3ForConditionalGeneration"].text_variants})
        == len(FAMILIES) + 1
    )


@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_keys_mean_what_the_class_built_without_arguments_means(architecture: str) -> None:
    stored = transformers_config(architecture).to_dict()
    family = FAMILIES[architecture]
    described = []
    for config in (stored, {key: stored[key] for key in SIZES if key in stored}):
        if stored["hidden_size"] % stored["num_attention_heads"]:
            config["head_dim"] = 64  # the class divides and drops the rest, which is refused
        text = family.text_config(whole_config(family, config))
        shape, rope = read_shape(text, family), read_rope(text, family)
        described.append(ModelDescription(whole_config(family, config), family, shape, rope))
    full, sparse = described
    assert sparse.shape == full.shape and sparse.rope == full.rope
    assert megatron_args(sparse) == megatron_args(full)


def test_null_means_as_many_query_groups_as_heads() -> None:
    config = base("MistralForCausalLM") | {"num_key_value_heads": None}
    assert read_shape(config, FAMILIES["MistralForCausalLM"]).num_query_groups == 4


@pytest.mark.parametrize("architecture", [*sorted(REFUSED), "UnheardOfForCausalLM"])
def test_refused_families_are_named_with_a_way_out(architecture: str) -> None:
    with pytest.raises(ModelFolderError, match=architecture) as error:
        read_family({"architectures": [architecture]})
    assert BRIDGE in str(error.value)
    assert REFUSED.get(architecture, ", ".join(FAMILIES)) in str(error.value)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_config_with_sizes_only_means_what_transformers_reads(architecture: str) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 96,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    }
    if FAMILIES[architecture].has_experts:
        sizes |= {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
        if hasattr(transformers_config(architecture), "moe_intermediate_size"):
            sizes["moe_intermediate_size"] = 16
        if has_shared_experts(FAMILIES[architecture]):
            sizes |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    config = transformers_config(architecture, **sizes)
    family = FAMILIES[architecture]
    shape, rope = read_shape(sizes, family), read_rope(sizes, family)
    described = ModelDescription(whole_config(family, sizes), family, shape, rope)
    args = megatron_args(described)
    assert args["init_method_std"] == config.initializer_range
    assert args["untie_embeddings_and_output_weights"] is not config.tie_word_embeddings
    assert args["layernorm_epsilon"] == config.rms_norm_eps
    # Megatron does not scale the queries of later positions
    last = "original_max_position_embeddings" if family.scales_late_queries else "max_position_embeddings"
    assert args["max_position_embeddings"] == (config.rope_parameters | config.to_dict())[last]
    if family.has_experts:
        assert args["moe_router_pre_softmax"] is not getattr(config, "norm_topk_prob", True)
    if args.get("moe_router_score_function") == "sigmoid":
        assert args["moe_router_topk_scaling_factor"] == config.routed_scaling_factor
        assert args["moe_layer_freq"] == [0, 1]
        assert args["moe_shared_expert_intermediate_size"] == 16 * config.n_shared_experts


WINDOWS: dict[str, dict[str, Any]] = {
    "default": {},
    "none": {"sliding_window": None, "use_sliding_window": True},
    "switched on": {"sliding_window": 48, "use_sliding_window": True},
    "switched off": {"sliding_window": 48, "use_sliding_window": False},
    "later layers": {"sliding_window": 48, "use_sliding_window": True, "max_window_layers": 3},
    "one layer less": {"use_sliding_window": True, "num_hidden_layers": 29},
    "no layer": {"use_sliding_window": True, "num_hidden_layers": 28},
    "named layers": {
        "sliding_window": 48, "use_sliding_window": True, "max_window_layers": 5,
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["sliding_attention"],
    },
    "as long as the positions": {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0},
}  # fmt: skip


@pytest.mark.parametrize("changes", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("architecture", [name for name, f in FAMILIES.items() if has_window(f)])
def test_layers_have_the_window_that_transformers_gives_them(
    architecture: str, changes: dict[str, Any]
) -> None:
    family = FAMILIES[architecture]
    values = {"num_hidden_layers": 5, "max_position_embeddings": 128} | changes
    if "layer_types" in changes and not family.reads_layer_types:
        del values["layer_types"]
    if family.default_local_rope_theta is not None and changes.get("sliding_window", 1) is None:
        values["sliding_window"] = 48  # its layers with a window have one
    config = transformers_config(architecture, **values)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    size = config.sliding_window
    # layers with an own rotary base must be named even if their window is as long as the positions
    longest = config.max_position_embeddings + (family.default_local_rope_theta is not None) * 10**9
    expected = [size is not None and size < longest and kind == "sliding_attention" for kind in kinds]
    args = window_args(values, family)
    if not any(expected):
        assert args == {"window_size": None, "window_attn_skip_freq": None}
    else:
        assert args == {"window_size": (size - 1, 0), "window_attn_skip_freq": [int(on) for on in expected]}


REFUSED_WINDOWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers with a window that is switched off": (
        "Qwen3ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}, "use_sliding_window",
    ),
    "a kind of layer too few": ("Qwen2ForCausalLM", {"layer_types": ["full_attention"]}, "num_hidden_layers"),
    "an unknown kind of layer": ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "mamba"]}, "mamba"),
    "a list that transformers ignores": (
        "MistralForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types",
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture,changes,key", REFUSED_WINDOWS.values(), ids=REFUSED_WINDOWS)
def test_windows_without_a_clear_meaning_are_refused(
    architecture: str, changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    made = read_back(tmp_path, base(architecture) | changes)
    assert isinstance(made, str) and key in made


KEYS = [
    "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "quantization_config", "attention_bias", "mlp_bias",
    "hidden_act", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rms_norm_eps", "initializer_range",
    "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step",
    "attention_out_bias", "no_rope_layers", "no_rope_layer_interval",
    "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor",
]  # fmt: skip
ROPE_KEYS = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "beta_fast",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
]
WRONG = [
    float("nan"),
    float("inf"),
    float("-inf"),
    1e300,
    10**400,
    -1,
    0,
    True,
    "1",
    "",
    [],
    [None],
    {},
    {"a": {}},
    0.5,
    [1],
    ["x"],
]
ANYTHING = st.sampled_from(
    [*WRONG, None, False, 1, 2, 8, 64, 1e4, "llama3", "yarn", "silu", ["full_attention"], 1.0, 4.0, 8192]
)


def has_shared_experts(family: Family) -> bool:
    """Whether a family has GLM's shared experts, which have no gate."""
    names = [name for entry in family.mlp for name in entry.megatron]
    return any("shared_experts.linear" in n for n in names) and not any("gate_weight" in n for n in names)


def base(architecture: str) -> dict[str, Any]:
    """A config.json with every key, so that a wrong value of one key is the only mistake."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True}
    if has_shared_experts(FAMILIES[architecture]):
        experts["n_routed_experts"] = experts.pop("num_experts")
    if FAMILIES[architecture].has_latent_attention:
        experts |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    return {
        "architectures": [architecture], "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "tie_word_embeddings": False,
        "sliding_window": None, "max_position_embeddings": 128, "rope_theta": 1e4, "rms_norm_eps": 1e-6,
        **(experts if FAMILIES[architecture].has_experts else {}),
    }  # fmt: skip


def read_back(path: Path, config: Any) -> dict[str, Any] | str:
    """Returns Megatron's arguments, or the message of the refusal."""
    if config["architectures"] == ["Mistral3ForConditionalGeneration"]:
        config = {"architectures": config["architectures"], "text_config": config}
    (path / "config.json").write_text(json.dumps(config))
    try:
        return megatron_args(ModelDescription.read(path))
    except ModelFolderError as error:
        return str(error)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"]
)
def test_wrong_values_are_refused_with_one_line_that_names_the_key(architecture: str, tmp_path: Path) -> None:
    config = base(architecture)
    assert isinstance(read_back(tmp_path, config), dict)
    numbers = [
        k
        for k in KEYS
        if isinstance(config.get(k), int | float) and k not in ("tie_word_embeddings", "norm_topk_prob")
    ]
    for key, value in product(KEYS, WRONG):
        made = read_back(tmp_path, config | {key: value})
        if isinstance(made, str):
            assert "\n" not in made and str(tmp_path) in made and len(made) < 1000 + len(str(tmp_path))
        elif key in numbers and key != "intermediate_size":
            fits = type(value) in (int, float) and math.isfinite(value) and value > 0
            assert fits, (key, value)


SIGMOID_ROUTING: dict[str, tuple[dict[str, Any], str]] = {
    "no layer with experts": ({"first_k_dense_replace": 2}, "layers"),
    "weights that do not sum to 1": ({"norm_topk_prob": False}, "norm_topk_prob"),
    "one normalised expert": ({"num_experts_per_tok": 1}, "norm_topk_prob"),
    "groups of unequal size": ({"n_group": 3}, "n_group"),
    "more groups than there are": ({"n_group": 2, "topk_group": 3}, "topk_group"),
    "groups with too few experts": ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "topk_group"),
    "groups scored by one expert": ({"n_group": 4, "topk_group": 2}, "topk_group"),
}


@pytest.mark.parametrize("changes,key", SIGMOID_ROUTING.values(), ids=SIGMOID_ROUTING)
def test_sigmoid_routing_that_megatron_lacks_is_refused(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    made = read_back(tmp_path, base("Glm4MoeForCausalLM") | changes)
    assert isinstance(made, str) and key in made


LATENT_ATTENTION: dict[str, tuple[dict[str, Any], str]] = {
    "halves that form pairs": ({"rope_interleave": False}, "rope_interleave"),
    "a bias": ({"attention_bias": True}, "attention_bias"),
    "llama3 scaling": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
         | {"original_max_position_embeddings": 8192}},
        "llama3",
    ),
    "yarn of fractions of channels": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "truncate": False}},
        "truncate",
    ),
    "dense layers between sparse ones": ({"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types"),
}  # fmt: skip


@pytest.mark.parametrize("changes,key", LATENT_ATTENTION.values(), ids=LATENT_ATTENTION)
def test_latent_attention_that_megatron_lacks_is_refused(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    made = read_back(tmp_path, base("Glm4MoeLiteForCausalLM") | changes)
    assert isinstance(made, str) and key in made


def test_query_groups_cannot_be_added_to_latent_attention(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(base("DeepseekV3ForCausalLM")))
    with pytest.raises(ValueError, match="--rasft-query-groups 8"):
        megatron_args(ModelDescription.read(tmp_path), query_groups=8)


DELTA: dict[str, tuple[dict[str, Any], str]] = {
    "heads that cannot be shared": (
        {"linear_num_value_heads": 6, "linear_num_key_heads": 4},
        "linear_num_key_heads",
    ),
    "a kind of layer too few": ({"layer_types": ["linear_attention"]}, "layer_types"),
    "a kind of layer that is unknown": ({"layer_types": ["linear_attention", "mamba"]}, "mamba"),
    "partly rotated YaRN": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "partial_rotary_factor"),
    "half a size": ({"linear_key_head_dim": 0.5}, "linear_key_head_dim"),
}


@pytest.mark.parametrize("changes,key", DELTA.values(), ids=DELTA)
def test_gated_delta_nets_that_megatron_lacks_are_refused(
    changes: dict[str, Any], key: str, tmp_path: Path
) -> None:
    config = base("Qwen3_5ForCausalLM")
    assert isinstance(read_back(tmp_path, config), dict)
    made = read_back(tmp_path, config | changes)
    assert isinstance(made, str) and key in made


@given(
    architecture=st.sampled_from(sorted(FAMILIES)),
    changes=st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=6),
    rope=st.none() | st.dictionaries(st.sampled_from(ROPE_KEYS), ANYTHING),
)
@settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_is_read_or_refused_with_one_line(
    tmp_path: Path, architecture: str, changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    made = read_back(
        tmp_path, base(architecture) | changes | ({} if rope is None else {"rope_scaling": rope})
    )
    if isinstance(made, str):
        assert "\n" not in made and str(tmp_path) in made
        return
    for key, value in made.items():
        assert not isinstance(value, float) or math.isfinite(value), key
        assert value is None or isinstance(value, int | float | str | list | tuple), key
