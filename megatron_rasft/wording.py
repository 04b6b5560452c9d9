"""Numbers in console lines and messages: ``1 step``, ``2 processes``, ``1.5 GiB``."""

_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def counted(number: float, noun: str, plural: str = "", form: str = "") -> str:
    """Returns a number with its noun: ``1 step``, ``0 steps``, ``2 processes``.

    Args:
        noun: the noun for one thing. It may have words before it: ``rollout server``.
        plural: the noun for several; empty: ``noun`` with an s.
        form: format of the number, such as ``,``.
    """
    return f"{number:{form}} {noun if number == 1 else plural or noun + 's'}"


def size_text(num_bytes: float) -> str:
    """Returns a size with one decimal, in the largest unit of which it is at least a tenth."""
    unit, size = next(((u, s) for u, s in _SIZES if num_bytes >= s / 10), _SIZES[-1])
    return f"{num_bytes / size:.1f} {unit}" if num_bytes else "0"
