"""Compares the published weights of random groups with those of ``tests/published_rules.py``.

    python -m tests.published_groups                                   20,000 random groups of random texts
    python -m tests.published_groups --texts math_train.jsonl.gz ...   the same, and every response in these files of training data

The random texts contain near-duplicates, loops, boxes, short texts, symbols and characters of many scripts. Exit code 1 if any
weight differs by more than 1e-9.
"""

import argparse
import gzip
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_rasft.config.verify import VerifyConfig, published_filters
from megatron_rasft.objective.published_weighting import published_weights
from megatron_rasft.types import Rollout, RolloutGroup
from megatron_rasft.verify.text_quality import deduplicate, first_failed_filter, similarity
from tests.published_rules import is_dropped, published

TOLERANCE = 1e-9

WORDS = (
    "let so x y = + 3 12 we have get that the sum of both is therefore thus hence and then solve for apples two half total number "
    "Since Anna has more than Ben find value equation substitute into first divide by each side which gives us 2x 15. answer."
).split()
RARE = "Größe naïve ΔΣ ∑ √2 数学 答案 是 ответ число ‏שלום İstanbul straße ﬁnd x² ½ ①② 3,5 e\u0301 \u200b 😀 \x1f".split(
    " "
)
PHRASES = (
    "wait,",
    "Wait, let me correct",
    "rechecking",
    "I need to\ncorrect",
    "let's correct",
    "however, this is incorrect",
    "the previous reasoning was wrong",
    "correcting the  calculation",
    "Therefore, the correct answer is",
    "thus the correct answer is",
    "therefore\nthe correct answer is",
    "thus,, the correct answer is 4",
    "hence the correct answer is",
    "According to the problem, the correct answer is",
    "based on the given information we know that the correct answer is",
    "Based on the given information, we know that, the correct answer is",
    "the correct answer is: \\boxed{4}",
    "The correct answer is \n \\boxed",
    "the correct answer is ： \\boxed{B}",
    "the correct answer is the first",
)
BOXES = (
    *(
        "A",
        "d",
        "E",
        "12",
        "3.5",
        "x",
        "②",
        "A, B",
        "1，2",
        "\\frac{1}{2}",
        "\\{1\\}",
        "",
        "   ",
        "0123456789ab",
        "0123456789abc",
    ),
    *(
        "$7$",
        "\\left(7\\right)",
        "\\left 7",
        "7\\,",
        "7\\!8",
        " 7. ",
        "\u00a0.7",
        "7!\r",
        "7\n8",
        "\\l$eft7",
        "\\text{(A)}",
        "a\tb",
        "}",
        "{",
        "{}",
    ),
)
SPACES = (" ", " ", " ", " ", " ", "\n", "  ", "\t", "\u00a0", "\u3000", "\r\n", ". ", ".", "\u2028")


def random_text(draw: random.Random) -> str:
    """A text of 0 to 120 words, with some of the properties that the filters look for."""
    kind = draw.random()
    pool = WORDS if kind < 0.8 else (*WORDS, *RARE, *RARE)
    parts = draw.choices(pool, k=int(draw.choice((3, 12, 40, 120)) * draw.random()))
    if draw.random() < 0.2:
        loop = draw.choices(pool, k=draw.choice((2, 3, 8, 9)))
        for _ in range(draw.randint(2, 4)):
            at = draw.randint(0, len(parts))
            parts[at:at] = [*loop, *(["."] if draw.random() < 0.5 else [])]
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        parts.insert(draw.randint(0, len(parts)), draw.choice(PHRASES))
    if draw.random() < 0.15:
        parts.insert(draw.randint(0, len(parts)), draw.choice("+-*/^_{}[]()=$\\") * draw.randint(1, 200))
    if draw.random() < 0.75:
        opening = draw.choice(("\\boxed{",) * 8 + ("\\fbox{", "\\boxed {", "\\boxed\\boxed{", "\\Boxed{"))
        closing = draw.choice(("}",) * 8 + ("", "\\}", "}}", " }."))
        at = len(parts) if draw.random() < 0.8 else draw.randint(0, len(parts))
        parts.insert(at, opening + draw.choice(BOXES) + closing)
    text = "".join(part + draw.choice(SPACES) if draw.random() < 0.4 else part + " " for part in parts)
    return draw.choice((text, text.strip(), text.upper() if draw.random() < 0.1 else text))


