"""Builds the documentation site once, as `make docs` does, and reads its pages."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_rasft.config import RasftConfig
from megatron_rasft.flags import FlagSection, flag_name
from tools.site_building import documents, pictures, reference

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_a_page_of_the_navigation(site: Path) -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for uri in documents.documents(ROOT):
        assert (site / documents.address(uri)).is_file(), uri
        assert f" {uri}\n" in navigation, f"{uri} is not in the navigation of mkdocs.yml"


@pytest.mark.parametrize(
    ("page", "sections"), [("flags", RasftConfig.sections()), ("tool_flags", reference.TOOL_SECTIONS)]
)
def test_every_flag_is_on_its_page(site: Path, page: str, sections: Mapping[str, type[FlagSection]]) -> None:
    text = (site / f"reference/{page}/index.html").read_text(encoding="utf-8")
    for section in sections.values():
        for name in section.flag_fields():
            assert f"<code>{flag_name(name)}</code>" in text


def test_every_metric_has_a_meaning(site: Path) -> None:
    page = (site / "reference/metrics/index.html").read_text(encoding="utf-8")
    for name, meaning in reference.metric_meanings().items():
        assert meaning, f"metrics.py needs a string below {name}"
        assert f"<code>{name}</code>" in page


@pytest.mark.parametrize(
    ("package", "pattern", "shown"),
    [
        ("objective", r'"(\w+)"\]?[:\]]? ?=? ?(?:tokens|self)\.sum_and_count\(', "objective/{}"),
        ("objective", r'"(\w+)": _sum_and_count\(', "objective/{}"),
        ("rollout", r'"rollout/(\w+)":', "rollout/{}"),
    ],
)
def test_metrics_that_a_package_names_itself_are_known(package: str, pattern: str, shown: str) -> None:
    sources = "".join(path.read_text() for path in (ROOT / "megatron_rasft" / package).rglob("*.py"))
    names = {shown.format(name) for name in re.findall(pattern, sources)}
    assert names and names <= reference.metric_meanings().keys()


def test_phases_of_a_sync_are_known() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "megatron_rasft/sync").glob("*.py"))
    text = reference.metric_meanings()["sync/PHASE_s"]
    assert set(re.findall(r'timed\(\w+\.seconds, "(\w+)"\)', sources)) <= set(re.findall(r"\w+", text))


@pytest.mark.parametrize("link", ["nowhere.py", "../megatron_rasft/flags.py#no_such_function"])
def test_link_to_nothing_is_refused(link: str) -> None:
    with pytest.raises(documents.BrokenLink, match=re.escape(link.partition("#")[0])):
        documents.with_site_links(ROOT, "docs/page.md", f"See [this]({link}).")


def test_links_of_a_document_work_in_the_repository() -> None:
    for uri in documents.documents(ROOT):
        text = (ROOT / uri).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / uri).parent.joinpath(link).exists(), f"{uri}: {link}"


def test_pictures_show_the_weights_of_the_method() -> None:
    for name, content in pictures.files().items():
        path = pictures.FOLDER / name
        assert path.read_text(encoding="utf-8") == content, (
            f"{name}: run python -m tools.site_building.pictures"
        )


def test_nested_list_stays_nested() -> None:
    text = documents.with_nested_lists("1. one\n   - a\n     more of a\n- two\n  - b\n")
    assert text == "1. one\n    - a\n     more of a\n- two\n    - b\n"


def test_pictures_of_a_page_are_files_of_the_site(site: Path) -> None:
    for uri in ("index.html", "method/index.html"):
        page = site / uri
        found = re.findall(r'(?:src|srcset)="?([^" >]+\.svg)', page.read_text(encoding="utf-8"))
        assert found and all((page.parent / name).is_file() for name in found), found


def test_link_to_a_function_leads_to_its_source(site: Path) -> None:
    text = documents.with_site_links(ROOT, "docs/page.md", "[name](../megatron_rasft/flags.py#flag_name)")
    assert "(../megatron_rasft/flags.py.md#flag_name)" in text
    page = documents.source_page(ROOT, "megatron_rasft/flags.py")
    first = page.partition("## `flag_name` {#flag_name}")[2]
    assert first.lstrip().splitlines()[1].startswith("def flag_name(")
