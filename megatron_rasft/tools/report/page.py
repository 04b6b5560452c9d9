"""The HTML page of one or several runs: one file that loads no other files."""

import base64
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2

from megatron_rasft import __version__
from megatron_rasft.tools.report import charts, formats, mathematics
from megatron_rasft.tools.report.configuration import configuration
from megatron_rasft.tools.report.curves import curves
from megatron_rasft.tools.report.examples import examples
from megatron_rasft.tools.report.overview import overview
from megatron_rasft.tools.report.problems import problems
from megatron_rasft.tools.report.search import search
from megatron_rasft.tools.report.texts import printable, shortened
from megatron_rasft.tools.report.verdicts import verdicts
from megatron_rasft.tools.report.views import RunView

_TEMPLATES = files(__package__).joinpath("templates")


class Section(NamedTuple):
    """One section of the page. Its template is the title in lower case, e.g. templates/overview.html."""

    title: str
    of_page: Callable[[Sequence[RunView]], dict[str, Any]] | None = None
    """Function that returns the template's variables for all runs. A section has either this or ``of_run``."""
    of_run: Callable[[RunView], dict[str, Any]] | None = None
    """Function that returns the template's variables for one run. The template is then rendered once per run."""

    def parts(self, views: Sequence[RunView]) -> list[dict[str, Any]]:
        """Returns the template's variables, for each time that it is rendered."""
        if self.of_run is not None:
            return [self.of_run(view) for view in views]
        assert self.of_page is not None, "a section needs a function of all runs or of one run"
        return [self.of_page(views)]


SECTIONS = (
    Section("Overview", of_page=overview),
    Section("Curves", of_page=curves),
    Section("Problems", of_run=problems),
    Section("Rollouts", of_run=verdicts),
    Section("Search", of_run=search),
    Section("Examples", of_run=examples),
    Section("Configuration", of_page=configuration),
)
"""The sections in the order of the page."""


def page(views: Sequence[RunView]) -> str:
    """Returns the complete HTML document."""
    return "".join(page_parts(views))


def page_parts(views: Sequence[RunView], reload_s: int | None = None) -> Iterator[str]:
    """Yields the HTML document in parts, because a page with all rollouts of a run can be larger than the memory.

    Args:
        views: the runs.
        reload_s: seconds after which the browser loads the page again, for a run that goes on; None for never.
    """
    scripts = [charts.script(), _source("page.js"), _source("search.js"), _source("tokens.js")]
    # Second barrier behind the escaping of texts that a model wrote: the browser may load no files and run only these scripts.
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; base-uri 'none'; form-action 'none'"
    return (
        _environment()
        .get_template("page.html")
        .generate(
            names=[view.name for view in views],
            policy=policy,
            style=_source("page.css"),
            scripts=scripts,
            sections=[(section.title, section.parts(views)) for section in SECTIONS],
            version=__version__,
            reload_s=reload_s,
            written=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": lambda value: f"{value:,}",
        "duration": formats.duration,
        "has_formulas": mathematics.has_formulas,
        "number": formats.number,
        "percent": formats.percent,
        "pieces": mathematics.pieces,
        "shortened": shortened,
        "variable": charts.variable,
    }
    environment.globals |= {"run_colour": charts.run_colour}
    return environment


def _source(name: str) -> str:
    return _TEMPLATES.joinpath(name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
