"""The published weights from texts and verdicts, written a second time: plain Python, without a function of megatron_rasft.

The rules are those that docs/method.md lists under "The published rule". ``tests/published_groups.py`` compares both.
"""

import itertools
import math
import re
from collections.abc import Sequence

CORRECTIONS = [
    "let me correct",
    "correcting the calculation",
    "i need to correct",
    "rechecking",
    "let's correct",
    "wait,",
    "however, this is incorrect",
    "the previous reasoning was wrong",
]
MARKERS = "=|therefore|thus|hence|so |let |we have|we get|substitute|solve".split("|")
LEADS = ("according to the problem", "therefore", "thus")
INFORMATION, KNOWN = "based on the given information", "we know that "
STATEMENT = "the correct answer is"
OPTIONS = set("ABCDabcd0123456789,， ") | {chr(code) for code in range(0x2460, 0x2469)}


def normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().strip())


def trigrams(text: str) -> set[str]:
    words = normalised(text).split(" ")
    return {"\n".join(words[i : i + 3]) for i in range(len(words) - 2)}


def alike(one: str, other: str) -> float:
    a, b = trigrams(one), trigrams(other)
    if not a or not b:
        return float(not a and not b)
    return len(a & b) / len(a | b)


def box_of(text: str) -> str | None:
    """Content of the last box; None without a box, or if the last box is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, content = 0, ""
    for char in text[start + 6 :]:
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return content[1:]
        content += char
    return None


def most(items: Sequence[str]) -> int:
    """How often the most frequent item occurs."""
    return max((items.count(item) for item in set(items)), default=0)


def loops(text: str) -> bool:
    norm = normalised(text)
    pieces = [piece.strip() for piece in norm.split(".")]
    words = norm.split()
    eights = [" ".join(words[i : i + 8]) for i in range(len(words) - 7)] if len(words) >= 30 else []
    repeated = most([p for p in pieces if len(p) >= 12]) >= 3 or most(eights) >= 3
    return repeated or len([phrase for phrase in CORRECTIONS if phrase in norm]) > 1


def symbols(text: str) -> bool:
    return len([c for c in text if not (c.isalnum() or c.isspace())]) / len(text) > 0.42


def states_answer(text: str) -> bool:
    """Whether "the correct answer is" follows one of the leads, or a box follows it."""
    for found in re.finditer(STATEMENT, text):
        before, after = text[: found.start()], text[found.end() :].lstrip()
        lead = before.rstrip(", ")
        if lead != before and lead.endswith(LEADS):
            return True
        informed = before.removesuffix(KNOWN)
        if (
            informed != before
            and informed.rstrip(", ") != informed
            and informed.rstrip(", ").endswith(INFORMATION)
        ):
            return True
        if after[:1] in (":", "："):
            after = after[1:].lstrip()
        if after.startswith("\\boxed"):
            return True
    return False


def shortcut(text: str) -> bool:
    box = box_of(text)
    if states_answer(text.lower()):
        return True
    if box is None:
        return False
    box = box.strip()
    for noise in ["$", "\\left", "\\right", "\\!", "\\,", "\\;", "\\:"]:
        box = "".join(box.split(noise))
    box = box.replace("\n", " ").strip(" .,:;!?\t").strip()
    is_option = 1 <= len(box) <= 12 and set(box) <= OPTIONS
    return len(text) < (180 if is_option else 120)


def misses_form(text: str) -> bool:
    return len(text) < 80 or box_of(text) is None or all(marker not in text.lower() for marker in MARKERS)


def is_dropped(text: str) -> bool:
    text = text.strip()
    return len(text) < 20 or loops(text) or symbols(text) or shortcut(text) or misses_form(text)


def published(texts: Sequence[str], are_correct: Sequence[bool]) -> tuple[float, list[float]]:
    """Weight of the demonstration, and of each rollout (0 if it is not trained on)."""
    kept: list[int] = []
    for i, text in enumerate(texts):
        if not [j for j in kept if alike(text, texts[j]) >= 0.82]:
            kept.append(i)
    survivors = [i for i in kept if not is_dropped(texts[i])]
    right = [i for i in survivors if are_correct[i]]
    weights = [0.0] * len(texts)
    if not right:
        return 1.0, weights
    nearest = [max(alike(texts[i], texts[j]) for j in right) for i in survivors if not are_correct[i]]
    wrong = [n for n in nearest if n < 0.88][:3]
    rewards = [3 - 2 * len(right) / len(kept), *itertools.repeat(1.0, len(right)), *(0.0 for _ in wrong)]
    if max(rewards) == min(rewards):
        return 1.0, weights
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    squashed = [math.tanh(0.4 * (r - mean) / (std + 1e-6)) / (1 + len(right)) for r in rewards]
    for i, value in zip(right, squashed[1:], strict=False):
        weights[i] = 0.25 * min(0.15, max(0.02, value))
    return squashed[0], weights
