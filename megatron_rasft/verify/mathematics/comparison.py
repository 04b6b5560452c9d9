"""Compares two typed values by their kind. docs/verification.md has the table of what equals what."""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy
from sympy import EmptySet, FiniteSet, Interval, MatrixBase, Rational, Set, Union

from megatron_rasft.verify.mathematics.expressions import (
    constant_ratio,
    parse_expression,
    rounds_to,
    values_equal,
)
from megatron_rasft.verify.mathematics.units import Unit, have_same_dimensions, is_degree, is_radian
from megatron_rasft.verify.mathematics.values import (
    MAX_ITEMS,
    Assignment,
    Based,
    Cases,
    Collection,
    Congruence,
    Equation,
    Expression,
    Inequality,
    Matrix,
    Membership,
    Number,
    Percent,
    Quantity,
    Ratio,
    Region,
    Unreadable,
    Value,
    Words,
    both_readings,
    read_value,
)

Scalar = Number | Percent | Quantity | Expression
_REGION_KINDS = (Inequality, Region, Membership)
_UNORDERED = ("", "{}")
_DEGREE = Fraction(1, 180)
_INDEXED_NAME = re.compile(r"(.+?)_?\{?\d+\}?")
_CLOCK_TIME = re.compile(r"\d{1,2}:[0-5]\d")
_IDENTITY = re.compile(r"(.*?)\s*(?:\\cdot\s*)?(?:I(?:_\{?\d\}?)?|\\mathbf\{\s*I\s*\})")
_UNIT_VECTOR = re.compile(
    r"\\(?:mathbf|hat|vec|boldsymbol|bm|mathrm)\s*\{?\s*(?:\\mathbf\s*\{)?\s*\\?([ijk])(?:math)?\s*\}?\}?"
)
_LEAD = re.compile(
    r"^(?:on|(?:it|this|that|they|the (?:graph|curve|figure|shape|answer|triangle|function|sequence|series)) (?:is|are)|it's|an?|the)\s+"
)
_ANSWER_SYNONYMS = {
    "dne": "does not exist", "doesn't exist": "does not exist", "not defined": "undefined", "infinitely many solutions": "infinitely many",
    "infinite solutions": "infinitely many", "infinitely many": "infinitely many", "there are infinitely many solutions": "infinitely many",
}  # fmt: skip


def values_match(gold: Value, answer: Value, rel_tolerance: float = 0.0) -> bool | None:
    """Compares an answer with the gold answer.

    Args:
        gold: the gold answer.
        answer: the response's answer.
        rel_tolerance: relative difference up to which two plain numbers are equal.

    Returns:
        True or False; None if one of them cannot be read.
    """
    if isinstance(gold, Unreadable) or isinstance(answer, Unreadable):
        return None
    if _has_inequality(gold) or _has_inequality(answer):
        return _regions_match(gold, answer, rel_tolerance)
    for kinds, compare in _COMPARISONS:
        if isinstance(gold, kinds) or isinstance(answer, kinds):
            return compare(gold, answer, rel_tolerance)
    return _scalars_match(gold, answer, rel_tolerance)  # type: ignore[arg-type]


def _has_inequality(value: Value) -> bool:
    """Returns whether a value is a list of conditions, as in ``x < 1 or x = 3``."""
    return isinstance(value, Collection) and any(isinstance(item, Inequality) for item in value.items)


def is_rounded_to(gold: Value, answer: Value) -> bool:
    """Returns whether an answer rounds to a gold answer that is marked as approximate, at the gold answer's digits."""
    (gold_value, gold_unit), (value, unit) = _measured(gold), _measured(answer)
    if not isinstance(gold_value, Number) or value is None or (gold_unit and unit and gold_unit != unit):
        return False
    decimals = (
        len(gold_value.text.partition(".")[2]) if re.fullmatch(r"-?\d*\.?\d*", gold_value.text) else None
    )
    expression = _sympy_value(value)
    if decimals is None or expression is None:
        return False
    return rounds_to(expression, gold_value.value, Fraction(1, 2 * 10**decimals))


def _words_match(gold: Value, answer: Value, _: float) -> bool | None:
    if not (isinstance(gold, Words) and isinstance(answer, Words)):
        # A formula may be the name of a person or a product of letters
        return False
    wanted, found = normal_words(gold.text), normal_words(answer.text)
    if wanted == found:
        return True
    # "Yes, it converges" answers a question of yes or no
    decision = re.match(r"(yes|no|true|false)\s*[,.;:-]", answer.text.casefold())
    if decision is None or wanted != [decision[1]]:
        return False
    return not re.search(
        r"\b(?:yes|no|or|but|maybe|sometimes|not always)\b", answer.text.casefold()[decision.end() :]
    )


