"""What the text of a response says about its worth, before anyone asks whether its answer is right."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from nltk.metrics.distance import jaccard_distance
from nltk.util import ngrams

from megatron_rasft.config.verify import VerifyConfig
from megatron_rasft.verify.math_extraction import closed_boxes, last_box_is_closed

# These run in the trainer's own process: linear on any input
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
    """Fewer than ``verify_min_chars`` characters."""
    return len(text.strip()) < config.verify_min_chars


def repeats_sentence(text: str, config: VerifyConfig) -> bool:
    """One sentence, not a short one, occurs ``verify_loop_repeats`` times; case and spacing do not count."""
    sentences = (" ".join(part.lower().split()) for part in _SENTENCE_END.split(text))
    counts = Counter(s for s in sentences if len(s) >= config.verify_loop_sentence_chars)
    return any(count >= config.verify_loop_repeats for count in counts.values())


def repeats_window(text: str, config: VerifyConfig) -> bool:
    """One window of ``verify_loop_window_words`` words occurs ``verify_loop_repeats`` times."""
    words = text.lower().split()
    if len(words) < config.verify_loop_min_words:
        return False
    counts = Counter(ngrams(words, config.verify_loop_window_words))
    return any(count >= config.verify_loop_repeats for count in counts.values())


def corrects_itself(text: str, config: VerifyConfig) -> bool:
    """``verify_self_corrections`` different phrases of self-correction occur."""
    found = (pattern for pattern in _SELF_CORRECTIONS if pattern.search(text))
    return len(list(islice(found, config.verify_self_corrections))) >= config.verify_self_corrections


def is_mostly_symbols(text: str, config: VerifyConfig) -> bool:
    """More than ``verify_max_symbol_frac`` of the characters are neither letters, digits nor white space.

    The denominator counts the characters other than white space; a text without any holds no symbols.
    """
    visible = [char for char in text if not char.isspace()]
    num_symbols = sum(not char.isalnum() for char in visible)
    return num_symbols > config.verify_max_symbol_frac * len(visible)


def takes_shortcut(text: str, config: VerifyConfig) -> bool:
    """Announces an answer instead of deriving it."""
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
    r"""Too short for a derivation, last \boxed{} missing or open, or no reasoning marker."""
    return (
        len(text.strip()) < config.verify_format_min_chars
        or not last_box_is_closed(text)
        or not _REASONING_MARKER.search(text)
    )


# name in Rollout.filtered_by, switch in VerifyConfig, rule
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
    """Name of the first filter that is on and fires, out of ``FILTER_NAMES``; empty if the text is good."""
    for name, switch, fires in _FILTERS:
        if getattr(config, switch) and fires(text, config):
            return name
    return ""


def similarity(text: str, other: str, n: int = 3) -> float:
    """Jaccard similarity of the two sets of lower-cased word n-grams, in [0, 1]; 1 for two empty texts."""
    return _jaccard(_word_ngrams(text, n), _word_ngrams(other, n))


def max_similarity(text: str, others: Sequence[str], n: int = 3) -> float:
    """Largest similarity to any of the others; 0 without others."""
    grams = _word_ngrams(text, n)
    return max((_jaccard(grams, _word_ngrams(other, n)) for other in others), default=0.0)


def deduplicate(texts: Sequence[str], threshold: float, n: int = 3) -> list[int]:
    """Indices of the texts to keep, ascending: each is less than ``threshold`` similar to every kept one before."""
    kept: list[int] = []
    kept_grams: list[frozenset[tuple[str, ...]]] = []
    for index, text in enumerate(texts):
        grams = _word_ngrams(text, n)
        if all(_jaccard(grams, other) < threshold for other in kept_grams):
            kept.append(index)
            kept_grams.append(grams)
    return kept


def _word_ngrams(text: str, n: int) -> frozenset[tuple[str, ...]]:
    """A text of fewer than n words is one gram of all its words."""
    words = text.lower().split()
    if not words:
        return frozenset()
    return frozenset(ngrams(words, min(n, len(words))))


def _jaccard(grams: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    if not grams and not other:
        return 1.0
    return 1.0 - float(jaccard_distance(grams, other))
