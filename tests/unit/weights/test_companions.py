"""Every file that a tokenizer or preprocessor needs travels with the weights; code travels only if it is referred to."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.weights.companions import copy_companions

TRAVEL = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v7m1", "tekken.json",
    "tekken_240911.json", "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken", "vocab.json", "vocab.txt", "vocab.bpe",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "LICENSE.txt", "NOTICE", "USE_POLICY.md", "additional_chat_templates/tools.jinja",
]  # fmt: skip
STAY = [
    "model.safetensors", "pytorch_model.bin", "training_args.bin", "tokenizer.pkl", "tokenizer_custom.py", "modeling_x.py",
    "optimizer.pt", "README.md", "config.json", "model.safetensors.index.json", "consolidated.safetensors",
]  # fmt: skip


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return tmp_path / "in"


def copied(source: Path) -> dict[str, bytes]:
    target = source.with_name("out")
    copy_companions(source, target)
    return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def test_every_file_of_the_tokenizer_travels_and_weights_and_code_stay(source: Path) -> None:
    for name in TRAVEL + STAY:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    assert copied(source) == {name: name.encode() for name in TRAVEL}


def write_config(path: Path, auto_map: Any) -> None:
    path.write_text(json.dumps({"a": "ä", "auto_map": auto_map}))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json"])
def test_code_that_a_file_refers_to_travels_with_its_imports(source: Path, name: str) -> None:
    write_config(source / name, {"AutoTokenizer": ["tokenization_x.XTokenizer", None]})
    (source / "tokenization_x.py").write_text(
        "import os\nfrom .vocab_x import V\nfrom .config_x import (\n A)\n"
    )
    (source / "vocab_x.py").write_text("    from .tokenization_x import XTokenizer\n")
    for module in ("config_x", "modeling_x"):
        (source / f"{module}.py").write_text("")
    found = copied(source)
    assert set(found) == {name, "tokenization_x.py", "vocab_x.py", "config_x.py"}
    assert found[name] == (source / name).read_bytes()


@pytest.mark.parametrize("module", ["tokenization_gone", "imports_gone", "../outside", ""])
def test_a_reference_to_code_that_is_missing_is_removed(source: Path, module: str) -> None:
    (source / "imports_gone.py").write_text("from .gone import x")
    (source.parent / "outside.py").write_text("")
    write_config(source / "tokenizer_config.json", {"AutoTokenizer": [f"{module}.XTokenizer", None]})
    found = copied(source)
    assert set(found) == {"tokenizer_config.json"}
    assert json.loads(found["tokenizer_config.json"]) == {"a": "ä"}


@pytest.mark.parametrize("auto_map", [None, {}, {"AutoTokenizer": "owner/name--tokenization_x.X"}, 3, [None]])
def test_a_file_without_local_code_is_copied_unchanged(source: Path, auto_map: Any) -> None:
    write_config(source / "tokenizer_config.json", auto_map)
    (source / "added_tokens.json").write_text("[not JSON")
    assert copied(source) == {path.name: path.read_bytes() for path in source.iterdir()}