def normal_words(text: str) -> list[str]:
    """Returns words without case, articles and lead-ins such as "it is". Items of a list are sorted."""
    text = " ".join(text.casefold().replace("’", "'").split()).strip(" .\"'")
    text = re.sub(r"\b([ap])\.?\s?m\b\.?", r"\1m", text)
    while (bare := _LEAD.sub("", text)) != text:
        text = bare
    text = _ANSWER_SYNONYMS.get(text, text)
    return sorted(part.strip() for part in re.split(r",\s*(?:and\s+)?|\s+and\s+", text) if part.strip())


def _regions_match(gold: Value, answer: Value, _: float) -> bool | None:
    if isinstance(gold, Inequality) and isinstance(answer, Inequality):
        direct = _inequalities_match(gold, answer)
        if direct is not None:
            return direct
    x, y = _region(gold), _region(answer)
    if x is None or y is None:
        return None if x is None else False
    if x[0] and y[0] and x[0] != y[0]:
        return False
    return _sets_equal(x[1], y[1])


def _inequalities_match(gold: Inequality, answer: Inequality) -> bool | None:
    """Compares inequalities of several variables by the difference of their sides. None: compare them as regions."""
    if len(gold.operators) != 1 or len(answer.operators) != 1:
        return _chains_match(gold, answer)
    sides = parse_expression(gold.members[0]), parse_expression(gold.members[1])
    if (
        any(s is None for s in sides)
        or len(set().union(*(s.free_symbols for s in sides if s is not None))) < 2
    ):
        return None
    ratio = constant_ratio((gold.members[0], gold.members[1]), (answer.members[0], answer.members[1]))
    flipped = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}[answer.operators[0]]
    return bool(ratio) and gold.operators[0] == (answer.operators[0] if ratio == 1 else flipped)


def _chains_match(gold: Inequality, answer: Inequality) -> bool | None:
    """Compares chains of several variables, such as ``a < b < c`` and ``c > b > a``. None: compare them as regions."""
    chains = [_ascending(chain) for chain in (gold, answer)]
    if None in chains:
        return None
    (x, operators), (y, other_operators) = chains  # type: ignore[misc]
    if len(set().union(*(member.free_symbols for member in x))) < 2:
        return None
    return operators == other_operators and bool(_all(values_equal(a, b) for a, b in zip(x, y, strict=True)))


def _ascending(chain: Inequality) -> tuple[list[Any], list[str]] | None:
    """Returns the members and operators of a chain from its smallest member; None if its operators point both ways."""
    members = [parse_expression(member) for member in chain.members]
    if any(member is None or isinstance(member, MatrixBase) for member in members):
        return None
    if set(chain.operators) <= {"<", "<="}:
        return members, list(chain.operators)
    if set(chain.operators) <= {">", ">="}:
        return members[::-1], [operator.replace(">", "<") for operator in chain.operators[::-1]]
    return None


def _region(value: Value) -> tuple[str, Set] | None:
    """Returns the name of the variable ("" without a name) and its set of numbers; None if the value is not a set."""
    try:
        return _region_of(value)
    except (TypeError, ValueError, NotImplementedError, AttributeError):
        # sympy cannot build or solve the set
        return None


def _region_of(value: Value) -> tuple[str, Set] | None:
    if isinstance(value, Inequality):
        return _solved(value)
    if isinstance(value, Membership):
        inner = _region_of(value.region)
        return (value.name, inner[1]) if inner and inner[0] in ("", value.name) else None
    if isinstance(value, Region):
        return _combined(value)
    if isinstance(value, Assignment) and len(value.names) == 1:
        point = _sympy_value(value.members[-1])
        return (value.names[0], FiniteSet(point)) if point is not None and not point.free_symbols else None
    if not isinstance(value, Collection):
        return None
    if value.brackets in ("()", "(]", "[)", "[]"):
        return _interval(value)
    conditions = (Inequality, Region, Membership, Assignment)
    if any(isinstance(item, Inequality) for item in value.items) and all(
        isinstance(item, conditions) for item in value.items
    ):
        return _joined_conditions(value)
    items = [_sympy_value(item) for item in value.items]
    return ("", FiniteSet(*items)) if all(item is not None for item in items) else None


def _interval(value: Collection) -> tuple[str, Set] | None:
    if len(value.items) != 2:
        return None
    low, high = (_sympy_value(item) for item in value.items)
    if (low == -sympy.oo and value.brackets[0] == "[") or (high == sympy.oo and value.brackets[1] == "]"):
        return None
    if low is None or high is None or low.free_symbols or high.free_symbols or not low < high:
        return None
    return "", Interval(low, high, value.brackets[0] == "(", value.brackets[1] == ")")


