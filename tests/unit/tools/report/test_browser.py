"""The page in a real browser: Debian's chromium, driven by playwright.

If one of them is missing, the tests are skipped, unless REQUIRE_BROWSER is set. .ci/run sets it after installing chromium.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rasft.files import replacing
from megatron_rasft.tools.report.archive import Archive
from megatron_rasft.tools.report.page import page, page_parts
from megatron_rasft.tools.report.records import read_run
from megatron_rasft.tools.report.tokens import Token
from megatron_rasft.tools.report.views import read_view
from tests.unit.tools.report.synthetic import write_run
from tests.unit.tools.report.test_page import hostile_view, view_of

CHROMIUM = shutil.which("chromium")
if not os.environ.get("REQUIRE_BROWSER"):
    pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright  # noqa: E402 - playwright may be missing

DRAWN_S = 120
"""Time limit for drawing all charts. It takes 1 to 7 seconds beside other tests."""
expect.set_options(timeout=1000 * DRAWN_S)  # playwright's 5 seconds are short beside other tests


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
    views = [read_view(read_run(run), None, 3, archive=Archive(folder, 100_000)) for run in runs]
    path.write_text(page(views), encoding="utf-8")
    return path


class Visit:
    """A page opened in the browser, its messages on the console, and its network requests."""

    def __init__(self, browser: Browser, path: Path, *, width: int = 1280, scheme: str = "light") -> None:
        self.page: Page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        self.page.set_default_timeout(1000 * DRAWN_S)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        for mark in ("drawn", "searchable"):
            self.page.wait_for_selector(f"html[data-{mark}]", state="attached")

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


def test_search_finds_texts_sorts_them_and_opens_a_problem(browser: Browser, two_runs: Path) -> None:
    visit = Visit(browser, two_runs)
    part = visit.page.locator(".search").first
    status, rows = part.locator("[role=status]"), part.locator("tbody tr:not(.snippet, .opened)")
    total = status.inner_text().split()[0]
    assert rows.count() == 50 and status.inner_text() == f"{total} of {total} rollouts"
    part.locator("input").fill("answer of p3 is \\boxed{2}")
    expect(status).to_have_text(f"10 of {total} rollouts")
    assert part.locator("mark").all_inner_texts() == ["answer of p3 is \\boxed{2}"] * 10
    part.locator(".sort", has_text="tokens").click()
    tokens = [int(row.locator("td").nth(6).inner_text()) for row in rows.all()]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) > 1
    part.locator("select[name=verdict]").select_option("correct")
    expect(status).not_to_contain_text(total)
    expect(status).to_contain_text(" of ")  # while a search goes on, the line is a percentage
    assert {row.locator("td").nth(3).inner_text() for row in rows.all()} <= {"correct"}
    part.locator("select[name=verdict]").select_option("")
    expect(status).to_have_text(f"10 of {total} rollouts")
    part.locator("button.open").first.click()
    opened = part.locator(".opened")
    expect(opened.locator(".history span")).to_have_count(10)  # half of the 20 refreshes sample it
    assert opened.locator(".rollouts details").count() == 39
    opened.locator(".rollouts details summary").first.click()
    expect(opened.locator(".rollouts details pre").first).to_contain_text("answer of p3")
    assert opened.locator(".rollouts pre menclose").count() == 2, "the formula of both open rollouts is drawn"
    part.locator("button", has_text="problems").click()
    part.locator("input").fill("")
    expect(status).to_have_text("40 of 40 problems")
    part.locator(".sort", has_text="change").click()
    changes = [row.locator("td").last.inner_text() for row in rows.all()]
    assert changes[0].startswith("+") and changes[-1].startswith("−")
    assert visit.complaints == []


def test_tokens_of_an_example_are_coloured_by_their_weight(browser: Browser, tmp_path: Path) -> None:
    view = view_of(write_run(tmp_path / "run"))
    samples = [sample for example in view.examples for sample in example.samples]
    trained = next(sample for sample in samples if sample.weight)
    untrained = next(sample for sample in samples if not sample.weight)
    view.tokens.largest = 0.5
    view.tokens.tokens = {
        id(trained): [Token("<b>", 1.0, 0.5), Token("\n", 0.2, 0.1), Token("low", 0.0, 0.0)],
        id(untrained): [Token("grey", 0.5, 0.0)],
    }
    path = tmp_path / "report.html"
    path.write_text(page([view]), encoding="utf-8")
    visit = Visit(browser, path)
    visit.page.locator("details.example").evaluate_all("all => all.forEach((one) => (one.open = true))")
    tokens = visit.page.locator("details.tokens")
    assert tokens.count() == 2
    found = []
    for one in tokens.all():
        one.locator("summary").click()
        one.locator("span").first.wait_for()
        spans = one.locator("span").all()
        found.append({s.text_content() or "": visit.style(s, "background-color") for s in spans})
    (coloured,) = (shown for shown in found if "<b>" in shown)
    assert list(coloured) == ["<b>", "\n", "low"] and len(set(coloured.values())) == 3
    assert found.index(coloured) != found.index(next(shown for shown in found if "grey" in shown))
    titles = tokens.locator("span").evaluate_all("all => all.map((one) => one.title)")
    assert "p 0.200, weight × p 0.100" in titles and "p 0.500" in titles
    assert visit.complaints == []


def test_page_of_a_run_that_goes_on_is_loaded_again(browser: Browser, tmp_path: Path) -> None:
    path, view = tmp_path / "report.html", view_of(write_run(tmp_path / "run"))
    path.write_text("".join(page_parts([view], reload_s=1)), encoding="utf-8")
    visit = Visit(browser, path)
    view.records.name = "newer"
    with replacing(path) as newer:  # as tools/report.py writes it: the browser never finds half a page
        newer.write_text("".join(page_parts([view])), encoding="utf-8")
    expect(visit.page.locator("h1")).to_have_text("newer")
    assert visit.page.locator("#live").count() == 0


def test_narrow_page_does_not_scroll_sideways(browser: Browser, two_runs: Path) -> None:
    visit = Visit(browser, two_runs, width=400)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 400
    widths = [figure.bounding_box() for figure in visit.page.locator("figure svg").all()]
    assert all(box is not None and 300 < box["width"] <= 360 for box in widths)


def test_texts_of_a_model_run_nothing(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page([hostile_view(tmp_path)]), encoding="utf-8")
    visit = Visit(browser, path)
    visit.page.locator(".search button.open").first.click()
    expect(visit.page.locator(".search .rollouts pre").first).to_contain_text("<img")
    assert visit.requests == [path.as_uri()] and visit.complaints == []
    assert visit.page.locator("img").count() == 0
