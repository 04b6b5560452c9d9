"""Filters of the text quality of responses, and removal of near-duplicates.

The filters and their thresholds are those of the published script, character by character; ``published_filters`` in
``config/verify.py`` turns all of them on. docs/method.md describes them.
"""

import re
from collections import Counter
from collections.abc import Sequence

from nltk.util import ngrams

from megatron_rasft.config.verify import ShortTexts, VerifyConfig

# The filters run in the trainer's process without a deadline, so every pattern must take linear time on any text. "+" after a
# quantifier makes it possessive: it never gives characters back.
_SELF_CORRECTIONS = (
    "let me correct",
    "correcting the calculation",
    "i need to correct",
    "rechecking",
    "let's correct",
    "wait,",
    "however, this is incorrect",
    "the previous reasoning was wrong",
)
_SHORTCUT_PHRASE = re.compile(
    r"(?:(?:according to the problem|therefore|thus)[, ]++|based on the given information[, ]++we know that )the correct answer is|"
    r"the correct answer is\s*+[:：]?+\s*+\\boxed"
)
_BOX = r"\boxed{"
_BOX_PADDING = ("$", r"\left", r"\right", r"\!", r"\,", r"\;", r"\:")
_OPTIONS = re.compile(r"[A-Da-d①-⑨0-9,， ]{1,12}")
_REASONING_MARKERS = (
    "=",
    "therefore",
    "thus",
    "hence",
    "so ",
    "let ",
    "we have",
    "we get",
    "substitute",
    "solve",
)


def is_too_short(text: str, config: VerifyConfig) -> bool:
    """Returns whether the text has fewer than ``verify_min_chars`` characters."""
    return len(text) < config.verify_min_chars


def repeats_sentence(text: str, config: VerifyConfig) -> bool:
    """Returns whether a piece of the text between full stops occurs ``verify_loop_repeats`` times or more.

    Case and white space are ignored. Pieces shorter than ``verify_loop_sentence_chars`` are not counted, and texts longer than
    ``verify_loop_max_words`` are not searched.
    """
    words = text.lower().split()
    if _is_too_long_for_loops(words, config):
        return False
    pieces = (piece.strip() for piece in " ".join(words).split("."))
    counts = Counter(piece for piece in pieces if len(piece) >= config.verify_loop_sentence_chars)
    return any(count >= config.verify_loop_repeats for count in counts.values())


def repeats_window(text: str, config: VerifyConfig) -> bool:
    """Returns whether a sequence of ``verify_loop_window_words`` words occurs ``verify_loop_repeats`` times or more.

    Case is ignored. Texts longer than ``verify_loop_max_words`` are not searched.
    """
    words = text.lower().split()
    if len(words) < config.verify_loop_min_words or _is_too_long_for_loops(words, config):
        return False
    counts = Counter(ngrams(words, config.verify_loop_window_words))
    return any(count >= config.verify_loop_repeats for count in counts.values())


def _is_too_long_for_loops(words: Sequence[str], config: VerifyConfig) -> bool:
    return 0 < config.verify_loop_max_words < len(words)


def corrects_itself(text: str, config: VerifyConfig) -> bool:
    """Returns whether ``verify_self_corrections`` or more different phrases of self-correction occur."""
    normalised = " ".join(text.lower().split())
    return sum(phrase in normalised for phrase in _SELF_CORRECTIONS) >= config.verify_self_corrections


def is_mostly_symbols(text: str, config: VerifyConfig) -> bool:
    """Returns whether more than ``verify_max_symbol_frac`` of all characters are symbols.

    A symbol is neither a letter nor a digit nor white space. White space counts in the total.
    """
    num_symbols = sum(not char.isalnum() and not char.isspace() for char in text)
    # Divided as the script divides: multiplying would round differently at the limit.
    return bool(text) and num_symbols / len(text) > config.verify_max_symbol_frac


def takes_shortcut(text: str, config: VerifyConfig) -> bool:
    """Returns whether the text states an answer without deriving it.

    True for a phrase such as "therefore, the correct answer is", for a box in a short text, and for a box with nothing but
    options or digits in a text that is a little longer.
    """
    if _SHORTCUT_PHRASE.search(text.lower()):
        return True
    box = _last_box(text)
    if box is None:
        return False
    if len(text) < config.verify_shortcut_box_chars:
        return True
    return len(text) < config.verify_shortcut_option_chars and bool(_OPTIONS.fullmatch(_unpadded(box)))


