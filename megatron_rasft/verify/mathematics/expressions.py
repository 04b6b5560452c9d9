r"""Compares single expressions exactly: parsed by latex2sympy2_extended, evaluated by mpmath to as many digits as they need.

Two expressions are equal if their values agree to ``_digits`` significant digits. That number grows with the size of the integers in
both expressions, so 2^{-200} differs from 2^{-201}, and sqrt(10^{40}+1) from 10^{20}. Expressions with variables are evaluated at
several points.
"""

import functools
import itertools
import math
import operator
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import mpmath
import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy import Basic, Float, I, Integer, MatrixBase, Pow, Rational, Symbol
from sympy.core.function import AppliedUndef
from sympy.printing.pycode import MpmathPrinter

from megatron_rasft.verify.mathematics.exact_numbers import exact_number
from megatron_rasft.verify.mathematics.notation import TEXT_WRAPPER

# basic_latex and malformed_operators are math-verify's. Its units, nits and equations rules drop text that has a meaning
_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
# math-verify's default maps R and r to one symbol
_CONVERSION = ConversionConfig(lowercase_symbols=False)

_MAX_DIGITS = 20000
_GUARD_DIGITS = 40
# Values that differ at this precision are different, so most pairs need no more
_QUICK_DIGITS = 150
_NUM_POINTS = 6
_MIN_POINTS = 2

# Two numbers side by side are not a product, except after an index or exponent, as in \log_2 8
_JUXTAPOSED = re.compile(r"(?<![_^\d.])[\d.]+\s+[\d.]|(?<![_^\d.}])\d+\s*\{\s*\d")
_INDEXED = re.compile(r"\\(?:sum|prod|lim|int)[^A-Za-z]")
_FRAC_DIGITS = re.compile(r"\\frac\s*(\d)\s*(\d)")
_FRAC_THEN = re.compile(r"\\frac\s*(\d|\{[^{}]*\})\s*(\d)(?=\d)")
_DECIMAL = re.compile(r"\d+\.\d*|\.\d+")
_PRIME = re.compile(r"(?<=[A-Za-z}])('+)")
_ANGLE = r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\})\s*\^\{\\circ\}"
_DEGREE_ARGUMENT = re.compile(
    rf"\\(sin|cos|tan|cot|sec|csc)(\s*\^\s*(?:\d|\{{-?\d+\}}))?\s*(?:\(\s*{_ANGLE}\s*\)|\{{\s*{_ANGLE}\s*\}}|{_ANGLE})"
)
_CHOOSE = re.compile(r"\{?\s*\{?([A-Za-z0-9+\-]+)\}?\s*\\choose\s*\{?([A-Za-z0-9+\-]+)\}?\s*\}?")
_COMBINATION = re.compile(r"(?:\{\}\s*)?[_^]?\{?(\d+|n)\}?\s*([CP])_\{?(\d+|[kr])\}?")
# C_{10}^{3} and A_5^2, the notation of several countries
_COMBINATION_ABOVE = re.compile(r"(?<![A-Za-z\\])([CAP])_\s*\{?(\d+|n)\}?\s*\^\s*\{?(\d+|[kmr])\}?")
_UNREADABLE = re.compile(
    r"\\(?:text|mbox|def|newcommand|let|ldots|usd|approx|undefined)(?![A-Za-z])|\.\.|[\"#@`?']|_\{\}"
)
_SAFE_COMMAND = re.compile(r"\\(?:operatorname|begin|end)\{[a-z]+\*?\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{4,}")
# latex2sympy evaluates binomials while it parses
_HUGE = re.compile(r"\\binom[^A-Za-z]*\d{6}|\\prod(?![A-Za-z]).{0,40}\^\s*\{?\s*(?:\d{5}|10\^)")
_INTEGER_NAMES = frozenset("n m k N M K".split())
_CONSTANT_NAME = re.compile(r"[CcKkD](?:_\{?\w+\}?)?")
_CALCULUS = (sympy.Integral, sympy.Limit, sympy.Derivative, sympy.Sum, sympy.Product)


class _Printer(MpmathPrinter):  # type: ignore[misc]
    """Prints integers as mpmath numbers. Python would evaluate 2**(-60) and 1/3 as floats of 53 bits."""

    def _print_Integer(self, expr: Any) -> str:
        return f"{self._module_format('mpmath.mpf')}({expr.p})"


