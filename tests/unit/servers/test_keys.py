"""A key that a request cannot carry is refused when it is read, and is never quoted."""

import pytest

from megatron_rasft.servers.keys import read_key


def test_a_key_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "a key: with # signs")
    assert read_key("--key-env", "KEY") == "a key: with # signs"
    assert read_key("--key-env", None) is None


@pytest.mark.parametrize("name", ["NOT_SET_HERE", "EMPTY"])
def test_a_variable_without_a_key_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(ValueError, match=f"--key-env {name}:"):
        read_key("--key-env", name)


@pytest.mark.parametrize("key", ["hidden\n", "hidden\r", " hidden", "hid\tden", "hid\nden", "hiddén"])
def test_a_key_that_a_header_cannot_carry_is_refused_and_not_quoted(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("KEY", key)
    with pytest.raises(ValueError, match="--key-env KEY:") as caught:
        read_key("--key-env", "KEY")
    assert "hid" not in str(caught.value)
