r"""Writes an answer in one notation: LaTeX without typesetting. Changes no value.

``tidy`` replaces Unicode symbols and plain notation such as ``sqrt(2)/2`` by LaTeX, and removes fonts, colours, spacing, dollar
signs and thousands separators. The rest of this package reads tidy text only.
"""

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱᵏᵐˣ", "0123456789+-()nikmx", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₐₑᵢₖₘₙₓ", "0123456789+-()aeikmnx", strict=True))
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "∗": "*", "÷": r"\div ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
    "≦": r"\le ", "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ", "∞": r"\infty ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "∅": r"\emptyset ", "Ø": r"\emptyset ", "°": r"^{\circ}",
    "º": r"^{\circ}", "∘": r"^{\circ}", "∠": r"\angle ", "′": "'", "’": "'", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ", "∣": r"\mid ", "…": r"\ldots ", "⋯": r"\ldots ",
    "∶": ":", "∑": r"\sum ", "∫": r"\int ", "→": r"\to ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "“": '"', "”": '"', "、": ",", "。": ".", "∆": r"\triangle ", "△": r"\triangle ",
    "µ": "μ",
}  # fmt: skip
_GREEK = dict(
    zip(
        "αβγδεζηθικλμνξπρστυφχψωϕΓΔΘΛΞΠΣΦΨΩ",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
        "omega phi Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega".split(),
        strict=True,
    )
)
_TRANSLATION = str.maketrans(_SYMBOLS | {letter: f"\\{name} " for letter, name in _GREEK.items()})
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_ROOT = re.compile(r"([√∛∜])\s*(?:\(([^()]*(?:\([^()]*\)[^()]*)*)\)|(\d+(?:\.\d+)?|[A-Za-zα-ω]))")
_SUPERSCRIPT_RUN = re.compile(f"[{''.join(map(re.escape, _SUPERSCRIPTS))}]+")
_SUBSCRIPT_RUN = re.compile(f"[{''.join(map(re.escape, _SUBSCRIPTS))}]+")
_VULGAR = re.compile(r"(\d*)\s*(\d+)⁄(\d+)")

