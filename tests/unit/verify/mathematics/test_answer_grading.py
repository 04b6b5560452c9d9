"""Pairs of answers that are equal and pairs that are not, and every set's gold answers compared with themselves."""

import gzip
import itertools
import json
import random
from pathlib import Path

import pytest

from megatron_rasft.verify.mathematics.answer_extraction import closed_boxes, extract_answer, extract_answers
from megatron_rasft.verify.mathematics.answer_grading import grade_answer

DATA = Path(__file__).parents[5] / "shared" / "data"

# Gold answer, and another way to write it in the box
EQUAL = [
    # fractions
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\tfrac12"),
    (r"\frac{1}{2}", r"\frac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", ".5"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"\frac{1}{2}", "0.50"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"\frac 59", r"\frac{5}{9}"),
    (r"\frac43", "4/3"),
    (r"\frac{11}{5}", "2.2"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"14\frac{6}{7}", r"\frac{104}{7}"),
    (r"-1\frac{1}{2}", "-1.5"),
    ("-1./3", r"-\frac13"),
    (".35625", "0.35625"),
    # roots, powers, constants
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"2\sqrt3", r"2\sqrt{3}"),
    (r"2\sqrt3", r"\sqrt{12}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\frac{3\sqrt{3}}{4}", r"\frac{3}{4}\sqrt{3}"),
    (r"11 \sqrt{5} + 11", r"11(1+\sqrt{5})"),
    (r"\sqrt{6}-1", r"-1+\sqrt{6}"),
    (r"3^{10}", "59049"),
    (r"2^{10}", "1024"),
    (r"\pi", r"\pi"),
    (r"10 \pi - 29", r"-29+10\pi"),
    (r"\frac{\pi}{6}", r"\pi/6"),
    (r"2+\pi", r"\pi + 2"),
    # numbers
    ("1000", "1,000"),
    ("1,000", "1000"),
    (r"10,\!080", "10080"),
    (r"10,\!080", "10,080"),
    ("10080", r"10{,}080"),
    ("1234567", "1,234,567"),
    ("18", "18.0"),
    ("18", "18."),
    ("18", "$18$"),
    ("18", r"\$18"),
    ("18", "$18"),
    ("18", r"\(18\)"),
    ("18", " 18 "),
    ("-5", "−5"),
    ("+2", "2"),
    ("007", "7"),
    ("4.45e15", r"4.45 \times 10^{15}"),
    ("1e-5", "0.00001"),
    ("3.61e2", "361"),
    (r"\$32,\!348", "32348"),
    (r"\$1.65", "1.65"),
    # percent
    (r"50\%", "50"),
    ("50", r"50\%"),
    ("50", "50%"),
    ("50", "50 percent"),
    (r"50\%", r"\frac{1}{2}"),
    (r"12.5\%", "12.5"),
    (r"12.5\%", "0.125"),
    # units
    ("5", r"5 \text{ cm}"),
    ("5", "5 dollars"),
    ("5", "5 hours"),
    ("5", r"5\text{ km/h}"),
    ("5", r"5 \mathrm{~m}"),
    ("12", "12 square units"),
    ("12", r"12\text{ cm}^2"),
    (r"5.4 \text{ cents}", "5.4"),
    (r"5 \text{ ft}", "5 feet"),
    (r"30^\circ", "30"),
    (r"30^\circ", r"30^{\circ}"),
    ("30", "30 degrees"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}"),
    (r"\approx 8.24 \text{ mph}", "8.24"),
    # words and letters
    (r"\text{Evelyn}", "Evelyn"),
    ("Evelyn", r"\text{Evelyn}"),
    (r"\text{Evelyn}", r"\textbf{evelyn}"),
    (r"\text{even}", "Even"),
    ("LQSX", "LQSX"),
    (r"\text{(B)}", "B"),
    (r"\text{(B)}", "(B)"),
    (r"\text{(B)}", "b"),
    ("B", r"\textbf{(B)}"),
    ("B", "B."),
    ("B", r"\textbf{(B)}\ 12"),
    ("B", "(B) 12"),
    ("n", "n"),
    # algebra
    ("x^2+2x+1", "(x+1)^2"),
    ("6r^2-4r-24", "2(3r^2-2r-12)"),
    ("(a+5)(b+2)", "ab+2a+5b+10"),
    ("15x - 80", "5(3x-16)"),
    ("x^3+3x-6", "3x + x^3 - 6"),
    ("2 n", "2n"),
    ("n(n-1)", "n^2-n"),
    (r"\frac{1}{(a + b)^3}", "(a+b)^{-3}"),
    ("y = -2x", "y=-2x"),
    ("y = -2x", "-2x"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("5", "x = 5"),
    ("6+9i", "9i+6"),
    ("6 - 5i", "6-5i"),
    # tuples, intervals, sets, lists
    ("(8,-2)", "(8, -2)"),
    ("(8,-2)", r"\left(8,-2\right)"),
    ("(2,1)", "(2, 1)"),
    (r"\left( -\frac{1}{3}, \frac{22}{3} \right)", "(-1/3, 22/3)"),
    ("(0.5,2)", r"(\frac12,2)"),
    ("(3,4]", r"\left(3, 4\right]"),
    (r"(5,\infty)", r"(5, \infty)"),
    (r"[-\tfrac13, 1]", r"\left[-\frac{1}{3},1\right]"),
    (r"(2,12) \cup (12,102)", r"(2,12)\cup(12,102)"),
    (r"(2,12) \cup (12,102)", r"(12,102)\cup(2,12)"),
    ("1,-2", "-2, 1"),
    ("3, 5, 7", "7,5,3"),
    ("3, 5, 7", r"\{3,5,7\}"),
    ("3, 5, 7", "3, 5 and 7"),
    ("-1,0,1", r"\left\{-1, 0, 1\right\}"),
    (r"64,\frac{1}{4}", "0.25, 64"),
    (r"10^{100}$,$10^{1 / 100}", r"10^{1/100}, 10^{100}"),
    (r"1-\sqrt{2}, 1+\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"1-\sqrt{2}, 1+\sqrt{2}", r"1\pm\sqrt{2}"),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}"),
    (r"\begin{pmatrix} 4 \\ 0 \end{pmatrix}", r"\begin{bmatrix} 4 \\ 0 \end{bmatrix}"),
    # bases
    ("2516_8", "2516_{8}"),
    ("2516_8", "2516"),
]

