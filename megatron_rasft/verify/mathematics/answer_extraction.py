r"""Finds the final answer in a response. Does not parse the answer, and needs neither sympy nor torch.

docs/verification.md states the rule. Training, evaluation and report use this module only. Its regular expressions take
linear time, because they run on text that a model wrote.
"""

import re
from bisect import bisect_right
from collections import deque
from typing import NamedTuple

from megatron_rasft.reasoning_tags import without_reasoning
from megatron_rasft.verify.mathematics.units import unit_is_known

# Boxes, escaped characters (so that \{ does not count as a brace) and braces
_BOX_TOKENS = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
# \boxed 5 and \boxed5, without braces
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?<!\{)([^\s{}$A-Za-z\\][^\s{}$]{0,99}|(?<=\s)[A-Za-z]\b)")
_BOX_COMMAND = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])")

_ANSWER_IN_OTHER_LANGUAGES = (
    r"答案\s{0,5}(?:是|为|為|：|:|=)\s{0,5}[:：]?|答えは|\bответ\s{0,3}(?::|—|-)"
    r"|\b(?:la|die|a|il) (?:respuesta|réponse|antwort|resposta|risposta)(?: correcta| finale?)? (?:es|est|ist|é|è)\b"
)
_ANSWER_PHRASE = re.compile(
    r"(?:answer|result|solution|option|choice)s?\s{0,5}(?:is|are|would be|equals|comes to|:|=|：)(?:\s{0,5}:)?(?![a-z])"
    r"|final answer\W{0,10}\n"
    r"|(?m:^)\s{0,5}####|<answer>"
    rf"|{_ANSWER_IN_OTHER_LANGUAGES}",
    re.IGNORECASE,
)
_ANSWER_ONLY_PHRASE = re.compile(r"(?:result|solution)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<!\bi\.e)(?<!\be\.g)[.!?](?=[\s*$]|$)|[。！？]")
_NUMBER = re.compile(
    r"(?<![\w.])-?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:\.\d+|(?<=\d))(?:/\d+(?![\d.]))?\s?%?"
)
_CLAUSE = re.compile(
    r"(?:\b(?:because|since|which|where|so that|as (?:required|desired|expected|we|it)|rather than|instead of"
    r"|and not|but not|not)\b|，|\s?(?:です|である)|,?\s?\b(?:i\.e|e\.g)\.|\s?</answer>|,\sI (?:think|believe|guess|hope)\b|,\s(?=(?:so|as|giving|but|and (?:we|so|thus))\b))",
    re.IGNORECASE,
)
_NAME_BEFORE = re.compile(r"(?<![A-Za-z\\])((?:\\?[A-Za-z]+)(?:_\{?\w{1,5}\}?)?)\s*=\s*\$?\s*$")
# A minus sign with a space after it at the start of a line begins an item of a list
_SIGN_BEFORE = re.compile(r"(?:[=$(]\s{0,9}[-−]\s{0,9}|(?:^|\s)[-−])$")
_JOIN = re.compile(
    r"(?:[\s$,;:&~*]|\\[(),;:!\[\]]|\\q?quad|\\text\s*\{|\}|\band\b|\bor\b|\balso\b|\bboth\b|\by?ields?\b"
    r"|(?:\\?[A-Za-z]+)(?:_\{?\w{1,5}\}?)?\s*=)*",
)
_HEDGE = re.compile(
    r"\b(?:maybe|perhaps|possibly|might|could be|may be|either|or|alternatively|not sure|unsure|uncertain)\b",
    re.IGNORECASE,
)
_HEDGE_AFTER_BOX = re.compile(
    r"[ \t$,;:)(*\\]{0,40}(?:text\s{0,9}\{\s{0,9})?(?:(?:or|alternatively)\b(?:,? (?:equivalently|simply|just|also))?|[.]?[ \t$]{0,20}(?:maybe|perhaps|possibly|or maybe|but (?:maybe|it (?:could|might)))\b)\}?"
    r"(?P<other>[^\n]*)",
    re.IGNORECASE,
)
# At the start of a sentence only: explanations after the answer also contain words such as "actually"
_RETRACTION = re.compile(
    r"(?:^|[.!?:)\n$—-])\s{0,20}(?:(?:oh|hm{2,9}|no|but|hold on)\b[,.!\s]{1,20}){0,4}"
    r"(?:(?:wait|sorry|correction|scratch that|on second thought|i was wrong|i mean|no\b(?=[,.!]))\b|actually,? (?:(?:no|that|this|it|the|i)\b|\W{0,3}\d)"
    r"|(?:that|this|it) (?:can't|cannot|can not|couldn't) be (?:right|correct|true)|i made (?:a|an) (?:mistake|error)|(?:actually,? |hm{2,9},? )?let me (?:re-?(?:compute|calculate|consider|think|count|evaluate|do)|try again|start over)\b|(?:that|this|it)(?:'s| is| was| seems) (?:wrong|incorrect|not right|not correct|a mistake))",
    re.IGNORECASE,
)
_WRITTEN_NUMBER = re.compile(r"(?:(?<![\w)}])-)?\d+(?:[.,]\d+)*(?:/\d+)?")
_PLAIN_FRACTION = re.compile(r"\\[dt]?frac\s{0,3}\{(\d{1,20})\}\s{0,3}\{(\d{1,20})\}")
# A check alone confirms an answer as often as not, so it takes an answer back only if it ends with another number
_RECHECK = re.compile(
    r"(?:^|[.!?:;,)\n$—-])\s{0,20}(?:(?:oh|hm{2,9}|but|hold on|actually|so|now|upon|on|after|by|i(?:'ll| will| should| must)"
    r"|let me|let us|let's|just|quickly|a|to)\b[,.!\s]{1,20}){0,5}"
    r"(?:re-?(?:check|count|calculat|comput|evaluat|examin|verify|consider|do)(?:e|ing)?"
    r"|double[- ]?check(?:ing)?|(?:check|count|verify|look|compute|calculate|go over|do)(?:ing)?(?:\s\w{1,9}){0,3}\s(?:again|once more))\b",
    re.IGNORECASE,
)
# Another value directly before the box: "13 or \boxed{12}". After a comma, "or" often means "that is"
_PLAIN_VALUE = r"-?(?:\d[\d./]{0,20}|\d{0,9}\\[dt]?frac\{[^{}]{1,9}\}\{[^{}]{1,9}\}|\d{0,9}\\sqrt\{?\d{1,9}\}?|\d{0,9}\\pi)(?:\\?%|\^\{?\\circ\}?)?"
_ALTERNATIVE_BEFORE = re.compile(
    rf"(?:\$(?P<formula>{_PLAIN_VALUE})\$|(?<![^\s(])(?P<word>{_PLAIN_VALUE}))\s{{1,3}}or\s{{1,3}}\$?\s{{0,3}}\Z"
)
_NAME = r"(?:\\?[A-Za-z]+(?:_\{?\w{1,5}\}?)?)"
# In 2x = 10 and x = 5 the first equation is a step, so the name must begin it
_SAME_NAME_BEFORE = re.compile(
    rf"(?:\A|[$(:]|\b(?:are|is|have|get|gives|so|thus|hence|and|or|either|then)\s)\s{{0,3}}(?P<first>{_NAME})\s{{0,3}}=\s{{0,3}}"
    rf"(?P<value>[^\s$=,]{{1,40}})[\s$]{{0,5}}(?P<join>,|,?\s?\b(?:and|or)\b)[\s$]{{1,5}}(?P<second>{_NAME})\s{{0,3}}=[\s$]{{0,5}}\Z"
)
_RANGE_BEFORE = re.compile(
    r"\b(?:between|from)\s{1,3}\$?[^\s$]{1,30}\$?\s{1,3}(?:and|to)\s{1,3}\$?\Z|\d\$?\s{1,3}(?:out of|in|and|or)\s{1,3}\$?\Z"
)
_OTHER_SENTENCE = re.compile(r"[.!\s]{1,9}(?:or|maybe|perhaps|possibly)\b", re.IGNORECASE)
# The box is a part of a formula, as in \boxed{10}^2 or \boxed{10}\sqrt{2}
_CONTINUED = re.compile(
    r"(?:\s|\\[,;:!]){0,3}(?:\^(?!\s{0,3}\{?\s{0,3}\\circ)|\\(?:times|cdot|div|pm|sqrt|[dt]?frac)(?![A-Za-z])"
    r"|\+\s{0,3}[\w\\(]|\*\s{0,3}[\d(]|/\s{0,3}(?:\d|\(|\\[dts])|[.:]?\d"
    r"|[$}]{0,2}\s{0,3}(?:\\text\s{0,3}\{\s{0,3})?(?:dozen|squared|cubed|factorial)\b)",
    re.IGNORECASE,
)
# These signs also occur in prose after a box, so they count between dollar signs only. A letter does not count: in \boxed{10}x^2
# the coefficient is the answer
_CONTINUED_FORMULA = re.compile(r"(?:\s|\\[,;:!]){0,3}(?:!|[+*/\-]|\(\s{0,3}[A-Za-z\d])")
_ARGUMENTS = r"\s{0,3}\{[^{}]{1,40}\}"
_FACTOR_BEFORE = re.compile(
    rf"(?:(?<![\w.])\d(?:[\d.,]{{0,20}}\d)?|(?<![A-Za-z\\])[A-Za-z]|\\pi|\\[dt]?frac{_ARGUMENTS}{_ARGUMENTS}|\\sqrt{_ARGUMENTS}"
    r"|\\(?:times|cdot|div|pm)|[+/^]|\d\.|(?<!\*)\*|[\w)}]\s{0,3}-|\\sqrt\s{0,3}\{|\\[dt]?frac\s{0,3}\{|[\^_]\s{0,3}\{|\}\s{0,3}\{)"
    r"(?:[ \t]|\\[,;:!])*\Z"
)
_WORD_BEFORE = re.compile(
    r"(?:\b(?:twice|thrice|double|half|half of|minus|negative|square root of|square of)|\\(?:log|ln|lg|sin|cos|tan|exp))[\s$]{0,5}\Z",
    re.IGNORECASE,
)
_GLUED_FACTOR_BEFORE = re.compile(
    r"(?:(?<![\w.,$)])\d+(?:\.\d+)?|[\d)]\s{0,3}[*/×^][ \t]{0,3}|\d\.|\\sqrt\s{0,3}\{|\\[dt]?frac\s{0,3}\{|\^\s{0,3}\{)\Z"
)
_EMPTY_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s{0,9}\{\s{0,9}\}")
_COMMANDS = re.compile(r"\\(?:text|mathrm|mbox)\s{0,3}\{[^{}]*\}|\\[A-Za-z]+")
_PROSE = re.compile(r"[A-Za-z]{3}")
_COORDINATES = r"[-\d./]{1,12}(?:\s{0,3},\s{0,3}[-\d./]{1,12})*"
_COORDINATES_BEFORE = re.compile(rf"[(\[{{]\s{{0,3}}{_COORDINATES}\s{{0,3}},\s{{0,3}}\Z")
_COORDINATES_AFTER = re.compile(rf"\s{{0,3}},\s{{0,3}}{_COORDINATES}\s{{0,3}}(?:\\right\s{{0,3}})?\\?[)\]}}]")
_DENIED = re.compile(
    r"[\s$)]*(?:(?:is|are|was|were)(?:n't| not)?|does(?:n't| not)|cannot|can't|then(?: it)?|which|but(?: it)?)*\b\s?(?:"
    r"(?<=is |as )(?:wrong|incorrect|impossible|(?:only |just )?(?:an? )?(?:upper|lower) bound|(?:only |just )?a guess)\b"
    r"|(?<=not |n't )(?:the |a )?(?:right|correct|valid|(?:final )?answer|solution|possible|work|satisfy|fit|be)\b|fails\b)",
    re.IGNORECASE,
)
_DOUBT_AFTER = re.compile(
    r"[\s$*)\]\\]{0,6}[?？]|[^.!?\n]{0,30}\b(?:not (?:entirely |completely |quite |really )?(?:sure|certain)|unsure)\b",
    re.IGNORECASE,
)
_LISTED_AFTER = re.compile(
    r"[ \t$]{0,5}(?:,|and|, and)[ \t$]{0,5}(-?\d[\d./]{0,20})(?<![./])[ \t$]{0,5}(?:[.\n]|\Z)"
)
_DOUBT_BEFORE = re.compile(
    r"(?:\bnot|n't|\bnever|\bcannot be|\bmaybe|\bperhaps|\bpossibly|\b(?:might|could|may) be)(?: equal(?: to)?| be)?[\s$:]*(?:\\[(\[])?[\s$]*$",
    re.IGNORECASE,
)
_LATER_ANSWER = re.compile(
    r"<answer>|^\W{0,10}(?:the |final |my |correct )*answer\s{0,3}(?:is|:)|\bthe (?:final |correct )?answer (?:is|should be)\b"
    r"|\b(?:it|this|that)(?:'s| is) (?:actually|really|rather)(?=\W{1,6}\d)"
    r"|\b(?:it|this|that) (?:actually )?(?:should|must|has to) be(?=\W{1,6}\d)"
    rf"|{_ANSWER_IN_OTHER_LANGUAGES}",
    re.IGNORECASE | re.MULTILINE,
)
_DOUBTED_PHRASE = re.compile(
    r"\b(?:maybe|perhaps|possibly|if|whether|unsure|not sure)\b[^.!?\n]{0,40}$", re.IGNORECASE
)
_OPTION_IS_RIGHT = re.compile(
    r"\b(?:option|choice|statement)\s+\(?([A-J])\)?\s+is\s+(?:the\s+)?(?:correct|right|true)\b", re.IGNORECASE
)
# (a), part 2:, case 3. A number alone also numbers the steps of a solution, so it must stand directly before the box
_PART_LABEL = re.compile(
    r"(?:\b(?:part|case|question|problem)\s{0,3}\(?(?P<named>[a-h1-9]|i{1,3}|iv|v)\)?(?=[\s:.,)])|(?<![\w)(])\(?(?P<letter>[a-h]|i{1,3}|iv|v)\)\s"
    r"|(?m:^)\s{0,9}\(?(?P<number>[1-9])[.)]\s{0,3}(?=[$\\]))",
    re.IGNORECASE,
)
_PART_WITH_NUMBER = re.compile(
    rf"(?:{_PART_LABEL.pattern})(?:[:.]?\s{{0,3}}(?:the answer is|answer:)?\s{{0,3}}\$?(?:[A-Za-z]\s{{0,3}}=\s{{0,3}})?-?\d)",
    re.IGNORECASE,
)
_NAMED_VALUE_BEFORE = re.compile(
    r"[A-Za-z]\s{0,3}=\s{0,3}-?[\d./]{1,20}[$\s]{0,3},?\s{0,3}\band[$\s]{1,4}(?:[A-Za-z]\s{0,3}=\s{0,3})?\Z"
)
_REPLACED = re.compile(
    r"\b(?:but|however|instead|no|not|wrong|check(?:ing)?|re-?(?:check|count|comput|calculat)(?:e|ing)?|mistake|guess|try|correct(?:ed|ion)?|first i|then i)\b",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not|n't|never|cannot|can't|isn't|wasn't|doesn't|don't|couldn't|unable|wrong|incorrect|fail(?:s|ed)?|no (?:idea|answer))\b",
    re.IGNORECASE,
)
# Anywhere in the reply. "We cannot factor it" is a step of a solution, so the subject must be the writer
_GIVES_UP = re.compile(
    r"\b(?:I|we)\s(?:(?:really |just |still )?(?:do not|don't|cannot|can't|could not|couldn't|can not)\s(?:really |yet )?"
    r"(?:know|solve|answer|determine|find the (?:answer|solution)|figure)|have no (?:idea|answer|clue))"
    r"|\bI(?:'m| am)\s(?:not sure|unsure|not certain|unable|not able|stuck)|\bnot enough information|\bcannot be (?:determined|solved)"
    r"|\b(?:I|we) (?:give up|am unable)|不知道|无法(?:确定|求|解)",
    re.IGNORECASE,
)
_CHANGES_NUMBER = re.compile(
    r"\s*(?:hundred|thousand|million|billion|trillion|dozens?|score|percent|half|halves|thirds?|quarters?|[a-z]+ths?|fifths?"
    r"|squared|cubed|factorial|negative|minus|plus|times|divided|over|less|fewer|more than|and a|too|to the)\b",
    re.IGNORECASE,
)
_FORMULA = re.compile(r"\$([^$\n]{1,300})\$|\\\((.{1,300}?)\\\)")
_OPERATOR_BEFORE = re.compile(r"[+*/×÷·^<>≤≥]\s*$|(?<=\s)[-−–x]\s+$")
_BOUND_BEFORE = re.compile(
    r"\b(?:(?:more|less|fewer|greater|larger|smaller|higher|lower|other|rather) than|instead of|at (?:least|most)|up to|not|about|around|roughly"
    r"|nearly|almost|approximately|between)\s+$",
    re.IGNORECASE,
)
# 2+5=8 as the last word. With blanks, 2 + 5 = 8, the last word is the result too
_CALCULATION = re.compile(r"[\d.+*/×÷·()−-]+=(-?\d+(?:\.\d+)?)")
_MAX_WORD_CHARS = 60
_UNIT_AFTER_BOX = re.compile(
    r"(?:\s|\\[,;: ]|~)*(\\(?:text|mathrm|mbox|rm)\s*\{[^{}]{1,60}\}(?:\s*\^\s*\{?-?\d\}?)?|\^\s*\{?\s*\\circ\s*\}?|°|\\?%)"
    r"|\$?\s{1,2}((?:[A-Za-z]{2,12}|[A-Za-z]{1,4}/[a-z]{1,3})(?:\^\{?\d\}?)?)(?=[\s.,$]|$)"
)
_WORDS_THAT_ARE_UNITS = frozenset("in as at min ha am pm bar rad".split())
_EDGES = " \t\n*:`：$"