TEXT_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|operatorname\*?|rm|bf)\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
)
_COLOR = re.compile(r"\\(?:text)?color\s*\{[A-Za-z]*\}")
_STYLE = re.compile(
    r"\\(?:text(?:bf|it|rm)?|math(?:bf|rm|it)|boldsymbol|bm|underline|emph|displaystyle)\s*(?=\{)"
)
_SPACING = re.compile(
    r"(?<!\\)\\[,;:! ]|~|\\q?quad\b|\\(?:hspace|vspace|phantom|hphantom)\s*\*?\{[^{}]*\}"
    r"|\\(?:left|right|displaystyle|textstyle|limits|nolimits|strut|bigg?[lr]?|Bigg?[lr]?)(?![A-Za-z])"
)
_PLAIN_SQRT = re.compile(r"(?<![\\A-Za-z])(sqrt|cbrt|abs)\s*(?=[({\[\d])")
_PLAIN_FUNCTION = re.compile(
    r"(?<![\\A-Za-z])(arc(?:sin|cos|tan)|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|gcd|lcm|max|min|det)(?=\s*[({\[\\^_ \dxyt])"
)
_PLAIN_NAME = re.compile(
    r"(?<![\\A-Za-z])(alpha|beta|gamma|delta|theta|lambda|mu|sigma|phi|omega|rho|pi)(?![A-Za-z])"
)
_PLAIN_PI = re.compile(r"(?<=\d)pi(?![A-Za-z])")
_PLAIN_POWER = re.compile(r"\^\s*(?:\(([^()]*)\)|(-?\d[\d.]+))")
_PLAIN_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|infty|inf|Infinity)(?![A-Za-z])")
_DECIMAL_MARK = re.compile(r"(?<=\d)\{,\}(?=\d{3})|(?<=\d),(?:\\[!,;: ]\s*)+(?=\d{3})")
_THOUSANDS_SPACE = re.compile(r"(?<![\d.])\d{1,3}(?:[\u00a0\u2009\u202f]\d{3})+(?!\d)")
_MONEY_SIGN = re.compile(r"(-?)\s*\\?\$\s*(?=\d)")
# A dollar sign alone is money
_FORMULA = re.compile(r"(?<!\\)\$([^\s$](?:[^$]{0,300}[^\s$\\])?)\$(?!\d)")
_FRAC_SPELLING = re.compile(r"\\[dtcsx]frac(?![A-Za-z])")
_COMMANDS = (
    (r"\lbrace", r"\{"), (r"\rbrace", r"\}"), (r"\varnothing", r"\emptyset"), (r"\leqslant", r"\le "), (r"\geqslant", r"\ge "),
    (r"\leq", r"\le "), (r"\geq", r"\ge "), (r"\neq", r"\ne "), (r"\lt", "<"), (r"\gt", ">"), (r"\lvert", "|"),
    (r"\rvert", "|"), (r"\langle", "("), (r"\rangle", ")"), (r"\vert", "|"), (r"\dots", r"\ldots "), (r"\cdots", r"\ldots "), (r"\ldots", r"\ldots "),
    (r"\colon", ":"), (r"\simeq", r"\approx "), (r"\thickapprox", r"\approx "), (r"\dbinom", r"\binom"),
    (r"\tbinom", r"\binom"), (r"\bmod", r"\mod "), (r"\ast", "*"), (r"\tg", r"\tan "), (r"\ctg", r"\cot "),
    (r"\arctg", r"\arctan "), (r"\lg", r"\log_{10} "), (r"\imath", "i"), (r"\varphi", r"\phi "),
    (r"\varepsilon", r"\epsilon "), (r"\backslash", r"\setminus "), (r"\textdegree", r"^{\circ}"), (r"\degree", r"^{\circ}"),
    (r"\textdollar", r"\$"), (r"\euro", "€"), (r"\pounds", "£"), (r"\cents", "¢"), (r"\land", r"\text{ and }"),
    (r"\lor", r"\text{ or }"), (r"\wedge", r"\text{ and }"), (r"\vee", r"\text{ or }"),
)  # fmt: skip
_COMMAND_RULES = tuple((re.compile(re.escape(old) + r"(?![A-Za-z])"), new) for old, new in _COMMANDS)
# ]2,7[ is the open interval (2,7). Each bracket is read by itself, so ]2,7) is open too
_END = r"(?:[^\[\](){},;]|\{[^{}]*\}){1,60}"
_INTERVAL = re.compile(
    rf"(\[|\(|(?:(?<![\w}})\]])|(?<=\\c[ua]p)|(?<=\\in)|(?<=\\setminus))\])({_END}[,;]{_END})(\)|\]|\[(?=\s*(?:$|[,;)}}]|\\|or\b|and\b)))"
)
_CURRENCY_IN_TEXT = re.compile(r"\\(?:text|mathrm|mbox)\s*\{\s*([€£¥₹])\s*\}")
_QUOTES = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("`", "`"),
    ('"', '"'),
    ("**", "**"),
    ("''", "''"),
)
_OPENERS, _CLOSERS = "([{", ")]}"


def tidy(answer: str) -> str:
    """Returns the answer in LaTeX without typesetting. The steps depend on each other, so their order matters."""
    answer = _plain_characters(answer)
    answer = _unquoted(answer)
    answer = _DECIMAL_MARK.sub("", answer)
    answer = _unstyled(answer)
    for rule, new in _COMMAND_RULES:
        answer = rule.sub(lambda _, new=new: new, answer)  # type: ignore[misc]
    answer = _FORMULA.sub(r" \1 ", answer)
    answer = _CURRENCY_IN_TEXT.sub(r"\1", answer)
    answer = _MONEY_SIGN.sub(r"\1\\usd ", answer)
    answer = answer.replace(r"\$", "").replace("$", "")
    for mark in (r"\(", r"\)", r"\[", r"\]"):
        answer = answer.replace(mark, " ")
    answer = _SPACING.sub(" ", answer)
    answer = _FRAC_SPELLING.sub(r"\\frac", answer)
    answer = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", r"^{\\circ}", answer)
    answer = re.sub(r"\\?%|\\text\s*\{\s*(?:per ?cent|\\?%)\s*\}|(?<=\d)\s*per ?cent\b", r"\\%", answer)
    answer = re.sub(r"\s+", " ", answer).strip()
    answer = _plain_to_latex(answer.replace("{:}", ":"))
    if "[" in answer or "]" in answer:
        answer = _INTERVAL.sub(_plain_interval, answer)
    return _without_outer_braces(_without_final_mark(answer))


