"""Measures seconds and memory of rank 0 from the data files to a ready curriculum, without and with the row cache.

Usage:
    python benchmarks/data_start.py --rows 100000
    python benchmarks/data_start.py --rows 1000000 --folder DIR

Writes rows of word problems and a small tokenizer, and measures two starts in new processes: the first tokenizes and
fills the cache, the second uses it. --folder keeps rows and cache, so that a second call only measures the start from the cache.
``rss_gib`` is the peak memory of the process, including mapped files; ``imports_gib`` is its memory before it reads a row.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_rasft.config import CurriculumConfig, DataConfig
from megatron_rasft.curriculum.curriculum import Curriculum
from megatron_rasft.data.row_cache import tokenized
from megatron_rasft.data.tokenized_rows import ByProblem
from megatron_rasft.data.tokenizer import open_tokenizer

BARS = {"seconds": 60.0, "rss_gib": 4.0}
"""Largest allowed figures of a start from the cache with a million rows."""

SEQ_LENGTH = 4096


def write_rows(path: Path, num_rows: int, num_words: int) -> None:
    """Yields rows of about ``num_words`` words, a fifth of which are the problem."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(4000)]
    with path.open("w", encoding="utf-8") as file:
        for index in range(num_rows):
            num = int(num_words * draw.lognormvariate(-0.18, 0.6)) + 5
            text = draw.choices(words, k=num)
            cut = num // 5 + 1
            row = {"problem": " ".join(text[:cut]), "response": " ".join(text[cut:]), "answer": str(index)}
            file.write(json.dumps(row) + "\n")


def write_tokenizer(folder: Path, rows: Path) -> None:
    """Trains a byte-level BPE tokenizer of 8,000 tokens on the first rows."""
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    with rows.open(encoding="utf-8") as file:
        trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<eos>"], show_progress=False)
        made.train_from_iterator(islice(file, 2000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>").save_pretrained(folder)


def start(folder: Path) -> dict[str, Any]:
    """Reads the data as rank 0 of a run does before it builds the model."""
    tokenizer = open_tokenizer(folder / "model")
    imports = peak_gib()
    began, cpu_began = time.monotonic(), time.process_time()
    config = DataConfig(train_data=[str(folder / "rows.jsonl")])
    rows = tokenized(config, tokenizer, folder / "model", SEQ_LENGTH, True, "--train-data", folder / "cache")
    rows.report.check(config)
    problems = ByProblem(rows, lambda d: d)
    curriculum = Curriculum(list(problems), CurriculumConfig(), seed=1)
    first = [problems[i] for i in curriculum.next_problems(32 * 256)]
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "rss_gib": peak_gib(),
        "imports_gib": imports,
        "rows": len(rows),
        "tokens_per_row": (rows.report.num_prompt_tokens + rows.report.num_response_tokens) / len(rows),
        "first_refresh_tokens": sum(len(d.prompt_ids) + len(d.response_ids) for d in first),
    }


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> int:
    """Prints one JSON line per start.

    Returns:
        1 if --bars is given and the start from the cache exceeds a bar, otherwise 0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--words", type=int, default=120, help="mean words of a row")
    parser.add_argument("--folder", help="folder for the files; a temporary folder if unset")
    parser.add_argument(
        "--bars", action="store_true", help="exit with 1 if a start from the cache exceeds a bar"
    )
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(Path(options.start))))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "rows.jsonl").exists():
            write_rows(folder / "rows.jsonl", options.rows, options.words)
            write_tokenizer(folder / "model", folder / "rows.jsonl")
        names = ["tokenizing"] * (not (folder / "cache").exists()) + ["from the cache"]
        for name in names:
            command = [sys.executable, __file__, "--start", str(folder)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            figures = {key: float(f"{value:.3g}") for key, value in found.items()}
            print(json.dumps({"start": name, **figures}), flush=True)
        return int(options.bars and any(found[key] > bar for key, bar in BARS.items()))


if __name__ == "__main__":
    sys.exit(main())
