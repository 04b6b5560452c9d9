"""A tiny policy for tests: a random Llama over 32 characters, whose guesses of one digit are sometimes right.

It is small enough to train in seconds, but complete: a Hugging Face folder with a tokenizer, from which responses can be
sampled and graded.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

CHARACTERS = "0123456789 +-=?\n{}\\boxed."
EOS = "<eos>"


def write_model(path: Path, characters: str = CHARACTERS, **overrides: Any) -> Path:
    """Writes an fp32 Llama with 4 layers of width 64, and a tokenizer with one token per character."""
    symbols = [EOS, *dict.fromkeys(characters)]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)
    shape: dict[str, Any] = {
        "vocab_size": len(symbols),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "rope_theta": 10000.0,
        **overrides,
    }
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).float()
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def write_mixture(path: Path, like: Path) -> Path:
    """Writes a random fp32 Mixtral with four experts, and the tokenizer of another model."""
    shutil.copytree(like, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = transformers.AutoConfig.from_pretrained(like)
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,  # a multiple of 32, so that SGLang does not pad it on a CPU
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": config.eos_token_id,
    }
    torch.manual_seed(3)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape)).float()
    model.save_pretrained(path)
    return path


def write_sums(path: Path, num_rows: int, seed: int = 0) -> Path:
    """Writes rows of sums with an answer of one digit, each with a response."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for index in range(num_rows):
            a = draw.randrange(9)
            b = draw.randrange(10 - a)
            row = {
                "id": f"sum{index}",
                "problem": f"{a} + {b}",
                "response": f"{a}+{b}={a + b}",
                "answer": str(a + b),
            }
            file.write(json.dumps(row) + "\n")
    return path
