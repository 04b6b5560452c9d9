"""Finds the final answer in a response. Scans the text a fixed number of times, and does not parse the answer."""

import re
from collections import deque

# Boxes, escaped characters (so that \{ does not count as a brace) and braces
_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# \boxed 5, without braces
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s{}$]{1,100})")
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox)\b")
_ANSWER_PHRASE = re.compile(r"answer\s{0,5}(?:is|:|=)\s{0,5}:?", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)")
_NUMBER = re.compile(
    r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+(?![\d.]))?\s?%?"
)
_MATH_QUOTES = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def closed_boxes(text: str) -> list[str]:
    r"""Returns the contents of every outermost \boxed{} or \fbox{} that is closed, in order."""
    boxes: list[str] = []
    open_braces: list[int] = []  # start of the content for a box, -1 for any other brace
    num_open_boxes = 0
    for token in _BOX_TOKENS.finditer(text):
        symbol = token.group()
        if symbol == "{":
            open_braces.append(-1)
        elif symbol == "}":
            start = open_braces.pop() if open_braces else -1
            if start >= 0:
                num_open_boxes -= 1
                if num_open_boxes == 0:
                    boxes.append(text[start : token.start()])
        elif len(symbol) > 2:
            open_braces.append(token.end())
            num_open_boxes += 1
    return boxes


def last_box_is_closed(text: str) -> bool:
    r"""Returns whether the text has a \boxed and the last one is closed."""
    starts = [m.start() for m in _BOX_COMMAND.finditer(text)]
    return bool(starts) and bool(closed_boxes(text[starts[-1] :]))


def extract_answer(text: str) -> str | None:
    r"""Returns the final answer of a response as it is written, or None if there is none.

    It is the content of the last closed \boxed{}. Without a box, or with an empty one, it is the text after the last
    "answer is" up to the end of the sentence; else the last number of the text.
    """
    boxes = closed_boxes(text)
    bare = _BARE_BOX.findall(text) if not boxes else []
    answer = (boxes or bare or [""])[-1].strip()
    if answer:
        # In \boxed{x = \boxed{5}} the inner box is the answer
        inner = closed_boxes(answer)
        return inner[-1].strip() or answer if inner else answer
    answer = _after_answer_phrase(text)
    if answer:
        return answer
    # A deque of length 1 keeps the last match without storing the others
    numbers = deque(_NUMBER.finditer(text), maxlen=1)
    return numbers[0].group().strip() if numbers else None


def _after_answer_phrase(text: str) -> str:
    phrases = deque(_ANSWER_PHRASE.finditer(text), maxlen=1)
    if not phrases:
        return ""
    rest = text[phrases[0].end() :].lstrip(" \t\n*:")
    for opening, closing in _MATH_QUOTES:
        if rest.startswith(opening):
            end = rest.find(closing, len(opening))
            if end > 0:
                return rest[len(opening) : end].strip()
    line = rest.partition("\n")[0]
    sentence_end = _SENTENCE_END.search(line)
    return line[: sentence_end.start() if sentence_end else None].strip(" \t*.:")
