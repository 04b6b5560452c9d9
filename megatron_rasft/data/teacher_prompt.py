"""The teacher's prompt of self-distillation: the plain prompt, with the demonstration in its last user message."""

import re
from collections.abc import Sequence

from megatron_rasft.data.chats import Message

_PART = re.compile(r"\{(problem|demonstration)\}")


def teacher_messages(
    messages: Sequence[Message], demonstration: str, template: str, end_texts: Sequence[str]
) -> list[Message]:
    """Returns the messages of a plain prompt with the last user message put into ``template``.

    Args:
        messages: those of the plain prompt, with its suffix and system prompt.
        template: text with {problem} and {demonstration}. Other braces stay, and so do braces in the texts.
        end_texts: end tokens as text. They are removed from the end of the demonstration, because they would end the user's turn.
    """
    place = max(i for i, message in enumerate(messages) if message["role"] == "user")
    parts = {
        "problem": messages[place]["content"],
        "demonstration": _without_end(demonstration, end_texts),
    }
    content = _PART.sub(lambda found: parts[found[1]], template)
    return [*messages[:place], {"role": "user", "content": content}, *messages[place + 1 :]]


def _without_end(text: str, end_texts: Sequence[str]) -> str:
    text = text.strip()
    while end := next((end for end in end_texts if end and text.endswith(end)), ""):
        text = text.removesuffix(end).rstrip()
    return text
