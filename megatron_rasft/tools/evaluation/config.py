"""Knobs of ``tools/evaluate.py``. The defaults are the protocol that the published tables were made with."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_rasft.config.verify import SandboxLevel

MATH_BENCHMARKS = ("math500", "minerva_math", "olympiadbench", "aime24", "aime25", "amc23")
"""The six sets of the published mathematical tables."""


@dataclass(kw_only=True)
class EvaluationConfig:
    """Which benchmarks, how many samples, how they are drawn."""

    benchmarks: list[str] = field(default_factory=lambda: list(MATH_BENCHMARKS))
    """Names of known sets, looked for in --data-folder, or NAME=FILE; NAME may be a mathematical set of one's own."""

    data_folder: str | None = None
    """Folder of benchmark files (<name>.jsonl.gz, .jsonl or .parquet), or of clones of their Hugging Face data sets."""

    num_samples: int = 16
    """Samples per problem (k of avg@k), >= 1."""

    temperature: float = 1.0
    """Sampling temperature, >= 0; 0 takes the most likely token, which goes with --num-samples 1."""

    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probability reaches this, in (0, 1]."""

    max_new_tokens: int = 4096
    """Longest response, tokens, >= 1."""

    seed: int = 1234
    """Seed of sampling, >= 0. Each sample's draws depend on it, the problem and its number only."""

    batch_size: int = 64
    """Sequences decoded at once on one replica, or requests in flight at a server, >= 1."""

    deadline_s: float = 1800.0
    """Longest time a server of --server may take for one sample, seconds, > 0; then others are asked."""

    limit: int = 0
    """Only the first so many problems of each set, >= 0; 0: all. The tables then say so."""

    pass_k: list[int] = field(default_factory=list)
    """k of pass@k and maj@k, each >= 1 and <= --num-samples. Unset: powers of two up to --num-samples."""

    prompt_suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    """Appended to each mathematical problem; "" appends nothing."""

    system_prompt: str | None = None
    """System message of every prompt. Unset: the chat template's default."""

    chat_template: str | None = None
    """Jinja file of the chat template. Unset: the model's own; without one, plain text and a line break."""

    verify_timeout_s: float = 10.0
    """Deadline for grading one sample, seconds, > 0."""

    verify_num_workers: int = 0
    """Grading processes, >= 0. 0: one per two CPU cores."""

    sandbox_level: SandboxLevel = "limits"
    """Weakest protection under which model-written programs may be run; namespaces is the strongest."""

    code_timeout_s: float = 60.0
    """Deadline for a program and all its tests, or one case of standard input and output, seconds of wall time, > 0. The
    slowest reference solution (Mbpp+/599) takes 30 s of a free core."""

    code_memory_mib: int = 2048
    """Address space a program may claim, and its tests likewise, MiB, >= 64."""

    code_output_mib: int = 64
    """Most that a program may print, return at once, or write to files, MiB, >= 1."""

    unknown_data: Literal["refuse", "accept"] = "refuse"
    """A file whose content is none of the known ones, or with another number of rows: refuse stops, accept marks its
    results as unverified."""

    def __post_init__(self) -> None:
        for flag, value in (
            ("--num-samples", self.num_samples),
            ("--max-new-tokens", self.max_new_tokens),
            ("--batch-size", self.batch_size),
            ("--code-output-mib", self.code_output_mib),
        ):
            if value < 1:
                raise ValueError(f"{flag} must be >= 1, got {value}.")
        if self.code_memory_mib < 64:
            raise ValueError(
                f"--code-memory-mib must be >= 64, got {self.code_memory_mib}. Less does not leave room to run a program."
            )
        if self.temperature < 0:
            raise ValueError(f"--temperature must be >= 0, got {self.temperature}. 0 is greedy.")
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"--num-samples {self.num_samples} at --temperature 0 would draw the same response each time. Use "
                "--num-samples 1, or a temperature above 0."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1], got {self.top_p}. Use 1 to keep every token.")
        for flag, value in (
            ("--seed", self.seed),
            ("--limit", self.limit),
            ("--verify-num-workers", self.verify_num_workers),
        ):
            if value < 0:
                raise ValueError(f"{flag} must be >= 0, got {value}.")
        for flag, seconds in (
            ("--deadline-s", self.deadline_s),
            ("--verify-timeout-s", self.verify_timeout_s),
            ("--code-timeout-s", self.code_timeout_s),
        ):
            if not seconds > 0:
                raise ValueError(f"{flag} must be > 0, got {seconds}.")
        if not self.benchmarks:
            raise ValueError("--benchmarks must name at least one set.")
        wrong = [k for k in self.pass_k if not 1 <= k <= self.num_samples]
        if wrong:
            raise ValueError(
                f"--pass-k must be in 1 .. {self.num_samples} (--num-samples), got {wrong[0]}. Draw more samples."
            )

    def ks(self) -> list[int]:
        """Every k of pass@k and maj@k, ascending, the default filled in."""
        powers = {2**i for i in range(self.num_samples.bit_length())} | {self.num_samples}
        return sorted(set(self.pass_k) or powers)