def _joined_conditions(value: Collection) -> tuple[str, Set] | None:
    regions = [_region_of(item) for item in value.items]
    if any(region is None for region in regions):
        return None
    names = {region[0] for region in regions if region and region[0]}
    if len(names) > 1:
        return None
    sets = [region[1] for region in regions if region]
    both = sympy.Intersection(*sets)
    if value.joined_by == "and":
        return "".join(names), both
    # With commas only, conditions that exclude each other are alternatives
    if value.joined_by == "," and both is not EmptySet:
        return "".join(names), both
    return "".join(names), Union(*sets)


def _combined(value: Region) -> tuple[str, Set] | None:
    if not value.operators:
        part = value.parts[0]
        if not isinstance(part, Words):
            return _region_of(part)
        letter = re.search(r"[RZNQC]", part.text.replace("mathbb", ""))
        is_plain = re.fullmatch(r"\\mathbb\{?[RZNQC]\}?", part.text)
        return ("", _NUMBER_SETS[letter[0]]) if letter and is_plain else None
    regions = [_region_of(part) for part in value.parts]
    if any(region is None for region in regions):
        return None
    sets = [region[1] for region in regions if region]
    result = sets[0]
    for operator, part in zip(value.operators, sets[1:], strict=True):
        result = {r"\cup": Union, r"\cap": sympy.Intersection, r"\setminus": sympy.Complement}[operator](
            result, part
        )
    is_finite = isinstance(result, sympy.Range) and result.size.is_finite and result.size <= MAX_ITEMS
    return "", FiniteSet(*result) if is_finite else result


_NUMBER_SETS = {
    "R": sympy.S.Reals, "Z": sympy.S.Integers, "N": sympy.S.Naturals, "Q": sympy.S.Rationals, "C": sympy.S.Complexes
}  # fmt: skip


def _solved(chain: Inequality) -> tuple[str, Set] | None:
    """Returns the solutions of a chain of inequalities in one variable."""
    members = [parse_expression(member) for member in chain.members]
    symbols = set().union(*(m.free_symbols for m in members if m is not None))
    if any(m is None for m in members) or len(symbols) != 1:
        return None
    symbol = symbols.pop()
    result: Set = sympy.S.Reals
    for left, operator, right in zip(members, chain.operators, members[1:], strict=False):
        result = sympy.Intersection(result, _half_line(left, operator, right, symbol))
    return str(symbol), result


def _half_line(left: Any, operator: str, right: Any, symbol: Any) -> Set:
    if right == symbol and not left.free_symbols:
        left, right = right, left
        operator = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!="}[operator]
    if left == symbol and not right.free_symbols:
        if operator == "!=":
            return sympy.Complement(sympy.S.Reals, FiniteSet(right))
        if operator in ("<", "<="):
            return Interval(-sympy.oo, right, True, operator == "<" or right == sympy.oo)
        return Interval(right, sympy.oo, operator == ">" or right == -sympy.oo, True)
    relation = {"<": sympy.Lt, ">": sympy.Gt, "<=": sympy.Le, ">=": sympy.Ge, "!=": sympy.Ne}[operator](
        left, right
    )
    if relation in (True, False):
        return sympy.S.Reals if relation else EmptySet
    return relation.as_set()


def _sets_equal(x: Set, y: Set) -> bool | None:
    if x == y:
        return True
    x_pieces, y_pieces = _pieces(x), _pieces(y)
    if x_pieces is None or y_pieces is None or len(x_pieces) != len(y_pieces):
        return False
    for a, b in zip(x_pieces, y_pieces, strict=True):
        if a[2:] != b[2:] or not all(values_equal(p, q) for p, q in zip(a[:2], b[:2], strict=True)):
            return False
    return True


def _pieces(region: Set) -> list[tuple[Any, Any, bool, bool]] | None:
    """Returns the intervals of a set from left to right, as (low, high, is open at low, is open at high)."""
    parts = region.args if isinstance(region, Union) else (region,)
    pieces: list[tuple[Any, Any, bool, bool]] = []
    for part in parts:
        if isinstance(part, FiniteSet):
            pieces.extend((point, point, False, False) for point in part.args)
        elif isinstance(part, Interval):
            pieces.append((part.start, part.end, bool(part.left_open), bool(part.right_open)))
        else:
            return None
    return sorted(
        pieces, key=lambda piece: float(piece[0]) if piece[0].is_real or piece[0].is_infinite else 0.0
    )


