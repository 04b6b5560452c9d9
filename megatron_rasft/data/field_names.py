"""Finds wrong names of fields before a data set is read, and names the flags that correct them."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rasft.config.data import DataConfig
from megatron_rasft.data.chats import SHAREGPT_FIELD
from megatron_rasft.errors import DataError
from megatron_rasft.flags import flag_name

_USUAL_NAMES = {
    "problem": ("question", "prompt", "instruction", "query", "input", "problem_statement", "text"),
    "response": ("solution", "output", "completion", "generation", "generated_solution", "reasoning"),
    "answer": ("final_answer", "expected_answer", "gold_answer", "ground_truth", "correct_answer", "target"),
    "tests": ("test", "test_list", "test_cases", "unit_tests"),
    "messages": ("conversation", "chat", "dialogue", "dialog", "turns"),
}
"""Kind of a field -> names that published data sets use for it, the likeliest first."""


def check_names(
    path: Path,
    names: Sequence[str],
    config: DataConfig,
    require_answer: bool,
    texts: Sequence[str] = ("problem", "response"),
) -> None:
    """Checks that a data set has the fields that ``config`` names.

    Args:
        path: the data set, for the message.
        names: its fields; none if they are unknown.
        config: the names of the fields.
        require_answer: whether rows need a gold answer or tests.
        texts: kinds of the fields that rows without a chat need.

    Raises:
        DataError: no row has the text fields, or no row has the answer's, and another name is likely.
    """
    if not names:
        return
    free = [name for name in names if name not in _used(config)]
    has_chat = config.data_messages_field in names or SHAREGPT_FIELD in names
    missing = [] if has_chat else [kind for kind in texts if _field(kind, config) not in names]
    flags = {kind: name for kind in missing if (name := _likely(kind, free, config))}
    if missing and "problem" not in flags and (chat := _likely("messages", free, config)):
        missing, flags = ["messages"], {"messages": chat}
    if require_answer and not {config.data_answer_field, config.data_tests_field}.intersection(names):
        free = [name for name in free if name not in flags.values()]
        kind = next((kind for kind in ("answer", "tests") if _likely(kind, free, config)), "answer")
        if missing or _likely(kind, free, config):
            missing, flags = [*missing, kind], {**flags, kind: _likely(kind, free, config) or "NAME"}
    if missing:
        raise DataError(_message(path, names, missing, flags, config))


def _used(config: DataConfig) -> list[str]:
    return [value for name, value in vars(config).items() if name.endswith("_field")]


def _field(kind: str, config: DataConfig) -> str:
    name: str = getattr(config, _attribute(kind))
    return name


def _attribute(kind: str) -> str:
    return f"data_{kind}_field"


def _likely(kind: str, names: Sequence[str], config: DataConfig) -> str:
    """Returns the name that most likely stands for a field, or ""."""
    by_lower = {name.lower(): name for name in reversed(names)}
    wanted = _field(kind, config).lower()
    usual = next((name for name in (wanted, kind, *_USUAL_NAMES[kind]) if name in by_lower), None)
    similar = difflib.get_close_matches(wanted, by_lower, n=1, cutoff=0.8)
    found = usual or next(iter(similar), None)
    return by_lower[found] if found else ""


def _message(
    path: Path, names: Sequence[str], missing: Sequence[str], flags: Mapping[str, str], config: DataConfig
) -> str:
    lacking = " or ".join(f'"{_field(kind, config)}"' for kind in missing)
    given = " ".join(f"{flag_name(_attribute(kind))} {flags.get(kind, 'NAME')}" for kind in missing)
    advice = f"Give {given}."
    if "response" in missing and "response" not in flags and config.data_answer_field in names:
        advice += (  # as in GSM8K's own files
            f' If "{config.data_answer_field}" holds the whole solution: tools/prepare_data.py convert --rename '
            f"{config.data_answer_field}=response --answers-from-responses."
        )
    return f"{path} has no field {lacking}. Its fields are {', '.join(names)}. {advice}"


def renamed(config: DataConfig, pairs: Sequence[str]) -> DataConfig:
    """Returns the configuration that reads the field OLD as NEW, for each OLD=NEW of ``pairs``.

    Raises:
        ValueError: a pair has another form, or NEW is not a kind of field or occurs twice.
    """
    kinds = [
        name.removeprefix("data_").removesuffix("_field") for name in vars(config) if name.endswith("_field")
    ]
    changes: dict[str, str] = {}
    for pair in pairs:
        old, _, new = pair.partition("=")
        if not old or new not in kinds:
            raise ValueError(f"--rename {pair} must be OLD=NEW, where NEW is one of {', '.join(kinds)}.")
        if _attribute(new) in changes:
            raise ValueError(f"--rename {pair}: {new} is given twice. Name one field for it.")
        changes[_attribute(new)] = old
    # answer=response leaves no field for the answer: the two exchange their names, so that no field is read twice
    by_old = {old: attribute for attribute, old in changes.items()}
    for attribute in map(_attribute, kinds):
        name = getattr(config, attribute)
        if attribute not in changes and name in by_old:
            changes[attribute] = getattr(config, by_old[name])
    return replace(config, **changes)  # type: ignore[arg-type]
