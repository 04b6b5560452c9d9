"""Finds the program in a response: which fenced block it is, where that block ends, and which helpers belong to it.

``extract_program`` parses blocks to decide, so call it in a worker that may be killed. ``holds_program`` only scans. Neither
runs anything.
"""

import ast
import builtins
import re
import textwrap
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

from megatron_rasft.reasoning_tags import without_reasoning

_LEAD = r"(?P<lead>(?:[ \t]*>)*[ \t]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?)"
_FENCE = re.compile(_LEAD + r"(?P<fence>`{3,}|~{3,})(?P<info>.*)")
_FENCE_AFTER_TEXT = re.compile(r".*?[^`\s][ \t]*(?P<fence>`{3,})[ \t]*(?P<info>[\w+.#-]*)[ \t]*")
_ONE_LINE = re.compile(r"[ \t]*(?:(?:python|py)[\d.]*[ \t]+)?(?P<code>.*?)`{3,}[^`]*", re.IGNORECASE)
_PYTHON = re.compile(r"[{.]*(?:[ci]?python|pypy|py)[\d.]*\b(?!-repl|-console)|\S*\.py\b", re.IGNORECASE)
_NO_LANGUAGE = frozenset({"code", "snippet", "solution", "source"})
_MARKERS = re.compile(r"^[ \t]*(?:</?answer>|</?code>|\[/?PYTHON\]|\[BEGIN\]|\[DONE\])[ \t]*", re.MULTILINE)
_CODE_LINE = re.compile(
    r"(?:def|class|async def|import|if|for|while|try|with)\b.*[:\w)]$|from \S+ import |@\w|\w+ = "
)
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0|\bfileinput\b")
_INLINE = re.compile(r"`{1,3}((?:def|class|import|from|\w+ = lambda)\b[^`\n]*)`{1,3}")
_FUTURE = re.compile(r"^from __future__ import [^\n(]*\n?", re.MULTILINE)
# Each parse costs time in proportion to the text, so a response of nothing but fences must not cause many
_MAX_TRIED, _MAX_SEEN, _MAX_FENCES = 12, 64, 400
_NOT_EFFECTS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_HELPERS = (*_NOT_EFFECTS, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Try, ast.If)


@dataclass(frozen=True)
class _Block:
    """One block of a response that may be a program."""

    source: str
    is_python: bool
    """Whether its fence names Python. Otherwise it names no language."""

    @property
    def tree(self) -> ast.Module | None:
        return _parsed(self.source)


def extract_program(
    text: str, entry_point: str = "", prompt: str = "", names: Iterable[str] = (), reads_input: bool = False
) -> str | None:
    """Returns the program of a response: its last fenced block in Python that defines ``entry_point``.

    Without an entry point it is the block that defines most of ``names``, or, for a script, the last block that reads its
    input and does something. Blocks without a language count only if no block in Python does. If other blocks define
    functions, classes or imports that the block lacks, these are put before it. Without blocks it is the text itself.
    Blocks of reasoning are ignored, because they hold attempts.

    Args:
        text: the response.
        entry_point: name of the function that the tests call, also a method; "" if they name none.
        prompt: source that the response may continue. It is put before the program, so that its imports and helper
            functions are available also to a program that defines the entry point again.
        names: names that the tests take from the program.
        reads_input: whether the program is a script that reads standard input.

    Returns:
        The source, or None for an empty program.
    """
    text = without_reasoning(text.removeprefix("\ufeff").replace("\r\n", "\n"))
    blocks = [block for block in _blocks(text, prompt) if block.source.strip()]
    wanted = (entry_point,) if entry_point else tuple(names)
    if blocks:
        index = _index_of_script(blocks) if reads_input else _index_of_best(blocks, wanted, prompt)
        program = _with_helpers(blocks, index, wanted)
    else:
        program = _unfenced(text, prompt)
    if not program.strip():
        return None
    return _after_prompt(prompt, program, entry_point) if prompt else program


def holds_program(text: str) -> bool:
    """Returns whether a response holds any text that may be a program, without parsing it."""
    return bool(without_reasoning(text).strip())


