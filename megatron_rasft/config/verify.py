"""Knobs of the verifier: workers and limits, de-duplication, quality filters."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

SandboxLevel = Literal["namespaces", "landlock", "limits"]


@dataclass(kw_only=True)
class VerifyConfig:
    """What a rollout is worth: grading in killable workers, near-duplicates, text quality.

    Filters run in the order of the fields and the first that fires names the rollout's
    ``filtered_by``. A filter set to False never fires, whatever its thresholds.
    """

    verify_num_workers: int = 0
    """Grading processes on rank 0, >= 0. 0: one per two CPU cores this process may use, at least 1."""

    verify_timeout_s: float = 10.0
    """Deadline for grading one rollout, seconds of wall time, > 0. Past it the worker is killed and the
    verdict is ``timeout``. Starting a worker does not count."""

    verify_memory_mib: int = 2048
    """Address space one grading may claim beyond what a fresh worker has, MiB, >= 64."""

    verify_max_tasks_per_worker: int = 1000
    """Gradings after which a worker is replaced, >= 1: sympy's caches grow with every answer."""

    verify_max_response_chars: int = 200_000
    """Characters of a response the grader reads, > 0: the last ones, where the answer stands."""

    verify_grade_truncated: bool = False
    """Grade responses cut by the length limit like finished ones. Off: they are ``wrong`` ("truncated")."""

    verify_numeric_rel_tolerance: float = 0.0
    """Relative difference up to which two plain numbers are equal, in [0, 0.1]. 0: exactly equal. Physics
    benchmarks with rounded answers (Minerva) are commonly scored with 1e-4."""

    verify_sandbox_level: SandboxLevel = "limits"
    """Weakest protection under which programs that a model wrote may be run; the strongest that the machine
    allows is used. ``megatron_rasft/verify/programs/sandbox.py`` says what each does; namespaces is the strongest."""

    verify_code_timeout_s: float = 20.0
    """Deadline for one program and all its tests (one case, if it is run case by case), seconds of wall time,
    > 0. Its CPU time is limited to 2 s more."""

    verify_code_memory_mib: int = 1024
    """Address space a program may claim, and the tests likewise, beyond the loaded interpreter's, MiB, >= 64."""

    verify_code_output_mib: int = 16
    """Most that a program may print, return at once, or write to files, MiB, >= 1."""

    verify_dedup_threshold: float = 0.82
    """Two responses of a group are near-duplicates at this word-n-gram Jaccard similarity, in (0, 1]."""

    verify_dedup_ngram: int = 3
    """Words per n-gram of the similarity, >= 1."""

    verify_filter_too_short: bool = True
    """Drop responses shorter than ``verify_min_chars``."""

    verify_min_chars: int = 20
    """Characters, surrounding white space not counted, >= 0."""

    verify_filter_loop_sentences: bool = True
    """Drop responses that repeat one sentence ``verify_loop_repeats`` times."""

    verify_loop_sentence_chars: int = 12
    """Shorter sentences may repeat freely, characters, >= 1."""

    verify_filter_loop_windows: bool = True
    """Drop responses in which one window of words occurs ``verify_loop_repeats`` times."""

    verify_loop_window_words: int = 8
    """Words in the window, >= 2."""

    verify_loop_min_words: int = 30
    """Responses with fewer words are not searched for repeated windows, >= 0."""

    verify_loop_repeats: int = 3
    """Occurrences that make a loop, for sentences and for windows, >= 2."""

    verify_filter_self_correction: bool = False
    """Drop responses with ``verify_self_corrections`` different self-correction phrases ("wait", "let me
    recheck"). Off: it throws away good long reasoning."""

    verify_self_corrections: int = 2
    """Different phrases, >= 1."""

    verify_filter_symbols: bool = False
    """Drop responses with more than ``verify_max_symbol_frac`` symbols. Off: it throws away good LaTeX."""

    verify_max_symbol_frac: float = 0.42
    """Share of the characters other than white space that are neither letters nor digits, in [0, 1]."""

    verify_filter_shortcut: bool = False
    """Drop responses that announce an answer instead of deriving it: a "the correct answer is" phrase, a
    boxed option letter in fewer than ``verify_shortcut_option_chars`` characters, any box in fewer than
    ``verify_shortcut_box_chars``. Off: short word problems have short correct solutions."""

    verify_shortcut_option_chars: int = 180
    """Characters, >= 0."""

    verify_shortcut_box_chars: int = 120
    """Characters, >= 0."""

    verify_filter_format: bool = False
    """Keep only responses of ``verify_format_min_chars`` characters whose last \\boxed{} is closed and that
    hold a reasoning marker ("=", "therefore", "let"). Off: the verifier has judged the answer already."""

    verify_format_min_chars: int = 80
    """Characters, >= 0."""

    def __post_init__(self) -> None:
        self._require("verify_num_workers", 0, None, "0 means one worker per two CPU cores.")
        if not self.verify_timeout_s > 0:
            raise ValueError(
                f"--verify-timeout-s must be > 0, got {self.verify_timeout_s}: without a deadline one answer "
                "could hold a worker for ever. Use a large value instead."
            )
        self._require("verify_memory_mib", 64, None, "Less does not leave room to parse a formula.")
        self._require("verify_max_tasks_per_worker", 1, None, "Use a large value to keep workers long.")
        self._require("verify_max_response_chars", 1, None, "Use a large value to read whole responses.")
        self._require("verify_numeric_rel_tolerance", 0, 0.1, "0 asks for exactly equal numbers.")
        if self.verify_sandbox_level not in get_args(SandboxLevel):
            raise ValueError(
                f"--verify-sandbox-level must be {', '.join(get_args(SandboxLevel))}, got "
                f"{self.verify_sandbox_level!r}. limits accepts whatever the machine allows."
            )
        if not self.verify_code_timeout_s > 0:
            raise ValueError(
                f"--verify-code-timeout-s must be > 0, got {self.verify_code_timeout_s}: a program may never end. "
                "Use a large value instead."
            )
        self._require("verify_code_memory_mib", 64, None, "Less does not leave room to run a program.")
        self._require("verify_code_output_mib", 1, None, "Results cross between processes within it.")
        if not 0 < self.verify_dedup_threshold <= 1:
            raise ValueError(
                f"--verify-dedup-threshold must be in (0, 1], got {self.verify_dedup_threshold}. "
                "1 removes only responses with the same word n-grams."
            )
        self._require("verify_dedup_ngram", 1, None, "3 is the published value.")
        self._require("verify_min_chars", 0, None, "Use --no-verify-filter-too-short to keep everything.")
        self._require("verify_loop_sentence_chars", 1, None, "12 is the published value.")
        self._require("verify_loop_window_words", 2, None, "8 is the published value.")
        self._require("verify_loop_min_words", 0, None, "30 is the published value.")
        self._require("verify_loop_repeats", 2, None, "A single occurrence is no loop.")
        self._require("verify_self_corrections", 1, None, "2 is the published value.")
        self._require("verify_max_symbol_frac", 0, 1, "It is a share of the characters.")
        self._require("verify_shortcut_option_chars", 0, None, "0 switches this part of the rule off.")
        self._require("verify_shortcut_box_chars", 0, None, "0 switches this part of the rule off.")
        self._require("verify_format_min_chars", 0, None, "0 switches this part of the rule off.")

    def _require(self, field: str, low: float, high: float | None, way_out: str) -> None:
        value = getattr(self, field)
        if value >= low and (high is None or value <= high):
            return
        rule = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"--{field.replace('_', '-')} must be {rule}, got {value}. {way_out}")


def published_filters() -> dict[str, Any]:
    """Fields of ``VerifyConfig`` that make its filters and de-duplication the published script's.

    ``VerifyConfig(**published_filters())``, or ``dataclasses.replace(config, **published_filters())`` to keep
    a run's workers and limits.
    """
    return {
        "verify_dedup_threshold": 0.82,
        "verify_dedup_ngram": 3,
        "verify_filter_too_short": True,
        "verify_min_chars": 20,
        "verify_filter_loop_sentences": True,
        "verify_loop_sentence_chars": 12,
        "verify_filter_loop_windows": True,
        "verify_loop_window_words": 8,
        "verify_loop_min_words": 30,
        "verify_loop_repeats": 3,
        "verify_filter_self_correction": True,
        "verify_self_corrections": 2,
        "verify_filter_symbols": True,
        "verify_max_symbol_frac": 0.42,
        "verify_filter_shortcut": True,
        "verify_shortcut_option_chars": 180,
        "verify_shortcut_box_chars": 120,
        "verify_filter_format": True,
        "verify_format_min_chars": 80,
    }
