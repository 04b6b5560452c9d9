"""Without Megatron-Bridge, --model-source bridge ends with one line that says how to install it."""

import sys

import pytest

from megatron_rasft.bridge.package import import_auto_bridge


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)  # as if it were not installed
    with pytest.raises(ValueError) as raised:
        import_auto_bridge("--model-source bridge")
    message = str(raised.value)
    assert "\n" not in message
    assert all(part in message for part in ("--model-source bridge", "make bridge", "Transformer Engine"))
