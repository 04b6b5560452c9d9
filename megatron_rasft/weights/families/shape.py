"""The sizes of a model."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """The sizes of multi-latent attention. Its keys and values are computed from a latent, and one key with positions is shared."""

    query_rank: int | None
    """Size of the queries' latent; None if queries are computed from the hidden state."""
    key_value_rank: int
    """Size of the latent of keys and values."""
    plain_dim: int
    """Dimensions of a query and of a key without positions."""
    rotary_dim: int
    """Further dimensions of a query and of the shared key, which are rotated."""
    value_dim: int

    @property
    def key_dim(self) -> int:
        """Dimensions of a query and of a key."""
        return self.plain_dim + self.rotary_dim


@dataclass(frozen=True, kw_only=True)
class DeltaShape:
    """The sizes of gated delta nets, which replace the attention of some layers."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int
    """Tokens that the short convolution before the delta rule sees."""
    is_delta: tuple[bool, ...]
    """Whether each layer of the model has a gated delta net."""

    @property
    def keys(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.num_value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model, as its config.json gives them."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    """Inner size of the MLP, or of one expert."""
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding in the folder. Megatron's embedding may have more rows, as padding."""
    is_tied: bool
    """Whether the output layer shares the embedding's weights. If so, the folder has no lm_head."""
    has_qkv_bias: bool
    has_qk_norm: bool
    num_experts: int = 0
    """Number of experts per layer; 0 if every layer has a single MLP."""
    num_dense_layers: int = 0
    """Number of first layers that have a single MLP, in a model whose other layers have experts."""
    dense_ffn_hidden_size: int = 0
    """Inner size of the MLP of these layers."""
    shared_ffn_hidden_size: int = 0
    """Inner size of the shared experts of a layer together, through which every token passes; 0 if there are none."""
    delta: DeltaShape | None = None
    """None if every layer has attention."""

    latent: LatentShape | None = None
    """The sizes of multi-latent attention; None if attention is grouped. head_dim is then the size of a value."""

    def cached_elements(self, tp: int) -> int:
        """Elements of a token's keys and values in one layer, on one of ``tp`` tensor-parallel ranks."""
        if self.latent is not None:
            return self.num_attention_heads // tp * (self.latent.key_dim + self.latent.value_dim)
        return 2 * max(1, self.num_query_groups // tp) * self.head_dim

    @property
    def delta_layers(self) -> tuple[bool, ...]:
        """Whether each layer has a gated delta net in place of attention."""
        return (False,) * self.num_layers if self.delta is None else self.delta.is_delta

    @property
    def mlp_size(self) -> int:
        """Inner size of the MLP in layers without experts."""
        return self.dense_ffn_hidden_size or self.ffn_hidden_size
