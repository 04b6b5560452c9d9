"""LaTeX in texts as MathML, which browsers draw without a script.

The package latex2mathml converts a formula to a tree of elements. It copies texts, links and styles of the formula into the tree
without escaping them, and a model wrote the formula. So this module writes the tree itself: known elements and harmless attributes
only. A formula that cannot be converted stays text.
"""

import functools
import html
import re
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree.ElementTree import Element

from markupsafe import Markup, escape

from megatron_rasft.errors import RasftError
from megatron_rasft.tools.report.texts import printable

_MAX_FORMULA_CHARS = 1500
"""Longer formulas stay text: a converter that needs minutes for a hostile formula must not stop the page."""
_BRACES = r"\{(?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*\}"
"""A pair of braces with at most three levels of braces inside."""
_PIECES = re.compile(
    rf"""
      # A formula does not open another one of its kind: the end of each of thousands that are never closed is found at once.
      (?P<code>```.*?(?:```|\Z)|`[^`\n]+`)
    | \$\$(?P<dollars>[^$]+)\$\$
    | \\\[(?P<brackets>(?:[^\\]|\\\\|\\(?![][\\]))++)\\\]
    | \\\((?P<parentheses>(?:[^\\]|\\\\|\\(?![()\\]))++)\\\)
    | (?P<environment>\\begin\{{(?P<name>equation|align|gather|multline)(?P<star>\*?)\}}(?:[^\\]|\\(?!(?:begin|end)\{{(?P=name)(?P=star)\}}))++\\end\{{(?P=name)(?P=star)\}})
    # A dollar sign may also be a currency: a formula touches both of its signs, and no letter or digit follows.
    | (?<![\\$\w])\$(?P<dollar>(?=\S)(?:[^$\n\\]|\\.)+)(?<=\S)\$(?![\w$])
    | (?P<boxed>\\boxed\s*{_BRACES})
    """,
    re.DOTALL | re.VERBOSE,
)
_IN_LINE = ("parentheses", "dollar", "boxed")
_ON_A_LINE = ("dollars", "brackets", "environment")
_OTHER_NAMES = {r"{aligned}": r"{align*}", r"{gathered}": r"{align*}", r"{multline}": r"{align*}"}
"""Environments that latex2mathml does not know -> a similar one."""

_ELEMENTS = frozenset(
    "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup mover munder munderover mtable mtr mtd mstyle menclose "
    "mpadded mphantom mmultiscripts mprescripts none".split()
)
_ATTRIBUTES = frozenset(
    "accent columnalign columnlines columnspacing depth display displaystyle fence form height linethickness lspace mathvariant "
    "maxsize minsize notation rowlines rowspacing rspace scriptlevel separator stretchy voffset width".split()
)
_HARMLESS = re.compile(r"[\w .%+-]*")


class Piece(NamedTuple):
    """A part of a text."""

    text: str
    """The characters of the text; for a formula with its delimiters."""
    markup: Markup | None = None
    """MathML of a formula. None for plain text, and for a formula that cannot be converted."""
    is_code: bool = False


def check_installed() -> None:
    """Raises RasftError if the package that converts formulas is not installed."""
    try:
        import latex2mathml.converter  # noqa: F401 - an optional package
    except ImportError as error:
        raise RasftError(
            "the report needs the package latex2mathml. Install it with: pip install 'megatron-rasft[report]'"
        ) from error


def pieces(text: str) -> Iterator[Piece]:
    """Yields the parts of a text in order: plain text, code and formulas. Formulas inside code stay code."""
    end = 0
    for match in _PIECES.finditer(text):
        if match.start() > end:
            yield Piece(text[end : match.start()])
        yield _piece(match)
        end = match.end()
    if end < len(text):
        yield Piece(text[end:])


def has_formulas(text: str) -> bool:
    """Returns whether a part of the text looks like a formula."""
    return any(match["code"] is None for match in _PIECES.finditer(text))


