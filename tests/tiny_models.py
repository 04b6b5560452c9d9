"""Tiny Hugging Face models of every supported family, and the Megatron models with the same weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_rasft.weights.architecture import megatron_args
from megatron_rasft.weights.families import FAMILIES
from megatron_rasft.weights.folder import HfFolder

_SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 4, "vocab_size": 101}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class MiMoConfig(transformers.Qwen2Config):
    """The configuration of MiMo-7B, which transformers does not have."""

    model_type = "mimo"


class MiMoForCausalLM(transformers.Qwen2ForCausalLM):
    """MiMo-7B as the code in its folder: Qwen2, and layers for multi-token prediction that forward() does not use."""

    config_class = MiMoConfig

    def __init__(self, config: MiMoConfig) -> None:
        super().__init__(config)
        layer = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.model.mtp_layers = torch.nn.ModuleList([torch.nn.ModuleDict({"input_proj": layer})])


_OWN_CLASSES = {kind.__name__: kind for kind in (MiMoConfig, MiMoForCausalLM)}


def hf_class(name: str) -> Any:
    """Returns a class of transformers, or of the code in a model's folder; None if there is none of this name."""
    return _OWN_CLASSES.get(name) or getattr(transformers, name, None)


_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}

_LATENT = {"kv_lora_rank": 20, "qk_nope_head_dim": 10, "qk_rope_head_dim": 8, "v_head_dim": 12}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "llama_scaled_tied": (
        "Llama",
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": _LLAMA3,
            "max_position_embeddings": 131072,
        },
    ),
    "llama_one_group_head_dim": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    ),
    "llama_groups_are_heads": (
        "Llama",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-3},
    ),
    "qwen2_tied": (
        "Qwen2",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "qwen2_one_group": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 128}),
    "qwen3": ("Qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen2_yarn": (
        "Qwen2",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": _YARN | {"beta_fast": 4.0, "attention_factor": 0.9},
            "max_position_embeddings": 128,
        },
    ),
    "seed_oss": ("SeedOss", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "smollm3": (
        "SmolLM3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "no_rope_layers": [1, 0, 1, 1],
            "use_sliding_window": True,
            "sliding_window": 9,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
    ),
    "mistral": ("Mistral", {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 24}),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    "ministral3": (
        "Mistral3ForConditionalGeneration",
        {
            "model_type": "ministral3",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "rope_parameters": _YARN
            | {"original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
            | {"llama_4_scaling_beta": 0.1},
        },
    ),
    "mimo": (
        "MiMo",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 640000.0},
            "rms_norm_eps": 1e-5,
        },
    ),
    "phi3": (
        "Phi3",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1},
    ),
    "glm": ("Glm", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0}),
    "glm4": ("Glm4", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}),
    "ernie4_5": ("Ernie4_5", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
    "phi4_mini": (
        "Phi3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 64,
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
            "partial_rotary_factor": 0.75,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
                "long_factor": [1.0, 1.5, 4.0, 10.0, 30.0, 60.0],
            },
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 20,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": 64,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (
        "Mixtral",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_unnormalized": (
        "Qwen3Moe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 32,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 3,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "attention_bias": True,
            "use_qk_norm": True,
            "first_k_dense_replace": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
        },
    ),
    "glm4_moe_groups": (
        "Glm4Moe",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "first_k_dense_replace": 2,
            "n_routed_experts": 12,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 16,
            "n_group": 4,
            "topk_group": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5": (
        "Qwen3_5",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            # The norm of an output close to zero divides its rounding error by sqrt(eps).
            "rms_norm_eps": 1e-3,
        },
    ),
    "qwen3_5_vision": (
        "Qwen3_5ForConditionalGeneration",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 28,
            **_LATENT,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "n_group": 4,
            "topk_group": 2,
            "max_position_embeddings": 64,
            "rope_parameters": _YARN
            | {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 8}
            | {"mscale": 0.7, "mscale_all_dim": 1.1},
        },
    ),
    "moonlight": (
        "DeepseekV3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            **_LATENT,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 16,
            "n_shared_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    "qwen3_5_moe_vision": (
        "Qwen3_5MoeForConditionalGeneration",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 8,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "rms_norm_eps": 1e-3,
        },
    ),
    "qwen3_next": (
        "Qwen3Next",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 12,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-3,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 24,
            "swiglu_limit": 0.5,
            "max_position_embeddings": 128,
            "rope_parameters": _YARN
            | {"factor": 16.0, "original_max_position_embeddings": 8, "truncate": False},
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 28,
            **_LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "qwen3_tied": (
        "Qwen3",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
}


def whole_blocks(case: str) -> dict[str, Any]:
    """Sizes for a case that make every matrix consist of whole blocks of 128 x 128, as blockwise FP8 requires."""
    family, overrides = CASES[case]
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 384}
    sizes |= {"num_hidden_layers": 1}
    sizes |= {"head_dim": 64} if family != "Phi3" else {}
    if "linear_key_head_dim" in overrides:
        sizes |= {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
        sizes |= {"linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64}
        sizes |= {"linear_num_value_heads": 4}
    return sizes | ({"moe_intermediate_size": 128} if "moe_intermediate_size" in overrides else {})


_PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
_SIGLIP = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_VISION: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": ("gemma3_text", _SIGLIP),
    "Mistral3ForConditionalGeneration": ("mistral", _PIXTRAL),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5_text", _QWEN_VISION),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe_text", _QWEN_VISION),
}
"""Classes of models that also see images -> model_type of the language model, configuration of the other one."""


