"""Well-known families without a table, each with the feature that is missing."""

_CAPPED = "its attention scores and output logits are capped softly, which Megatron's GPTModel does not have"
_OLMO = "its norms stand after attention and MLP, and its norms of queries and keys span all heads"
_MAMBA = "some of its layers are Mamba layers, which need Megatron's HybridModel"

REFUSED = {
    "ApertusForCausalLM": "its activation xIELU and its MLP without a gate are not in Megatron's GPTModel",
    "ChatGLMModel": "its model is code in the folder, which is not run",
    "DeciLMForCausalLM": "its layers have different sizes, and some have no attention",
    "DeepseekV32ForCausalLM": "there is no table for its sparse attention",
    "Ernie4_5_MoeForCausalLM": "there is no table for its routing and its shared experts",
    "Exaone4ForCausalLM": "its norms stand after attention and MLP, and its layers with full attention have no positions",
    "Gemma2ForCausalLM": _CAPPED,
    "Gemma4ForConditionalGeneration": "its embeddings per layer, its shared keys and values, and its norms are not in Megatron's GPTModel",
    "GraniteForCausalLM": "it multiplies embeddings, attention, residuals and logits by constants that Megatron's GPTModel does not have",
    "GraniteMoeHybridForCausalLM": _MAMBA,
    "HunYuanDenseV1ForCausalLM": "it normalises queries and keys after the rotary embedding, Megatron before it",
    "InternLM3ForCausalLM": "its model is code in the folder, which is not run",
    "KimiK25ForConditionalGeneration": "there is no table for its latent attention and grouped routing",
    "Llama4ForConditionalGeneration": "there is no table for its attention in chunks and its scaled queries",
    "MiniMaxM2ForCausalLM": "its norms of queries and keys span all heads",
    "NemotronHForCausalLM": _MAMBA,
    "Olmo2ForCausalLM": _OLMO,
    "Olmo3ForCausalLM": _OLMO,
    "Qwen2_5_VLForConditionalGeneration": "its positions have three dimensions, for images and videos",
}  # fmt: skip
