"""The flags that are read from Megatron's source are those of its parser."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_rasft.config import megatron_flags
from megatron_rasft.config.megatron_flags import add_megatron_flags
from megatron_rasft.config.parser import FlagParser

ARGUMENTS = """
def add_megatron_arguments(parser):
    parser = _add_training_args(parser)
    return parser

def _add_training_args(parser):
    {}
    return parser
"""


def by_option(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {option: action for action in parser._actions for option in action.option_strings}


def titles(parser: argparse.ArgumentParser) -> dict[str, str | None]:
    return {action.dest: group.title for group in parser._action_groups for action in group._group_actions}


def test_every_flag_is_that_of_megatrons_parser() -> None:
    read, real = FlagParser(add_help=False), FlagParser(add_help=False)
    assert add_megatron_flags(read)
    add_megatron_arguments(real)
    found, expected = by_option(read), by_option(real)
    assert {option for option in found.keys() - expected.keys() if "kitchen" not in option} == set()
    assert titles(real).items() <= titles(read).items()
    for option, action in expected.items():
        same = found[option]
        assert (same.dest, same.nargs, same.const) == (action.dest, action.nargs, action.const), option
        assert type(same) is type(action), option
        # Functions of Megatron are not called, so that their flags accept any text here
        if action.type in (int, float, str, None) and action.nargs != 0:
            assert same.type == action.type and same.default in (action.default, None), option
        if same.choices is not None:
            assert tuple(same.choices) == tuple(action.choices or ()), option


def source(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts another Megatron in place of the installed one."""
    (folder / "training").mkdir()
    (folder / "training" / "arguments.py").write_text(ARGUMENTS.format(body), encoding="utf-8")
    spec: Any = argparse.Namespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(megatron_flags.importlib.util, "find_spec", lambda name: spec)


@pytest.mark.parametrize(
    ("body", "is_complete"),
    [
        ("parser.add_argument('--new', type=int)", True),
        ("parser.add_argument(*names('new'))", False),
        ("ArgumentGroupFactory(Unknown).build_group(parser, 'new')", False),
    ],
)
def test_a_source_that_is_not_understood_is_incomplete(
    body: str, is_complete: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path, body, monkeypatch)
    assert add_megatron_flags(FlagParser(add_help=False)) == is_complete


def test_without_megatron_no_flag_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_flags.importlib.util, "find_spec", lambda name: None)
    assert not add_megatron_flags(FlagParser(add_help=False))