class _Box(NamedTuple):
    content: str
    start: int
    end: int


def closed_boxes(text: str) -> list[str]:
    r"""Returns the contents of every outermost \boxed{}, \fbox{} or \framebox{} that is closed, in order."""
    return [box.content for box in _find_boxes(text)]


def _find_boxes(text: str) -> list[_Box]:
    boxes: list[_Box] = []
    open_braces: list[
        tuple[int, int]
    ] = []  # start of the box and of its content; (-1, -1) for any other brace
    num_open_boxes = 0
    for token in _BOX_TOKENS.finditer(text):
        symbol = token.group()
        if symbol == "{":
            open_braces.append((-1, -1))
        elif symbol == "}":
            start, content = open_braces.pop() if open_braces else (-1, -1)
            if start >= 0:
                num_open_boxes -= 1
                if num_open_boxes == 0:
                    boxes.append(_Box(text[content : token.start()], start, token.end()))
        elif len(symbol) > 2:
            open_braces.append((token.start(), token.end()))
            num_open_boxes += 1
    return boxes


def extract_answer(text: str) -> str | None:
    """Returns the final answer of a response as it is written, or None if the response does not commit to an answer.

    Several answers that are joined, as in two boxes with "and" between them, are separated by commas.
    """
    return ", ".join(extract_answers(text)) or None


