import subprocess
import sys

import pytest

from megatron_rasft.errors import DataError, FailedElsewhere
from megatron_rasft.tools import cli


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (ValueError("--top is 0"), 2, "error: --top is 0\n"),
        (DataError("no rows"), 1, "error: no rows\n"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (FailedElsewhere(), 1, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_expected_errors_are_one_line(
    error: BaseException, code: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    assert cli.run(main) == code
    assert capsys.readouterr() == ("", printed)


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_exit_code_of_main_and_its_arguments_pass_through(returned: int | None, code: int) -> None:
    def main(argv: list[str], *, flag: bool) -> int | None:
        assert (argv, flag) == (["--x"], True)
        return returned

    assert cli.run(main, ["--x"], flag=True) == code


def test_bugs_keep_their_traceback() -> None:
    def main() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        cli.run(main)


def test_a_closed_pipe_ends_a_tool_silently() -> None:
    program = (
        "import sys; from megatron_rasft.tools import cli; sys.exit(cli.run(lambda: print('x\\n' * {lines})))"
    )
    for lines in (1, 100_000):  # fails once when stdout is flushed at the end, and once within print
        tool = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read(); " + program.format(lines=lines)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert tool.stdin is not None and tool.stdout is not None and tool.stderr is not None
        tool.stdout.close()
        tool.stdin.close()  # only now the tool prints
        assert tool.stderr.read() == b"" and tool.wait() == 141
