"""Writes a model folder with random weights and a file of demonstrations, for machines without a network.

python tools/gpu_checking/material.py --shape qwen2.5-1.5b --output DIR
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.shapes import SHAPES, write_model

NUM_ROWS = 512
EOS = "<|endoftext|>"


def write_tokenizer(folder: Path) -> None:
    """A tokenizer with one token per printable ASCII character. Further ids of a larger vocabulary decode to an empty string."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's names of the bytes. For a Qwen2, transformers loads the vocabulary into a tokenizer of bytes in any case
    symbols = [EOS, "Ċ", "Ġ", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)


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
    """Writes the model and the demonstrations into --output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), required=True, help="size of the model")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write model/ and train.jsonl into"
    )
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    write_model(options.shape, options.output / "model", bos_token_id=None, eos_token_id=0)
    write_tokenizer(options.output / "model")
    write_rows(options.output / "train.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
