"""Flags of ``tools/plan.py``: the cluster and the run to be planned, and the assumptions about both."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_rasft.flags import (
    FlagSection,
    NonNegativeFloat,
    NonNegativeInt,
    OneOf,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
)
from megatron_rasft.objective.declaration import Objective
from megatron_rasft.objective.families import OBJECTIVES


@dataclass(kw_only=True)
class CapacityConfig(FlagSection):
    """The cluster, and the run on it."""

    config: list[str] = field(default_factory=list)
    """TOML files of flags of pretrain_rasft.py (examples/recipes), whose layout and run are planned. Flags of this tool stand in their
    table [plan]; those on the command line win."""

    num_gpus: PositiveInt = 8
    """GPUs of the cluster, including those of the rollout servers."""

    gpus_per_node: PositiveInt = 8
    """GPUs of a node, which are connected by NVLink. Tensor parallelism stays inside a node."""

    gpu_memory_gib: PositiveFloat = 80.0
    """Memory of a GPU, GiB."""

    rollout_gpus: NonNegativeInt | None = None
    """GPUs of --num-gpus for SGLang servers; 0: the trainer samples itself. Unset: the number with the shortest run."""

    train_data: str = "train.jsonl"
    """File of demonstrations in the commands."""

    objective: Annotated[str, OneOf(tuple(OBJECTIVES))] = "rasft"
    """The objective, as in pretrain_rasft.py. It decides whether rollouts and a reference are needed."""

    seq_length: PositiveInt = 8192
    """Longest sample, tokens. A packed micro-batch holds --micro-batch-size times as many tokens."""

    global_batch_size: PositiveInt = 256
    """Problems per step."""

    micro_batch_size: PositiveInt = 1
    """Tokens of a micro-batch, in units of --seq-length."""

    num_samples: PositiveInt = 4
    """Rollouts per problem."""

    max_new_tokens: PositiveInt = 4096
    """Longest rollout, tokens."""

    num_problems: PositiveInt = 100_000
    """Problems in the training data."""

    epochs: PositiveInt = 1
    """Number of times that each problem is trained on."""

    refresh_interval: PositiveInt = 32
    """Steps between refreshes (--rasft-refresh-interval)."""

    rollout_lag: Literal[0, 1] = 0
    """0: the trainer waits for rollouts; 1: servers sample during the training steps (--rollout-lag)."""

    rollout_batch_size: PositiveInt = 64
    """Sequences that one replica of the trainer decodes at once if the trainer samples itself."""

    sync_bucket_mib: PositiveInt = 512
    """Weights sent at once in a sync, MiB."""

    logprob_chunk_tokens: NonNegativeInt | None = None
    """Number of tokens whose logits exist at once (--objective-logprob-chunk-tokens); 0: all.

    Unset: as many as fit 3 GiB of logits.
    """

    rasft_query_groups: int | None = None
    """Query groups of the model in training, as in pretrain_rasft.py."""

    save_interval: NonNegativeInt = 100
    """Steps between checkpoints. All checkpoints are kept. 0: the run saves none."""

    tensor_model_parallel_size: PositiveInt | None = None
    """Plan only layouts with this size. Unset: all sizes that divide the node and the model."""

    pipeline_model_parallel_size: PositiveInt | None = None
    """Plan only layouts with this size. Unset: all sizes that divide the number of layers."""

    context_parallel_size: PositiveInt | None = None
    """Plan only layouts with this size. Unset: 1, 2, 4 and 8, as long as each rank has at least 4,096 tokens."""

    expert_model_parallel_size: PositiveInt | None = None
    """Plan only layouts with this size; for mixtures of experts. Unset: all sizes that divide the number of experts."""

    num_layers_per_virtual_pipeline_stage: NonNegativeInt | None = None
    """Plan only layouts with this many layers in a model chunk; 0: without interleaving. Unset: up to 5 chunks a stage."""

    recompute: Literal["any", "none", "selective", "full"] = "any"
    """Plan only layouts with this recomputation in the backward pass. selective: the activations of the MLP (or of the mixture of
    experts); full: the activations of every layer."""

    @property
    def needs(self) -> Objective:
        """The objective, which declares whether it needs rollouts and a reference."""
        return OBJECTIVES[self.objective]()

    def check(self) -> None:
        if self.rollout_gpus is not None and self.rollout_gpus >= self.num_gpus:
            raise self.refusal(
                "rollout_gpus",
                f"must be less than --num-gpus, {self.num_gpus}, because the trainer needs GPUs too. Use 0 to let the trainer sample "
                "itself.",
            )
        if self.rollout_lag and self.rollout_gpus == 0:
            raise self.refusal(
                "rollout_lag", "needs servers, and --rollout-gpus 0 leaves none. Change one of the two flags."
            )
        if self.max_new_tokens >= self.seq_length:
            raise self.refusal(
                "max_new_tokens",
                f"leaves no tokens for a prompt in --seq-length {self.seq_length}. Use fewer new tokens, or a longer sequence.",
            )


@dataclass(kw_only=True)
class AssumptionConfig(FlagSection):
    """The assumptions from which the times are calculated. Each is printed with its value and its source."""

    demonstration_tokens: PositiveInt = 1024
    """Mean length of a demonstration with its prompt, tokens."""

    prompt_tokens: PositiveInt = 256
    """Mean length of a prompt, tokens."""

    response_tokens: PositiveInt | None = None
    """Mean length of a rollout without its prompt, tokens. Unset: half of --max-new-tokens."""

    solve_rate: Share = 0.5
    """Share of the rollouts that are correct. Most objectives train on these only, grpo and gft on the wrong ones too."""

    mfu: Annotated[float | None, Range(above=0, at_most=1, advice="0.4 means 40 % of the peak.")] = None
    """Share of --peak-tflops that matrix products reach, without pipeline bubbles and communication. Unset: 0.47 in BF16, 0.27 in
    FP8; for mixtures of experts 0.30 and 0.12."""

    peak_tflops: PositiveFloat | None = None
    """Dense peak of a GPU in this precision, TFLOP/s. Unset: 989 in BF16, 1979 in FP8 (H100 SXM)."""

    decode_tokens_per_s: PositiveFloat | None = None
    """Tokens that SGLang decodes per second and GPU. Unset: a measurement, scaled by the size of the model."""

    embedded_layer_ms: PositiveFloat = 0.5
    """Time of the kernels of one layer for one token of every sequence, ms, if the trainer samples itself and launches the
    kernels one by one. It does so with pipeline stages and with mixtures of experts."""

    embedded_graph_layer_ms: PositiveFloat = 0.034
    """The same time in a CUDA graph, ms.

    Estimated from 17 kernels of 2 microseconds with Transformer Engine's layers.
    """

    verifications_per_s: PositiveFloat = 100.0
    """Rollouts that all workers together verify per second."""

    hbm_gb_per_s: PositiveFloat = 3350.0
    """Memory bandwidth of a GPU, GB/s. Decoding reaches 60 % of it."""

    nvlink_gb_per_s: PositiveFloat = 300.0
    """Bandwidth of a collective inside a node, GB/s per GPU and direction."""

    network_gb_per_s: PositiveFloat = 40.0
    """Bandwidth of a collective between nodes, GB/s per GPU and direction (80 % of a 400 Gb/s card per GPU)."""

    pcie_gb_per_s: PositiveFloat = 25.0
    """Bandwidth between a GPU and pinned host memory, GB/s."""

    disk_gb_per_s: PositiveFloat = 2.0
    """Bandwidth at which all nodes together write a checkpoint, GB/s."""

    margin_gib: NonNegativeFloat = 8.0
    """GPU memory left for the CUDA context, NCCL's buffers and the allocator's gaps, GiB."""
