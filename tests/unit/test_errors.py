import pytest

from megatron_rasft.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [("one", "one"), ("\n  one \ntwo", "one"), ("", "ValueError"), (" \n", "ValueError")],
)
def test_first_line_of_an_error(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line


def test_an_empty_message_has_a_default() -> None:
    assert first_line(AssertionError(), "refused") == "refused"
    assert first_line(AssertionError("why"), "refused") == "why"
