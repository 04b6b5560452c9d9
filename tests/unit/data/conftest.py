"""A small real tokenizer, real rows, and a way to write files of rows."""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_gzip(path: Path, num_rows: int | None = None) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in islice(stream, num_rows)]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"the real data is missing: {DATA} is not a folder")
    return DATA


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Texts to train a tokenizer on: real ones if the data is present, else generated ones."""
    path = DATA / "train" / "gsm8k_train.jsonl.gz"
    if path.is_file():
        return [row["problem"] + "\n" + row["response"] for row in read_gzip(path, 300)]
    return [
        f"Tom has {n} apples and eats {n // 2}. How many are left? \\boxed{{{n - n // 2}}}"
        for n in range(300)
    ]


@pytest.fixture(scope="session")
def make_tokenizer(corpus: list[str]) -> Callable[..., PreTrainedTokenizerFast]:
    """Creates byte-level BPE tokenizers of 1,000 tokens. ``<|endoftext|>`` is end-of-sequence, ``<|im_end|>`` ends a turn."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=1000, special_tokens=special, initial_alphabet=alphabet)
    )
    source = bpe.to_str()

    def make(
        chat_template: str | None = CHATML, eos_token: str | None = "<|endoftext|>"
    ) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(source), eos_token=eos_token)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Iterator[PreTrainedTokenizerFast]:
    yield make_tokenizer()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a .jsonl file and returns its path. Rows are dicts, or strings that are written unchanged."""

    def write(*rows: dict[str, Any] | str, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape"))
        return str(path)

    return write


def save_to_disk(folder: Path, *shards: list[dict[str, Any]]) -> str:
    """Writes the files of ``datasets.Dataset.save_to_disk``: Arrow streams, and state.json with their names."""
    folder.mkdir(parents=True)
    files = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for file, rows in zip(files, shards, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(folder / file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": file} for file in files], "_fingerprint": "0", "_format_type": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return str(folder)
