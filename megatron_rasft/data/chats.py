"""Reads chats: messages with role and content, or ShareGPT's with from and value, whose content is text or a list of parts."""

from typing import Any

from megatron_rasft.data.fields import FieldError, check_text

Message = dict[str, str]

CHAT_ROLES = ("system", "user", "assistant")
SHAREGPT_FIELD = "conversations"
"""Name of the field with a chat in ShareGPT's format."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def parse_messages(value: Any, name: str) -> list[Message]:
    """Returns a chat with a user message, and an assistant message at its end, as messages with role and content.

    Raises:
        FieldError: the value of the field ``name`` is something else.
    """
    messages = parse_prompt(value, name)
    if not messages or messages[-1]["role"] != "assistant":
        raise FieldError(f'"{name}" does not end with an assistant message')
    return messages


def parse_prompt(value: Any, name: str) -> list[Message]:
    """Like ``parse_messages``, but the chat may end with any message.

    Raises:
        FieldError: the value of the field ``name`` is not a chat with a user message.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise FieldError(f'"{name}" is not a list of messages')
    messages = [_parse_message(message, index, name) for index, message in enumerate(value)]
    if messages and all(message["role"] != "user" for message in messages):
        raise FieldError(f'"{name}" has no user message')
    return messages


def _parse_message(message: dict[str, Any], index: int, name: str) -> Message:
    is_sharegpt = message.get("role") is None and "from" in message
    role, content = (message.get(key) for key in (("from", "value") if is_sharegpt else ("role", "content")))
    if isinstance(role, str):
        role = _SHAREGPT_ROLES.get(role, role)
    if role not in CHAT_ROLES:
        known = ", ".join((*CHAT_ROLES, *_SHAREGPT_ROLES))
        raise FieldError("unknown chat role", f"message {index} has {role!r}; known roles: {known}")
    try:
        text = check_text(_joined(content), f'content of a message in "{name}"')
    except FieldError as fault:
        details = [f"message {index}", *filter(None, [fault.detail])]
        raise FieldError(fault.reason, ", ".join(details)) from None
    return {"role": role, "content": text}


def _joined(content: Any) -> Any:
    """Returns the text of a list of parts, joined without a separator as chat templates do; other values unchanged."""
    if not isinstance(content, list):
        return content
    return "".join(_text_of(part, number) for number, part in enumerate(content))


def _text_of(part: Any, number: int) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise FieldError("a message has a part that is not text", f"part {number}: {str(part)[:50]}")
    return text