def _bindings(value: Value) -> list[tuple[str, Value]] | None:
    """Returns the names and values of ``x = 3, y = 4`` or ``x = y = 3``; None if not every item has one name."""
    if isinstance(value, Assignment):
        assigned = _assigned(value)
        return [(name, assigned) for name in value.names] if value.names and assigned is not None else None
    if not isinstance(value, Collection) or not value.items:
        return None
    bindings = [_bindings(item) if isinstance(item, Assignment) else None for item in value.items]
    if any(b is None or len(b) != 1 for b in bindings):
        return None
    return [b[0] for b in bindings if b]


def _assigned(value: Assignment) -> Value | None:
    """Returns the last member of a chain. None if two members are different numbers, as in ``x = 4 = 5``."""
    last = value.members[-1]
    for member in value.members[:-1]:
        if _is_constant(member) and _is_constant(last) and not values_match(last, member):
            return None
    return last


def _is_constant(value: Value) -> bool:
    """Returns whether a value is a number, also with a unit or percent sign."""
    if isinstance(value, Percent | Quantity):
        return _is_constant(value.value)
    expression = _sympy_value(value)
    return expression is not None and not isinstance(expression, MatrixBase) and not expression.free_symbols


def _assignments_match(gold: Value, answer: Value, rel_tolerance: float) -> bool | None:
    pairs = ((gold, answer), (answer, gold))
    if any(
        isinstance(x, Collection | Matrix) and isinstance(y, Assignment) and len(y.names) > 1
        for x, y in pairs
    ):
        return _collections_match(gold, answer, rel_tolerance)
    if isinstance(gold, Collection) != isinstance(answer, Collection):
        single, other = (gold, answer) if isinstance(gold, Assignment) else (answer, gold)
        if (
            isinstance(single, Assignment)
            and isinstance(other, Collection)
            and _bindings(other)
            and single is gold
        ):
            return _collections_match(gold, answer, rel_tolerance)
    if isinstance(gold, Assignment) and isinstance(answer, Assignment) and gold.names and answer.names:
        return _named_match(gold, answer, rel_tolerance)
    if isinstance(gold, Equation) or isinstance(answer, Equation):
        return _equations_match(gold, answer, rel_tolerance)
    gold_value = _assigned(gold) if isinstance(gold, Assignment) else gold
    answer_value = _assigned(answer) if isinstance(answer, Assignment) else answer
    if gold_value is None or answer_value is None:
        return False
    matches = values_match(gold_value, answer_value, rel_tolerance)
    if matches or not isinstance(answer, Assignment) or answer.approximate is None:
        return matches
    return is_rounded_to(answer.approximate, answer_value) and values_match(gold_value, answer.approximate)


def _named_match(gold: Assignment, answer: Assignment, rel_tolerance: float) -> bool | None:
    x, y = _assigned(gold), _assigned(answer)
    if x is None or y is None:
        return False
    if set(gold.names) & set(answer.names):
        matches = values_match(x, y, rel_tolerance)
        if matches is not False:
            return matches
        return bool(answer.approximate) and values_match(x, answer.approximate, rel_tolerance)  # type: ignore[arg-type]
    return _equations_match(gold, answer, rel_tolerance) or False


def _equations_match(gold: Value, answer: Value, _: float) -> bool | None:
    x, y = _sides(gold), _sides(answer)
    if x is None or y is None:
        return False
    ratio = constant_ratio(x, y)
    return None if ratio is None else bool(ratio)


def _sides(value: Value) -> tuple[str, str] | None:
    if isinstance(value, Equation):
        return value.left, value.right
    if isinstance(value, Assignment) and value.names:
        member = value.members[-1]
        text = member.text if isinstance(member, Number | Expression) else None
        return (value.names[0], text) if text is not None else None
    return None


def _without_label(value: Value) -> Value:
    """Returns the coordinates of a labelled point such as ``A(1, 2)``."""
    label = re.fullmatch(r"[A-Z]'?\s*(\(.+,.+\))", value.text) if isinstance(value, Expression) else None
    return read_value(label[1]) if label else value


