"""The page in a real browser: Debian's chromium, driven by playwright.

If one of them is missing, the tests are skipped, unless REQUIRE_BROWSER is set. .ci/run sets it after installing chromium.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rasft.tools.report.page import page
from tests.unit.tools.report.synthetic import write_run
from tests.unit.tools.report.test_page import hostile_view, view_of

CHROMIUM = shutil.which("chromium")
if not os.environ.get("REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import Browser, Locator, Page, sync_playwright  # noqa: E402 - playwright may be missing

DRAWN_S = 120
"""Time limit for drawing all charts. It takes 1 to 7 seconds beside other tests."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium's sandbox does not work for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs, one of them with lines long enough to be averaged."""
    folder = tmp_path_factory.mktemp("report")
    runs = [
        write_run(folder / "long", num_steps=400, interval=20, num_problems=40),
        write_run(folder / "short", seed=1, lag=3),
    ]
    path = folder / "report.html"
    path.write_text(page([view_of(run) for run in runs]), encoding="utf-8")
    return path


class Visit:
    """A page opened in the browser, its messages on the console, and its network requests."""

    def __init__(self, browser: Browser, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached", timeout=1000 * DRAWN_S)

    def figure(self, title: str) -> Locator:
        return self.page.locator(f'figure[aria-label="{title}"]').first

    def style(self, locator: Locator, name: str) -> str:
        value: str = locator.evaluate(f"element => getComputedStyle(element).getPropertyValue('{name}')")
        return value


def test_all_charts_are_drawn_without_network_or_complaint(browser: Browser, two_runs: Path) -> None:
    visit = Visit(browser, two_runs)
    assert visit.requests == [two_runs.as_uri()] and visit.complaints == []
    figures = visit.page.locator("figure")
    assert figures.count() > 25
    for figure in figures.all():
        marks = figure.locator("svg .mark-line path, svg .mark-rect path, svg .mark-symbol path")
        assert marks.count() > 0, figure.get_attribute("aria-label")
    lines = visit.figure("Loss of the objective").locator("svg .mark-line path")
    assert lines.count() == 2 and all("NaN" not in (line.get_attribute("d") or "") for line in lines.all())


def test_pointer_reads_values_of_all_runs_at_a_step(browser: Browser, two_runs: Path) -> None:
    visit = Visit(browser, two_runs)
    plot = visit.figure("Correct rollouts").locator(".plot")
    plot.scroll_into_view_if_needed()
    left = visit.figure("Correct rollouts").locator("svg .mark-line path").first.bounding_box()
    box = plot.bounding_box()
    assert left is not None and box is not None
    plot.hover(position={"x": left["x"] - box["x"] + 1, "y": 60})
    tooltip = visit.page.locator("#vg-tooltip-element.visible")
    tooltip.wait_for()
    names = tooltip.locator("th").all_inner_texts()
    assert names == ["step", "long", "short"]
    assert tooltip.locator("td").first.inner_text() == "0"


def test_colours_follow_the_scheme_of_the_system_and_the_button(browser: Browser, two_runs: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        visit = Visit(browser, two_runs, scheme=scheme)
        line = visit.figure("Loss of the objective").locator("svg .mark-line path").first
        body = visit.page.locator("body")
        seen[scheme] = visit.style(body, "background-color"), visit.style(line, "stroke")
    assert seen["light"][0] != seen["dark"][0] and seen["light"][1] != seen["dark"][1]
    visit.page.click("#theme")
    assert (visit.style(body, "background-color"), visit.style(line, "stroke")) == seen["light"]


def test_examples_are_filtered_by_course_and_text(browser: Browser, two_runs: Path) -> None:
    visit = Visit(browser, two_runs)
    part = visit.page.locator(".examples").first
    examples, status = part.locator("details.example"), part.locator("[role=status]")
    total = examples.count()
    assert status.inner_text() == f"{total} of {total}"
    button = part.locator("button").nth(1)
    course = button.inner_text()
    button.click()
    of_course = part.locator(f'details.example[data-course="{course}"]').count()
    assert 0 < of_course < total and status.inner_text() == f"{of_course} of {total}"
    assert part.locator("details.example:visible").count() == of_course
    part.locator("button").first.click()
    name = examples.first.locator("summary code").inner_text()
    part.locator("input").fill(f"answer of {name} is")
    assert part.locator("details.example:visible").count() == 1


def test_narrow_page_does_not_scroll_sideways(browser: Browser, two_runs: Path) -> None:
    visit = Visit(browser, two_runs, width=400)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 400
    widths = [figure.bounding_box() for figure in visit.page.locator("figure svg").all()]
    assert all(box is not None and 300 < box["width"] <= 360 for box in widths)


def test_texts_of_a_model_run_nothing(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page([hostile_view(tmp_path)]), encoding="utf-8")
    visit = Visit(browser, path)
    assert visit.requests == [path.as_uri()] and visit.complaints == []
    assert visit.page.locator("img").count() == 0
