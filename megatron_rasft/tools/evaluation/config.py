"""Flags of ``tools/evaluate.py``. The defaults are the protocol of the published tables."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_rasft.config.verify import SandboxLevel, check_verify_function
from megatron_rasft.flags import (
    FlagSection,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
)

MATH_BENCHMARKS = ("math500", "minerva_math", "olympiadbench", "aime24", "aime25", "amc23")
"""The six sets of the published mathematical tables."""


@dataclass(kw_only=True)
class EvaluationConfig(FlagSection):
    """The benchmarks, the number of samples and how they are drawn."""

    benchmarks: list[str] = field(default_factory=lambda: list(MATH_BENCHMARKS))
    """Names of known benchmarks, which are searched in --data-folder, or NAME=FILE. NAME may be new: a benchmark of
    your own, of code if its rows have tests."""

    data_folder: str | None = None
    """Folder of benchmark files (<name>.jsonl.gz, .jsonl or .parquet), or of clones of their Hugging Face data sets."""

    num_samples: PositiveInt = 16
    """Samples per problem (k of avg@k)."""

    temperature: NonNegativeFloat = 1.0
    """Sampling temperature. 0 takes the most likely token and requires --num-samples 1."""

    top_p: Annotated[float, Range(above=0, at_most=1, advice="Use 1 to keep every token.")] = 1.0
    """Nucleus sampling: sample from the smallest set of tokens whose total probability reaches this. 1 keeps every token."""

    max_new_tokens: PositiveInt = 4096
    """Longest response, tokens."""

    seed: NonNegativeInt = 1234
    """Seed of sampling. The draws of a sample depend only on this seed, the problem and the sample's number."""

    batch_size: PositiveInt = 64
    """Sequences decoded at once on one replica, or requests in flight at a server."""

    deadline_s: PositiveFloat = 1800.0
    """Longest time that a server of --server may take for one sample, seconds. After that, other servers get the request."""

    limit: NonNegativeInt = 0
    """Evaluate only this many problems of each benchmark, from its beginning; the tables then have a note on it.

    0: all problems.
    """

    pass_k: list[PositiveInt] = field(default_factory=list)
    """k of pass@k and maj@k, at most --num-samples. Unset: the powers of two up to --num-samples."""

    prompt_suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    """Appended to each mathematical problem, and to each problem that --verify-function grades; "" appends nothing."""

    code_prompt_suffix: str = "\nWrite the solution in Python."
    """Appended to each problem of a code benchmark of your own, as --data-code-prompt-suffix in training. "" appends nothing."""

    system_prompt: str | None = None
    """System message of every prompt. Unset: the default of the chat template."""

    chat_template: str | None = None
    """Jinja file of the chat template. Unset: the template of the model; if it has none, plain text and a line break."""

    verify_function: str | None = None
    """Function that grades every sample in place of the gold answer or the tests, as in training: FILE.py:NAME, or the name of an
    entry point in the group megatron_rasft.verifiers. The rows of a benchmark of your own then need a problem only."""

    verify_correct_reward: Annotated[
        float, Range(above=0, at_most=1, advice="With 1 only a full reward is correct.")
    ] = 1.0
    """Smallest reward of --verify-function that counts as correct in the tables. The mean reward is listed beside them."""

    verify_timeout_s: PositiveFloat = 10.0
    """Deadline for grading one sample, seconds."""

    verify_num_workers: NonNegativeInt = 0
    """Grading processes. 0: one per two CPU cores."""

    sandbox_level: SandboxLevel = "landlock"
    """Weakest protection under which programs that a model wrote may run; namespaces is the strongest. docs/sandbox.md describes
    them."""

    code_timeout_s: PositiveFloat = 60.0
    """Deadline for a program with all its tests, or with one case of standard input and output, seconds of wall time. The slowest
    reference solution (Mbpp+/599) takes 30 s on an idle core."""

    code_memory_mib: Annotated[
        int, Range(at_least=64, advice="Running a program needs at least this much.")
    ] = 2048
    """Address space that a program may use, MiB. Its tests may use the same amount in addition."""

    code_output_mib: PositiveInt = 64
    """Maximum output of a program, MiB: printed, returned at once, or written to files."""

    unknown_data: Literal["refuse", "accept"] = "refuse"
    """Treatment of a file with unknown content or an unexpected number of rows. refuse: stop; accept: mark its results as
    unverified."""

    live_s: NonNegativeFloat = 30.0
    """Longest time between two lines about samples that are drawn or graded, seconds. On a terminal a single line is kept up to
    date instead. 0: no such lines."""

    def check(self) -> None:
        check_verify_function(self)
        if self.temperature == 0 and self.num_samples > 1:
            raise self.refusal(
                "num_samples",
                "at --temperature 0 would give the same response each time. Use --num-samples 1, or a temperature above 0.",
            )
        if not self.benchmarks:
            raise self.refusal("benchmarks", "must name at least one benchmark.")
        if self.pass_k and max(self.pass_k) > self.num_samples:
            raise self.refusal(
                "pass_k", f"must not exceed --num-samples, {self.num_samples}. Draw more samples."
            )

    def ks(self) -> list[int]:
        """Every k of pass@k and maj@k, ascending, with the default filled in."""
        powers = {2**i for i in range(self.num_samples.bit_length())} | {self.num_samples}
        return sorted(set(self.pass_k) or powers)