def _unpadded(box: str) -> str:
    """Returns the content of a box without dollar signs, thin spaces and punctuation around it."""
    for padding in _BOX_PADDING:
        box = box.replace(padding, "")
    return box.replace("\n", " ").strip(" .,:;!?\t").strip()


def breaks_format(text: str, config: VerifyConfig) -> bool:
    r"""Returns whether the text is too short for a derivation, lacks a closed last \boxed{}, or lacks words of reasoning.

    The script's rule also contains the filters before this one. They are applied by their own switches here.
    """
    lowered = text.lower()
    return (
        len(text) < config.verify_format_min_chars
        or _last_box(text) is None
        or not any(marker in lowered for marker in _REASONING_MARKERS)
    )


def _last_box(text: str) -> str | None:
    r"""Returns the content of the last \boxed{ without white space around it, or None if there is none or it is not closed.

    Braces are counted as the published script counts them: a brace after a backslash counts too, and \fbox does not count as a box.
    """
    _, box, rest = text.rpartition(_BOX)
    depth = 1
    for brace in re.finditer("[{}]", rest if box else ""):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return rest[: brace.start()].strip()
    return None


# Name in Rollout.filtered_by, switch in VerifyConfig, function. Applied in this order
_FILTERS = (
    ("too_short", "verify_filter_too_short", is_too_short),
    ("loop_sentences", "verify_filter_loop_sentences", repeats_sentence),
    ("loop_windows", "verify_filter_loop_windows", repeats_window),
    ("self_correction", "verify_filter_self_correction", corrects_itself),
    ("symbols", "verify_filter_symbols", is_mostly_symbols),
    ("shortcut", "verify_filter_shortcut", takes_shortcut),
    ("format", "verify_filter_format", breaks_format),
)
FILTER_NAMES = tuple(name for name, _, _ in _FILTERS)


def first_failed_filter(text: str, config: VerifyConfig, *, is_mathematics: bool = True) -> str:
    """Returns the name of the first enabled filter that rejects the text (see ``FILTER_NAMES``), or an empty string.

    Args:
        text: the response. White space around it is ignored.
        is_mathematics: whether the response answers a problem with a gold answer. Others pass, unless ``verify_filter_programs`` is set.
    """
    if not is_mathematics and not config.verify_filter_programs:
        return ""
    text = text.strip()
    for name, switch, fires in _FILTERS:
        if getattr(config, switch) and fires(text, config):
            return name
    return ""


def similarity(text: str, other: str, n: int = 3, short_texts: ShortTexts = "compare") -> float:
    """Returns the Jaccard similarity of two texts' sets of lower-cased word n-grams, in [0, 1]; 1 for two empty texts.

    Args:
        short_texts: the n-grams of a text with fewer than n words; see ``verify_dedup_short_texts``.
    """
    return _jaccard(_word_ngrams(text, n, short_texts), _word_ngrams(other, n, short_texts))


def deduplicate(
    texts: Sequence[str], threshold: float, n: int = 3, short_texts: ShortTexts = "compare"
) -> list[int]:
    """Removes near-duplicates. Returns the ascending indices of the texts to keep.

    A text is kept if its similarity to every text kept before it is less than ``threshold``.
    """
    kept: list[int] = []
    kept_grams: list[frozenset[tuple[str, ...]]] = []
    for index, text in enumerate(texts):
        grams = _word_ngrams(text, n, short_texts)
        if all(_jaccard(grams, other) < threshold for other in kept_grams):
            kept.append(index)
            kept_grams.append(grams)
    return kept


def _word_ngrams(text: str, n: int, short_texts: ShortTexts) -> frozenset[tuple[str, ...]]:
    """Returns the set of word n-grams. A text with fewer than n words has a single n-gram of all its words, or none."""
    words = text.lower().split()
    if not words or (len(words) < n and short_texts == "equal"):
        return frozenset()
    return frozenset(ngrams(words, min(n, len(words))))


def _jaccard(grams: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    """Intersection over union; 1 for two empty sets.

    Not nltk's jaccard_distance: 1 - (1 - x) is rounded twice, so that a similarity of exactly the threshold can fall below it.
    """
    union = len(grams | other)
    return len(grams & other) / union if union else 1.0