def _collections_match(gold: Value, answer: Value, rel_tolerance: float) -> bool | None:
    gold, answer = _without_label(gold), _without_label(answer)
    if isinstance(gold, Matrix) or isinstance(answer, Matrix):
        return _matrices_match(gold, answer, rel_tolerance)
    if any(isinstance(v, Expression) and r"\begin" in v.text for v in (gold, answer)):
        return _matrices_match(gold, answer, rel_tolerance)
    named = _bound_match(gold, answer, rel_tolerance)
    if named is not None:
        return named
    if isinstance(gold, Number) and isinstance(answer, Collection):
        gold = both_readings(gold.text) or gold
    if isinstance(answer, Number) and isinstance(gold, Collection):
        answer = both_readings(answer.text) or answer
    if isinstance(gold, Collection) and gold.brackets == "()" and isinstance(answer, Expression):
        components = _components(answer.text)
        if components is not None and len(gold.items) in (2, 3):
            values = [*map(_sympy_value, gold.items), *[sympy.Integer(0)] * (3 - len(gold.items))]
            return _all(
                values_equal(v, c) if v is not None else None for v, c in zip(values, components, strict=True)
            )
    x, y = _as_collection(gold), _as_collection(answer)
    if x.brackets == "{}" or y.brackets == "{}":
        return (
            x.brackets in _UNORDERED
            and y.brackets in _UNORDERED
            and _same_sets(x.items, y.items, rel_tolerance)
        )
    if len(x.items) != len(y.items):
        return False
    if x.brackets == y.brackets == "":
        return _same_items(x.items, y.items, rel_tolerance)
    if "" not in (x.brackets, y.brackets) and x.brackets != y.brackets:
        return False
    # If one side has no brackets, the order must match
    if "or" in (x.joined_by, y.joined_by) or "pm" in (x.joined_by, y.joined_by):
        return False
    return _all(values_match(g, a, rel_tolerance) for g, a in zip(x.items, y.items, strict=True))


def _as_collection(value: Value) -> Collection:
    """Returns a collection. A single value is a list of one item: 5 equals {5}, but not (5, 5)."""
    return value if isinstance(value, Collection) else Collection("", (value,))


def _all(results: Any) -> bool | None:
    """Returns False if one result is False, else None if one is None, else True."""
    found = list(results)
    return False if False in found else None if None in found else True


def _bound_match(gold: Value, answer: Value, rel_tolerance: float) -> bool | None:
    """Compares collections of which at least one binds names. Returns None if neither does."""
    x, y = _bindings(gold), _bindings(answer)
    if x and y:
        if _are_alternatives(x) or _are_alternatives(y):
            same_base = {_base(name) for name, _ in x} == {_base(name) for name, _ in y}
            return same_base and _same_items([v for _, v in x], [v for _, v in y], rel_tolerance)
        names = dict(y)
        if {name for name, _ in x} != set(names) or len(x) != len(y):
            return False
        return bool(_all(values_match(value, names[name], rel_tolerance) for name, value in x))
    if y:
        values = [value for _, value in sorted(y, key=lambda b: b[0])]
        if _are_alternatives(y):
            return values_match(gold, Collection("", tuple(values)), rel_tolerance) or False
        return (
            isinstance(gold, Collection)
            and gold.brackets != "{}"
            and _in_order(gold.items, values, rel_tolerance)
        )
    if x and isinstance(answer, Collection):
        values = [value for _, value in x]
        if _are_alternatives(x):
            return values_match(Collection("", tuple(values)), answer, rel_tolerance) or False
        return (
            answer.brackets != "{}"
            and answer.joined_by != "or"
            and _in_order(values, answer.items, rel_tolerance)
        )
    return None


def _are_alternatives(bindings: list[tuple[str, Value]]) -> bool:
    """Returns whether names are values of one unknown, as in ``x = 2, x = 3`` and ``x_1 = 2, x_2 = 3``."""
    return len({_base(name) for name, _ in bindings}) == 1


def _base(name: str) -> str:
    match = _INDEXED_NAME.fullmatch(name)
    return match[1] if match else name


def _in_order(gold: Sequence[Value], answer: Sequence[Value], rel_tolerance: float) -> bool:
    return len(gold) == len(answer) and bool(
        _all(values_match(g, a, rel_tolerance) for g, a in zip(gold, answer, strict=True))
    )


def _same_sets(gold: Sequence[Value], answer: Sequence[Value], rel_tolerance: float) -> bool | None:
    """Compares sets. Repeated items count once."""
    return _same_items(_distinct(gold), _distinct(answer), rel_tolerance)


def _distinct(items: Sequence[Value]) -> list[Value]:
    kept: list[Value] = []
    for item in items:
        if not any(item == other or values_match(other, item) for other in kept):
            kept.append(item)
    return kept


