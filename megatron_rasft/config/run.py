"""Flags of the run as a whole: the folder of the model, the interval of refreshes, the layout of batches."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_rasft.flags import FlagSection, NonNegativeFloat, PositiveInt, Range, Share


@dataclass(kw_only=True)
class RunConfig(FlagSection):
    """The model, the interval of refreshes and the layout of batches."""

    config: list[str] = field(default_factory=list)
    """TOML files of flags: NAME = VALUE, with the names of the flags (examples/recipes). Later files win, and the command line over
    all of them. --save keeps the flags of a run in such a file, config.toml."""

    hf_model: str | None = None
    """Hugging Face folder of the model: config.json sets the architecture flags, the safetensors the weights."""

    model_source: Literal["tables", "bridge"] = "tables"
    """Who builds the model and names its weights. tables: this program, for the families in docs/checkpoints.md. bridge: NVIDIA's
    Megatron-Bridge, for other families, in an environment of its own (`make bridge`); rollouts then come from servers or a file."""

    dry_run: bool = False
    """Print what the run would do, and exit: rows used and dropped, steps, refreshes, memory, and the files it would write. No model is
    built, no server is asked, and nothing is written."""

    export_hf: str | None = None
    """Folder for the trained model, written at the end in the format of transformers. It must not exist, unless this run has written
    it: then the run is finished."""

    rasft_query_groups: int | None = None
    """Query groups of the model in training, at least as many as in config.json. The added groups are zero, get no gradient and are
    not exported; they cost computation. Example: SmolLM2 has 3 groups; with 4 it trains on 2 tensor-parallel ranks."""

    rasft_refresh_interval: PositiveInt = 32
    """Steps between refreshes. At a refresh the problems of the next steps are scored, sampled and weighted. 1 refreshes before
    every step."""

    rasft_batch_layout: Literal["packed", "padded"] = "packed"
    """Layout of a micro-batch. packed: sequences without padding, up to --micro-batch-size x --seq-length tokens; padded:
    --micro-batch-size sequences, each padded to the longest."""

    exit_before_end_s: NonNegativeFloat | None = None
    """Seconds before the end of the Slurm allocation (SLURM_JOB_END_TIME) at which the run saves and stops with exit code 0. Unset:
    1.5 times the longest save of the run, plus its longest step or phase of a refresh, plus 60 s; 300 s for the save before the first
    one. 0 ignores the end."""

    stall_deadline_s: NonNegativeFloat = 600.0
    """Seconds without progress on every rank after which the run ends, with a line that names the rank for which the others wait, its
    phase and its Python stack. Three times as long while the model is built or loaded, weights are sent to servers, a checkpoint is
    saved, and the model is exported. 0 waits for ever. A collective that waits longer than --distributed-timeout-minutes is ended by
    torch first."""

    straggler_factor: Annotated[float, Range(above=1)] = 1.5
    """A step's line names each rank whose own work (its batch, forward and backward passes) takes longer than this factor times the median
    of its pipeline stage, and at least 0.5 s longer. Ranks of a tensor-, context- or expert-parallel group wait for each other within their layers
    and are named together. inf names none."""

    rasft_keep_checkpoints: PositiveInt | None = None
    """Number of newest checkpoints that are kept in --save. Older ones are deleted after each complete save, except every
    --save-retain-interval steps. Unset: all are kept, or with --save-retain-interval the newest one and those at its interval."""

    rasft_warn_frac: Share = 0.3
    """Share of a refresh's rollouts above which a warning follows the refresh: rollouts that were cut by length, filtered, or
    unverifiable. 1: no warning."""

    rasft_live_s: NonNegativeFloat = 30.0
    """Longest time between two lines about scoring, sampling, verification or a weight sync that goes on, seconds. On a terminal a
    single line is kept up to date instead. 0: no such lines."""

    rasft_ref_cache: str | None = None
    """SQLite file of reference log-probabilities, which later runs reuse. Unset: ref_logprobs.sqlite in --save."""

    rasft_metrics: str | None = None
    """File to which all logged metrics are appended, one JSON object per line. Unset: metrics.jsonl in --save."""
