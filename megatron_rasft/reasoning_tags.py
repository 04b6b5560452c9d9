"""The tags around a block of reasoning, such as ``<think>`` and ``</think>``, and the reply that is left without such blocks.

Chat templates, and the extraction of answers and programs, all know blocks of reasoning by this module. It takes linear time,
because it reads text that a model wrote.
"""

import re

_NAME = r"[\w:.-]{0,40}(?i:think|thought|reason|scratchpad|analysis)[\w:.-]{0,40}"
_OTHER_TAGS = {
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
}
_ALL_OTHERS = "|".join(map(re.escape, (*_OTHER_TAGS, *_OTHER_TAGS.values())))
_TAG = re.compile(
    rf"<(?P<slash>/?)(?:{_NAME})>|\[(?P<mark>/?)[A-Z_]{{0,20}}THINK[A-Z_]{{0,20}}\]|{_ALL_OTHERS}"
)
_FENCE = "```"
# The part of a line on either side of a tag that is searched for quotes. It bounds the time for one long line of tags
_MAX_QUOTED_CHARS = 200
# The part of a line before a closing tag in which quotes are counted
_MAX_COUNTED_CHARS = 500
# An apostrophe in a word is not a quote
_QUOTES = {'"': re.compile('"'), "`": re.compile("`"), "'": re.compile(r"(?<!\w)'|'(?!\w)")}
_STRING_START = r"(?<!\w)[rRbBfFuU]{0,2}"


def is_reasoning_tag(text: str) -> bool:
    """Returns whether a text is a tag that opens or closes a block of reasoning."""
    return _TAG.fullmatch(text) is not None


def closing_tag(tag: str) -> str:
    """Returns the tag that closes the block of an opening tag: ``</think>`` for ``<think>``, ``[/THINK]`` for ``[THINK]``."""
    return _OTHER_TAGS.get(tag) or f"{tag[0]}/{tag[1:]}"


def without_reasoning(text: str) -> str:
    """Returns the reply of a response: the text without its blocks of reasoning.

    A closing tag without an opening one ends a block that the prompt has opened, so the text before it is reasoning. If the last
    block is not closed, the reply is the text before it. Tags in strings and fenced code do not count, because programs about
    tags contain them.
    """
    return _read(text)[0]


def open_tag(text: str) -> str:
    """Returns the opening tag of the block of reasoning that a text leaves open, or "" if it leaves none open."""
    return _read(text)[1]


def _read(text: str) -> tuple[str, str]:
    """Returns the text outside of all blocks, and the tag of the block that is still open at the end ("" for none)."""
    reply: list[str] = []
    start = position = num_fences = 0
    num_fences_left = text.count(_FENCE)
    opened = ""
    for tag in _TAG.finditer(text):
        num_new_fences = text.count(_FENCE, position, tag.start())
        num_fences, num_fences_left = num_fences + num_new_fences, num_fences_left - num_new_fences
        position = tag.start()
        before, after = _line_around(text, tag)
        # Reasoning may end in the middle of code. Then a tag on a line of its own has no end of the fence after it
        is_alone = not (before.strip() or after.strip())
        is_in_code = num_fences % 2 == 1 and not (is_alone and num_fences_left % 2 == 0)
        if _is_quoted(before, after) and not (_closes(tag) and _is_after_strings(text, tag)):
            continue
        if opened and tag.group() == closing_tag(opened):
            start, opened, num_fences = tag.end(), "", 0
        elif opened or is_in_code:
            continue
        elif _closes(tag):
            reply, start, num_fences = [], tag.end(), 0
        else:
            reply.append(text[start : tag.start()])
            opened = tag.group()
    return "".join(reply) + ("" if opened else text[start:]), opened


def _closes(tag: re.Match[str]) -> bool:
    return bool(tag["slash"] or tag["mark"]) or tag.group() in _OTHER_TAGS.values()


def _line_around(text: str, tag: re.Match[str]) -> tuple[str, str]:
    """Returns the text before and after a tag on its line, at most ``_MAX_QUOTED_CHARS`` characters each."""
    before = text[max(0, tag.start() - _MAX_QUOTED_CHARS) : tag.start()].rpartition("\n")[2]
    after = text[tag.end() : tag.end() + _MAX_QUOTED_CHARS].partition("\n")[0]
    return before, after


def _is_after_strings(text: str, tag: re.Match[str]) -> bool:
    """Returns whether strings with the quotes beside a tag are closed before it on its line: ``it is "5."</think>``."""
    before = text[max(0, tag.start() - _MAX_COUNTED_CHARS) : tag.start()].rpartition("\n")[2]
    beside = before[-1:] + text[tag.end() : tag.end() + 1]
    return all(len(quotes.findall(before)) % 2 == 0 for quote, quotes in _QUOTES.items() if quote in beside)


def _is_quoted(before: str, after: str) -> bool:
    """Returns whether a tag stands in a string or pattern, with a quote beside it and its partner elsewhere on the line."""
    ends = before[-1:] if not before.endswith(_FENCE) else ""
    if ends and ends in "\"'`" and re.search(rf"{_STRING_START}{ends}\Z", before) and ends in after:
        return True
    starts = after[:1]
    return bool(starts) and starts in "\"'" and bool(re.search(_STRING_START + starts, before))