class _OddRoot(sympy.Function):
    """The real root of odd degree, as in the cube root of -8, which is -2. Arguments: base, numerator, odd denominator."""


def values_equal(x: Any, y: Any) -> bool | None:
    """Compares two parsed expressions or matrices. Returns None if they cannot be evaluated."""
    if isinstance(x, MatrixBase) or isinstance(y, MatrixBase):
        return _matrices_equal(x, y)
    if x == y:
        return not x.has(sympy.nan, sympy.zoo)
    fractions = _fraction(x), _fraction(y)
    if fractions[0] is not None and fractions[1] is not None:
        return fractions[0] == fractions[1]
    if x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):
        return False
    if any(e in (sympy.oo, -sympy.oo) for e in (x, y)):
        return False
    renamed = _with_constant_of(x, y)
    symbols = _symbols(x, renamed)
    digits = _digits(x, renamed)
    evaluate = _evaluator([x, renamed], symbols)
    if digits > _QUICK_DIGITS and _agree_at_points(evaluate, symbols, _QUICK_DIGITS) is False:
        return False
    return _agree_at_points(evaluate, symbols, digits) if digits <= _MAX_DIGITS else None


def _fraction(e: Any) -> Fraction | None:
    """Returns the exact value of sums, products and integer powers of fractions; None for other expressions."""
    if isinstance(e, Rational):
        return Fraction(e.p, e.q)
    if isinstance(e, sympy.factorial):
        n = _fraction(e.args[0])
        return (
            Fraction(math.factorial(int(n)))
            if n is not None and n.denominator == 1 and 0 <= n < 5000
            else None
        )
    if not isinstance(e, sympy.Add | sympy.Mul | Pow):
        return None
    parts = [part for part in map(_fraction, e.args) if part is not None]
    if len(parts) < len(e.args):
        return None
    if isinstance(e, Pow) and (parts[1].denominator != 1 or (parts[0] == 0 and parts[1] < 0)):
        return None
    result: Fraction = functools.reduce(_OPERATIONS[e.func], parts)
    return result


_OPERATIONS: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    Pow: lambda x, n: x ** int(n),
}


def constant_ratio(gold: tuple[str, str], answer: tuple[str, str]) -> int | None:
    """Compares two relations, each as (left side, right side), by the difference of their sides.

    Returns:
        1 or -1, the sign of the factor, if the differences have a constant ratio; 0 if not; None if they cannot be read.
    """
    sides = [parse_expression(side) for side in (*gold, *answer)]
    if any(side is None or isinstance(side, MatrixBase) for side in sides):
        return None
    x, y = sides[0] - sides[1], sides[2] - sides[3]  # type: ignore[operator]
    if x.has(sympy.oo, sympy.nan, sympy.zoo) or y.has(sympy.oo, sympy.nan, sympy.zoo):
        return None
    if x.free_symbols != y.free_symbols or not x.free_symbols:
        return 0
    digits = _digits(x, y)
    return (
        _ratio_sign(_evaluator([x, y], _symbols(x, y)), _symbols(x, y), digits)
        if digits <= _MAX_DIGITS
        else None
    )