def _same_items(gold: Sequence[Value], answer: Sequence[Value], rel_tolerance: float) -> bool | None:
    """Returns whether the items are equal in some order."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    is_unknown = False
    for item in gold:
        # Equal items first, so that a list in the same order needs no comparison of different items
        left.sort(key=lambda other, wanted=item: other != wanted)  # type: ignore[misc]
        results = []
        for i, other in enumerate(left):
            # The sets {1} and {2} in a set are not the numbers 1 and 2
            is_comparable = _is_set(other) == _is_set(item)
            results.append(other == item or (is_comparable and values_match(item, other, rel_tolerance)))
            if results[-1]:
                del left[i]
                break
        else:
            if None not in results:
                return False
            is_unknown = True
    return None if is_unknown else True


def _is_set(value: Value) -> bool:
    return isinstance(value, Collection) and value.brackets == "{}"


def _matrices_match(gold: Value, answer: Value, rel_tolerance: float) -> bool | None:
    gold, answer = _evaluated_matrix(gold), _evaluated_matrix(answer)
    for x, y in ((gold, answer), (answer, gold)):
        if isinstance(x, Matrix) and isinstance(y, Collection):
            cells = [cell for row in x.rows for cell in row]
            is_vector = 1 in (len(x.rows), len(x.rows[0]))
            if (
                not is_vector
                or y.brackets not in ("()", "", "[]" if y is answer else "")
                or y.joined_by == "or"
                or len(cells) != len(y.items)
            ):
                return False
            return _all(
                values_equal(p, q) if p is not None and q is not None else None
                for p, q in (
                    (parse_expression(c), _sympy_value(i)) for c, i in zip(cells, y.items, strict=True)
                )
            )
        if isinstance(x, Matrix) and isinstance(y, Expression):
            special = _identity_or_vector(y.text, len(x.rows), len(x.rows[0]))
            if special is not None:
                matrix = _sympy_value(x)
                return None if matrix is None else values_equal(matrix, special)
    left, right = _sympy_value(gold), _sympy_value(answer)
    return None if left is None or right is None else values_equal(left, right)


def _evaluated_matrix(value: Value) -> Value:
    r"""Returns a product such as ``\frac15 \begin{pmatrix} 1 \\ 2 \end{pmatrix}`` as a matrix, any other value as it is."""
    matrix = (
        parse_expression(value.text) if isinstance(value, Expression) and r"\begin" in value.text else None
    )
    if not isinstance(matrix, MatrixBase):
        return value
    return Matrix(tuple(tuple(sympy.latex(cell) for cell in matrix.row(i)) for i in range(matrix.rows)))


def _identity_or_vector(text: str, num_rows: int, num_columns: int) -> Any | None:
    r"""Returns ``2I`` as a matrix of the wanted size, and ``3\mathbf{i} - \mathbf{j}`` as a vector; else None."""
    if match := _IDENTITY.fullmatch(text):
        factor = parse_expression({"": "1", "-": "-1"}.get(match[1], match[1]))
        is_square = num_rows == num_columns
        return (
            sympy.ImmutableMatrix(sympy.eye(num_rows) * factor) if factor is not None and is_square else None
        )
    components = _components(text)
    if components is None or min(num_rows, num_columns) > 1:
        return None
    padded = components[: num_rows * num_columns]
    return (
        sympy.ImmutableMatrix(num_rows, num_columns, padded) if not any(components[len(padded) :]) else None
    )


def _components(text: str) -> list[Any] | None:
    r"""Returns the three components of a sum of unit vectors, or None for another expression."""
    if not _UNIT_VECTOR.search(text):
        return None
    names = {"i": "u_1", "j": "u_2", "k": "u_3"}
    vector = parse_expression(_UNIT_VECTOR.sub(lambda m: f" {names[m[1]]} ", text))
    if vector is None or isinstance(vector, MatrixBase):
        return None
    units = [next((s for s in vector.free_symbols if s.name == name), None) for name in names.values()]
    vector = vector.expand()
    return [vector.coeff(unit) if unit is not None else sympy.Integer(0) for unit in units]


def _cases_match(gold: Value, answer: Value, rel_tolerance: float) -> bool | None:
    if not (isinstance(gold, Cases) and isinstance(answer, Cases)) or len(gold.rows) != len(answer.rows):
        return False
    left = list(answer.rows)
    for value, condition in sorted(gold.rows, key=lambda row: row[1] is None):
        for row in sorted(left, key=lambda row: row[1] is None):
            same_condition = (
                condition is None or row[1] is None or row[1] == condition or values_match(condition, row[1])
            )
            if same_condition and (row[0] == value or values_match(value, row[0], rel_tolerance)):
                left.remove(row)
                break
        else:
            return False
    return True


def _based_match(gold: Value, answer: Value, _: float) -> bool | None:
    """Compares numbers in a given base. An answer without a base is read in the gold answer's base, but not the reverse."""
    x, y = (_digits_and_base(value) for value in (gold, answer))
    return x is not None and y is not None and x[0] == y[0] and y[1] in ("", x[1])


