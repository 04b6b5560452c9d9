"""Writes a model folder with random weights and a file of demonstrations: a machine without network has neither.

python tools/gpu_checking/material.py --shape qwen2.5-1.5b --output DIR
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 1024,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
}
NUM_ROWS = 512
EOS = "<|endoftext|>"


def write_tokenizer(folder: Path) -> None:
    """One token per printable ASCII character; a larger vocabulary's other ids decode to nothing."""
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    symbols = [EOS, "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)


def write_model(shape: str, folder: Path) -> None:
    """A Qwen2 folder of that shape with random weights in BF16 and a tokenizer."""
    import torch
    import transformers

    config = transformers.Qwen2Config(**SHAPES[shape], bos_token_id=None, eos_token_id=0, dtype="bfloat16")
    torch.manual_seed(0)
    # On a GPU 1.5 billion random numbers take a second, on a CPU half a minute.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.cpu().save_pretrained(folder)
    write_tokenizer(folder)


def write_rows(path: Path) -> None:
    """Long sums, added up step by step: responses of 30 to 300 characters."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(NUM_ROWS):
            terms = [draw.randrange(100) for _ in range(draw.randrange(2, 16))]
            total, steps = terms[0], []
            for term in terms[1:]:
                steps.append(f"{total} + {term} = {total + term}.")
                total += term
            response = f"{' '.join(steps)} The answer is \\boxed{{{total}}}."
            row = {"problem": " + ".join(map(str, terms)), "response": response, "answer": str(total)}
            file.write(json.dumps(row) + "\n")


def main() -> int:
    """Write both into --output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), required=True, help="size of the model")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write model/ and train.jsonl into"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write_model(options.shape, options.output / "model")
    write_rows(options.output / "train.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
