r"""Reads units: physical units with prefixes, angles, money, and counted things such as ``apples``.

A unit has dimensions and a scale, so that 1.5 kg equals 1500 g and 60 km/h differs from 60 m/s. Imperial and metric units have
different dimensions: answers are not converted between the two systems. Months and days differ in the same way.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_rasft.verify.mathematics.notation import TEXT_WRAPPER

Dimensions = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """A unit of measurement, or a counted thing."""

    dimensions: Dimensions
    """Base dimension and power, sorted by name. A counted thing is a dimension of its own."""
    scale: Fraction
    """Size in base units. For degrees of arc, 1: radians have the dimension ``radian``."""


_PREFIXES = {
    "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "c": -2, "m": -3, "μ": -6, "u": -6, "n": -9, "p": -12, "h": 2, "d": -1, "f": -15,
}  # fmt: skip
_PREFIX_WORDS = {
    "": 0, "kilo": 3, "mega": 6, "giga": 9, "tera": 12, "centi": -2, "milli": -3, "micro": -6, "nano": -9, "pico": -12,
    "deci": -1, "hecto": 2,
}  # fmt: skip
_KG_M2_S2 = "kg m2 s-2"
# Symbol, words, dimensions in base units, scale. These take prefixes
_SI = (
    ("m", "meter metre", "m", "1"), ("g", "gram", "kg", "1/1000"), ("s", "second sec", "s", "1"), ("A", "ampere amp", "A", "1"),
    ("K", "kelvin", "K", "1"), ("mol", "mole", "mol", "1"), ("J", "joule", _KG_M2_S2, "1"), ("N", "newton", "kg m s-2", "1"),
    ("W", "watt", "kg m2 s-3", "1"), ("V", "volt", "kg m2 s-3 A-1", "1"), ("Pa", "pascal", "kg m-1 s-2", "1"),
    ("Hz", "hertz", "s-1", "1"), ("C", "coulomb", "A s", "1"), ("F", "farad", "kg-1 m-2 s4 A2", "1"),
    ("Ω", "ohm", "kg m2 s-3 A-2", "1"), ("T", "tesla", "kg s-2 A-1", "1"), ("H", "henry", "kg m2 s-2 A-2", "1"),
    ("eV", "electronvolt", "eV", "1"), ("L", "liter litre", "m3", "1/1000"), ("l", "", "m3", "1/1000"),
    ("cal", "calorie", "cal", "1"), ("bit", "", "bit", "1"), ("B", "byte", "bit", "8"), ("pc", "parsec", "pc", "1"),
    ("Bq", "becquerel", "Bq", "1"), ("Wh", "", _KG_M2_S2, "3600"), ("Wb", "weber", "kg m2 s-2 A-1", "1"), ("erg", "", _KG_M2_S2, "1/10000000"),
    ("dyn", "dyne", "kg m s-2", "1/100000"), ("G", "gauss", "gauss", "1"), ("bar", "", "kg m-1 s-2", "100000"),
)  # fmt: skip
# Spellings, dimensions, scale. These take no prefix
_OTHER = (
    ("min mins minute minutes", "s", "60"), ("h hr hrs hour hours", "s", "3600"), ("day days", "s", "86400"),
    ("week weeks wk wks", "s", "604800"), ("month months mo", "month", "1"), ("year years yr yrs", "month", "12"),
    ("decade decades", "month", "120"), ("century centuries", "month", "1200"), ("secs", "s", "1"),
    ("in inch inches", "inch", "1"), ("ft foot feet", "inch", "12"), ("yd yard yards yds", "inch", "36"),
    ("mi mile miles", "inch", "63360"), ("oz ounce ounces", "oz", "1"), ("lb lbs pound pounds", "oz", "16"),
    ("ton tons", "ton", "1"), ("tonne tonnes", "kg", "1000"), ("gal gallon gallons", "pint", "8"),
    ("qt quart quarts", "pint", "2"), ("pint pints", "pint", "1"), ("cup cups", "pint", "1/2"),
    ("acre acres", "acre", "1"), ("hectare hectares ha", "m2", "10000"), ("cc", "m3", "1/1000000"),
    ("mph", "inch s-1", "63360/3600"), ("kph kmph kmh", "m s-1", "1000/3600"), ("fps", "inch s-1", "12"),
    ("knot knots", "knot", "1"), ("rpm", "revolution s-1", "1/60"), ("revolution revolutions rev revs", "revolution", "1"),
    ("dollar dollars usd \\usd buck bucks", "dollar", "1"), ("cent cents ¢ penny pennies", "dollar", "1/100"),
    ("euro euros eur €", "euro", "1"), ("£ gbp", "sterling", "1"), ("yen jpy 日元 円", "yen", "1"),
    ("yuan cny rmb renminbi 元 人民币 元人民币", "yuan", "1"), ("¥", "yenOrYuan", "1"), ("欧元", "euro", "1"), ("英镑", "sterling", "1"),
    ("rupee rupees rs inr ₹", "rupee", "1"), ("dime dimes", "dollar", "1/10"), ("nickel nickels", "dollar", "1/20"),
    ("degree degrees deg degs \\deg", "degree", "1"), ("arcmin arcminute arcminutes", "degree", "1/60"),
    ("arcsec arcsecond arcseconds", "degree", "1/3600"), ("rad radian radians rads", "radian", "1"),
    ("atm atmosphere atmospheres", "atm", "1"), ("au", "au", "1"), ("light-year light-years ly", "ly", "1"),
    ("å angstrom angstroms", "m", "1/10000000000"), ("celsius \\celsius", "celsius", "1"),
    ("fahrenheit \\fahrenheit", "fahrenheit", "1"), ("unit units", "", "1"), ("amps", "A", "1"), ("horsepower hp", "hp", "1"),
    ("db decibel decibels", "dB", "1"), ("米 公尺", "m", "1"), ("厘米", "m", "1/100"), ("毫米", "m", "1/1000"), ("千米 公里", "m", "1000"),
    ("克", "kg", "1/1000"), ("千克 公斤", "kg", "1"), ("吨", "kg", "1000"), ("秒", "s", "1"), ("分钟", "s", "60"), ("小时", "s", "3600"),
    ("天", "s", "86400"), ("年 岁", "month", "12"), ("度", "degree", "1"), ("升", "m3", "1/1000"), ("平方米", "m2", "1"),
    ("平方厘米", "m2", "1/10000"), ("立方米", "m3", "1"), ("立方厘米", "m3", "1/1000000"), ("美元", "dollar", "1"),
)  # fmt: skip
_PLURALS = ("", "s", "es")

# Words after a number that are not units: they change the value, or leave it open
_NOT_COUNTED = frozenset(
    "pi sqrt or and mod plus minus over to log ln sin cos tan infinity hundred thousand million billion trillion dozen "
    "dozens score half halves third thirds quarter quarters fifths tenths percent percents base if for when where by not at is "
    "are was were negative positive less more fewer than too many few much squared cubed factorial divided multiplied "
    "maybe perhaps possibly either else but except without approximately about nearly almost roughly wait no yes none "
    "hundreds thousands millions billions trillions tens ones digits s x y z n k pairs couples plus-minus i e "
    "options choices points percentages fold doubles triples twos threes fours fives sixes factors powers roots inverses logs "
    "halved doubled tripled opposites negatives positives zeros zeroes mods modulus moduli bits squares cubes factorials does".split()
)
_ORDINAL_FRACTION = re.compile(r"(?:.*[a-z])?(?:th|ths|sth|fifths?|thirds?)")
_IRREGULAR_PLURALS = frozenset(
    "people children men women mice fish sheep feet teeth geese deer data dice oxen cattle series trees 个 人 元 种 只 本 次 天 "
    "小时 分钟 米 厘米 千米 公里 千克 克 度 岁 条 张 件 台 块".split()
)
_SINGULARS = frozenset(
    "way apple person student ticket coin marble book car point vote page egg hour trip box bag card game ball team "
    "pencil cookie candy piece item number solution integer digit child man woman house room step square triangle row column "
    "arrangement permutation combination outcome possibility pair value worker boy girl bird tree flower game dog cat".split()
)
# Words that count things although they end like a word that is refused
_COUNTED = frozenset("digits points pairs options choices squares cubes factors roots zeros bits".split())
_UNIT_NAME = r"((?:\\(?:text|mathrm|rm)\s*\{[^{}]*\}|[A-Za-z]{1,4})(?:\s*\^\s*\{?\d\}?)?)"
_UNIT_FRACTION = re.compile(rf"\\frac\s*\{{\s*{_UNIT_NAME}\s*\}}\s*\{{\s*{_UNIT_NAME}\s*\}}")
_PREFIXED_OHM = re.compile(r"\\(?:text|mathrm|rm)\s*\{\s*([kMGmμun])\s*\}\s*\\(?:Omega|ohm)")
_TRAILING_WORDS = re.compile(
    r"\s+(?:old|long|tall|wide|high|deep|apart|away|each|total|in total|in all|left|remaining|altogether)$"
)
_TOKENS = re.compile(
    r"(?P<degree_word>\^\{\\circ\}\s*[CF](?![A-Za-z]))|(?P<degree>\^\{\\circ\})|(?P<per>/|\bper\b)"
    r"|(?P<power>\^\s*\{?\s*(?P<exponent>-?\d)\s*\}?)|(?P<times>\\cdot|\*|·|⋅|\\times)"
    r"|(?P<word>\\(?:usd|euro|deg|celsius|fahrenheit)|[A-Za-zμΩå€£¥₹¢][A-Za-zμΩ\-']*|[\u4e00-\u9fff]+)|(?P<space>\s+)"
)


def _power(dimensions: str) -> dict[str, int]:
    powers: dict[str, int] = {}
    for part in dimensions.split():
        name, power = re.fullmatch(r"([A-Za-z]+?)(-?\d*)", part).groups()  # type: ignore[union-attr]
        powers[name] = int(power or 1)
    return powers


def _build_table() -> dict[str, tuple[dict[str, int], Fraction]]:
    table: dict[str, tuple[dict[str, int], Fraction]] = {}
    for symbol, words, dimensions, scale in _SI:
        entry = _power(dimensions), Fraction(scale)
        for prefix, exponent in _PREFIXES.items():
            table.setdefault(prefix + symbol, (entry[0], entry[1] * Fraction(10) ** exponent))
        for prefix, exponent in _PREFIX_WORDS.items():
            for word in words.split():
                for plural in _PLURALS:
                    table[prefix + word + plural] = (entry[0], entry[1] * Fraction(10) ** exponent)
    for spellings, dimensions, scale in _OTHER:
        for spelling in spellings.split():
            table[spelling] = (_power(dimensions), Fraction(scale))
    return table


_TABLE = _build_table()
_SQUARE_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def parse_unit(text: str) -> Unit | None:
    """Returns the unit that the text names, or None if it does not name a unit or a counted thing.

    Text without a unit of the table counts things if it ends with a plural noun and has no word that changes a number.
    """
    text = _UNIT_FRACTION.sub(r"\1/\2", text)
    text = _PREFIXED_OHM.sub(r"\1Ω", text)
    text = TEXT_WRAPPER.sub(
        r" \1 ", re.sub(r"\\mu\s*", "μ", text).replace(r"\Omega", "Ω").replace(r"\ohm", "Ω")
    )
    text = (
        re.sub(r"[()\[\]{}.,]+(?=\s|$|/)|(?<=\s)[(\[{]|^[(\[{]", " ", text)
        .replace("{", "")
        .replace("}", "")
        .strip()
    )
    text = re.sub(r"\^\s*\\circ", r"^{\\circ}", text)
    text = _TRAILING_WORDS.sub("", text)
    return _measured(text) or _counted(text)


def unit_is_known(text: str) -> bool:
    """Returns whether the text is a unit of the table, and not a counted thing."""
    text = TEXT_WRAPPER.sub(r" \1 ", text).replace("°", r"^{\circ}").strip(" .")
    return _measured(re.sub(r"\^\s*\{?\s*\\circ\s*\}?", r"^{\\circ}", text)) is not None


def _measured(text: str) -> Unit | None:
    powers: dict[str, int] = {}
    scale = Fraction(1)
    sign, ahead, last = 1, 1, None
    position = 0
    while position < len(text):
        token = _TOKENS.match(text, position)
        if token is None:
            return None
        position = token.end()
        if token["space"] or token["times"]:
            continue
        if token["per"]:
            sign = -1
        elif token["power"] or token["word"] in ("squared", "cubed"):
            exponent = int(token["exponent"]) if token["power"] else {"squared": 2, "cubed": 3}[token["word"]]
            if last is None:
                return None
            scale *= last[1] ** (last[2] * (exponent - 1))
            _add(powers, last[0], last[2] * (exponent - 1))
            last = None
        elif token["word"] and token["word"].lower() in _SQUARE_WORDS:
            ahead = _SQUARE_WORDS[token["word"].lower()]
        else:
            entry = _entry(token)
            if entry is None:
                return None
            scale *= entry[1] ** (sign * ahead)
            _add(powers, entry[0], sign * ahead)
            last, ahead = (*entry, sign * ahead), 1
    if not text:
        return None
    return Unit(tuple(sorted((name, power) for name, power in powers.items() if power)), scale)


def _entry(token: re.Match[str]) -> tuple[dict[str, int], Fraction] | None:
    if token["degree"]:
        return _TABLE["degree"]
    if token["degree_word"]:
        return _TABLE["celsius" if token["degree_word"].endswith("C") else "fahrenheit"]
    word = token["word"]
    return _TABLE.get(word) or (_TABLE.get(word.lower()) if len(word) > 1 else None)


def _add(powers: dict[str, int], dimensions: dict[str, int], factor: int) -> None:
    for name, power in dimensions.items():
        powers[name] = powers.get(name, 0) + power * factor


def _counted(text: str) -> Unit | None:
    if not re.fullmatch(r"[A-Za-z\s'\-]+|[\u4e00-\u9fff]+", text):
        return None
    words = text.lower().split()
    per = words.index("per") if "per" in words else words.index("of") if "of" in words else len(words)
    head = words[:per]
    if not head or len(words) > 5:
        return None
    refused = [
        w
        for w in words
        if (w in _NOT_COUNTED or w.split("-")[0] in _NOT_COUNTED or _ORDINAL_FRACTION.fullmatch(w))
        and w not in _COUNTED
    ]
    noun = head[-1]
    is_noun = (noun.endswith("s") and not noun.endswith(("ss", "ous", "us"))) or noun in _IRREGULAR_PLURALS
    if refused or not (is_noun or noun in _SINGULARS):
        return None
    return Unit(((" ".join([_singular(noun), *words[per:]]), 1),), Fraction(1))


def _singular(noun: str) -> str:
    if noun.endswith("ies"):
        return noun[:-3] + "y"
    if noun.endswith(("xes", "ches", "shes", "sses")):
        return noun[:-2]
    return {"people": "person", "children": "child", "men": "man", "women": "woman"}.get(
        noun, noun.removesuffix("s")
    )


def have_same_dimensions(first: Unit, second: Unit) -> bool:
    """Returns whether two units measure the same thing. The sign ¥ is yen and yuan, which differ from each other."""
    return any(_with_yen_sign_as(name, first) == _with_yen_sign_as(name, second) for name in ("yen", "yuan"))


def _with_yen_sign_as(currency: str, unit: Unit) -> Dimensions:
    return tuple(
        sorted((currency if name == "yenOrYuan" else name, power) for name, power in unit.dimensions)
    )


def is_degree(unit: Unit | None) -> bool:
    """Returns whether the unit measures an angle in degrees, minutes or seconds of arc."""
    return unit is not None and unit.dimensions == (("degree", 1),)


def is_radian(unit: Unit | None) -> bool:
    """Returns whether the unit is the radian."""
    return unit is not None and unit.dimensions == (("radian", 1),)
