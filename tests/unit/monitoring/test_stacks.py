"""The stack of a process that holds Python's lock is read from outside."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rasft.monitoring import stacks
from megatron_rasft.monitoring.stacks import stack_of

HOLDER = """
import ctypes

def holds_the_lock():
    # PR_SET_PTRACER: Yama lets every process read this one, also without CAP_SYS_PTRACE.
    ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)
    print("began", flush=True)
    ctypes.PyDLL(None).sleep(600)

holds_the_lock()
"""


@pytest.mark.skipif(
    shutil.which("py-spy", path=str(Path(sys.executable).parent)) is None, reason="py-spy is not installed"
)
def test_process_that_holds_pythons_lock_shows_its_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, "_PATIENCE_S", 600.0)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"began\n"
        assert any("holds_the_lock" in frame for frame in stack_of(holder.pid))
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("script", ["echo 'no permission' >&2; exit 1", "echo nothing", "echo '[]'"])
def test_reason_why_py_spy_fails_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    program = tmp_path / "py-spy"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert stack_of(4711) == ()
    error = capsys.readouterr().err
    assert "process 4711" in error and ("no permission" in error) == ("permission" in script)


def test_without_py_spy_there_is_no_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks.shutil, "which", lambda *args, **kwargs: None)
    assert stack_of(4711) == ()