def _blocks(text: str, prompt: str) -> Iterator[_Block]:
    """Yields the fenced blocks in Python or without a language, in order. The last one may not be closed."""
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line or "~~~" in line]
    # No answer needs more fences. Only the end of a text of nothing but fences is read
    fences = fences[-_MAX_FENCES:]
    number = 0
    while (place := bisect_left(fences, number)) < len(fences):
        number = fences[place]
        opening = _FENCE.fullmatch(lines[number]) or _FENCE_AFTER_TEXT.fullmatch(lines[number])
        number += 1
        if opening is None:
            continue
        info, lead = opening["info"].strip(), opening.groupdict().get("lead") or ""
        if opening["fence"][0] in info:
            code = _ONE_LINE.fullmatch(opening["info"])
            if code is not None:
                yield _Block(code["code"].strip() + "\n", _PYTHON.match(info) is not None)
            continue
        is_python = _PYTHON.match(info) is not None
        if not is_python and info and info.lower() not in _NO_LANGUAGE:
            number = next(_strict_ends(lines, fences[place + 1 :], opening["fence"]), len(lines)) + 1
            continue
        content, number = _content(
            lines, number, fences[place + 1 :][:_MAX_SEEN], opening["fence"], lead, prompt
        )
        yield _Block(content, is_python)


def _content(
    lines: list[str], first: int, fences: list[int], fence: str, lead: str, prompt: str
) -> tuple[str, int]:
    """Returns the content of a block that begins at line ``first``, and the number of the line after the block.

    A line of backticks may be part of the program, for example of its docstring, and the closing fence may stand at the
    end of the last line of code. So the block ends at the first of these places before which the content is valid.
    """
    strict = ((number, "", number + 1) for number in _strict_ends(lines, fences, fence))
    loose = _loose_ends(lines, fences, fence)
    default: tuple[str, int] | None = None
    for end, rest_of_line, after in chain(islice(strict, _MAX_TRIED), islice(loose, _MAX_TRIED)):
        body = [*lines[first:end], rest_of_line] if rest_of_line else lines[first:end]
        content = "".join(f"{line}\n" for line in _outdented(body, lead))
        valid = _valid_form(content, prompt)
        if valid is not None:
            return valid, after
        default = default or (content, after)
    if default is not None:
        return default
    rest = "\n".join(_outdented(lines[first:], lead))
    return _valid_form(rest, prompt) or _valid_beginning(rest, prompt) or rest, len(lines)


def _loose_ends(lines: list[str], fences: list[int], fence: str) -> Iterator[tuple[int, str, int]]:
    """Yields (line, its part before the fence, the next line) for lines that hold a fence and something else."""
    for number in fences:
        before, ticks, _ = lines[number].partition(fence)
        if ticks and before.strip():
            yield number, before, number + 1
        elif ticks and lines[number].strip(" \t>").strip(fence[0]):
            # The block lacks its closing fence and the next block opens here, or text follows the closing fence
            is_opening = _FENCE.fullmatch(lines[number]) is not None and " " not in lines[number].strip()
            yield number, "", number if is_opening else number + 1


def _strict_ends(lines: list[str], fences: list[int], fence: str) -> Iterator[int]:
    """Yields the numbers of lines that hold nothing but a fence that may close ``fence``."""
    for number in fences:
        line = lines[number].lstrip(" \t>").rstrip()
        if line.startswith(fence) and not line.strip(fence[0]):
            yield number


def _outdented(lines: Sequence[str], lead: str) -> Iterator[str]:
    """Yields the lines without the quote marks and the indentation that precede the opening fence."""
    quotes, width = lead.count(">"), len(lead.rpartition(">")[2].expandtabs(4))
    for line in lines:
        if quotes:
            line = re.sub(rf"^(?:[ \t]*>){{0,{quotes}}}", "", line)
        if width and line[:1] in " \t":
            stripped = line.lstrip(" \t")
            indent = line[: len(line) - len(stripped)].expandtabs(4)
            line = indent[width:] + stripped
        yield line


