"""The filters at their limits, and de-duplication against set arithmetic.

``tests/unit/objective/test_published_groups.py`` compares all filters with a second implementation.
"""

import random

import pytest

from megatron_rasft.config.verify import VerifyConfig, published_filters
from megatron_rasft.verify import text_quality as quality
from megatron_rasft.verify.text_quality import FILTER_NAMES, deduplicate, first_failed_filter, similarity

PUBLISHED = VerifyConfig(**published_filters())
DEFAULT = VerifyConfig()
SWITCHES = [f"verify_filter_{name}" for name in FILTER_NAMES]
GOOD = (
    "Let x be the number of apples. Since Anna has 3 more than Ben, we have x + (x + 3) = 15, so 2x = 12 and "
    "therefore x = 6. Anna has 9 apples, which is what was asked, and Ben has the 6 others of the two. \\boxed{9}"
)


def random_texts(num_texts: int = 200) -> list[str]:
    rng = random.Random(7)
    words = [
        "let",
        "x",
        "=",
        "3.",
        "so",
        "we",
        "get",
        "{",
        "}",
        "\\boxed{A}",
        "\\boxed{4}",
        "wait,",
        "sum!",
        "\n",
        "$$",
    ]
    return [" ".join(rng.choices(words, k=rng.randrange(0, 60))) for _ in range(num_texts)]


def reference_jaccard(a: str, b: str, n: int) -> float:
    grams = []
    for words in (a.lower().split(), b.lower().split()):
        size = min(n, len(words))
        grams.append(
            {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)} if words else set()
        )
    union = len(grams[0] | grams[1])
    return len(grams[0] & grams[1]) / union if union else 1.0


def test_good_text_passes_every_filter() -> None:
    assert first_failed_filter(GOOD, PUBLISHED) == ""
    assert first_failed_filter(GOOD, DEFAULT) == ""


@pytest.mark.parametrize(
    "name, text",
    [
        ("too_short", "  x = 5  " + " " * 40),
        ("loop_sentences", "We add one more to it. " * 3 + GOOD),
        ("loop_windows", GOOD + " and now we do the same thing once more" * 3),
        ("self_correction", "Wait, this is not it. Let's correct the sum. " + GOOD),
        ("symbols", "+-*/^_{}[]()=" * 8 + "Let x = 4 \\boxed{4}"),
        ("shortcut", "Thus, the correct answer is what follows from the sum that we have seen = 4. " + GOOD),
        ("shortcut", "So x + x = 8, and therefore x = 4. \\boxed{4}"),
        ("shortcut", "We have x + x = 8, and therefore x = 4, which is the second of the options that the problem "
                     "gives us to choose from: \\boxed{$B$}"),
        ("shortcut", "We have x + x = 8, and therefore x = 4, which is the second of the options that the problem "
                     "gives us to choose from: \\boxed{\u00a0.B!\r}"),
        ("format", "Nothing here reasons about anything at all, it merely talks on and on about apples and pears."),
        ("format", GOOD.replace("\\boxed{9}", "\\boxed{9")),
    ],
)  # fmt: skip
def test_filter_fires_by_name_and_can_be_switched_off(name: str, text: str) -> None:
    assert first_failed_filter(text, PUBLISHED) == name
    others_off = dict.fromkeys(SWITCHES, False) | {f"verify_filter_{name}": True}
    assert first_failed_filter(text, VerifyConfig(**(published_filters() | others_off))) == name
    all_off = dict.fromkeys(SWITCHES, False)
    assert first_failed_filter(text, VerifyConfig(**(published_filters() | all_off))) == ""


def test_default_switches() -> None:
    on = {name for name in FILTER_NAMES if getattr(DEFAULT, f"verify_filter_{name}")}
    assert on == {"too_short", "loop_sentences", "loop_windows"}
    assert all(getattr(PUBLISHED, switch) for switch in SWITCHES)


def test_thresholds_are_exact() -> None:
    assert not quality.is_too_short("x" * 20, DEFAULT)
    assert quality.is_too_short("x" * 19, DEFAULT)
    # The share must exceed 42 %
    assert not quality.is_mostly_symbols("+" * 42 + "a" * 58, DEFAULT)
    assert quality.is_mostly_symbols("+" * 43 + "a" * 57, DEFAULT)
    assert not quality.is_mostly_symbols("", DEFAULT)
    # White space counts in the total
    assert not quality.is_mostly_symbols("+" * 42 + "a" * 29 + " " * 29, DEFAULT)
    # A piece of 12 characters is a loop at its third occurrence, a shorter piece never is
    assert quality.repeats_sentence("abcdefghijkl. " * 3, DEFAULT)
    assert quality.repeats_sentence("Abcdefg\nhijk. x.ABCDEFG  hijk.y.abcdefg hijk", DEFAULT)
    assert not quality.repeats_sentence("abcdefghijkl. " * 2, DEFAULT)
    assert not quality.repeats_sentence("abcdefghijkl! " * 3, DEFAULT)
    assert not quality.repeats_sentence("abcdefghijk. " * 9, DEFAULT)
    # Texts of 29 words or fewer are not searched
    window = [str(i) for i in range(8)]
    assert quality.repeats_window(" ".join(window * 3 + ["a"] * 6), DEFAULT)
    assert not quality.repeats_window(" ".join(window * 3 + ["a"] * 5), DEFAULT)
    # The same phrase twice counts once
    assert not quality.corrects_itself("Wait, what? Wait, no.", DEFAULT)
    assert quality.corrects_itself("Wait, what? Let me\n correct this.", DEFAULT)


