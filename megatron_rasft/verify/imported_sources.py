"""The source files that a Python file imports from its own folder or package. They are read and not run."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def imported_sources(file: Path, module: str = "") -> dict[str, bytes]:
    """Returns the content of every source file that ``file`` imports, also through other such files.

    Imports inside functions count. A module whose name the code computes, as for ``importlib.import_module(name)``, is not found.

    Args:
        file: a Python file.
        module: its dotted name in an installed package, where only files of that package are searched. "" searches the folder of
            ``file`` for modules and packages.

    Returns:
        Path below the folder of ``file`` or of the package -> content, sorted by path.
    """
    root, package = _root(file, module), module.partition(".")[0]
    found: dict[Path, bytes] = {}
    waiting = [(module, file), *_files(root, module)]
    while waiting:
        name, path = waiting.pop()
        if path in found:
            continue
        found[path] = path.read_bytes()
        for imported in _imported_names(found[path], name, is_package=path.stem == "__init__"):
            first = imported.partition(".")[0]
            if first == package if package else first not in sys.stdlib_module_names:
                waiting += _files(root, imported)
    del found[file]
    return {str(path.relative_to(root)): found[path] for path in sorted(found)}


def _root(file: Path, module: str) -> Path:
    """Returns the folder in which the names of the imported modules begin."""
    if not module:
        return file.parent
    return file.parents[module.count(".") + (file.stem == "__init__")]


def _imported_names(content: bytes, module: str, is_package: bool) -> Iterator[str]:
    """Yields the dotted name of everything that is imported; ``from a import b`` gives ``a.b``, which may be no module."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):  # the worker reports it
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            around = parts[: len(parts) - node.level + is_package] if node.level else []
            base = [*around, *filter(None, [node.module])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _files(root: Path, name: str) -> Iterator[tuple[str, Path]]:
    """Yields (dotted name, file) of a module and of the packages around it, as far as they are source files below ``root``."""
    parts = name.split(".") if name else []
    for end in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:end])
        for file in (place / "__init__.py", place.with_name(f"{place.name}.py")):
            if file.is_file():
                yield ".".join(parts[:end]), file