def extract_answers(text: str, num_values: int = 1) -> list[str]:
    r"""Returns what a response commits to, as it is written: [] for nothing, several texts for joined boxes.

    Blocks of reasoning are removed first. The answer is the content of the last closed \boxed{}, together with the boxes that
    are joined to it by "and", "or" or commas only. Without a box, or with empty boxes only, it is the text after the last phrase
    such as "answer is". Without such a phrase it is the last formula or word with a digit. A hedge or a retraction takes the
    commitment back.

    Args:
        text: the response.
        num_values: number of values of the gold answer. If it is above 1 and the reply has as many boxes, all of them count.
    """
    text = without_reasoning(text)
    boxes = [box for box in _find_boxes(text) if box.content.strip()]
    if boxes:
        return _from_boxes(text, boxes, num_values)
    answer = _without_box(text)
    return [answer] if answer else []


def _without_box(text: str) -> str | None:
    bare = list(_BARE_BOX.finditer(text))
    if bare:
        return bare[-1][1].strip()
    if _BOX_COMMAND.search(text) and not _find_boxes(text):
        return None
    if _ends_with_parts(text):
        return None
    phrase = _last_answer_phrase(text)
    if phrase is None and (options := _OPTION_IS_RIGHT.findall(text)):
        return options[-1] if len(set(options)) == 1 else None
    if phrase is None:
        # An empty box announces an answer that is missing
        return None if _find_boxes(text) else _last_number(text)
    if _DOUBTED_PHRASE.search(text[max(0, phrase.start() - 60) : phrase.start()]):
        return None
    return _after_phrase(text[phrase.end() :])