def test_loops_of_long_texts_and_of_programs_pass_by_default() -> None:
    loop = "We add one more to it. " * 3
    long = loop + " ".join(map(str, range(500 - len(loop.split()))))
    assert first_failed_filter(long, DEFAULT) == "loop_sentences"
    assert first_failed_filter(long + " 500", DEFAULT) == ""
    assert first_failed_filter(long + " 500", VerifyConfig(verify_loop_max_words=0)) == "loop_sentences"
    assert first_failed_filter(long + " 500", PUBLISHED) == "loop_sentences"
    window = "a b c d e f g h i j " * 3
    assert first_failed_filter(window + " ".join(map(str, range(471))), DEFAULT) == ""
    for text in (loop, "x = 1"):
        assert first_failed_filter(text, DEFAULT) and not first_failed_filter(
            text, PUBLISHED, is_mathematics=False
        )
        assert first_failed_filter(text, VerifyConfig(verify_filter_programs=True), is_mathematics=False)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_similarity_is_the_jaccard_index_of_word_ngrams(n: int) -> None:
    texts = [*random_texts(40), "", "one", "one two", "One  TWO", GOOD]
    for a in texts:
        for b in texts[:10]:
            assert similarity(a, b, n) == reference_jaccard(a, b, n)
        assert similarity(a, a, n) == 1.0
    assert similarity("one two", "One  TWO", n) == 1.0


def test_short_texts_have_no_ngram_in_the_published_rule() -> None:
    assert similarity("one two", "three", 3, "equal") == 1.0 == similarity("", "one two", 3, "equal")
    assert similarity("one two", "one two three", 3, "equal") == 0.0
    assert similarity("one two", "three", 3) == 0.0
    texts = ["one two three", "a", "b c", "one two three", ""]
    assert deduplicate(texts, 0.82, 3, "equal") == [0, 1]
    assert deduplicate(texts, 0.82, 3) == [0, 1, 2, 4]


def test_a_similarity_equal_to_the_threshold_is_a_near_duplicate() -> None:
    # 41 of 50 unigrams in common: 0.82, which 1 - (1 - 0.82) rounds down
    one, other = " ".join(map(str, range(46))), " ".join(map(str, range(5, 50)))
    assert similarity(one, other, 1) == 0.82
    assert deduplicate([one, other], 0.82, 1) == [0]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.82, 1.0])
def test_deduplication_keeps_the_first_of_each_kind(threshold: float) -> None:
    rng = random.Random(3)
    words = GOOD.split()
    texts = [" ".join(words[: rng.randrange(5, len(words))] + rng.choices(words, k=3)) for _ in range(30)]
    texts += [texts[4], GOOD, GOOD.upper()]
    kept: list[int] = []
    for i, text in enumerate(texts):
        if all(reference_jaccard(text, texts[j], 3) < threshold for j in kept):
            kept.append(i)
    assert deduplicate(texts, threshold, 3) == kept
    assert kept[0] == 0 and len(texts) - 1 not in kept


def test_deduplication_of_nothing_and_of_equals() -> None:
    assert deduplicate([], 0.82, 3) == []
    assert deduplicate(["", "", "a"], 0.82, 3) == [0, 2]


@pytest.mark.parametrize(
    "text",
    [
        "." * 300_000 + "x",
        "\\boxed{" * 50_000,
        "{" * 300_000,
        "\\boxed{" + " " * 300_000 + "}",
        "wait " * 60_000,
        "the correct answer is" + " " * 300_000,
        "therefore" + ", " * 150_000,
        "therefore, " * 30_000,
        "\x00" * 9999,
    ],
)
def test_filters_are_linear_on_hostile_text(text: str) -> None:
    for config in (DEFAULT, PUBLISHED):
        assert first_failed_filter(text, config) in ("", *FILTER_NAMES)
    quality.takes_shortcut(text, PUBLISHED)
    quality.breaks_format(text, PUBLISHED)
    quality.repeats_sentence(text, PUBLISHED)
