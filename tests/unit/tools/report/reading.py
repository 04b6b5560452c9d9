"""Parses a page: its elements, their texts, and the data of its charts."""

import json
from html.parser import HTMLParser
from typing import Any

_WITHOUT_END = ("meta", "input", "br")


class Page(HTMLParser):
    """A parsed page. Asserts that every element is closed in its parent."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._pieces: dict[str, list[list[str]]] = {}
        self._open: list[tuple[str, list[str]]] = []
        self.feed(markup)
        self.close()
        self.texts = {tag: ["".join(parts) for parts in found] for tag, found in self._pieces.items()}
        """Element name -> text of each such element."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _WITHOUT_END:
            pieces: list[str] = []
            self._open.append((tag, pieces))
            self._pieces.setdefault(tag, []).append(pieces)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for _, pieces in self._open:
            pieces.append(data)

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def text(self) -> str:
        """Text of the complete page, with single spaces."""
        return " ".join("".join(self.texts["main"]).split())

    @property
    def rows(self) -> list[str]:
        """Text of each row of the tables."""
        return [" ".join(text.split()) for text in self.texts["tr"]]

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """Title -> specification of each chart."""
        scripts = zip(self.texts.get("script", []), self.tags("script"))
        specs = [
            json.loads(text) for text, attributes in scripts if attributes.get("type") == "application/json"
        ]
        return dict(zip((figure["aria-label"] or "" for figure in self.tags("figure")), specs, strict=True))

    @property
    def lines(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Title of each line chart -> label -> points."""
        return {title: lines_of(spec) for title, spec in self.charts.items() if "layer" in spec}


def lines_of(spec: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Label -> (step, value) of a line chart, as its tooltip shows them."""
    rows = [dict(zip(spec["data"]["names"], row)) for row in spec["data"]["rows"]]
    _, *values = spec["layer"][-1]["encoding"]["tooltip"]
    return {
        value["title"]: [
            (row["step"], row[value["field"]]) for row in rows if row[value["field"]] is not None
        ]
        for value in values
    }