def _from_boxes(text: str, boxes: list[_Box], num_values: int) -> list[str]:
    tail = text[boxes[-1].end :]
    before = text[max(0, boxes[-1].start - 60) : boxes[-1].start]
    if (
        _RETRACTION.search(tail)
        or _recheck_differs(boxes[-1].content, tail)
        or _DENIED.match(tail)
        or _DOUBT_AFTER.match(tail)
        or _is_part_of_formula(text, boxes[-1])
        or _DOUBT_BEFORE.search(before)
        or (before.endswith("~~") and tail.startswith("~~"))
    ):
        return []
    joined = _joined_boxes(text, boxes)
    if len(joined) == 1 and len(boxes) == num_values > 1 and not _are_replaced(text, boxes):
        joined = boxes
    if len(joined) == 1 and len(boxes) > 1:
        joined = _boxes_of_parts(text, boxes) or joined
    contents = [_with_name(text, box) if len(joined) > 1 else _in_context(text, box) for box in joined]
    if len(joined) == 1:
        contents = _with_value_before(before, contents[0])
    alternative = _HEDGE_AFTER_BOX.match(tail)
    if alternative:
        sentence_end = _SENTENCE_END.search(alternative["other"])
        contents.append(
            alternative["other"][: sentence_end.start() if sentence_end else None].strip(_EDGES + ".,;()")
        )
    if listed := _LISTED_AFTER.match(tail):
        contents.append(listed[1])
    later = _LATER_ANSWER.search(tail)
    later_answer = _after_phrase(tail[later.end() :]) if later else None
    if later_answer and len(joined) == 1 and re.search(r"\d", later_answer):
        contents.append(later_answer)
    return list(dict.fromkeys(contents))


