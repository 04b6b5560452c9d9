"""The HTML page of one or several runs: one file that asks for no other and runs no script but its own."""

import base64
import hashlib
from collections.abc import Callable, Sequence
from importlib.resources import files

from megatron_rasft import __version__
from megatron_rasft.tools.report.charts import swatch
from megatron_rasft.tools.report.configuration import configuration
from megatron_rasft.tools.report.curves import curves
from megatron_rasft.tools.report.examples import examples
from megatron_rasft.tools.report.markup import Content, Html, embedded, tag
from megatron_rasft.tools.report.outcomes import outcomes
from megatron_rasft.tools.report.overview import overview
from megatron_rasft.tools.report.solvability import solvability
from megatron_rasft.tools.report.views import RunView, colour


def page(views: Sequence[RunView]) -> Html:
    """The whole document."""
    script = files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing may be loaded, and no script runs but this one: a second lock behind the escaping of what a model wrote.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"Report: {', '.join(view.name for view in views)}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        embedded("style", files(__package__).joinpath("page.css").read_text(encoding="utf-8")),
    )
    sections = [
        _section("overview", "Overview", overview(views)),
        _section("curves", "Curves", curves(views)),
        _section("solvability", "Solvability", _by_run(views, solvability)),
        _section("rollouts", "Rollouts", _by_run(views, outcomes)),
        _section("examples", "Examples", _by_run(views, examples)),
        _section("configuration", "Configuration", configuration(views)),
    ]
    names = ("Overview", "Curves", "Solvability", "Rollouts", "Examples", "Configuration")
    links = [tag("a", name, href=f"#{name.lower()}") for name in names]
    theme = tag("button", "Light / dark", type="button", id="theme", hidden=True)
    header = tag("header", tag("nav", tag("strong", "megatron_rasft"), links, theme))
    footer = tag(
        "footer", f"Written by megatron_rasft {__version__}. This file needs no other and no network."
    )
    main = tag("main", tag("h1", ", ".join(view.name for view in views)), sections, footer)
    body = tag("body", header, main, embedded("script", script))
    return Html(f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n")


def _section(name: str, title: str, *content: Content) -> Html:
    return tag("section", tag("h2", title), *content, id=name)


def _by_run(views: Sequence[RunView], draw: Callable[[RunView], Content]) -> Content:
    """Each run's part, under its name if there are several."""
    if len(views) == 1:
        return draw(views[0])
    return [
        tag("div", tag("h3", swatch(colour(place)), view.name, class_="run"), draw(view), class_="of-run")
        for place, view in enumerate(views)
    ]