def _plain_interval(match: re.Match[str]) -> str:
    left, inner, right = match.groups()
    return f"{left.replace(']', '(')}{inner}{right.replace('[', ')')}"


def _plain_characters(text: str) -> str:
    """Replaces Unicode by ASCII and LaTeX, and removes characters that cannot be seen."""
    text = _THOUSANDS_SPACE.sub(lambda m: re.sub(r"\D", "", m.group()), text)
    if not text.isascii():
        text = _SUPERSCRIPT_RUN.sub(lambda m: f"^{{{''.join(_SUPERSCRIPTS[c] for c in m.group())}}}", text)
        text = _SUBSCRIPT_RUN.sub(lambda m: f"_{{{''.join(_SUBSCRIPTS[c] for c in m.group())}}}", text)
        text = re.sub(r"\^\{([^{}]*)\}⁄?_\{([^{}]*)\}(?=$|[^\w])", r"^{\1}_{\2}", text)
        text = _replace_roots(text.translate(_TRANSLATION))
        text = _VULGAR.sub(_mixed, unicodedata.normalize("NFKC", text)).translate(_TRANSLATION)
        text = text.replace("⁄", "/")
    return "".join(" " if c in "\t\n\r\u2028" else c for c in text if c in "\t\n\r" or not _is_invisible(c))


def _is_invisible(char: str) -> bool:
    return (
        ord(char) < 32 or char == "\x7f" or (ord(char) > 127 and unicodedata.category(char) in ("Cf", "Cc"))
    )


def _mixed(match: re.Match[str]) -> str:
    whole, over, under = match.groups()
    return f"{whole} \\frac{{{over}}}{{{under}}}" if whole else f"\\frac{{{over}}}{{{under}}}"


def _replace_roots(text: str) -> str:
    while match := _ROOT.search(text):
        root = f"{_ROOTS[match[1]]}{{{match[2] or match[3]}}}"
        text = text[: match.start()] + root + text[match.end() :]
    return text


def _unquoted(answer: str) -> str:
    """Removes quotes, backticks, bold marks and formula signs around the whole answer."""
    answer = answer.strip()
    for opening, closing in _QUOTES * 2:
        inner = answer[len(opening) : -len(closing)]
        if (
            answer.startswith(opening)
            and answer.endswith(closing)
            and len(answer) > len(opening + closing)
            and opening not in inner
        ):
            answer = inner.strip()
    return answer