def _recheck_differs(answer: str, tail: str) -> bool:
    """Returns whether the text after an answer checks it once more, and ends with a number that the answer does not have."""
    recheck = _RECHECK.search(tail)
    numbers = _written_numbers(tail[recheck.end() :]) if recheck else []
    return bool(numbers) and numbers[-1] not in _written_numbers(answer)


def _written_numbers(text: str) -> list[str]:
    numbers = _WRITTEN_NUMBER.findall(_PLAIN_FRACTION.sub(r"\1/\2", text))
    return [re.sub(r",(?=\d{3}(?!\d))", "", number) for number in numbers]


def _with_value_before(before: str, content: str) -> list[str]:
    r"""Returns the content of a box together with a value that the text directly before it joins to it.

    ``x = 3 and x = \boxed{12}`` has two values of x, and ``13 or \boxed{12}`` two answers.
    """
    named = _SAME_NAME_BEFORE.search(before)
    if named and _names_one_unknown(named):
        return [f"{named['first']} = {named['value']}", f"{named['second']} = {content}"]
    if other := _ALTERNATIVE_BEFORE.search(before):
        return [other["formula"] or other["word"], content]
    return [content]


def _names_one_unknown(named: re.Match[str]) -> bool:
    """Returns whether two names are one, or x_1 and x_2 joined by a word. After commas, s_1 = 4, s_2 = 7 is a sequence."""
    if named["first"] == named["second"]:
        return True
    return named["join"] != "," and _unindexed(named["first"]) == _unindexed(named["second"])


