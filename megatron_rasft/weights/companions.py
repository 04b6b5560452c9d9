"""The files that accompany a model's weights: tokenizer, chat template, preprocessor, generation config, licence."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.files import read_json_object

_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "tekken*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.*",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
    "*preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files of the template folder that are copied along with the weights, if they exist."""

_NOT_COPIED = {".py", ".bin", ".pt", ".pth", ".pkl", ".safetensors"}
"""Suffixes of code, which is copied only if a copied file refers to it, and of weights and pickles."""

_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the files that accompany the weights, and the code to which their "auto_map" refers.

    If the code is not in the folder, the copy has no "auto_map", because it would make the copy unusable.
    """
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        elif path.is_file() and path.suffix not in _NOT_COPIED:
            shutil.copyfile(path, target / path.name)
            if path.suffix == ".json":
                _copy_code(path, target)


def _copy_code(config: Path, target: Path) -> None:
    """Copies the files of Python code to which the "auto_map" of a copied file refers, or removes the "auto_map"."""
    try:
        content = read_json_object(config)
    except ModelFolderError:
        return
    code = find_code(config.parent, content)
    if code is None:
        del content["auto_map"]
        (target / config.name).write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    for path in code or ():
        shutil.copyfile(path, target / path.name)


def find_code(folder: Path, content: dict[str, Any]) -> list[Path] | None:
    """Returns the files of code to which the "auto_map" of a file in ``folder`` refers; None if one is missing."""
    return _with_imports(folder, set(_local_modules(content.get("auto_map"))))


def _local_modules(value: Any) -> Iterator[str]:
    """Yields the modules of an "auto_map", except those of other repositories ("owner/name--module.Class")."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _local_modules(item)
    elif isinstance(value, str) and "--" not in value:
        yield value.partition(".")[0]


def _with_imports(folder: Path, modules: set[str]) -> list[Path] | None:
    """Returns the files of modules and of the modules that these import from the same folder; None if one is missing."""
    found: dict[str, Path] = {}
    missing = sorted(modules)
    while missing:
        module = missing.pop()
        path = folder / f"{module}.py"
        if not module.isidentifier() or not path.is_file():
            return None
        found[module] = path
        imported = _RELATIVE_IMPORT.findall(path.read_text(encoding="utf-8", errors="replace"))
        missing += [name for name in imported if name not in found]
    return list(found.values())
