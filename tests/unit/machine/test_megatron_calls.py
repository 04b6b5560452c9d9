"""Closing a context restores Megatron's output, arguments and hooks."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.machine import megatron_calls
from megatron_rasft.machine.megatron_calls import VERBOSE, overridden, parameters_gathered, quiet


@pytest.mark.parametrize("is_verbose", [False, True])
def test_output_is_hidden_unless_it_is_asked_for(
    is_verbose: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VERBOSE, raising=False)
    if is_verbose:
        monkeypatch.setenv(VERBOSE, "1")
    with quiet():
        print("Megatron's page")
    print("after")
    assert capsys.readouterr().out == ("Megatron's page\n" if is_verbose else "") + "after\n"


def test_arguments_are_set_for_a_call_that_may_fail() -> None:
    args: Any = SimpleNamespace(load="given", ckpt_step=3, save="kept")
    with pytest.raises(RuntimeError), overridden(args, load=None, ckpt_step=None):
        assert vars(args) == {"load": None, "ckpt_step": None, "save": "kept"}
        raise RuntimeError
    assert vars(args) == {"load": "given", "ckpt_step": 3, "save": "kept"}


def test_an_argument_that_megatron_does_not_have_is_an_error() -> None:
    with pytest.raises(AttributeError), overridden(SimpleNamespace(), load=None):  # type: ignore[arg-type]
        pass


class Chunk:
    """A wrapped chunk, with or without the hooks of overlapped gathering."""

    def __init__(self, has_hooks: bool) -> None:
        self.remove_forward_pre_hook_handles = {"a": "hook"} if has_hooks else {}


@pytest.mark.parametrize(
    ("flags", "has_hooks", "notes"),
    [
        ((True, True), True, ["gather True", "hooks off", "inside", "hooks on"]),
        ((True, False), True, ["inside"]),
        ((False, True), True, ["inside"]),
        ((True, True), False, ["inside"]),  # like the export of a sync over the disk
    ],
)
def test_hooks_are_off_while_parameters_are_gathered(
    flags: tuple[bool, bool], has_hooks: bool, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    args: Any = SimpleNamespace(use_distributed_optimizer=flags[0], overlap_param_gather=flags[1])

    def disable(model: Any, param_sync: bool) -> None:
        found.extend([f"gather {param_sync}", "hooks off"])

    monkeypatch.setattr(megatron_calls.training, "disable_forward_pre_hook", disable)
    monkeypatch.setattr(
        megatron_calls.training, "enable_forward_pre_hook", lambda model: found.append("hooks on")
    )
    with parameters_gathered(args, [Chunk(has_hooks)], are_stale=True):  # type: ignore[list-item]
        found.append("inside")
    assert found == notes