def _unindexed(name: str) -> str:
    return re.sub(r"_?\{?\d{1,5}\}?\Z", "", name)


def _is_part_of_formula(text: str, box: _Box) -> bool:
    r"""Returns whether a box has a factor, an operator or other coordinates beside it, as in ``2\boxed{10}`` or ``\boxed{10}/3``."""
    before, tail = text[max(0, box.start - 100) : box.start], text[box.end : box.end + 100]
    if _CONTINUED.match(tail) or _COORDINATES_BEFORE.search(before) or _WORD_BEFORE.search(before):
        return True
    if before.rstrip().endswith(("(", "[", "\\{")) and _COORDINATES_AFTER.match(tail):
        return True
    if not _is_in_formula(text, box.start):
        return bool(_GLUED_FACTOR_BEFORE.search(before))
    return bool(_CONTINUED_FORMULA.match(tail) or _FACTOR_BEFORE.search(before))


def _is_in_formula(text: str, position: int) -> bool:
    r"""Returns whether a position is between dollar signs, ``\( \)`` or ``\[ \]``."""
    before = text[max(0, text.rfind("\n\n", 0, position)) : position].replace("\\$", "")
    brackets = max(before.rfind(r"\("), before.rfind(r"\["))
    is_open = brackets > max(before.rfind(r"\)"), before.rfind(r"\]"))
    before = before.replace("$$", "$")
    # Words after the last dollar sign show that it means the currency
    is_prose = _PROSE.search(_COMMANDS.sub("", before[before.rfind("$") + 1 :]))
    return is_open or (before.count("$") % 2 == 1 and not is_prose)


