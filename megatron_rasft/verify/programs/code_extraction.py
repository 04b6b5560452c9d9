"""Finds the program in a response by scanning, linear in its length; parses and runs nothing."""

import re

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.-]*)[^\n]*$", re.MULTILINE)
_LANGUAGES = frozenset({"", "python", "python3", "py", "py3"})


def code_blocks(text: str) -> list[str]:
    """Contents of the fenced blocks that are Python or name no language, in order; the last may be unclosed."""
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
    """Whether the program seems to define ``name`` at its top level."""
    return bool(
        re.search(
            rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*=",
            program,
            re.MULTILINE,
        )
    )


def extract_program(text: str, entry_point: str = "", prompt: str = "") -> str | None:
    """The program a response commits to; None if there is none.

    The last fenced block that defines ``entry_point``, else the last block, else the whole text. A reasoning trace
    up to ``</think>`` holds attempts, not answers. With a ``prompt``, what does not define the entry point by
    itself continues the prompt; what does follows it, so that its imports and helper functions are there.
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
        return f"{prompt.rstrip()}\n    pass\n\n{program}"
    return f"{prompt}{program}"