def _unstyled(answer: str) -> str:
    """Removes colours, and a font command around a whole formula. Words keep their font command, which marks them as text."""
    answer = _COLOR.sub("", answer)
    while (style := _STYLE.match(answer)) and closes_at_end(answer[style.end() :]):
        inner = answer[style.end() + 1 : -1].strip()
        if not re.search(r"[\\$\d]", inner) or re.search(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", inner)):
            break
        answer = inner
    # A single letter or a number in a font is a symbol and not a word
    answer = re.sub(r"\\(?:text|math)(?:bf|rm|it|sf|normal|up)?\s*\{\s*(-?[\d.]+)\s*\}", r"{\1}", answer)
    return re.sub(r"\\(?:text|math)(?:rm|it|normal)?\s*\{\s*([ei])\s*\}", r"{\1}", answer)


def _plain_to_latex(answer: str) -> str:
    r"""Replaces plain notation: ``sqrt(2)``, ``2*pi``, ``x**2``, ``2^10``, ``<=``, ``+-``."""
    answer = answer.replace("**", "^").replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ")
    answer = answer.replace("+/-", r"\pm ").replace("+-", r"\pm ") if re.match(r".*\+/?-", answer) else answer
    answer = re.sub(
        r"\\text\s*\{\s*\(?\s*mod\s*(\d+)\s*\)?\s*\}|\(\s*mod\s*(\d+)\s*\)", r"\\pmod{\1\2}", answer
    )
    answer = _PLAIN_POWER.sub(lambda m: f"^{{{m[1] or m[2]}}}", answer)
    while match := _PLAIN_SQRT.search(answer):
        answer = _latex_root(answer, match)
    answer = _outside_text(_PLAIN_FUNCTION, r"\\\1", answer)
    answer = _outside_text(_PLAIN_NAME, r"\\\1 ", answer)
    answer = _PLAIN_PI.sub(r"\\pi ", answer)
    return _outside_text(_PLAIN_INFINITY, r"\\infty ", answer)


def _outside_text(rule: re.Pattern[str], new: str, answer: str) -> str:
    """Applies a rule outside of ``\\text{}``, whose words are not plain notation."""
    result, position = "", 0
    for wrapper in TEXT_WRAPPER.finditer(answer):
        result += rule.sub(new, answer[position : wrapper.start()]) + wrapper.group()
        position = wrapper.end()
    return result + rule.sub(new, answer[position:])


def _latex_root(answer: str, match: re.Match[str]) -> str:
    command = {"sqrt": r"\sqrt", "cbrt": r"\sqrt[3]", "abs": r"\mathrm{abs}"}[match[1]]
    rest = answer[match.end() :]
    if rest[0] == "[":
        return f"{answer[: match.start()]}{command}{rest}"
    end = _closing_index(rest) if rest[0] in "({" else len(re.match(r"\d+", rest).group()) - 1  # type: ignore[union-attr]
    if end < 0:
        return f"{answer[: match.start()]}{command} {rest}"
    inner = rest[1:end] if rest[0] in "({" else rest[: end + 1]
    if match[1] == "abs":
        return f"{answer[: match.start()]}|{inner}|{rest[end + 1 :]}"
    return f"{answer[: match.start()]}{command}{{{inner}}}{rest[end + 1 :]}"


def _without_final_mark(answer: str) -> str:
    while answer.endswith((".", ",", ";", ":", "?", "。")) or (
        answer.endswith("\\") and not answer.endswith("\\\\")
    ):
        if answer.endswith(("..", r"\}.")) and answer.endswith(".."):
            break
        answer = answer[:-1].rstrip()
    return answer


def _without_outer_braces(answer: str) -> str:
    while answer.startswith("{") and answer.endswith("}") and closes_at_end(answer):
        answer = answer[1:-1].strip()
    return answer


def _closing_index(text: str) -> int:
    """Returns the index of the bracket that closes the first character, or -1. "(" may be closed by "]"."""
    depth = 0
    for i, symbol in enumerate(text):
        if symbol in _OPENERS:
            depth += 1
        elif symbol in _CLOSERS:
            depth -= 1
            if depth == 0:
                return i
    return -1


def closes_at_end(text: str) -> bool:
    """Returns whether the first bracket is closed by the last character."""
    return bool(text) and _closing_index(text) == len(text) - 1


def split_top_level(text: str, separators: re.Pattern[str]) -> list[str]:
    """Splits text at separators outside of brackets. A captured separator stays in the result, as with ``re.split``."""
    parts: list[str] = []
    depth = start = position = 0
    while position < len(text):
        symbol = text[position]
        depth += (symbol in _OPENERS) - (symbol in _CLOSERS)
        match = separators.match(text, position) if depth == 0 and symbol not in _CLOSERS else None
        if match and match.end() > position:
            parts.append(text[start : match.start()])
            parts.extend(group for group in match.groups() if group is not None)
            start = position = match.end()
        else:
            position += 1
    return [*parts, text[start:]]


def plain_words(text: str) -> str:
    """Returns text without font commands, formula signs and repeated white space."""
    return " ".join(TEXT_WRAPPER.sub(r" \1 ", text).replace("$", " ").split())