def _ratio_sign(evaluate: Any, symbols: Sequence[Symbol], digits: int) -> int | None:
    with mpmath.workdps(digits):
        pairs = [pair for point in _points(symbols) if (pair := evaluate(point))]
        ratios = [x / y for x, y in pairs if x != 0 and y != 0]
        if len(ratios) < _MIN_POINTS:
            return None
        tolerance = mpmath.mpf(10) ** -(_GUARD_DIGITS // 2)
        if len(ratios) < len(pairs) or any(abs(r - ratios[0]) > tolerance * abs(ratios[0]) for r in ratios):
            return 0
        return 1 if mpmath.re(ratios[0]) > 0 else -1


def rounds_to(exact: Any, decimal: Fraction, half_unit: Fraction) -> bool:
    """Returns whether a constant expression of sympy differs from a decimal by at most ``half_unit``."""
    if isinstance(exact, MatrixBase) or exact.free_symbols:
        return False
    evaluated = _evaluator([exact], [])(())
    if not evaluated or not _is_real(evaluated[0]):
        return False
    difference = evaluated[0] - mpmath.mpf(decimal.numerator) / decimal.denominator
    return bool(abs(difference) <= mpmath.mpf(half_unit.numerator) / half_unit.denominator)


def has_symbols(text: str) -> bool | None:
    """Returns whether an expression has variables; None if it cannot be read."""
    value = parse_expression(text)
    return None if value is None else bool(value.free_symbols)


def is_multiple(text: str, residue: Fraction, modulus: int) -> bool:
    """Returns whether an integer expression differs from ``residue`` by a multiple of ``modulus``."""
    value = parse_expression(text)
    exact = None if value is None or isinstance(value, MatrixBase) else _fraction(value)
    return exact is not None and (exact - residue) % modulus == 0


@functools.lru_cache(maxsize=256)
def parse_expression(text: str) -> Any | None:
    """Returns tidy LaTeX as an expression or matrix of sympy, or None if it cannot be read.

    Decimals become exact fractions, ``i`` the imaginary unit, and a root of odd degree the real root.
    """
    number = exact_number(text)
    if number is not None:
        return Rational(number.numerator, number.denominator)
    prepared = _prepared(text)
    if prepared is None:
        return None
    try:
        parsed = latex2sympy(
            prepared, is_real=True, normalization_config=_NORMALIZATION, conversion_config=_CONVERSION
        )
        if not isinstance(parsed, Basic | MatrixBase) or isinstance(
            parsed, sympy.Set | sympy.Tuple | sympy.core.relational.Relational
        ):
            return None
        return _exact(parsed)
    except (MemoryError, RecursionError):
        raise
    except Exception:
        # latex2sympy raises plain Exception for text that its grammar does not have
        return None


def _prepared(text: str) -> str | None:
    """Returns text that latex2sympy reads as it is meant, or None for text that it would misread."""
    text = re.sub(
        r"\\text\{\s*(lcm|gcd|max|min|Re|Im|arctan|arcsin|arccos)\s*\}", r"\\operatorname{\1}", text
    )
    text = TEXT_WRAPPER.sub(
        lambda m: m[1] if re.fullmatch(r"[A-Za-z]|\d+", m[1].strip()) else m.group(), text
    )
    text = re.sub(r"\\(?:mathrm|operatorname)\{\s*(lcm|gcd|max|min)\s*\}", r"\\\1", text)
    text = re.sub(r"\\lcm", r"\\operatorname{lcm}", text)
    text = _DEGREE_ARGUMENT.sub(_in_radians, text).replace(r"^{\circ}", "")
    text = _FRAC_DIGITS.sub(r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\binom\s*(\w)\s*(\w)(?!\w)", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\\(sin|cos|tan)(?=\d)", r"\\\1 ", text)
    text = _FRAC_THEN.sub(lambda m: f"\\frac{{{m[1].strip('{}')}}}{{{m[2]}}}\\cdot ", text)
    text = _CHOOSE.sub(r"\\binom{\1}{\2}", text)
    text = _COMBINATION_ABOVE.sub(lambda m: f"{m[1].replace('A', 'P')}({m[2]},{m[3]})", text)
    text = _COMBINATION.sub(lambda m: f"{m[2]}({m[1]},{m[3]})", text)
    text = _PRIME.sub(lambda m: f"_{{{'p' * len(m[1])}}}" if "_" not in text else "", text)
    text = re.sub(r"\\(?:div)(?![A-Za-z])", "/", text)
    text = re.sub(r"\(\s*\\(?:mod|pmod)", r"(\\mod", text)
    if _UNREADABLE.search(text) or _JUXTAPOSED.search(text) or re.search(r"[<>]|--|\+\+", text):
        return None
    if "=" in text and not _INDEXED.search(text):
        return None
    if _WORD.search(_SAFE_COMMAND.sub("", text)) or _HUGE.search(text):
        return None
    return text.strip() or None


def _in_radians(match: re.Match[str]) -> str:
    degrees = match[3] or match[4] or match[5]
    return f"\\{match[1]}{match[2] or ''}{{\\frac{{{degrees} \\pi}}{{180}}}}"


def _exact(parsed: Any) -> Any:
    """Replaces floats by fractions, ``i`` by the imaginary unit, and function calls with unknown names by symbols."""
    if isinstance(parsed, sympy.MatrixExpr):
        parsed = parsed.doit()
    if isinstance(parsed, MatrixBase):
        return parsed.applyfunc(_exact)
    if _height(parsed) > _MAX_DIGITS:
        raise ValueError("the expression has too many digits")
    parsed = parsed.replace(lambda e: isinstance(e, AppliedUndef), _named_call)
    values: dict[Basic, Basic] = {f: Rational(str(f)) for f in parsed.atoms(Float)}
    for symbol in parsed.free_symbols:
        if symbol.name == "i":
            values[symbol] = I
        elif symbol.name in ("e", "mathrm{e}"):
            values[symbol] = sympy.E
    parsed = parsed.xreplace(values) if values else parsed
    parsed = parsed.replace(_is_odd_root, _odd_root)
    return parsed.replace(lambda e: isinstance(e, sympy.UnevaluatedExpr), lambda e: e.args[0])


def _named_call(call: Any) -> Any:
    """Returns C(n, k) and P(n, k) as numbers of combinations and permutations, any other call as a symbol."""
    name, args = call.func.__name__, call.args
    if len(args) == 2 and name in ("C", "P"):
        combinations = sympy.binomial(*args)
        return combinations if name == "C" else combinations * sympy.factorial(args[1])
    return Symbol(str(call), real=True)


def _is_odd_root(e: Any) -> bool:
    return (
        isinstance(e, Pow)
        and isinstance(e.exp, Rational)
        and e.exp.q % 2 == 1
        and e.exp.q > 1
        and not e.base.is_positive
    )


def _odd_root(e: Any) -> Any:
    return _OddRoot(e.base, Integer(e.exp.p), Integer(e.exp.q))


def _symbols(*expressions: Any) -> list[Symbol]:
    found: set[Symbol] = set().union(*(e.free_symbols for e in expressions))
    return sorted(found, key=lambda s: s.name)


def _with_constant_of(gold: Any, answer: Any) -> Any:
    """Renames the answer's constant of integration to the gold answer's, if both are added to the rest."""
    constants, others = (
        [symbol for symbol in e.free_symbols - other.free_symbols if _CONSTANT_NAME.fullmatch(symbol.name)]
        for e, other in ((gold, answer), (answer, gold))
    )
    if len(constants) == len(others) == 1 and all(
        # The constant is added to a function. A constant alone is an answer of its own: c is not k
        len(e.free_symbols) > 1 and sympy.diff(e, symbol) == 1
        for e, symbol in ((gold, constants[0]), (answer, others[0]))
    ):
        return answer.xreplace({others[0]: constants[0]})
    return answer


def _height(e: Any) -> float:
    """Estimates how many digits the integers of an expression have, before anything is evaluated."""
    if isinstance(e, Rational):
        return (
            len(str(abs(e.p))) + len(str(e.q))
            if abs(e.p) < 10**4000 and e.q < 10**4000
            else 2.0 * _MAX_DIGITS
        )
    if isinstance(e, Pow | sympy.exp):
        base, exponent = e.as_base_exp()
        size = _magnitude(exponent)
        return (_height(base) if base is not sympy.E else 1.0) * max(1.0, size) + _height(exponent)
    if isinstance(e, sympy.factorial | sympy.gamma):
        size = _magnitude(e.args[0])
        return size * max(1.0, len(str(int(size)))) if size < _MAX_DIGITS else 2.0 * _MAX_DIGITS
    if isinstance(e, sympy.binomial):
        return min(_magnitude(e.args[0]), 2.0 * _MAX_DIGITS)
    return float(sum(_height(arg) for arg in e.args))


def _magnitude(e: Any) -> float:
    """Returns roughly the absolute value of an exponent; 1 for an exponent with variables."""
    try:
        if e.free_symbols:
            return 1.0
        if _height(e) > 60:
            return 2.0 * _MAX_DIGITS if e.is_Integer or e.args else 1.0
        return min(abs(complex(e.evalf(5))), 2.0 * _MAX_DIGITS)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return 1.0


def _digits(*expressions: Any) -> int:
    return 2 * _GUARD_DIGITS + int(2 * sum(map(_height, expressions)))


def _points(symbols: Sequence[Symbol]) -> list[tuple[Any, ...]]:
    """Returns the points at which expressions are compared: positive and negative fractions, integers for n, m and k."""
    points = []
    for i in range(_NUM_POINTS if symbols else 1):
        point = []
        for j, symbol in enumerate(symbols):
            if symbol.name in _INTEGER_NAMES:
                point.append(mpmath.mpf(3 + (5 * i + 3 * j) % 11))
            else:
                sign = -1 if i % 3 == 2 and j % 2 == 0 else 1
                point.append(sign * mpmath.mpf(17 + 13 * i + 29 * j) / (11 + 6 * j + 4 * i * i))
        points.append(tuple(point))
    return points


def _evaluator(expressions: Sequence[Any], symbols: Sequence[Symbol]) -> Any:
    """Returns a function of a point that evaluates the expressions, or returns None where one of them has no finite value."""

    def evaluate(point: tuple[Any, ...]) -> list[Any] | None:
        try:
            values = [mpmath.mpmathify(f(*point)) for f in functions]
        except _EVALUATION_ERRORS:
            return None
        return values if all(mpmath.isfinite(v) for v in values) else None

    try:
        functions = [_as_function(e, symbols) for e in expressions]
    except _EVALUATION_ERRORS:
        return lambda point: None
    return evaluate


_EVALUATION_ERRORS = (
    ArithmeticError,
    ValueError,
    TypeError,
    NameError,
    AttributeError,
    LookupError,
    NotImplementedError,
)


def _as_function(e: Any, symbols: Sequence[Symbol]) -> Any:
    """Returns a function of mpmath numbers. Integrals, sums and limits are evaluated by sympy first."""
    dummies = [sympy.Dummy(real=True) for _ in symbols]
    prepared = (e.doit() if e.has(*_CALCULUS) else e).xreplace(dict(zip(symbols, dummies, strict=True)))
    printer = _Printer({"fully_qualified_modules": False, "inline": True, "allow_unknown_functions": True})
    return sympy.lambdify(
        dummies, prepared, modules=[{"_OddRoot": _real_odd_root}, "mpmath"], printer=printer
    )


def _real_odd_root(base: Any, numerator: Any, denominator: Any) -> Any:
    if _is_real(base) and mpmath.re(base) < 0:
        root = -((-mpmath.re(base)) ** (mpmath.mpf(1) / int(denominator)))
        return root ** int(numerator)
    return mpmath.mpmathify(base) ** (mpmath.mpf(int(numerator)) / int(denominator))


def _is_real(value: Any) -> bool:
    return bool(abs(mpmath.im(value)) <= abs(mpmath.re(value)) * mpmath.mpf(10) ** -30)


def _agree_at_points(evaluate: Any, symbols: Sequence[Symbol], digits: int) -> bool | None:
    num_compared = 0
    for point in _points(symbols):
        with mpmath.workdps(digits):
            values = evaluate(point)
        if values is None or (symbols and _is_real(values[0]) != _is_real(values[1])):
            continue
        if not _same(evaluate, point, values, digits):
            return False
        num_compared += 1
    if num_compared == 0 and not symbols:
        return None
    return True if num_compared >= (_MIN_POINTS if symbols else 1) else None


def _same(evaluate: Any, point: tuple[Any, ...], values: list[Any], digits: int) -> bool:
    """Compares two values at a precision. Two values near 0 are compared again: rounding errors shrink, numbers do not."""
    with mpmath.workdps(digits):
        size = max(abs(v) for v in values)
        if abs(values[0] - values[1]) <= size * mpmath.mpf(10) ** -(digits - _GUARD_DIGITS):
            return True
        if size > mpmath.mpf(10) ** -(digits // 2):
            return False
    with mpmath.workdps(2 * digits):
        again = evaluate(point)
        return again is not None and max(abs(v) for v in again) < size * mpmath.mpf(10) ** -(digits // 2)


def _matrices_equal(x: Any, y: Any) -> bool | None:
    if not (isinstance(x, MatrixBase) and isinstance(y, MatrixBase)):
        return False
    if x.shape != y.shape:
        return False
    results = [values_equal(a, b) for a, b in itertools.zip_longest(x.flat(), y.flat())]
    return None if None in results else all(results)