def _digits_and_base(value: Value) -> tuple[str, str] | None:
    if isinstance(value, Based):
        return value.digits, value.base
    if isinstance(value, Number | Expression | Words):
        text = value.text.replace(" ", "").replace(",", "").lstrip("0").upper()
        return (text, "") if re.fullmatch(r"[0-9A-Z.]+", text) else None
    return None


def _ratios_match(gold: Value, answer: Value, rel_tolerance: float) -> bool | None:
    if isinstance(gold, Ratio) and isinstance(answer, Ratio):
        if len(gold.terms) != len(answer.terms):
            return False
        if _CLOCK_TIME.fullmatch(":".join(gold.terms)):
            return [int(t) if t.isdigit() else t for t in gold.terms] == [
                int(t) if t.isdigit() else t for t in answer.terms
            ]
        pairs = list(zip(map(parse_expression, gold.terms), map(parse_expression, answer.terms), strict=True))
        if any(a is None or b is None for a, b in pairs):
            return None
        (first, other), *rest = pairs
        return _all(values_equal(a * other, b * first) for a, b in rest)  # type: ignore[operator]
    if isinstance(gold, Ratio) and _CLOCK_TIME.fullmatch(":".join(gold.terms)):
        return False
    x, y = _sympy_value(gold), _sympy_value(answer)
    return values_equal(x, y) if x is not None and y is not None else False


def _congruences_match(gold: Value, answer: Value, _: float) -> bool | None:
    if isinstance(gold, Congruence) and isinstance(answer, Congruence):
        if gold.name and answer.name and gold.name != answer.name:
            return False
        residues = [{residue % gold.modulus for residue in value.residues} for value in (gold, answer)]
        return gold.modulus == answer.modulus and residues[0] == residues[1]
    congruence, other = (gold, answer) if isinstance(gold, Congruence) else (answer, gold)
    if isinstance(other, Assignment):
        if isinstance(congruence, Congruence) and congruence.name and congruence.name not in other.names:
            return False
        other = _assigned(other) or other
    if not isinstance(congruence, Congruence) or len(congruence.residues) > 1:
        return False
    number, residue = _sympy_value(other), congruence.residues[0]
    if number is not None and number.free_symbols:
        # A gold answer 4n+1 is a formula, which a congruence does not give
        return congruence is gold and _is_residue_class(number, residue, congruence.modulus)
    # 3 = 10 (mod 7) has two numbers. Only a remainder is the result of such a statement
    if congruence is answer and congruence.is_statement and not 0 <= residue < congruence.modulus:
        return False
    # An answer 12 (mod 7) does not name 5
    accepted = (residue,) if congruence is answer else (residue, residue % congruence.modulus)
    return number is not None and any(
        values_equal(number, Rational(r.numerator, r.denominator)) is True for r in accepted
    )


def _is_residue_class(numbers: Any, residue: Fraction, modulus: Fraction) -> bool:
    """Returns whether an expression such as ``5k + 2`` gives the numbers that are congruent to ``residue``."""
    symbols = numbers.free_symbols
    if len(symbols) != 1 or not {s.name for s in symbols} <= {"k", "n", "m", "t", "j", "l", "a", "q"}:
        return False
    (symbol,) = symbols
    step, start = numbers.coeff(symbol, 1), numbers.coeff(symbol, 0)
    is_linear = sympy.expand(numbers - step * symbol - start) == 0
    return bool(
        is_linear
        and step in (modulus, -modulus)
        and start.is_Integer
        and (int(start) - residue) % modulus == 0
    )


def _measured(value: Value) -> tuple[Number | Expression | None, Unit | None]:
    if isinstance(value, Quantity):
        return value.value, value.unit
    return (value, None) if isinstance(value, Number | Expression) else (None, None)


def _scalars_match(gold: Scalar, answer: Scalar, rel_tolerance: float) -> bool | None:
    if isinstance(gold, Percent) or isinstance(answer, Percent):
        return _percents_match(gold, answer, rel_tolerance)
    (x, x_unit), (y, y_unit) = _measured(gold), _measured(answer)
    assert x is not None and y is not None, f"not a scalar: {gold} or {answer}"
    if x_unit and y_unit and not is_degree(x_unit) and not is_degree(y_unit):
        if not have_same_dimensions(x_unit, y_unit):
            return False
        return _plain_match(x, y, rel_tolerance, y_unit.scale / x_unit.scale)
    if not (is_degree(x_unit) or is_degree(y_unit)):
        return _plain_match(x, y, rel_tolerance)
    return _angles_match((x, x_unit), (y, y_unit), rel_tolerance)


