"""Knobs of ``megatron_rasft/planning``: the cluster and the run that are asked about, and what is assumed of both."""

from dataclasses import dataclass
from typing import Literal

from megatron_rasft.config.objective import ObjectiveConfig, ObjectiveName


@dataclass(kw_only=True)
class PlanConfig:
    """The cluster, and the run on it."""

    num_gpus: int = 8
    """GPUs of the cluster, those of the rollout servers included, >= 1."""

    gpus_per_node: int = 8
    """GPUs of a node, which share NVLink; tensor parallelism stays inside, >= 1."""

    gpu_memory_gib: float = 80.0
    """Memory of a GPU, GiB, > 0."""

    rollout_gpus: int | None = None
    """Of --num-gpus, those that SGLang servers run on; 0: the trainer samples itself. Unset: the number that makes the
    run shortest."""

    objective: ObjectiveName = "rasft"
    """As in pretrain_rasft.py: decides whether rollouts and a reference are needed."""

    seq_length: int = 8192
    """Longest sample, tokens; with the micro-batch size the token budget of a packed micro-batch."""

    global_batch_size: int = 256
    """Problems of a step."""

    micro_batch_size: int = 1
    """--seq-length sequences' worth of tokens in a micro-batch."""

    num_samples: int = 4
    """Rollouts per problem."""

    max_new_tokens: int = 4096
    """Longest rollout, tokens."""

    num_problems: int = 100_000
    """Problems in the training data."""

    epochs: int = 1
    """How often each problem is trained on."""

    refresh_interval: int = 32
    """Steps between refreshes (--rasft-refresh-interval)."""

    rollout_lag: int = 0
    """0: the trainer waits for rollouts; 1: servers sample while it trains (--rollout-lag)."""

    rollout_batch_size: int = 64
    """Sequences that a replica of the trainer decodes at once where it samples itself."""

    sync_bucket_mib: int = 512
    """Weights sent at once in a sync, MiB."""

    logprob_chunk_tokens: int | None = None
    """Tokens whose logits exist at once (--objective-logprob-chunk-tokens); 0: all. Unset: as many as 3 GiB hold."""

    rasft_query_groups: int | None = None
    """Query groups to build the model with, as in pretrain_rasft.py."""

    save_interval: int = 100
    """Steps between checkpoints, all of which are kept; 0: none."""

    tensor_model_parallel_size: int | None = None
    """Plan only layouts with this size. Unset: every one that divides a node and the model."""

    pipeline_model_parallel_size: int | None = None
    """Plan only layouts with this size. Unset: every one that divides the layers."""

    context_parallel_size: int | None = None
    """Plan only layouts with this size. Unset: 1, 2, 4 and 8, as far as 4,096 tokens are left to a rank."""

    expert_model_parallel_size: int | None = None
    """Plan only layouts with this size; mixtures of experts only. Unset: every one that divides the experts."""

    num_layers_per_virtual_pipeline_stage: int | None = None
    """Plan only layouts with this many layers in a model chunk; 0: without interleaving. Unset: up to 5 chunks a stage."""

    recompute: Literal["any", "none", "selective", "full"] = "any"
    """Plan only layouts with this recomputation in the backward pass. selective: the MLP's (or the mixture's) activations; full: those of every layer."""

    @property
    def needs(self) -> ObjectiveConfig:
        """The objective, asked for what it needs."""
        return ObjectiveConfig(objective=self.objective)

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--num-gpus", self.num_gpus, 1),
            ("--gpus-per-node", self.gpus_per_node, 1),
            ("--seq-length", self.seq_length, 1),
            ("--global-batch-size", self.global_batch_size, 1),
            ("--micro-batch-size", self.micro_batch_size, 1),
            ("--num-samples", self.num_samples, 1),
            ("--max-new-tokens", self.max_new_tokens, 1),
            ("--num-problems", self.num_problems, 1),
            ("--epochs", self.epochs, 1),
            ("--refresh-interval", self.refresh_interval, 1),
            ("--rollout-batch-size", self.rollout_batch_size, 1),
            ("--sync-bucket-mib", self.sync_bucket_mib, 1),
            ("--logprob-chunk-tokens", self.logprob_chunk_tokens, 0),
            ("--save-interval", self.save_interval, 0),
            ("--tensor-model-parallel-size", self.tensor_model_parallel_size, 1),
            ("--pipeline-model-parallel-size", self.pipeline_model_parallel_size, 1),
            ("--context-parallel-size", self.context_parallel_size, 1),
            ("--expert-model-parallel-size", self.expert_model_parallel_size, 1),
            ("--num-layers-per-virtual-pipeline-stage", self.num_layers_per_virtual_pipeline_stage, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{flag} must be >= {least}, got {value}. Give a larger number.")
        if self.gpu_memory_gib <= 0:
            raise ValueError(f"--gpu-memory-gib must be > 0, got {self.gpu_memory_gib:g}. An H100 has 80.")
        if self.rollout_gpus is not None and not 0 <= self.rollout_gpus < self.num_gpus:
            raise ValueError(
                f"--rollout-gpus must be in [0, --num-gpus), got {self.rollout_gpus} of {self.num_gpus}: the trainer needs "
                "some too. Use 0 to sample from the trainer itself."
            )
        if self.rollout_lag not in (0, 1):
            raise ValueError(
                f"--rollout-lag must be 0 or 1, got {self.rollout_lag}. Use 0 to wait for rollouts."
            )
        if self.rollout_lag and self.rollout_gpus == 0:
            raise ValueError(
                "--rollout-lag 1 needs servers, and --rollout-gpus 0 leaves none. Give them GPUs, or leave it out."
            )
        if self.max_new_tokens >= self.seq_length:
            raise ValueError(
                f"--max-new-tokens {self.max_new_tokens} leaves no room for a prompt in --seq-length {self.seq_length}. Use "
                "fewer new tokens, or a longer sequence."
            )


@dataclass(kw_only=True)
class AssumptionConfig:
    """What the times stand on. Each is printed with its value and where it comes from."""

    demonstration_tokens: int = 1024
    """Mean length of a demonstration with its prompt, tokens."""

    prompt_tokens: int = 256
    """Mean length of a prompt, tokens."""

    response_tokens: int | None = None
    """Mean length of a rollout without its prompt, tokens. Unset: half of --max-new-tokens."""

    solve_rate: float = 0.5
    """Share of the rollouts that are correct, and so are trained on, in [0, 1]."""

    mfu: float | None = None
    """Share of --peak-tflops that matrix products reach, bubbles and communication left out, in (0, 1]. Unset: 0.47 in
    BF16, 0.27 in FP8; for mixtures of experts 0.30 and 0.12."""

    peak_tflops: float | None = None
    """Dense peak of a GPU in this precision, TFLOP/s. Unset: 989 in BF16, 1979 in FP8 (H100 SXM)."""

    decode_tokens_per_s: float | None = None
    """Tokens that SGLang decodes per second and GPU. Unset: scaled by size from the measurement."""

    embedded_layer_ms: float = 0.5
    """Time of one layer's kernels for a token of all rows where the trainer samples itself and launches them one by one, as it does
    with pipeline stages and mixtures of experts, ms."""

    embedded_graph_layer_ms: float = 0.034
    """The same in a CUDA graph, ms. An estimate: 17 kernels, counted with Transformer Engine's layers, of 2 microseconds."""

    verifications_per_s: float = 100.0
    """Rollouts that all workers together verify per second."""

    hbm_gb_per_s: float = 3350.0
    """Memory bandwidth of a GPU, GB/s; decoding reaches 0.6 of it."""

    nvlink_gb_per_s: float = 300.0
    """What a collective inside a node moves per GPU and direction, GB/s."""

    network_gb_per_s: float = 40.0
    """What a collective between nodes moves per GPU and direction, GB/s (a 400 Gb/s card for each, less a fifth)."""

    pcie_gb_per_s: float = 25.0
    """Between a GPU and pinned host memory, GB/s."""

    disk_gb_per_s: float = 2.0
    """What the file system takes of a checkpoint from all nodes together, GB/s."""

    margin_gib: float = 8.0
    """GPU memory left for the CUDA context, NCCL's buffers and the allocator's gaps, GiB, >= 0."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--demonstration-tokens", self.demonstration_tokens),
            ("--prompt-tokens", self.prompt_tokens),
            ("--response-tokens", self.response_tokens),
            ("--mfu", self.mfu),
            ("--peak-tflops", self.peak_tflops),
            ("--decode-tokens-per-s", self.decode_tokens_per_s),
            ("--embedded-layer-ms", self.embedded_layer_ms),
            ("--embedded-graph-layer-ms", self.embedded_graph_layer_ms),
            ("--verifications-per-s", self.verifications_per_s),
            ("--hbm-gb-per-s", self.hbm_gb_per_s),
            ("--nvlink-gb-per-s", self.nvlink_gb_per_s),
            ("--network-gb-per-s", self.network_gb_per_s),
            ("--pcie-gb-per-s", self.pcie_gb_per_s),
            ("--disk-gb-per-s", self.disk_gb_per_s),
        ):
            if value is not None and value <= 0:
                raise ValueError(f"{flag} must be > 0, got {value:g}. Leave it out for the default.")
        if self.mfu is not None and self.mfu > 1:
            raise ValueError(f"--mfu must be in (0, 1], got {self.mfu:g}: 0.4 means 40 % of the peak.")
        if not 0 <= self.solve_rate <= 1:
            raise ValueError(f"--solve-rate must be in [0, 1], got {self.solve_rate:g}: 0.5 means half.")
        if self.margin_gib < 0:
            raise ValueError(f"--margin-gib must be >= 0, got {self.margin_gib:g}. Use 0 for none.")