class Formulas:
    """The different formulas of many texts, for pages that draw texts later.

    Args:
        max_formulas: number of different formulas that are converted. It limits the time, as a conversion takes about a millisecond.
    """

    def __init__(self, max_formulas: int) -> None:
        self.drawn: list[tuple[str, str]] = []
        """(formula with its delimiters, its MathML), in the order of their numbers."""
        self._numbers: dict[str, int | None] = {}
        self._max_formulas = max_formulas

    def numbers(self, text: str) -> list[int]:
        """Returns the numbers of the text's formulas, in order. Formulas that are not valid LaTeX are left out.

        Returns [] for a text with a formula beyond the limit, so that no text has only a part of its formulas drawn.
        """
        found = []
        for match in _PIECES.finditer(text) if "\\" in text or "$" in text else ():
            if match["code"] is not None:
                continue
            if match[0] not in self._numbers:
                if len(self._numbers) >= self._max_formulas:
                    return []
                self._numbers[match[0]] = self._draw(match)
            found.append(self._numbers[match[0]])
        return [number for number in found if number is not None]

    def _draw(self, match: re.Match[str]) -> int | None:
        markup = _piece(match).markup
        if markup is None:
            return None
        self.drawn.append((match[0], str(markup)))
        return len(self.drawn) - 1


def _piece(match: re.Match[str]) -> Piece:
    whole = match[0]
    if match["code"] is not None:
        return Piece(whole, is_code=True)
    for names, display in ((_IN_LINE, "inline"), (_ON_A_LINE, "block")):
        for name in names:
            if match[name] is not None:
                return Piece(whole, to_mathml(match[name], display))
    raise AssertionError("every alternative of _PIECES is a name of a group")


@functools.lru_cache(maxsize=4096)
def to_mathml(latex: str, display: str = "inline") -> Markup | None:
    """Converts a formula without delimiters. Returns None if it is too long or not valid LaTeX."""
    if len(latex) > _MAX_FORMULA_CHARS:
        return None
    try:
        tree = _tree(latex.strip(), display)
        written = _written(tree)
    except Exception:  # latex2mathml raises many different exceptions for broken formulas
        return None
    source = Markup('<annotation encoding="application/x-tex">{}</annotation>').format(printable(latex))
    return Markup('<math display="{}"><semantics>{}{}</semantics></math>').format(display, written, source)


def _tree(latex: str, display: str) -> Element:
    """Converts a formula. Line breaks outside of an environment become rows of a table, because browsers ignore them."""
    from latex2mathml.converter import convert_to_element

    for name, other in _OTHER_NAMES.items():
        latex = latex.replace(name, other)
    tree = convert_to_element(latex, display=display)
    if _breaks_lines(tree):
        tree = convert_to_element(rf"\begin{{split}}{latex}\end{{split}}", display=display)
    if _breaks_lines(tree):
        raise ValueError("a line break that is in no table")
    return tree[0]  # the first element inside <math>


def _breaks_lines(tree: Element) -> bool:
    return any("linebreak" in element.attrib for element in tree.iter("mspace"))


def _written(element: Element) -> Markup:
    """Writes a tree of elements.

    Raises:
        ValueError: the tree has an unknown element, or a command that the converter does not know.
    """
    if element.tag not in _ELEMENTS:
        raise ValueError(f"unknown element {element.tag}")
    text = html.unescape(element.text or "")
    if element.tag != "mtext" and "\\" in text:
        raise ValueError(f"unknown command {text}")
    attributes = Markup("").join(
        Markup(' {}="{}"').format(name, value)
        for name, value in element.attrib.items()
        if name in _ATTRIBUTES and _HARMLESS.fullmatch(value)
    )
    content = escape(printable(text)) + Markup("").join(_written(child) for child in element)
    return Markup("<{0}{1}>{2}</{0}>").format(element.tag, attributes, content)
