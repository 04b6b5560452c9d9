"""Texts as the page prints them: long ones without their middle, and all of them without characters that HTML forbids."""

import re
from dataclasses import dataclass
from typing import Any

MAX_TEXT_CHARS = 6000
"""Maximum length of a printed text, characters. Longer texts are printed without their middle."""
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Control characters, which HTML does not allow, and lone surrogates, which UTF-8 cannot encode."""


@dataclass(frozen=True)
class Text:
    """A text to print: all of it, or the beginning and the end of a long text."""

    head: str
    num_left_out: int
    """Number of characters left out between head and tail."""
    tail: str

    def __str__(self) -> str:
        if not self.num_left_out:
            return self.head
        return f"{self.head}\n… {self.num_left_out:,} characters left out …\n{self.tail}"


def shortened(text: str) -> Text:
    """Cuts the middle of a text that is longer than MAX_TEXT_CHARS."""
    if len(text) <= MAX_TEXT_CHARS:
        return Text(text, 0, "")
    head, tail = MAX_TEXT_CHARS * 2 // 3, MAX_TEXT_CHARS // 3
    return Text(text[:head], len(text) - head - tail, text[-tail:])


def printable(value: Any) -> Any:
    """Replaces the characters of a text that a page cannot hold. Other values stay as they are."""
    if not isinstance(value, str) or _UNPRINTABLE.search(value) is None:
        return value  # of the same type: markup stays markup
    return type(value)(_UNPRINTABLE.sub("�", value))


def reason_of(record: dict[str, Any]) -> str:
    """Returns the reason of a rollout's verdict, after its reward if --verify-function gave one."""
    reason, reward = str(record.get("verdict_reason", "")), record.get("reward")
    given = "" if reward is None else f"reward {reward:g}"
    return reason if reason.startswith(given) else ": ".join(filter(None, [given, reason]))