def _angles_match(
    gold: tuple[Number | Expression, Unit | None],
    answer: tuple[Number | Expression, Unit | None],
    rel_tolerance: float,
) -> bool | None:
    """Compares angles of which at least one has a degree sign. An angle with pi, or in radians, is converted."""
    (x, x_unit), (y, y_unit) = gold, answer
    if x_unit and y_unit and is_degree(x_unit) and is_degree(y_unit):
        return _plain_match(x, y, rel_tolerance, y_unit.scale / x_unit.scale)
    if any(unit and not is_degree(unit) and not is_radian(unit) for unit in (x_unit, y_unit)):
        # 20 degrees for 20 degrees Celsius
        names = {name for unit in (x_unit, y_unit) if unit for name, _ in unit.dimensions}
        return names <= {"degree", "celsius", "fahrenheit"} and _plain_match(x, y, rel_tolerance)
    for degrees, other, other_unit in ((x, y, y_unit), (y, x, x_unit)):
        if is_radian(other_unit) or (not other_unit and r"\pi" in other.text):
            a, b = _sympy_value(degrees), _sympy_value(other)
            return None if a is None or b is None else values_equal(a * sympy.pi * Rational(1, 180), b)
    return _plain_match(x, y, rel_tolerance)


def _percents_match(gold: Scalar, answer: Scalar, rel_tolerance: float) -> bool | None:
    """Compares where a percent sign is on one side or both.

    With a sign on one side only, 25% equals 1/4. If the number before the sign is above 1,
    25% also equals 25, because the answer may have left out the sign. But 0.5% does not equal 0.5.
    """
    x, y = (value.value if isinstance(value, Percent) else value for value in (gold, answer))
    if isinstance(x, Quantity) or isinstance(y, Quantity):
        return False
    if isinstance(gold, Percent) and isinstance(answer, Percent):
        return _plain_match(x, y, rel_tolerance)  # type: ignore[arg-type]
    factor = Fraction(1, 100) if isinstance(answer, Percent) else Fraction(100)
    scaled = _plain_match(x, y, rel_tolerance, factor)  # type: ignore[arg-type]
    if scaled:
        return True
    with_sign = _sympy_value(x if isinstance(gold, Percent) else y)
    is_large = with_sign is not None and with_sign.is_number and bool(abs(with_sign) > 1)
    return _plain_match(x, y, rel_tolerance) if is_large else scaled  # type: ignore[arg-type]


def _plain_match(
    gold: Number | Expression,
    answer: Number | Expression,
    rel_tolerance: float,
    factor: Fraction = Fraction(1),
) -> bool | None:
    """Compares the gold answer with ``factor`` times the answer."""
    if isinstance(gold, Number) and isinstance(answer, Number):
        return abs(gold.value - answer.value * factor) <= Fraction(rel_tolerance) * abs(gold.value)
    x, y = _sympy_value(gold), _sympy_value(answer)
    if x is None or y is None:
        return None
    if factor != 1:
        y = y * Rational(factor.numerator, factor.denominator)
    equal = values_equal(x, y)
    if not equal and isinstance(answer, Expression) and _uses_j(x, y):
        return values_equal(x, y.xreplace({s: sympy.I for s in y.free_symbols if s.name == "j"}))
    return equal


def _uses_j(gold: Any, answer: Any) -> bool:
    """Returns whether the answer writes j for the imaginary unit of the gold answer."""
    return (
        gold.has(sympy.I)
        and not answer.has(sympy.I)
        and {s.name for s in answer.free_symbols - gold.free_symbols} == {"j"}
    )


def _sympy_value(value: Value) -> Any | None:
    if isinstance(value, Number):
        return Rational(value.value.numerator, value.value.denominator)
    if isinstance(value, Expression):
        return parse_expression(value.text)
    if isinstance(value, Ratio) and len(value.terms) == 2:
        over, under = map(parse_expression, value.terms)
        return over / under if over is not None and under is not None and under != 0 else None
    if isinstance(value, Matrix):
        cells = [[parse_expression(cell) for cell in row] for row in value.rows]
        is_readable = all(
            cell is not None and not isinstance(cell, MatrixBase) for row in cells for cell in row
        )
        return sympy.ImmutableMatrix(cells) if is_readable else None
    return None


_COMPARISONS: tuple[tuple[Any, Callable[[Value, Value, float], bool | None]], ...] = (
    (Words, _words_match),
    (Based, _based_match),
    (_REGION_KINDS, _regions_match),
    (Congruence, _congruences_match),
    (Assignment, _assignments_match),
    (Equation, _equations_match),
    (Cases, _cases_match),
    (Matrix, _matrices_match),
    (Collection, _collections_match),
    (Ratio, _ratios_match),
)
