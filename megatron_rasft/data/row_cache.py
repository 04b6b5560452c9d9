"""Keeps tokenized rows on disk. Their key is derived from the content of all inputs."""

import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data import (
    chat_format,
    chats,
    fields,
    reading,
    records,
    teacher_prompt,
    tokenized_rows,
    tokenizing,
)
from megatron_rasft.data import tokenizer as tokenizer_module
from megatron_rasft.data.reading import read_rows
from megatron_rasft.data.records import check_files, files_of
from megatron_rasft.data.row_report import DataReport
from megatron_rasft.data.tokenized_rows import TokenizedRows, write_rows
from megatron_rasft.data.tokenizer import Tokenizer
from megatron_rasft.data.tokenizing import tokenize_rows
from megatron_rasft.errors import DataError
from megatron_rasft.files import written_to

_BUILDING = ".building-"
_ABANDONED_S = 3600.0
"""An unfinished folder without writes for this time was left by a killed process and may be deleted."""

_CODE = (
    records,
    fields,
    chats,
    reading,
    tokenizer_module,
    chat_format,
    teacher_prompt,
    tokenizing,
    tokenized_rows,
)
"""The modules that make rows from files."""

_NOT_IN_ROWS = (
    "train_data",
    "data_chat_template",
    "data_overlong",
    "data_bad_rows",
    "data_seed",
    "data_epochs",
    "data_cache",
)
"""Fields of DataConfig that are not in the key: they change no row, or the key covers the content of their files."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp", ".h5", ".msgpack")
"""Suffixes of weight files. All other files of a model folder may belong to its tokenizer."""


def tokenized(
    config: DataConfig,
    tokenizer: Tokenizer,
    model: Path,
    max_tokens: int,
    require_answer: bool,
    flag: str,
    cache: Path | None,
    keep_fields: bool = False,
    teacher_template: str | None = None,
) -> TokenizedRows:
    """Returns the rows of ``config.train_data`` as demonstrations, from the cache if it has them.

    Faulty and over-long rows raise no error here. They are in the ``report`` of the result.

    Args:
        tokenizer: the tokenizer of the folder ``model``.
        max_tokens: maximum number of tokens of prompt plus response.
        require_answer: as for ``read_rows``.
        flag: the flag that named the files, for messages.
        cache: folder for tokenized rows. None writes them to unnamed files in the temporary folder, which the system
            deletes when this process ends.
        keep_fields: as for ``read_rows``.
        teacher_template: as for ``tokenize_rows``.

    Raises:
        DataError: a file is missing, empty or unreadable, or changes while it is read.
        RasftError: the cache cannot be written.
    """

    def build(folder: Path) -> None:
        report = DataReport()
        rows = read_rows(config, require_answer, flag, keep_fields)
        demonstrations = tokenize_rows(rows, tokenizer, config, max_tokens, report, teacher_template)
        write_rows(folder, demonstrations, report)

    if cache is None:
        place = Path(tempfile.gettempdir())
        with (
            written_to(place, "TMPDIR"),
            tempfile.TemporaryDirectory(prefix="rasft-rows-", dir=place) as folder,
        ):
            build(Path(folder))
            return TokenizedRows(Path(folder))
    check_files(config.train_data, flag)
    seen = _stamps(config.train_data)
    found = cache / _key(config, model, max_tokens, require_answer, keep_fields, teacher_template)
    if (rows := _opened(found)) is not None:
        return rows
    with written_to(cache, "--data-cache"):
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        made = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=cache))
        try:
            build(made)
            if _stamps(config.train_data) != seen:
                raise DataError(
                    f"a file of {flag} changed while it was read. Start again when all files are complete."
                )
            made.chmod(0o755)
            return _moved(made, found)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def _opened(folder: Path) -> TokenizedRows | None:
    try:
        return TokenizedRows(folder)
    # the stored rows are missing, truncated, or in another format
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _moved(made: Path, found: Path) -> TokenizedRows:
    """Renames the folder of new rows to its final name. If another run was faster, returns the other run's rows.

    The other run has mapped its own files. On a network file system, deleting them here would take them away from a process
    on another node.
    """
    rows = TokenizedRows(made)
    try:
        made.rename(found)  # raises OSError if ``found`` contains files
    except OSError:
        if (theirs := _opened(found)) is not None:
            return theirs
        shutil.rmtree(found, ignore_errors=True)  # it is damaged
        made.rename(found)
    return rows


def _remove_abandoned(cache: Path) -> None:
    for folder in cache.glob(_BUILDING + "*"):
        times = [path.stat().st_mtime for path in (folder, *folder.glob("*")) if path.exists()]
        if times and time.time() - max(times) > _ABANDONED_S:
            shutil.rmtree(folder, ignore_errors=True)


def _stamps(files: list[str]) -> list[tuple[int, int]]:
    stats = (file.stat() for name in files for file in files_of(Path(name)))
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]


def _key(
    config: DataConfig,
    model: Path,
    max_tokens: int,
    require_answer: bool,
    keep_fields: bool,
    teacher_template: str | None,
) -> str:
    """Returns the key of rows: a hash over the content of all files, flags and code from which they are made."""
    template = config.data_chat_template
    ingredients: dict[str, Any] = {
        "flags": {name: value for name, value in asdict(config).items() if name not in _NOT_IN_ROWS},
        "template": None if template is None else _digest(Path(template)),
        "max_tokens": max_tokens,
        "require_answer": require_answer,
        "keep_fields": keep_fields,
        "teacher_template": teacher_template,
        # Paths are included because they occur in default ids and in messages.
        "data": [(path, [_digest(file) for file in files_of(Path(path))]) for path in config.train_data],
        "tokenizer": [
            (str(path.relative_to(model)), _digest(path))
            for path in sorted([*model.glob("*"), *model.glob("additional_chat_templates/*")])
            if path.is_file() and path.suffix not in _WEIGHTS
        ],
        "code": [_digest(Path(module.__file__ or "")) for module in _CODE],
        "versions": [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
    }
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