def _valid_form(content: str, prompt: str) -> str | None:
    """Returns the content if it is valid source, alone or after the prompt, else its dedented form if that is, else None."""
    if _parsed(content) is not None or (prompt and _parsed(prompt + content) is not None):
        return content
    dedented = textwrap.dedent(content)
    return dedented if dedented != content and _parsed(dedented) is not None else None


def _valid_beginning(text: str, prompt: str = "") -> str | None:
    """Returns the longest valid beginning of a text that ends at a blank line, or None."""
    paragraphs = [match.end() for match in re.finditer(r"\n[ \t]*\n|\n(?=\S)", text)]
    for end in paragraphs[: -4 * _MAX_TRIED : -1]:
        beginning = text[:end]
        if beginning.strip() and _valid_form(beginning, prompt) is not None:
            return _valid_form(beginning, prompt)
    return None


def _unfenced(text: str, prompt: str) -> str:
    """Returns the program of a response without blocks: the whole text if it is valid, else the valid part from the first
    line of code on, else code within a line, else the whole text."""
    if _valid_form(text, prompt) is not None:
        return text
    plain = _MARKERS.sub("", text)
    lines = plain.split("\n")
    starts = [0] if prompt else []
    starts += [number for number, line in enumerate(lines) if _CODE_LINE.match(line)][:3]
    for start in starts:
        rest = "\n".join(lines[start:])
        found = rest if _valid_form(rest, prompt) is not None else _valid_beginning(rest, prompt)
        if found is not None:
            return found
    inline = [code for code in _INLINE.findall(text) if _parsed(code) is not None]
    return inline[-1] if inline else text


@lru_cache(maxsize=64)
def _parsed(source: str) -> ast.Module | None:
    """Returns the syntax tree of valid source, else None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # finds more faults than ast.parse, such as "return" outside of a function
            compile(source, "solution.py", "exec", dont_inherit=True)
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None


def _index_of_best(blocks: list[_Block], wanted: Sequence[str], prompt: str) -> int:
    """Returns the index of the program: the last of the blocks that define most wanted names, with a body and in Python.

    A block that continues the prompt defines what the prompt begins.
    """

    def rank(index: int) -> tuple[int, bool, bool, bool, bool, int]:
        block = blocks[index]
        continues = prompt != "" and block.tree is None and _parsed(prompt + block.source) is not None
        num_defined = len(wanted) if continues else sum(_defines(block, name) for name in wanted)
        is_stub = num_defined > 0 and block.tree is not None and _is_stub(block.tree)
        is_valid = num_defined > 0 or block.tree is not None
        has_definitions = block.tree is not None and any(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
            for node in block.tree.body
        )
        return num_defined, not is_stub, block.is_python, is_valid, has_definitions, index

    return max(range(len(blocks)), key=rank)


def _index_of_script(blocks: list[_Block]) -> int:
    """Returns the index of the last block that reads input and runs, alone or with the functions of other blocks.

    A block that shows a call of the program with an example does not read input.
    """
    for is_python in (True, False):
        for index in reversed(range(len(blocks))):
            tree = blocks[index].tree
            if blocks[index].is_python != is_python or tree is None or not _has_effects(tree):
                continue
            if _READS_INPUT.search(_with_helpers(blocks, index, ())):
                return index
    running = [i for i, block in enumerate(blocks) if block.tree is None or _has_effects(block.tree)]
    return max(running or range(len(blocks)), key=lambda i: (blocks[i].is_python, i))


def _has_effects(tree: ast.Module) -> bool:
    """Returns whether running this source does more than to define names."""
    return any(
        not isinstance(node, _NOT_EFFECTS)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not (isinstance(node, ast.Assign) and not any(isinstance(n, ast.Call) for n in ast.walk(node)))
        for node in tree.body
    )


def _is_stub(tree: ast.Module) -> bool:
    """Returns whether no function of this source has a body, as in a repeated signature."""
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return bool(functions) and all(_is_placeholder(node) for function in functions for node in function.body)


def _is_placeholder(node: ast.stmt) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    is_refusal = isinstance(node, ast.Raise) and "NotImplemented" in ast.dump(node)
    return is_constant or is_refusal or isinstance(node, ast.Pass)


def _defines(block: _Block, name: str) -> bool:
    """Returns whether a block defines ``name`` at its top level, or as a method of a class there."""
    if block.tree is None:
        return defines(block.source, name)
    classes = [node for node in block.tree.body if isinstance(node, ast.ClassDef)]
    methods = {
        n.name for c in classes for n in c.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return name in methods or any(name in _bound_by(node) for node in block.tree.body)


def defines(program: str, name: str) -> bool:
    """Returns whether a line of the program defines ``name`` at the top level, as a function, class or variable."""
    return bool(
        re.search(
            rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*=",
            program,
            re.MULTILINE,
        )
    )


def _bound_by(statement: ast.stmt) -> set[str]:
    """Returns the names that a statement of a module binds in that module."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
    return names


