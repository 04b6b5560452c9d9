"""Finds the program in a response. Scans the text once, and neither parses nor runs it."""

import re

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.-]*)[^\n]*$", re.MULTILINE)
_LANGUAGES = frozenset({"", "python", "python3", "py", "py3"})


def code_blocks(text: str) -> list[str]:
    """Returns the contents of the fenced blocks in Python or without a language. The last one may not be closed."""
    blocks = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            blocks.append((opening, text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening is not None:
        blocks.append((opening, text[opening.end() + 1 :]))
    return [content for fence, content in blocks if fence[2].lower() in _LANGUAGES]


def defines(program: str, name: str) -> bool:
    """Returns whether a line of the program defines ``name`` at the top level, as a function, class or variable."""
    return bool(
        re.search(
            rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*=",
            program,
            re.MULTILINE,
        )
    )


def extract_program(text: str, entry_point: str = "", prompt: str = "") -> str | None:
    """Returns the program of a response: its last fenced block that defines ``entry_point``.

    If there is none, the last fenced block, else the whole text. Text up to ``</think>`` is ignored: a reasoning trace
    holds attempts.

    Args:
        text: the response.
        entry_point: name of the function that the tests call; "" if they name none.
        prompt: source that the response may continue. It is put before the program, so that its imports and helper
            functions are available also to a program that defines the entry point again.

    Returns:
        The source, or None for an empty program.
    """
    text = text.rpartition("</think>")[2]
    blocks = [block for block in code_blocks(text) if block.strip()]
    naming = [block for block in blocks if entry_point and defines(block, entry_point)]
    program = (naming or blocks or [text])[-1]
    if not program.strip():
        return None
    if not prompt:
        return program
    if entry_point and defines(program, entry_point):
        # The prompt ends with a function without a body
        return f"{prompt.rstrip()}\n    pass\n\n{program}"
    return f"{prompt}{program}"
