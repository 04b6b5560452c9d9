"""Numbers and durations as the page prints them."""

import math


def number(value: float, digits: int = 4) -> str:
    """Formats a number with at most ``digits`` significant digits, e.g. 0.125, 1,234 or 1.5e-5."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if abs(value) >= 1e15 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        if "." in mantissa:
            mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def short_count(value: float) -> str:
    """Formats a count with three digits and a unit prefix, e.g. 780k or 2M."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{number(value / (1e3 if prefix == 'k' else size), 3)}{prefix}"
    return number(value, 3)


def percent(share: float) -> str:
    """Formats a share of 1, e.g. 12.5%."""
    return f"{share:.1%}"


def duration(seconds: float) -> str:
    """Formats seconds in seconds, minutes or hours, e.g. 90 s, 42.3 min or 5.2 h."""
    if seconds < 120:
        return f"{number(seconds, 3)} s"
    minutes = seconds / 60
    if minutes < 120:
        return f"{number(minutes, 3)} min"
    return f"{number(minutes / 60, 3)} h"