def near_duplicate(text: str, draw: random.Random) -> str:
    """The text with a few of its words changed, moved or dropped, or in another case or spacing."""
    words = text.split(" ")
    for _ in range(draw.choice((0, 1, 1, 2, 3, 6))):
        at = draw.randrange(len(words))
        words[at : at + draw.choice((0, 1, 1))] = draw.choices(WORDS, k=draw.choice((0, 1, 1)))
        words = words or [""]
    changed = draw.choice((" ", " ", "  ", "\n")).join(words)
    return changed.swapcase() if draw.random() < 0.1 else changed


def random_group(draw: random.Random, texts: Sequence[str] = ()) -> tuple[list[str], list[bool]]:
    """1 to 16 texts and whether each is correct. Some texts come from ``texts``, the others are random."""
    group: list[str] = []
    for _ in range(draw.randint(1, 16)):
        if group and draw.random() < 0.35:
            group.append(near_duplicate(draw.choice(group), draw))
        elif texts and draw.random() < 0.8:
            group.append(draw.choice(texts))
        else:
            group.append(random_text(draw))
    share = draw.random()
    return group, [draw.random() < share for _ in group]


CONFIG = VerifyConfig(**published_filters())
TEXTS = {"n": CONFIG.verify_dedup_ngram, "short_texts": CONFIG.verify_dedup_short_texts}


def product_weights(texts: Sequence[str], are_correct: Sequence[bool]) -> tuple[float, list[float]]:
    """The weights that a run with --rasft-weighting published computes."""
    rollouts = [
        Rollout(
            problem_id="p",
            sample_index=index,
            weight_version=0,
            prompt_ids=[1],
            response_ids=[2],
            response_logprobs=[0.0],
            finish_reason="stop",
            text=text,
            verdict="correct" if is_correct else "wrong",
            filtered_by=first_failed_filter(text, CONFIG),
        )
        for index, (text, is_correct) in enumerate(zip(texts, are_correct, strict=True))
    ]
    weights = published_weights(
        RolloutGroup(problem_id="p", rollouts=rollouts),
        deduplicate=partial(deduplicate, threshold=CONFIG.verify_dedup_threshold, **TEXTS),
        similarity=partial(similarity, **TEXTS),
    )
    return weights.demonstration, list(weights.rollouts)


def differs(texts: Sequence[str], are_correct: Sequence[bool]) -> bool:
    """Whether any weight of the group differs between the product and the second implementation."""
    demonstration, rollouts = product_weights(texts, are_correct)
    expected, each = published(texts, are_correct)
    pairs = zip([demonstration, *rollouts], [expected, *each], strict=True)
    return any(abs(one - other) > TOLERANCE for one, other in pairs)


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The responses of files of training data."""
    return [json.loads(line)["response"] for path in paths for line in _open(path) if line.strip()]


def _open(path: Path) -> gzip.GzipFile:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def main(num_groups: int, paths: Sequence[Path], seed: int) -> int:
    """Compares the groups and the texts, and prints how many differ."""
    texts = read_texts(paths)
    draw = random.Random(seed)
    outcomes: Counter[float] = Counter()
    wrong = 0
    for index in range(num_groups):
        group, are_correct = random_group(draw, texts if index % 2 else ())
        wrong += differs(group, are_correct)
        outcomes[round(published(group, are_correct)[0], 6)] += 1
    other = [text for text in texts if bool(first_failed_filter(text, CONFIG)) != is_dropped(text)]
    names = Counter(first_failed_filter(text, CONFIG) or "kept" for text in texts)
    print(f"{wrong} of {num_groups} groups differ; {len(outcomes)} different weights of the demonstration")
    if texts:
        print(f"{len(other)} of {len(texts)} texts are filtered differently; {dict(names.most_common())}")
    return int(bool(wrong or other))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=20_000, help="number of random groups")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="files of training data")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random groups")
    flags = parser.parse_args()
    sys.exit(main(flags.groups, flags.texts, flags.seed))
