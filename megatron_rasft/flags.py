"""Dataclasses whose fields are command-line flags. Imports no torch.

    @dataclass(kw_only=True)
    class SyncConfig(FlagSection):
        sync_bucket_mib: PositiveInt = 512
        \"\"\"Weights sent at once, MiB.\"\"\"

The field's name gives the flag (``--sync-bucket-mib``), its annotation the accepted values, and the string below it the help text.
``config/parser.py`` adds the flags to a parser.
"""

import ast
import dataclasses
import inspect
import math
import textwrap
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints


def flag_name(field_name: str) -> str:
    """``sync_bucket_mib`` -> ``--sync-bucket-mib``."""
    return "--" + field_name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a flag accepts. A range with a bound excludes NaN."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    """Upper bound, exclusive. Infinity accepts every finite number."""
    advice: str = ""
    """Last sentence of the error about a value outside the range. Unset: a sentence that names the flag's default."""

    def __contains__(self, value: float) -> bool:
        # Every comparison with NaN is false, so NaN is refused if there is a bound.
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """``>= 1``, ``in (0, 1]``, ``> 0 and finite``."""
        low = f">= {self.at_least:g}" if self.at_least is not None else ""
        low = f"> {self.above:g}" if self.above is not None else low
        if self.below == math.inf:
            return f"{low} and finite" if low else "finite"
        high = f"<= {self.at_most:g}" if self.at_most is not None else ""
        high = f"< {self.below:g}" if self.below is not None else high
        if not (low and high):
            return low or high
        opening, closing = "[" if "=" in low else "(", "]" if "=" in high else ")"
        return f"in {opening}{low.split()[1]}, {high.split()[1]}{closing}"


@dataclass(frozen=True)
class OneOf:
    """The only values that a flag accepts."""

    values: tuple[Any, ...]
    advice: str = ""
    meanings: str = ""
    """Explanation of the values. --help shows it after the field's help text."""

    def __contains__(self, value: Any) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return " or ".join(filter(None, [", ".join(map(str, self.values[:-1])), str(self.values[-1])]))


PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]


class FlagSection:
    """Base class of a dataclass whose fields are flags. The values are checked when an instance is created."""

    def __post_init__(self) -> None:
        for name, rule in self.rules().items():
            value = getattr(self, name)
            for item in value if isinstance(value, list) else [value]:
                if item is not None and item not in rule:
                    raise ValueError(
                        f"{flag_name(name)} must be {rule}, got {item!r}. {rule.advice or self._default_advice(name)}"
                    )
        self.check()

    def check(self) -> None:
        """Checks the rules between fields. A section with such rules overrides this method.

        Raises:
            ValueError: a rule is broken; the message names the flag, the rule and the way out.
        """

    def refusal(self, name: str, reason: str) -> ValueError:
        """Returns the error for a broken rule between fields: the flag as on a command line, followed by ``reason``."""
        value = getattr(self, name)
        if isinstance(value, bool):
            return ValueError(f"{flag_name(name if value else f'no_{name}')} {reason}")
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        return ValueError(" ".join(filter(None, [flag_name(name), text, reason])))

    @classmethod
    def from_args(cls, args: Any) -> Self:
        """Reads the section from parsed arguments.

        Raises:
            ValueError: a value is refused; the message names the flag, the rule and the way out.
        """
        return cls(**{name: getattr(args, name) for name in cls.flag_fields()})

    @classmethod
    def flag_fields(cls) -> dict[str, Any]:
        """Field name -> its default; None for a field without a default."""
        return {field.name: _default(field) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]

    @classmethod
    def types(cls) -> dict[str, Any]:
        """Field name -> its type, without its range."""
        return get_type_hints(cls)

    @classmethod
    @cache
    def rules(cls) -> dict[str, Range | OneOf]:
        """Field name -> the values that it accepts. A field that accepts every value of its type is left out."""
        hints = get_type_hints(cls, include_extras=True)
        found = {name: _rule(hints[name]) for name in cls.flag_fields()}
        return {name: rule for name, rule in found.items() if rule is not None}

    @classmethod
    def docs(cls) -> dict[str, str]:
        """Field name -> the string below the field, in this class and its bases."""
        found: dict[str, str] = {}
        for kind in reversed(cls.__mro__):
            if issubclass(kind, FlagSection):
                found |= _field_docs(kind)  # type: ignore[arg-type] # a class is hashable, also one with instances that are not
        return {name: found[name] for name in cls.flag_fields() if name in found}

    def _default_advice(self, name: str) -> str:
        default = self.flag_fields()[name]
        return "Leave it out for the default" + ("." if default in (None, []) else f", {default}.")


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _rule(hint: Any) -> Range | OneOf | None:
    """The range or the choices in an annotation, also inside ``| None`` and ``list[...]``."""
    if get_origin(hint) is Literal:
        return OneOf(get_args(hint))
    if get_origin(hint) is Annotated:
        (rule,) = hint.__metadata__
        return rule
    parts = [part for part in get_args(hint) if part is not NoneType]
    return _rule(parts[0]) if parts else None


@cache
def _field_docs(kind: type) -> dict[str, str]:
    """Field name -> the string literal that follows the field in the source of the class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef), "the source of a class must parse as a class"
    docs = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
        ):
            docs[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return docs
