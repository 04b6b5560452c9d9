"""Writes the tokens of a response as text, with the tags of its reasoning, in which the grader reads no answer."""

from collections.abc import Callable, Sequence

from megatron_rasft.data.chat_format import ChatFormat
from megatron_rasft.data.tokenizer import Tokenizer
from megatron_rasft.reasoning_tags import is_reasoning_tag


def response_decoder(tokenizer: Tokenizer, chat_format: ChatFormat) -> Callable[[Sequence[int]], str]:
    """Returns a function that writes the token ids of a response as text.

    The text has no special tokens except tags of reasoning. If the chat template opens a block of reasoning in the prompt, the
    text begins with its tag: without it, a response that never closes the block would look like a reply.
    """
    special_ids = set(tokenizer.all_special_ids)
    tags = {
        token_id: str(token)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if (token_id in special_ids or getattr(token, "special", False)) and is_reasoning_tag(str(token))
    }
    opened = "" if chat_format.reasoning is None else chat_format.reasoning.start

    def decode(ids: Sequence[int]) -> str:
        text = ""
        for part in _split(ids, tags):
            text += tags.get(part[0]) or str(tokenizer.decode(part, skip_special_tokens=True))
        return text if text.lstrip().startswith(opened) else opened + text

    return decode


def _split(ids: Sequence[int], separators: dict[int, str]) -> list[list[int]]:
    """Splits a list before and after each separator. Keeps the separators, and leaves out empty parts."""
    parts: list[list[int]] = []
    is_open = False
    for token_id in ids:
        if token_id in separators or not is_open:
            parts.append([token_id])
        else:
            parts[-1].append(token_id)
        is_open = token_id not in separators
    return parts
