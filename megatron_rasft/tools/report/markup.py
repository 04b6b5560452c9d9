"""HTML that is escaped by construction: what is not made by ``tag`` is text, whatever it holds."""

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = {"meta", "input", "br"}
_NOT_IN_A_PAGE = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127, *range(55296, 57344)), "�")
"""Control characters and lone surrogates, which HTML or UTF-8 has no way to write."""


class Html(str):
    """Markup as it stands in the page. Made here only."""

    __slots__ = ()


Content = str | int | None | Iterable["Content"]
"""What an element may hold: text is escaped, None is nothing, a list is its items."""


def escape(text: str) -> Html:
    """Text as a page shows it; also safe in an attribute."""
    return Html(html.escape(text.translate(_NOT_IN_A_PAGE)))


def join(*content: Content) -> Html:
    """One piece of markup after the other."""
    parts: list[str] = []
    for item in content:
        if isinstance(item, Html):
            parts.append(item)
        elif isinstance(item, str | int):
            parts.append(escape(str(item)))
        elif item is not None:
            parts.append(join(*item))
    return Html("".join(parts))


def tag(name: str, /, *content: Content, **attributes: str | float | bool | None) -> Html:
    """An element. ``class_`` is class, other underscores are hyphens; an attribute that is True has no value."""
    opened = _opened(name, attributes)
    return opened if name in _VOID else Html(f"{opened}{join(*content)}</{name}>")


def embedded(name: str, source: str, **attributes: str) -> Html:
    """A script or style of this package's own, or data for one, as it stands.

    Raises:
        ValueError: it would end its element early.
    """
    if f"</{name}" in source.lower() or "<!--" in source:
        raise ValueError(f"what is embedded as <{name}> holds the end of one")
    return Html(f"{_opened(name, attributes)}{source}</{name}>")


def data(value: Any, **attributes: str) -> Html:
    """A value for the page's script to read; no character of it can end the element."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return embedded("script", text, type="application/json", **attributes)


def _opened(name: str, attributes: Mapping[str, str | float | bool | None]) -> Html:
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        parts.append(label if value is True else f'{label}="{escape(shown)}"')
    return Html(f"<{' '.join(parts)}>")
