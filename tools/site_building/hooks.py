"""The events of mkdocs: which pages the site has, and where their links lead."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

# mkdocs loads this file by its path
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.site_building import documents, models, reference

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {
    "docs/models.md": models.models_page,
    "docs/reference/flags.md": reference.flags_page,
    "docs/reference/tool_flags.md": reference.tool_flags_page,
    "docs/reference/metrics.md": reference.metrics_page,
}
"""Page -> the function that writes it."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the files of docs/ by the pages of the whole repository."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    texts = {uri: (ROOT / uri).read_text(encoding="utf-8") for uri in documents.documents(ROOT)}
    texts |= {uri: write() for uri, write in GENERATED.items()}
    sources = {path for uri, text in texts.items() for path in documents.linked_sources(ROOT, uri, text)}
    texts |= {f"{path}.md": documents.source_page(ROOT, path) for path in sorted(sources)}
    return Files([*theme, *(_page(config, uri, text) for uri, text in texts.items()), *_assets(config)])


def _page(config: MkDocsConfig, uri: str, text: str) -> File:
    file = File.generated(config, uri, content=text)
    file.dest_uri = documents.address(uri)
    return file


def _assets(config: MkDocsConfig) -> Iterator[File]:
    """The files of docs/ that are not documents: pictures and the style sheet."""
    for path in sorted((ROOT / "docs").rglob("*")):
        if path.suffix in documents.ASSETS:
            yield File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Directs links to folders and source files to their pages, and pictures to their files."""
    uri = page.file.src_uri
    try:
        text = documents.with_site_links(ROOT, uri, markdown)
        if (ROOT / uri).is_file():  # not a generated page
            text = documents.with_nested_lists(text)
            text = documents.with_site_pictures(ROOT, uri, text, partial(get_relative_url, other=page.url))
        return text
    except documents.BrokenLink as error:
        raise PluginError(str(error)) from None