DIFFERENT = [
    ("18", "19"),
    ("18", "-18"),
    ("18", "180"),
    ("18", "1.8"),
    ("18", "18x"),
    ("18", "18 million"),
    ("18", r"18\pi"),
    ("1000", "1,00"),
    ("1000", "1,000,000"),
    ("5", "5, 6"),
    ("5", "5 or 6"),
    ("5", "(5, 5)"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\frac{1}{2}", "0.05"),
    (r"\frac{1}{3}", "0.33"),
    (r"\frac{1}{3}", "0.333333"),
    (r"\frac{2}{3}", "0.6666667"),
    (r"1\frac{4}{5}", r"\frac{4}{5}"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
    (r"2\sqrt{3}", r"\sqrt{6}"),
    (r"\sqrt{2}", "1.414214"),
    (r"\pi", "3.14"),
    (r"\pi", "3.141593"),
    (r"50\%", r"5\%"),
    (r"50\%", "0.05"),
    ("4.45e15", r"4.45 \times 10^{14}"),
    (r"5 \text{ m}", r"5 \text{ cm}"),
    ("5 hours", "5 minutes"),
    (r"\$5", "5 cents and 1 dollar"),
    (r"30^\circ", r"60^\circ"),
    (r"\text{Evelyn}", r"\text{Carla}"),
    (r"\text{Evelyn}", "nylevE"),
    ("LQSX", "SXLQ"),
    (r"\text{even}", "odd"),
    (r"\text{(B)}", "(C)"),
    ("B", r"\textbf{(C)}\ 12"),
    ("B", "A or B"),
    ("B", "AB"),
    ("n", "m"),
    ("x^2+2x+1", "(x-1)^2"),
    ("15x - 80", "15x + 80"),
    ("15x - 80", "15y - 80"),
    ("y = -2x", "y=2x"),
    ("x=5", "x=6"),
    ("6+9i", "6-9i"),
    ("(8,-2)", "(-2,8)"),
    ("(2,1)", "(5,3)"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(3,4]", "[3,4)"),
    ("(3,4]", "(3,5]"),
    (r"(5,\infty)", r"(-\infty,5)"),
    (r"(2,12) \cup (12,102)", "(2,102)"),
    ("1,-2", "1,2"),
    ("1,-2", "1"),
    ("1,1,2", "1,2,2"),
    ("3, 5, 7", "3, 5"),
    ("3, 5, 7", "3, 5, 7, 9"),
    ("-1,0,1", "0,1"),
    ("(1,1), (3,2)", "(1,1), (2,3)"),
    (r"\begin{pmatrix} 4 \\ 0 \end{pmatrix}", r"\begin{pmatrix} 0 \\ 4 \end{pmatrix}"),
    ("2516_8", "2516_9"),
    ("2516_8", "2517_8"),
    ("18", "banana"),
    ("18", r"\text{the answer}"),
    ("18", r"\frac{1}{"),
    ("18", "?"),
]


@pytest.mark.parametrize("gold, answer", EQUAL)
def test_equal_answers_grade_correct(gold: str, answer: str) -> None:
    assert grade_answer(f"So the result is $\\boxed{{{answer}}}$.", gold)[0] == "correct"


@pytest.mark.parametrize("gold, answer", DIFFERENT)
def test_different_answers_do_not_grade_correct(gold: str, answer: str) -> None:
    assert grade_answer(f"So the result is $\\boxed{{{answer}}}$.", gold)[0] in ("wrong", "unverifiable")


def test_there_are_enough_pairs() -> None:
    assert len(EQUAL) + len(DIFFERENT) >= 120
    assert len(set(EQUAL)) == len(EQUAL) and len(set(DIFFERENT)) == len(DIFFERENT)


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed 7", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"stray } brace, \boxed{3} and another {", "3"),
        (r"\boxed{4} but then \boxed{5", "4"),
        (r"\boxed{} The answer is 6.", "6"),
        ("The answer is 6.", "6"),
        ("The answer is 6.5.", "6.5"),
        ("The answer is $\\frac{1}{2}$. Check: 3.", r"\frac{1}{2}"),
        ("The answer is: **12**", "12"),
        ("Answer: 12", "12"),
        ("the answer is 1. No, the answer is 2.", "2"),
        ("We get 3 and then 1,234.50 in total", "1,234.50"),
        ("costs $12", "$12"),
        ("it falls to -4", "-4"),
        ("so 3/4", "3/4"),
        ("that is 20%", "20%"),
        ("no idea", None),
        ("", None),
        ("\\boxed{}", None),
    ],
)
def test_answer_is_found(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        *(
            "$2\\boxed{10}$",
            "$x\\boxed{10}$",
            "$2 \\cdot \\boxed{10}$",
            "$\\frac{1}{2}\\boxed{10}$",
            "$5 + \\boxed{10}$",
        ),
        *(
            "2\\boxed{10}",
            "$\\sqrt{\\boxed{10}}$",
            "$\\frac{\\boxed{10}}{3}$",
            "$2^{\\boxed{10}}$",
            "$\\boxed{10}+5$",
        ),
        *(
            "\\(3 - \\boxed{10}\\)",
            "$\\boxed{10}/5$",
            "$\\boxed{10}\\sqrt{2}$",
            "$\\boxed{10}!$",
            "$(\\boxed{10}, 3)$",
        ),
        *(
            "$\\boxed{10} \\pm 1$",
            "$(3, \\boxed{10})$",
            "\\boxed{10} is only an upper bound.",
            "\\boxed{10} then it fails.",
        ),
        *(
            "$\\boxed{10}$ does not work.",
            "$\\boxed{10}$ isn't right.",
            "Is it $\\boxed{10}$?",
            "\\boxed{10} (I'm not sure)",
        ),
        *(
            "\\boxed{10} squared",
            "$\\boxed{10}3$",
            "$0.\\boxed{10}$",
            "$\\boxed{10}.5$",
            "$[3,\\boxed{10}]$",
            "$\\{3,\\boxed{10}\\}$",
        ),
        *("twice \\boxed{10}", "\\sqrt{\\boxed{10}}", "negative $\\boxed{10}$", "$\\log \\boxed{10}$"),
    ],
)
def test_box_within_a_formula_or_denied_is_no_answer(text: str) -> None:
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    "text",
    [
        *(
            "It costs $5 each, so the total is **\\boxed{10}**",
            "It costs $5 each: \\boxed{10}!",
            "*\\boxed{10}* is it",
        ),
        *(
            "$$5+5 = 10\n\\boxed{10}$$",
            "\\[ 5 + 5 = 10 \\\\ \\boxed{10} \\]",
            "$x = 10$ \\boxed{10}",
            "$\\text{so }\\boxed{10}$",
        ),
        *(
            "The term is $\\boxed{10}x^3$.",
            "$\\boxed{10}\\pi$",
            "$\\Rightarrow\\boxed{10}$",
            "$n = \\boxed{10}$ (using $a = 5$)",
        ),
        *(
            "\\boxed{10} is the answer, not 8.",
            "\\boxed{10} - as claimed",
            "\\boxed{10}. It should be noted that 3 is prime.",
        ),
    ],
)
def test_box_beside_prose_is_an_answer(text: str) -> None:
    assert extract_answer(text) == "10"


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        ("(a) $\\boxed{3}$ (b) $\\boxed{5}$", ["3", "5"]),
        ("Part (i): x is \\boxed{3}. Part (ii): x is \\boxed{5}.", ["3", "5"]),
        ("1. $\\boxed{3}$\n2. $\\boxed{5}$", ["3", "5"]),
        ("Case 1: then \\boxed{3}. Case 2: then \\boxed{5}.", ["3", "5"]),
        ("1. We add to get \\boxed{3}.\n2. We double to get \\boxed{5}.", ["5"]),
        ("(a) We get 3. (b) \\boxed{5}", ["5"]),
        ("Let f(a) = \\boxed{3}. Then f(b) = \\boxed{5}.", ["5"]),
        ("\\boxed{5}. Hmm, it should be 6.", ["5", "6"]),
        ("\\boxed{5}. It's actually 6.", ["5", "6"]),
        ("\\boxed{5}, 6", ["5", "6"]),
        ("$\\boxed{5}$ and $6$.", ["5", "6"]),
        ("\\boxed{5}, 3 of them red.", ["5"]),
        ("The answer is 5. Actually, 6.", []),
        ("The answer is 5. Hmm, that can't be right.", []),
    ],
)
def test_boxes_of_labelled_parts_and_later_values_all_count(text: str, answers: list[str]) -> None:
    assert extract_answers(text) == answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I do not know the answer. The train travels for 3 hours.", None),
        ("I'm not sure how to solve this. We have 3 apples.", None),
        ("Sorry, we can’t determine it. There were 3 apples.", None),
        ("There is not enough information; it has 3 cars.", None),
        ("So we need more than 3", None),
        ("It is about 3", None),
        ("(a) 3 (b) 12", None),
        ("Part 1: 3. Part 2: 12.", None),
        ("(a) The answer is 3. (b) The answer is 12.", None),
        ("so x=3 and x=12", None),
        ("By (a) and (b), it is 3", "3"),
        ("Case 1: 3 ways. Case 2: 5 ways. Answer: 8", "8"),
        ("Case 1: 3 ways. Case 2: 5 ways. In total 8", "8"),
        ("1. $3x = 6$\n2. $2$ is x\nAnswer: 2", "2"),
        ("If a = 3, x = 12", "12"),
        ("We cannot factor it. So x = 3", "3"),
        ("I don't need the first. It has 3.", "3"),
    ],
)
def test_number_of_a_reply_that_gives_up_is_no_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize("answer", ["7...", "7.."])
def test_dots_that_leave_a_number_open_are_part_of_it(answer: str) -> None:
    assert grade_answer(f"\\boxed{{{answer}}}", "7")[0] != "correct"