def hf_config_class(family: str) -> Any:
    """Returns the class of transformers for the configuration of a family's language model."""
    return hf_class(f"{family}TextConfig") or hf_class(f"{family}Config")


def hf_config(family: str, values: dict[str, Any]) -> Any:
    """Returns transformers' configuration. ``values`` are those of the language model."""
    if family not in _VISION:
        return hf_config_class(family)(**values)
    kind = getattr(transformers, family.replace("ForConditionalGeneration", "Config"))
    text_type, vision = _VISION[family]
    is_tied = values.get("tie_word_embeddings", False)
    text = {"model_type": text_type, **values}
    return kind(text_config=text, vision_config=vision, tie_word_embeddings=is_tied)


def hf_model(case: str, sizes: dict[str, Any] | None = None) -> transformers.PreTrainedModel:
    """A random fp32 model whose norms and biases do not have their initial ones and zeros; ``sizes`` replace the case's."""
    family, overrides = CASES[case]
    config = hf_config(family, {**_SIZES, **overrides, **(sizes or {})})
    torch.manual_seed(1234)
    name = family if family in _VISION else f"{family}ForCausalLM"
    model = hf_class(name)(config).float().eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("A_log"):
                # With the initial decay a chunk's logarithms would sum to about 1,000, rounded to 1e-4.
                param.fill_(-2.0)
            # With a kernel as small as the matrices the delta rule's norms would divide by their epsilons.
            scale = 0.5 if "conv1d" in name else 0.08
            param.add_(0.1 * torch.randn_like(param)) if param.ndim == 1 else param.normal_(0, scale)
        for buffer in (b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")):
            buffer.normal_(0, 0.1)
    return model


def write_folder(
    case: str,
    path: Path,
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, Any] | None = None,
    **save: Any,
) -> Path:
    """Saves the model of a case with transformers."""
    save_model(hf_model(case, sizes).to(dtype), path, **save)
    return path


def save_model(model: transformers.PreTrainedModel, path: Path, **save: Any) -> None:
    """Saves a model as its authors do. They join the experts of a layer in some families, which transformers would split."""
    family = FAMILIES[type(model).__name__]
    model.save_pretrained(path, save_original_format=not family.writes_joined_experts, **save)


def some_tokens(batch: int = 2, length: int = 64) -> Tensor:
    """Random token ids [b, s] int64 that are valid for every case."""
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(7))


def transformer_config(folder: HfFolder, **overrides: Any) -> Any:
    """Returns Megatron's TransformerConfig for a model folder. Model parallelism must be initialised."""
    import torch.nn.functional as F
    from megatron.core import parallel_state as ps
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from megatron.training.argument_utils import _apply_yarn_config_from_args

    from megatron_rasft.model.model_chunks import config_class

    args = megatron_args(folder)
    kind = config_class(SimpleNamespace(**args))
    kind = MLATransformerConfig if args.get("multi_latent_attention") else kind
    same = {k: v for k, v in args.items() if k in kind.__dataclass_fields__}
    values = {
        **same,
        "num_moe_experts": args.get("num_experts"),
        "gated_linear_unit": True,
        "activation_func": F.silu if args["swiglu"] else quick_gelu,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "transformer_impl": "local",
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": ps.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": ps.get_pipeline_model_parallel_world_size(),
        "expert_model_parallel_size": ps.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": ps.get_expert_tensor_parallel_world_size(),
        "moe_token_dispatcher_type": "alltoall",
        **overrides,
    }
    config = kind(**values)
    _apply_yarn_config_from_args(config, SimpleNamespace(**args))
    return config


def build_chunks(
    folder: HfFolder, padded_vocab_size: int, vpp: int | None = None, **overrides: Any
) -> tuple[list[Any], list[int]]:
    """Builds this rank's GPTModel chunks with random weights, and returns them with their layer offsets."""
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_rasft.model.model_chunks import layer_spec, model_class

    args = megatron_args(folder)
    config = transformer_config(folder, virtual_pipeline_model_parallel_size=vpp, **overrides)
    chunks, offsets = [], []
    for stage in [None] if vpp is None else range(vpp):
        first = ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunk = model_class(config)(
            config,
            transformer_layer_spec=layer_spec(config, stage),
            vocab_size=padded_vocab_size,
            max_sequence_length=args["max_position_embeddings"],
            pre_process=first,
            post_process=last,
            parallel_output=True,
            position_embedding_type=args["position_embedding_type"],
            rotary_base=args["rotary_base"],
            rotary_percent=args["rotary_percent"],
            seq_len_interpolation_factor=args["rotary_seq_len_interpolation_factor"],
            rope_scaling=args["use_rope_scaling"],
            rope_scaling_factor=args["rope_scaling_factor"],
            share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
            vp_stage=stage,
        )
        chunks.append(chunk.eval())
        offsets.append(get_transformer_layer_offset(config, vp_stage=stage))
    return chunks, offsets