def _joined_boxes(text: str, boxes: list[_Box]) -> list[_Box]:
    """Returns the last box and those before it that are joined to it by connecting words only."""
    first = len(boxes) - 1
    while first > 0 and _is_join(text[boxes[first - 1].end : boxes[first].start]):
        first -= 1
    return boxes[first:]


def _boxes_of_parts(text: str, boxes: list[_Box]) -> list[_Box]:
    r"""Returns the last box of each labelled part, such as ``(a) \boxed{3} (b) \boxed{5}``.

    Returns [] if the last box has no label, or if all labelled boxes stand in one part.
    """
    labels = list(_PART_LABEL.finditer(text, 0, boxes[-1].start + 1))
    ends = [label.end() for label in labels]
    parts: dict[str, _Box] = {}
    for box in boxes:
        num_before = bisect_right(ends, box.start)
        label = labels[num_before - 1] if num_before else None
        if label and not (label["number"] and text[label.end() : box.start].strip("$ \\([")):
            parts[label.group().strip().lower()] = box
    is_last_labelled = bool(parts) and boxes[-1] in parts.values()
    return list(parts.values()) if is_last_labelled and len(parts) > 1 else []


def _is_join(between: str) -> bool:
    return len(between) <= 80 and _JOIN.fullmatch(between) is not None


def _are_replaced(text: str, boxes: list[_Box]) -> bool:
    """Returns whether the text from the first to the last box withdraws one of them."""
    return bool(_REPLACED.search(text[boxes[0].end : boxes[-1].start]))


def _in_context(text: str, box: _Box) -> str:
    r"""Returns the content of a box with a sign before it and a unit after it, as in ``-\boxed{60}\text{ m/s}``."""
    content = _innermost(box.content)
    if _SIGN_BEFORE.search(text[max(0, box.start - 40) : box.start]) and not content.startswith("-"):
        content = f"-{content}"
    after = _UNIT_AFTER_BOX.match(text, box.end)
    unit = (after[1] or after[2]) if after else ""
    if not unit or unit in _WORDS_THAT_ARE_UNITS or not re.fullmatch(r".*[\d}!]", content.strip(), re.DOTALL):
        return content
    if unit.endswith("%"):
        return f"{content}\\%"
    is_table_unit = unit_is_known(unit)
    return f"{content} {unit if after and after[1] else f'\\text{{{unit}}}'}" if is_table_unit else content


def _with_name(text: str, box: _Box) -> str:
    r"""Returns the content of a box with the name before it, as in ``x = \boxed{3}``."""
    content = _innermost(box.content)
    named = None if "=" in content else _NAME_BEFORE.search(text[max(0, box.start - 40) : box.start])
    return f"{named[1]} = {content}" if named else content


def _innermost(content: str) -> str:
    r"""Returns the inner box's content for ``\boxed{x = \boxed{5}}``."""
    inner = closed_boxes(content)
    if not inner:
        return content.strip()
    return inner[-1].strip() or _EMPTY_BOX.sub("", content).strip()


def _ends_with_parts(text: str) -> bool:
    """Returns whether the last number is that of a labelled part, and other parts have numbers, as in ``(a) 3 (b) 5``."""
    parts = [part for part in _PART_WITH_NUMBER.finditer(text) if not part["number"]]
    if not parts or re.search(r"\D\d", text[parts[-1].end() :]):
        return False
    return len({part["named"] or part["letter"] for part in parts}) > 1


def _last_answer_phrase(text: str) -> re.Match[str] | None:
    """Returns the last phrase that announces the answer. "Answer" comes before "result" and "solution"."""
    phrases = list(_ANSWER_PHRASE.finditer(text))
    announced = [p for p in phrases if not _ANSWER_ONLY_PHRASE.match(p.group())]
    found = announced or [p for p in phrases if re.match(r"\W*[$\\(\[-]*\d", text[p.end() : p.end() + 20])]
    return found[-1] if found else None


