"""Reads a page as a browser does: elements, texts, and the data beside the charts."""

import json
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        """Element -> the texts in it, one for each such element."""
        self._open: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for tag in set(self._open):
            self.texts[tag][-1] += data

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def text(self) -> str:
        """What a reader sees, white space aside."""
        return " ".join("".join(self.texts["main"]).split())

    @property
    def rows(self) -> list[str]:
        return [" ".join(text.split()) for text in self.texts["tr"]]

    @property
    def lines(self) -> dict[str, list[dict[str, Any]]]:
        """Title of a line chart -> its series."""
        titles = iter(self.texts["figcaption"])
        data = iter(t for t, a in zip(self.texts["script"], self.tags("script")) if a.get("type"))
        charts = {}
        for figure in self.tags("figure"):
            title = next(titles)
            if "lines" in (figure["class"] or ""):
                charts[title] = json.loads(next(data))["series"]
        return charts
