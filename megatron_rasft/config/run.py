"""Knobs of the run as a whole: the model's folder, the rhythm of refreshes, how batches are laid out."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class RunConfig:
    """The run as a whole."""

    hf_model: str | None = None
    """Hugging Face folder of the model: config.json sets the architecture flags, the safetensors the weights."""

    export_hf: str | None = None
    """Folder that the trained model is written to at the end, as transformers loads it. Must not exist."""

    rasft_query_groups: int | None = None
    """Query groups to build the model with, at least those of config.json. The added ones are zero, get no gradient
    and are not exported: SmolLM2 with its 3 groups trains on 2 tensor-parallel ranks with 4, at the cost of their
    computation."""

    rasft_refresh_interval: int = 32
    """Steps between refreshes, >= 1: at a refresh the problems of the next steps are scored and sampled."""

    rasft_batch_layout: Literal["packed", "padded"] = "packed"
    """packed: sequences side by side up to --micro-batch-size x --seq-length tokens; padded: --micro-batch-size
    sequences, each padded to the longest."""

    rasft_ref_cache: str | None = None
    """SQLite file of reference log-probabilities, reused by later runs. Unset: ref_logprobs.sqlite in --save."""

    rasft_metrics: str | None = None
    """File every logged number is appended to, one JSON object a line. Unset: metrics.jsonl in --save."""

    def __post_init__(self) -> None:
        if self.rasft_refresh_interval < 1:
            raise ValueError(
                f"--rasft-refresh-interval must be >= 1, got {self.rasft_refresh_interval}. 1 samples before every step."
            )
