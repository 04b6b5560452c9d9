"""Formulas become MathML, hostile ones stay harmless, and broken ones stay text."""

import sys

import pytest

from megatron_rasft.errors import RasftError
from megatron_rasft.tools.report.mathematics import Formulas, check_installed, has_formulas, pieces, to_mathml


@pytest.mark.parametrize(
    "text,formulas",
    [
        (r"so $x^2 = 4$, and", ["$x^2 = 4$"]),
        (r"\(a\) and \[b\] and $$c$$", [r"\(a\)", r"\[b\]", "$$c$$"]),
        (r"the answer is \boxed{\frac{1}{2}}.", [r"\boxed{\frac{1}{2}}"]),
        (r"\begin{align*}x&=1\\y&=2\end{align*}", [r"\begin{align*}x&=1\\y&=2\end{align*}"]),
        ("it costs $5 and then $6.", []),
        (r"it costs \$5 and \$6", []),
        ("a line $x\nends$ here", []),
        ("code `$x$` and\n```\n$y$\n```\nand $z$", ["$z$"]),
    ],
)
def test_formulas_are_found_between_their_delimiters(text: str, formulas: list[str]) -> None:
    found = list(pieces(text))
    assert "".join(piece.text for piece in found) == text
    assert [piece.text for piece in found if piece.markup is not None] == formulas
    assert has_formulas(text) == bool(formulas)


def test_fraction_has_the_elements_of_mathml_and_its_source() -> None:
    markup = to_mathml(r"\frac{a}{7}")
    assert markup is not None and "<mfrac><mrow><mi>a</mi></mrow><mrow><mn>7</mn></mrow></mfrac>" in markup
    assert r'<annotation encoding="application/x-tex">\frac{a}{7}</annotation>' in markup


@pytest.mark.parametrize("latex", [r"a &= b \\ c &= d", r"\begin{aligned}a&=b\\c&=d\end{aligned}"])
def test_line_breaks_become_rows(latex: str) -> None:
    markup = to_mathml(latex, "block")
    assert markup is not None and markup.count("<mtr>") == 2 and 'display="block"' in markup


@pytest.mark.parametrize(
    "latex", [r"\frac{", "a_{", r"\left( x", r"\nosuchcommand{x}", "{" * 900, "x" * 2000]
)
def test_broken_formula_stays_text(latex: str) -> None:
    assert to_mathml(latex) is None
    assert [(p.text, p.markup) for p in pieces(rf"\[{latex}\]")] == [(rf"\[{latex}\]", None)]


@pytest.mark.parametrize(
    "latex",
    [
        r"\text{<img src=x onerror=alert(1)>}",
        r"\href{javascript:alert(1)}{x}",
        r"\style{background:url(x)}{x}",
        r"\class{a\" onclick=\"x}{x}",
        r"x </math><script>alert(1)</script>",
    ],
)
def test_formula_of_a_model_adds_no_markup_of_its_own(latex: str) -> None:
    markup = to_mathml(latex)
    assert markup is not None
    assert not any(
        bad in markup.split("<annotation")[0]
        for bad in ("<img", "<script", "href", "style=", "class", "onclick=")
    )
    assert "<img" not in markup and "<script" not in markup


def test_formulas_that_are_opened_again_and_again_are_text() -> None:
    """Without the rule a response of 100,000 characters takes minutes, as each formula's end is looked for in the whole text."""
    for begin, end in ((r"\[", r"\]"), (r"\(", r"\)"), (r"\begin{align}", r"\end{align}")):
        opened = 20_000 * begin
        assert not has_formulas(opened)
        assert [p.text for p in pieces(f"{opened}x{end}") if p.markup] == [f"{begin}x{end}"]


def test_line_break_with_a_distance_does_not_open_a_formula() -> None:
    text = r"\[\begin{matrix}a\\[2pt]b\end{matrix}\]"
    assert [piece.text for piece in pieces(text) if piece.markup] == [text]


def test_formulas_of_many_texts_are_numbered_up_to_a_limit() -> None:
    formulas = Formulas(3)
    assert formulas.numbers("$a$, $b$ and $a$") == [0, 1, 0]
    assert formulas.numbers(r"\(\frac{\) `$c$` $b$ costs $5") == [1], "broken LaTeX and code have no number"
    assert formulas.numbers("$a$ and $d$") == [], "a text is drawn as a whole or not at all"
    assert formulas.numbers("$b$") == [1]
    assert formulas.drawn == [("$a$", to_mathml("a")), ("$b$", to_mathml("b"))]


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "latex2mathml", None)
    monkeypatch.setitem(sys.modules, "latex2mathml.converter", None)
    with pytest.raises(RasftError, match=r"latex2mathml.*megatron-rasft\[report\]"):
        check_installed()
