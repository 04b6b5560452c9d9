"""The repository's Markdown files as pages of the site, and the source files that they link to.

A page keeps its path in the repository as its name, so that the relative links of a document work in both places. A link
``file.py#name`` leads to a generated page that shows the file, at the function or class of that name.
"""

import ast
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

DOCUMENTS = (
    "*.md",
    "docs/*.md",
    "examples/*/*.md",
    "megatron_rasft/*/README.md",
    "megatron_rasft/verify/*/README.md",
)
HOME = "README.md"
ASSETS = (".svg", ".png", ".css")
"""Suffixes of the files in docs/ that are copied as they are."""
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_PICTURE = re.compile(r'\b(src|srcset)="([^":]+)"')
_LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".sbatch": "bash",
    ".toml": "toml",
    ".jsonl": "json",
    ".json": "json",
}


class BrokenLink(Exception):
    """A link of a document leads to no file, or to no function of a file."""


def documents(root: Path) -> Iterator[str]:
    """The paths of all documents, relative to the repository."""
    for pattern in DOCUMENTS:
        yield from sorted(path.relative_to(root).as_posix() for path in root.glob(pattern))


def address(uri: str) -> str:
    """The page's file in the site: docs/method.md -> method/index.html, README.md -> index.html."""
    if uri == HOME:
        return "index.html"
    place = uri.removeprefix("docs/").removesuffix(".md").removesuffix("/README")
    return f"{place.lower() if '/' not in place else place}/index.html"


def linked_sources(root: Path, uri: str, text: str) -> set[str]:
    """The files of the repository, other than documents and pictures, to which a document links."""
    places = {_place(uri, path) for path, _ in _LINK.findall(text)}
    return {place for place in places if (root / place).is_file() and not place.endswith((".md", *ASSETS))}


def with_nested_lists(text: str) -> str:
    """Indents the items of nested lists by four spaces, which Python's Markdown needs, in place of two or three."""
    return re.sub(r"^ {2,3}(?=- )", "    ", text, flags=re.MULTILINE)


def with_site_links(root: Path, uri: str, text: str) -> str:
    """Changes links to folders and source files into links to their pages.

    Raises:
        BrokenLink: a link leads to nothing. mkdocs itself checks the links between documents.
    """

    def replaced(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        target = root / _place(uri, path)
        if target.is_dir():
            return f"{path.rstrip('/')}/README.md{anchor}"
        if target.suffix in (".md", *ASSETS):  # perhaps a generated page: mkdocs checks it
            return match[0]
        if not target.is_file():
            raise BrokenLink(f"{uri}: no file {path}")
        if anchor and anchor[1:] not in _definitions(target):
            raise BrokenLink(f"{uri}: {path} defines no {anchor[1:]}")
        return f"{path}.md{anchor}"

    return _LINK.sub(replaced, text)


def with_site_pictures(root: Path, uri: str, text: str, relative: Callable[[str], str]) -> str:
    """Changes the addresses of pictures in HTML, which mkdocs leaves as they are.

    Args:
        relative: path in the repository -> address, relative to the page.

    Raises:
        BrokenLink: there is no such picture.
    """

    def replaced(match: re.Match[str]) -> str:
        place = _place(uri, match[2])
        if not (root / place).is_file():
            raise BrokenLink(f"{uri}: no file {match[2]}")
        return f'{match[1]}="{relative(place)}"'

    return _PICTURE.sub(replaced, text)


def _place(uri: str, path: str) -> str:
    """A relative link of a document as a path in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(uri), path))


def _definitions(path: Path) -> dict[str, int]:
    """Name of each function and class of a Python file -> its first line, from 1."""
    if path.suffix != ".py":
        return {}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)]
    return {node.name: min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in nodes}


def source_page(root: Path, uri: str) -> str:
    """A page that shows a source file, with a heading before each function and class."""
    lines = (root / uri).read_text(encoding="utf-8").splitlines()
    starts = {"": 1, **_definitions(root / uri)}
    ends = [start - 1 for start in list(starts.values())[1:]] + [len(lines)]
    language = _LANGUAGES.get(Path(uri).suffix, "text")
    parts = [f"# {uri}"]
    for (name, start), end in zip(starts.items(), ends, strict=True):
        if name:
            parts.append(f"## `{name}` {{#{name}}}")
        code = "\n".join(lines[start - 1 : end]).strip("\n")
        if code:
            parts.append(f'````{language} linenums="{start}"\n{code}\n````')
    return "\n\n".join(parts) + "\n"