def test_boxes_are_the_outermost_closed_ones() -> None:
    assert closed_boxes(r"\boxed{a \boxed{b}} \fbox{c} \boxed{d") == [r"a \boxed{b}", "c"]


@pytest.mark.parametrize(
    "text, gold, grade",
    [
        (r"\boxed{5}", "", ("unverifiable", "no gold answer")),
        ("I do not know.", "5", ("wrong", "no answer")),
        (r"\boxed{}", "5", ("wrong", "no answer")),
        (r"\boxed{\foo}", r"\bar^", ("wrong", "different text")),
        (r"\boxed{\foo \bar^}", r"\foo\bar^", ("correct", "same text")),
        (r"\boxed{\frac{}^}", "5", ("unverifiable", "answer not parsed")),
        (r"\boxed{the cat sat down}", "5", ("unverifiable", "answer is prose")),
        ("\\boxed{" + "1" * 3000 + "}", "5", ("unverifiable", "answer longer than 2000 characters")),
    ],
)
def test_reasons(text: str, gold: str, grade: tuple[str, str]) -> None:
    assert grade_answer(text, gold) == grade


def test_tolerance_applies_to_plain_numbers_on_request() -> None:
    assert grade_answer(r"\boxed{3.1416}", "3.14159")[0] == "wrong"
    assert grade_answer(r"\boxed{3.1416}", "3.14159", rel_tolerance=1e-4)[0] == "correct"
    assert grade_answer(r"\boxed{3.15}", "3.14159", rel_tolerance=1e-4)[0] == "wrong"


