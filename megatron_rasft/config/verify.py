"""Flags of ``megatron_rasft/verify``: grading workers and their limits, de-duplication, text filters."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from megatron_rasft.flags import FlagSection, NonNegativeInt, PositiveFloat, PositiveInt, Range, Share

SandboxLevel = Literal["namespaces", "landlock", "limits"]
ShortTexts = Literal["compare", "equal"]

FUNCTION_GROUP = "megatron_rasft.verifiers"
"""Entry point group of installed functions for --verify-function."""


def file_and_name(reference: str) -> tuple[Path, str] | None:
    """Returns file and name of ``FILE.py:NAME``; None for the name of an entry point."""
    file, _, name = reference.rpartition(":")
    return (Path(file), name) if file.endswith(".py") and name else None


def check_function(reference: str) -> None:
    """Checks a --verify-function without importing it: its file, or its entry point, exists.

    Raises:
        ValueError: the message names the flag and the way out.
    """
    found = file_and_name(reference)
    if found is not None:
        file, name = found
        if not file.is_file():
            raise ValueError(
                f"--verify-function {reference}: the file {file} does not exist (current folder: {Path.cwd()}). Correct the path."
            )
        if not name.isidentifier():
            raise ValueError(f"--verify-function {reference}: {name!r} is not a name. Give {file}:NAME.")
        return
    if reference.endswith(".py") or "/" in reference:
        raise ValueError(f"--verify-function {reference} does not name a function. Give FILE.py:NAME.")
    names = sorted(metadata.entry_points(group=FUNCTION_GROUP).names)
    if reference not in names:
        raise ValueError(
            f"--verify-function {reference}: no installed package has this entry point in {FUNCTION_GROUP} "
            f"(installed: {', '.join(names) or 'none'}). Give one of them, or FILE.py:NAME."
        )


def check_verify_function(section: Any) -> None:
    """Checks the flags --verify-function and --verify-correct-reward of a section that has both.

    Raises:
        ValueError: the function does not exist, or the reward is given without it.
    """
    if section.verify_function is not None:
        check_function(section.verify_function)
    elif section.verify_correct_reward != 1.0:
        raise section.refusal(
            "verify_correct_reward",
            "has no effect without --verify-function, because other verdicts have no reward. Leave it out.",
        )


@dataclass(kw_only=True)
class VerifyConfig(FlagSection):
    """Verification of rollouts: grading in killable workers, near-duplicates, text filters.

    The filters run in the order of their flags, and a rollout's ``filtered_by`` names the first filter that rejects it. A rollout
    that a filter rejects is not trained on. If it is correct, it still counts as solved.
    """

    verify_function: str | None = None
    """Function that grades every response in place of the gold answer or the tests: FILE.py:NAME, or the name of an entry point in the
    group megatron_rasft.verifiers. It is called as f(row, response) and returns a bool, a reward in [0, 1] or a verdict.
    docs/verification.md describes it."""

    verify_correct_reward: Annotated[
        float, Range(above=0, at_most=1, advice="With 1 only a full reward is correct.")
    ] = 1.0
    """Smallest reward of --verify-function that counts as correct: such rollouts are trained on. A problem's solvability is the
    mean of all its rewards."""

    verify_num_workers: NonNegativeInt = 0
    """Grading processes on rank 0. 0: one per two CPU cores that this process may use, at least 1."""

    verify_timeout_s: PositiveFloat = 10.0
    """Deadline for grading one rollout, seconds of wall time. After it the worker is killed and the verdict is ``timeout``. The
    time for starting a worker is not counted. Answers that take more than a twentieth of it are graded after all others. A call of
    --verify-function has the whole deadline at once."""

    verify_timeouts_per_problem: PositiveInt = 4
    """Number of responses in a row to one problem that exceed the deadline, after which the next responses to it are not graded: their
    verdict is ``timeout``. A refresh (or a benchmark) starts to count anew."""

    verify_max_timeouts: PositiveInt = 64
    """Number of responses in one refresh (or benchmark) that exceed the deadline. After it no other answer that takes more than a
    twentieth of the deadline is graded: its verdict is ``timeout``."""

    verify_memory_mib: Annotated[
        int, Range(at_least=64, advice="Parsing a formula needs at least this much.")
    ] = 2048
    """Address space that one grading may use beyond that of a fresh worker, MiB."""

    verify_max_tasks_per_worker: PositiveInt = 1000
    """Gradings after which a worker is replaced, because sympy's caches grow with every answer."""

    verify_max_response_chars: PositiveInt = 200_000
    """Number of characters at the end of a response that the grader reads; the end contains the answer."""

    verify_grade_truncated: bool = False
    """Grade truncated responses like finished responses. Off: their verdict is ``wrong`` ("truncated")."""

    verify_numeric_rel_tolerance: Annotated[
        float, Range(at_least=0, at_most=0.1, advice="With 0 the numbers must be exactly equal.")
    ] = 0.0
    """Relative difference up to which two numbers are equal; 0 requires equal numbers. Physics benchmarks with rounded answers
    (Minerva) are commonly scored with 1e-4."""

    verify_sandbox_level: SandboxLevel = "landlock"
    """Weakest protection under which programs that a model wrote may run. The strongest protection that the machine allows is used:
    namespaces, then landlock, then limits. docs/sandbox.md describes them. At limits, programs can find out which files exist, and
    tests can read every file of the user."""

    verify_code_timeout_s: PositiveFloat = 20.0
    """Deadline for one program with all its tests (or with one case, if cases are run one by one), seconds of wall time. Its
    CPU time is limited to 2 s more."""

    verify_code_memory_mib: Annotated[
        int, Range(at_least=64, advice="Running a program needs at least this much.")
    ] = 1024
    """Address space that a program may use beyond that of the loaded interpreter, MiB.

    The tests may use the same amount in addition.
    """

    verify_code_output_mib: PositiveInt = 16
    """Maximum output of a program, MiB: printed, returned at once, or written to files."""

    verify_dedup_threshold: Annotated[
        float, Range(above=0, at_most=1, advice="1 removes only responses with the same word n-grams.")
    ] = 0.82
    """Word-n-gram Jaccard similarity from which two responses of a group are near-duplicates."""

    verify_dedup_ngram: PositiveInt = 3
    """Words per n-gram of the similarity."""

    verify_dedup_short_texts: ShortTexts = "compare"
    """Similarity of responses with fewer words than --verify-dedup-ngram. compare: their words are compared; equal: all of them
    count as equal, as in the published script."""

    verify_filter_programs: bool = False
    """Filter programs too, the responses to problems with tests, and responses that --verify-function grades. Off by default, because
    the filters are made for mathematics: a good program repeats lines, and the format filter drops every program."""

    verify_filter_too_short: bool = True
    """Drop responses that are shorter than --verify-min-chars."""

    verify_min_chars: NonNegativeInt = 20
    """Shortest response that --verify-filter-too-short keeps, characters without surrounding white space."""

    verify_filter_loop_sentences: bool = True
    """Drop responses that contain the same piece between full stops --verify-loop-repeats times. Case and white space are
    ignored."""

    verify_loop_sentence_chars: PositiveInt = 12
    """Shortest piece that --verify-filter-loop-sentences counts, characters."""

    verify_filter_loop_windows: bool = True
    """Drop responses that contain the same --verify-loop-window-words consecutive words --verify-loop-repeats times."""

    verify_loop_window_words: Annotated[int, Range(at_least=2, advice="8 is the published value.")] = 8
    """Number of consecutive words that --verify-filter-loop-windows compares."""

    verify_loop_min_words: NonNegativeInt = 30
    """Shortest response that --verify-filter-loop-windows searches, words."""

    verify_loop_max_words: NonNegativeInt = 500
    """Longest response that the two loop filters search, words; 0 for no limit. Good long reasoning repeats itself: without a limit
    these filters drop half of the reasoning traces of DeepSeek-R1."""

    verify_loop_repeats: Annotated[int, Range(at_least=2, advice="A single occurrence is not a loop.")] = 3
    """Number of occurrences of a sentence, or of consecutive words, that count as a loop."""

    verify_filter_self_correction: bool = False
    """Drop responses with --verify-self-corrections different phrases of self-correction ("wait", "let me recheck"). Off by
    default, because it drops good long reasoning."""

    verify_self_corrections: PositiveInt = 2
    """Number of different phrases of self-correction from which --verify-filter-self-correction drops a response."""

    verify_filter_symbols: bool = False
    """Drop responses with more than --verify-max-symbol-frac symbols. Off by default, because it drops good LaTeX."""

    verify_max_symbol_frac: Share = 0.42
    """Largest share of symbols that --verify-filter-symbols keeps: characters that are neither letters nor digits nor white space,
    of all characters."""

    verify_filter_shortcut: bool = False
    """Drop responses that state an answer without deriving it: with a phrase such as "therefore, the correct answer is", with a box
    of options or digits only in fewer than --verify-shortcut-option-chars characters, or with any box in fewer than
    --verify-shortcut-box-chars. Off by default, because short word problems have short correct solutions."""

    verify_shortcut_option_chars: NonNegativeInt = 180
    """Length below which --verify-filter-shortcut drops a response whose box holds options or digits only, characters."""

    verify_shortcut_box_chars: NonNegativeInt = 120
    """Length below which --verify-filter-shortcut drops a response with any box, characters."""

    verify_filter_format: bool = False
    """Keep only responses of at least --verify-format-min-chars characters whose last \\boxed{} is closed and that contain a marker
    of reasoning ("=", "therefore", "let"). Off by default, because the verifier has already judged the answer."""

    verify_format_min_chars: NonNegativeInt = 80
    """Shortest response that --verify-filter-format keeps, characters."""

    def check(self) -> None:
        check_verify_function(self)


def published_filters() -> dict[str, Any]:
    """Values of ``VerifyConfig`` for the filters and the de-duplication of the published script.

    Use them as ``VerifyConfig(**published_filters())``, or as ``dataclasses.replace(config, **published_filters())`` to keep a
    run's workers and limits.
    """
    return {
        "verify_dedup_threshold": 0.82,
        "verify_dedup_ngram": 3,
        "verify_dedup_short_texts": "equal",
        "verify_filter_too_short": True,
        "verify_min_chars": 20,
        "verify_filter_loop_sentences": True,
        "verify_loop_sentence_chars": 12,
        "verify_filter_loop_windows": True,
        "verify_loop_window_words": 8,
        "verify_loop_min_words": 30,
        "verify_loop_max_words": 0,
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
