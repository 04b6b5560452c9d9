"""What ``--help`` and ``--help=WORD`` print about this package's flags. Needs neither torch nor Megatron."""

import re
import textwrap

from megatron_rasft.config import RasftConfig
from megatron_rasft.config.parser import FlagParser, add_flags
from megatron_rasft.flags import FlagSection, flag_name

MEGATRON = "megatron"
"""``--help=megatron`` asks for Megatron's flags, ``--help=megatron:WORD`` for those with a word."""

_WIDTH = 130
_NAME_WIDTH = 36
# Groups of which --help lists only the names of the flags, or of the flags from this one on
_NAMES_ONLY = {
    "curriculum": "curriculum_low_start",
    "verification": "verify_code_timeout_s",
    "weight sync": "sync_timeout_s",
}
_START = """\
Rollout-Adaptive Supervised Fine-Tuning on Megatron-Core.

    torchrun --nproc-per-node N pretrain_rasft.py --hf-model DIR --train-data FILE.jsonl --save DIR [flags]

All flags of Megatron-Core's pretraining are accepted too, or refused with a reason: --lr, --global-batch-size, --train-iters, ...
    --help=WORD            the full help of the flags and groups that contain WORD: --help=rollouts, --help=clip
    --help=megatron        Megatron's flags, with the refused ones marked, and the defaults that differ here (takes some seconds)
    --help=megatron:WORD   those that contain WORD: --help=megatron:lr
"""


def overview() -> str:
    """The text of ``--help``: one line a flag, by groups."""
    lines = [_START]
    for title, section in RasftConfig.sections().items():
        lines += [f"{title}: {_first_sentence(section.__doc__ or '')}"]
        docs = section.docs()
        names = list(section.flag_fields())
        start = 0 if title.startswith("objective ") else len(names)
        if title in _NAMES_ONLY:
            start = names.index(_NAMES_ONLY[title])
        lines += [_line(name, docs[name]) for name in names[:start]]
        lines += _wrapped([flag_name(name) for name in names[start:]])
    return "\n".join(lines)


def _line(name: str, doc: str) -> str:
    meaning = textwrap.shorten(
        _first_sentence(doc), _WIDTH - _NAME_WIDTH - 2, placeholder=" ...", break_on_hyphens=False
    )
    return f"  {flag_name(name):<{_NAME_WIDTH}}{meaning}"


def _first_sentence(doc: str) -> str:
    return " ".join(doc.split()).split(". ", 1)[0].rstrip(".")


def _wrapped(flags: list[str]) -> list[str]:
    return textwrap.wrap(
        "  ".join(flags), _WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
    )


def about(word: str) -> str:
    """The text of ``--help=WORD``: this package's groups and flags with that word; "" if there are none.

    A title or a flag may contain the word anywhere, a help text only as a whole word.
    """
    word = word.lower().lstrip("-").replace("_", "-")
    parser = FlagParser(usage="pretrain_rasft.py [flags]", add_help=False)
    found = False
    for title, section in RasftConfig.sections().items():
        names = _names_with(word, title, section)
        if names:
            add_flags(parser.add_argument_group(title, section.__doc__), section, only=names)
            found = True
    if not found:
        return ""
    return f"{parser.format_help()}\nMegatron's flags that contain it: --help={MEGATRON}:{word}"


def _names_with(word: str, title: str, section: type[FlagSection]) -> set[str]:
    docs = section.docs()
    if word in title.replace(" ", "-"):
        return set(docs)
    whole = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])")
    return {
        name
        for name, doc in docs.items()
        if word in flag_name(name) or whole.search(doc.lower().replace("_", "-"))
    }