MATH_SETS = [
    "evaluation/aime24",
    "evaluation/aime25",
    "evaluation/amc23",
    "evaluation/gsm8k",
    "evaluation/math500",
    "evaluation/minerva_math",
    "evaluation/olympiadbench",
    "train/gsm8k_train",
    "train/math_train",
]


def sample_rows(name: str, num_rows: int) -> list[dict[str, str]]:
    if not DATA.is_dir():
        pytest.skip(f"the data sets are not part of the repository, and {DATA} does not exist")
    with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["answer"]]
    return random.Random(20260606).sample(rows, min(num_rows, len(rows)))


@pytest.mark.parametrize("name", MATH_SETS)
def test_gold_answers_equal_themselves(name: str) -> None:
    rows = sample_rows(name, 300)
    missed = [
        r["answer"] for r in rows if grade_answer(f"\\boxed{{{r['answer']}}}", r["answer"])[0] != "correct"
    ]
    assert not missed


@pytest.mark.parametrize("name", ["train/gsm8k_train", "train/math_train"])
def test_demonstration_responses_grade_correct(name: str) -> None:
    rows = sample_rows(name, 500)
    missed = [r["id"] for r in rows if grade_answer(r["response"], r["answer"])[0] != "correct"]
    assert not missed


def test_other_rows_answers_grade_wrong() -> None:
    # The answers of GSM8K are integers, so this test can compare them itself
    rows = sample_rows("evaluation/gsm8k", 300)
    for row, other in itertools.pairwise(rows):
        same = float(row["answer"].replace(",", "")) == float(other["answer"].replace(",", ""))
        graded = grade_answer(f"The answer is {other['answer']}.", row["answer"])[0]
        assert (graded == "correct") == same, (row["answer"], other["answer"])


@pytest.mark.parametrize(
    ("answer", "gold", "verdict"),
    [
        ("2+6=8", "8", "correct"),
        (r"\frac{16}{2}=8", "8", "correct"),
        ("2+6=8=8", "8", "correct"),
        ("x=2+6=8", "8", "correct"),
        ("2+5=8", "8", "wrong"),
        ("2+5=8", "7", "wrong"),
        ("8=7", "8", "wrong"),
        ("7=8", "8", "wrong"),
        ("2+6=8=9", "8", "wrong"),
        ("2+6=8=9", "9", "wrong"),
    ],
)
def test_sides_of_a_calculation_in_a_box_are_equal(answer: str, gold: str, verdict: str) -> None:
    assert grade_answer(rf"So \boxed{{{answer}}}", gold)[0] == verdict


@pytest.mark.parametrize("text", ["2+5=8", "We get 2+5=8.", "2 + 5 = 8"])
def test_prose_that_ends_with_a_calculation_commits_to_its_result(text: str) -> None:
    assert extract_answer(text) == "8"
    assert grade_answer(text, "8")[0] == "correct" and grade_answer(text, "7")[0] == "wrong"