def _after_phrase(rest: str) -> str | None:
    """Returns the answer after a phrase: the rest of the sentence without reasons that follow the answer."""
    whole = rest
    line = rest.lstrip(_EDGES).partition("\n")[0] if not rest.lstrip(_EDGES).startswith("[") else rest
    line = _display_math(rest.lstrip(" \t\n*:`：")) or line
    sentence_end = _SENTENCE_END.search(line)
    sentence, rest = (
        (line[: sentence_end.start()], line[sentence_end.start() :]) if sentence_end else (line, "")
    )
    after_sentence = whole[whole.find(sentence) + len(sentence) :]
    if rest.startswith(("?", "？")) or _RETRACTION.search(after_sentence) or _OTHER_SENTENCE.match(rest):
        return None
    if _recheck_differs(sentence, after_sentence):
        return None
    clause = _CLAUSE.search(sentence, 1)
    if clause and clause.start() > 0:
        if _HEDGE.search(sentence[clause.start() :]):
            return None
        sentence = sentence[: clause.start()]
    sentence = sentence.strip(_EDGES.rstrip("$") + ".,;")
    # The opening sign before the answer has been removed. In "the value is $5$" the last sign has a partner
    if sentence.endswith("$") and sentence.count("$") % 2 == 1:
        sentence = sentence[:-1].strip(_EDGES + ".,;")
    return sentence or None


def _display_math(rest: str) -> str | None:
    r"""Returns a formula that stands on lines of its own, as in ``\[ ... \]``, else None."""
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):
        if rest.startswith(opening):
            end = rest.find(closing, len(opening))
            if end > 0:
                return " ".join(rest[len(opening) : end].split())
    return None


def _last_number(text: str) -> str | None:
    """Returns the last formula or word with a digit; None if its sentence hedges, or if the text after it withdraws it."""
    # A deque of length 1 keeps the last match without storing the others
    numbers = deque(_NUMBER.finditer(text), maxlen=1)
    if not numbers or not numbers[0].group().strip():
        return None
    if _GIVES_UP.search(text.replace("’", "'")):
        return None
    number = numbers[0]
    starts = deque((m.end() for m in _SENTENCE_END.finditer(text, 0, number.start())), maxlen=1)
    sentence_start = max(starts[0] if starts else 0, text.rfind("\n", 0, number.start()) + 1)
    end = _SENTENCE_END.search(text, number.end())
    sentence = text[sentence_start : end.end() if end else len(text)]
    if sentence.rstrip().endswith(("?", "？")) or _HEDGE.search(sentence):
        return None
    if _NEGATION.search(text, sentence_start) or _RETRACTION.search(text, number.end()):
        return None
    formula = _formula_around(text, number)
    if formula is not None:
        is_range_end = _RANGE_BEFORE.search(text[max(0, formula.start() - 60) : formula.start()])
        return None if is_range_end else (formula[1] or formula[2]).strip()
    start, stop = _word_around(text, number)
    before = text[max(0, start - 60) : start]
    if _RANGE_BEFORE.search(before):
        return None
    if _CHANGES_NUMBER.match(text, stop) or _OPERATOR_BEFORE.search(before) or _BOUND_BEFORE.search(before):
        return None
    if _NAMED_VALUE_BEFORE.search(before):
        return None
    word = text[start:stop].strip(_EDGES.rstrip("$") + ".,;!")
    calculation = _CALCULATION.fullmatch(word)
    return calculation[1] if calculation else word or None


def _formula_around(text: str, number: re.Match[str]) -> re.Match[str] | None:
    r"""Returns the formula between dollar signs or ``\( \)`` that contains a number, else None."""
    line_start = text.rfind("\n", 0, number.start()) + 1
    for formula in _FORMULA.finditer(text, line_start):
        if formula.start() > number.start():
            return None
        if formula.end() >= number.end():
            return formula
    return None


def _word_around(text: str, number: re.Match[str]) -> tuple[int, int]:
    """Returns start and end of the word around a number, up to the next white space: ``x=5``, ``sqrt(2)``, ``3:4``."""
    start, stop = number.start(), number.start() + len(number.group().rstrip())
    while start > 0 and not text[start - 1].isspace() and number.start() - start < _MAX_WORD_CHARS:
        start -= 1
    while stop < len(text) and not text[stop].isspace() and stop - number.end() < _MAX_WORD_CHARS:
        stop += 1
    return start, stop
