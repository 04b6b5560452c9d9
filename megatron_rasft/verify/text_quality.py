"""Filters of the text quality of responses, and removal of near-duplicates.

The filters and their thresholds come from the published script; see ``published_filters`` in ``config/verify.py``.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from nltk.metrics.distance import jaccard_distance
from nltk.util import ngrams

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.verify.math_extraction import closed_boxes, last_box_is_closed

# The filters run in the trainer's process without a deadline, so every pattern must take linear time on any text
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_SELF_CORRECTIONS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bwait\b",
        r"\bhold on\b",
        r"\blet me (?:re-?check|re-?think|re-?consider|re-?calculate|re-?do|double[- ]check|try again)",
        r"\blet's (?:re-?check|re-?think|re-?consider|re-?calculate|re-?do|double[- ]check|try again)",
        r"\bI (?:made|have made) (?:a|an) (?:\w+ )?(?:mistake|error)",
        r"\b(?:that|this) (?:is|was) (?:wrong|incorrect|not right)",
        r"\bon second thought",
        r"\bactually,",
        r"\bcorrection:",
        r"\bsorry\b",
        r"\bapolog(?:y|ies|i[sz]e)",
    )
)
_SHORTCUT_PHRASE = re.compile(
    r"\bthe (?:correct|right) (?:answer|option|choice) (?:is|must be|should be|would be)\b|"
    r"\b(?:option|choice) \(?[A-J]\)? is (?:correct|right|the (?:correct |right )?answer)\b",
    re.IGNORECASE,
)
_OPTION_LETTER = re.compile(r"(?:\\text(?:bf|rm|it)?\{)?\(?[A-J]\)?\.?\}?")
_REASONING_MARKER = re.compile(
    r"=|\b(?:therefore|thus|hence|because|since|let|we have|we get|we find|so that|implies|it follows)\b|"
    r"\\(?:implies|Rightarrow|therefore)\b",
    re.IGNORECASE,
)


def is_too_short(text: str, config: VerifyConfig) -> bool:
    """Returns whether the text has fewer than ``verify_min_chars`` characters, without the spaces around it."""
    return len(text.strip()) < config.verify_min_chars


def repeats_sentence(text: str, config: VerifyConfig) -> bool:
    """Returns whether a sentence occurs ``verify_loop_repeats`` times or more. Case and spacing are ignored.

    Sentences shorter than ``verify_loop_sentence_chars`` are not counted.
    """
    sentences = (" ".join(part.lower().split()) for part in _SENTENCE_END.split(text))
    counts = Counter(s for s in sentences if len(s) >= config.verify_loop_sentence_chars)
    return any(count >= config.verify_loop_repeats for count in counts.values())


def repeats_window(text: str, config: VerifyConfig) -> bool:
    """Returns whether a sequence of ``verify_loop_window_words`` words occurs ``verify_loop_repeats`` times or more."""
    words = text.lower().split()
    if len(words) < config.verify_loop_min_words:
        return False
    counts = Counter(ngrams(words, config.verify_loop_window_words))
    return any(count >= config.verify_loop_repeats for count in counts.values())


def corrects_itself(text: str, config: VerifyConfig) -> bool:
    """Returns whether ``verify_self_corrections`` or more different phrases of self-correction occur."""
    found = (pattern for pattern in _SELF_CORRECTIONS if pattern.search(text))
    return len(list(islice(found, config.verify_self_corrections))) >= config.verify_self_corrections


def is_mostly_symbols(text: str, config: VerifyConfig) -> bool:
    """Returns whether more than ``verify_max_symbol_frac`` of the characters are neither letters nor digits.

    White space is not counted, neither as symbol nor in the total.
    """
    visible = [char for char in text if not char.isspace()]
    num_symbols = sum(not char.isalnum() for char in visible)
    return num_symbols > config.verify_max_symbol_frac * len(visible)


def takes_shortcut(text: str, config: VerifyConfig) -> bool:
    """Returns whether the text states an answer without deriving it.

    True for a phrase such as "the correct answer is", for a box in a short text, and for a boxed option letter in a text that
    is a little longer.
    """
    if _SHORTCUT_PHRASE.search(text):
        return True
    num_chars = len(text.strip())
    boxes = closed_boxes(text)
    if boxes and num_chars < config.verify_shortcut_box_chars:
        return True
    if num_chars >= config.verify_shortcut_option_chars:
        return False
    return any(_OPTION_LETTER.fullmatch("".join(box.split())) for box in boxes)


def breaks_format(text: str, config: VerifyConfig) -> bool:
    r"""Returns whether the text is too short for a derivation, lacks a closed last \boxed{}, or lacks words of reasoning."""
    return (
        len(text.strip()) < config.verify_format_min_chars
        or not last_box_is_closed(text)
        or not _REASONING_MARKER.search(text)
    )


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


def first_failed_filter(text: str, config: VerifyConfig) -> str:
    """Returns the name of the first enabled filter that rejects the text (see ``FILTER_NAMES``), or an empty string."""
    for name, switch, fires in _FILTERS:
        if getattr(config, switch) and fires(text, config):
            return name
    return ""


def similarity(text: str, other: str, n: int = 3) -> float:
    """Returns the Jaccard similarity of two texts' sets of lower-cased word n-grams, in [0, 1]; 1 for two empty texts."""
    return _jaccard(_word_ngrams(text, n), _word_ngrams(other, n))


def max_similarity(text: str, others: Sequence[str], n: int = 3) -> float:
    """Returns the largest similarity of ``text`` to any of the others, or 0 if there are none."""
    grams = _word_ngrams(text, n)
    return max((_jaccard(grams, _word_ngrams(other, n)) for other in others), default=0.0)


def deduplicate(texts: Sequence[str], threshold: float, n: int = 3) -> list[int]:
    """Removes near-duplicates. Returns the ascending indices of the texts to keep.

    A text is kept if its similarity to every text kept before it is less than ``threshold``.
    """
    kept: list[int] = []
    kept_grams: list[frozenset[tuple[str, ...]]] = []
    for index, text in enumerate(texts):
        grams = _word_ngrams(text, n)
        if all(_jaccard(grams, other) < threshold for other in kept_grams):
            kept.append(index)
            kept_grams.append(grams)
    return kept


def _word_ngrams(text: str, n: int) -> frozenset[tuple[str, ...]]:
    """Returns the set of word n-grams. A text with fewer than n words has a single n-gram of all its words."""
    words = text.lower().split()
    if not words:
        return frozenset()
    return frozenset(ngrams(words, min(n, len(words))))


def _jaccard(grams: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    if not grams and not other:
        return 1.0
    return 1.0 - float(jaccard_distance(grams, other))