def _lacking(node: ast.AST) -> set[str]:
    """Returns the names that source reads and that neither it nor Python defines."""
    read: set[str] = set()
    bound = set(dir(builtins)) | {"__file__"}
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            (read if isinstance(part.ctx, ast.Load) else bound).add(part.id)
        elif isinstance(part, ast.arg):
            bound.add(part.arg)
        elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(part.name)
        elif isinstance(part, ast.Import | ast.ImportFrom):
            bound.update((alias.asname or alias.name).partition(".")[0] for alias in part.names)
        elif isinstance(part, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and part.name:
            bound.add(part.name)
    return read - bound


def _with_helpers(blocks: list[_Block], index: int, wanted: Sequence[str]) -> str:
    """Returns a block, after the statements of other blocks that define the names which it or ``wanted`` lacks.

    Only definitions are taken, so that nothing runs which the response shows as an example.
    """
    program = blocks[index]
    if program.tree is None:
        return program.source
    lacking = _lacking(program.tree) | {name for name in wanted if not _defines(program, name)}
    # The nearest definition before the block counts, then the first one after it
    order = [*reversed(range(index)), *range(index + 1, len(blocks))]
    taken: dict[tuple[int, int], str] = {}
    known: set[str] = set().union(*map(_bound_by, program.tree.body))
    while lacking:
        name = lacking.pop()
        known.add(name)
        found = next((places for i in order if (places := _definitions(blocks[i], i, name))), {})
        for place, (statement, source) in found.items():
            taken[place] = source
            lacking |= _lacking(statement) - known
    return _ahead_of(program.source, "".join(taken[place] for place in sorted(taken)))


def _definitions(block: _Block, index: int, name: str) -> dict[tuple[int, int], tuple[ast.stmt, str]]:
    """Returns (block, line) -> the statement and its source, for the statements of a block that define ``name``."""
    if block.tree is None:
        return {}
    lines = block.source.split("\n")
    found: dict[tuple[int, int], tuple[ast.stmt, str]] = {}
    for node in block.tree.body:
        if isinstance(node, _HELPERS) and name in _bound_by(node):
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(d.lineno for d in decorators)])
            source = "\n".join(lines[first - 1 : node.end_lineno]) + "\n"
            if isinstance(
                node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef | ast.Import | ast.ImportFrom
            ):
                found = {place: kept for place, kept in found.items() if not isinstance(kept[0], type(node))}
            found[index, first] = node, source
    return found


def _ahead_of(program: str, source: str) -> str:
    """Returns ``source`` and the program, with the program's imports from __future__ first, as Python requires."""
    if not source:
        return program
    futures = "".join(line if line.endswith("\n") else f"{line}\n" for line in _FUTURE.findall(program))
    return f"{futures}{source}{_FUTURE.sub('', program) if futures else program}"


def _after_prompt(prompt: str, program: str, entry_point: str) -> str:
    if entry_point and defines(program, entry_point):
        # The prompt ends with a function without a body
        return _ahead_of(program, f"{prompt.rstrip()}\n    pass\n\n")
    return f"{prompt}{program}"
