"""Runs tools/gpu_check.py with small programs as steps: deadlines, failures, the report, exit codes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.tools import cli
from tools import gpu_check
from tools.gpu_checking import processes, report
from tools.gpu_checking.processes import Command, Started
from tools.gpu_checking.steps import STEPS, Setting, Step

ROOT = Path(__file__).resolve().parents[3]


def step(name: str, code: str, **more: Any) -> Step:
    """A step that runs a few lines of Python, which can use the step's folder as ``folder``."""

    def command(setting: Setting) -> Command:
        return Command(
            program=["-c", f"from pathlib import Path\nfolder = Path({str(setting.folder)!r})\n{code}"]
        )

    fields = {"number": 0, "title": f"the step {name}", "deadline_s": 600, "after": "", **more}
    return Step(name=name, command=command, **fields)


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "figures.json").read_text())


def machine(**facts: Any) -> Step:
    """The first step of every check."""
    text = json.dumps({"num_gpus": 1, "torch": "2.11.0", **facts})
    return step("versions", f"(folder / 'figures.json').write_text({text!r})", figures=figures)


def check(
    tmp_path: Path, *steps: Step, flags: tuple[str, ...] = (), **more: Any
) -> tuple[int, report.Report]:
    code = cli.run(gpu_check.main, ["--output", str(tmp_path), *flags], steps=[machine(), *steps], **more)
    return code, report.read(tmp_path / report.JSON_FILE)


def by_name(found: report.Report) -> dict[str, report.Result]:
    return {result.name: result for result in found.steps}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_ended(pids: Sequence[int | str]) -> None:
    """Waits until the processes have ended, because on a busy machine a killed process ends only after a moment."""
    ends = time.monotonic() + 600
    while (left := [pid for pid in pids if is_running(int(pid))]) and time.monotonic() < ends:
        time.sleep(0.02)
    assert not left


def wait_for(path: Path) -> str:
    while not path.exists() or not path.read_text().endswith("\n"):
        time.sleep(0.02)
    return path.read_text()


def begin_and_wait(path: Path) -> processes.Start:
    """Starts a program and returns when it has written a line to ``path``, so that a deadline of zero does not end the program
    earlier."""

    def begin(command: Command, log: Path) -> Started:
        started = processes.start(command, log)
        if str(path) in " ".join(command.program):
            wait_for(path)
        return started

    return begin


def hanging(path: Path, prologue: str = "") -> str:
    """Code that starts a process in a new session, writes both ids to ``path`` and sleeps."""
    return (
        f"import os, subprocess, sys, time\n{prologue}\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        f"Path({str(path)!r}).write_text(f'{{os.getpid()}} {{child.pid}}\\n')\n"
        "time.sleep(600)"
    )


def test_step_that_hangs_is_killed_with_its_descendants_and_the_rest_goes_on(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    code, found = check(
        tmp_path / "out",
        step("hangs", "print('began', flush=True)\n" + hanging(ids), deadline_s=0.01),
        step("next", "pass"),
        begin=begin_and_wait(ids),
    )
    assert code == 1
    assert by_name(found)["hangs"].status == "timed out"
    assert by_name(found)["hangs"].last_lines == ["began"]
    assert by_name(found)["next"].status == "passed"
    assert_ended(ids.read_text().split())


def test_step_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    ids = tmp_path / "ids"
    deaf = hanging(ids, "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)")
    _, found = check(tmp_path / "out", step("deaf", deaf, deadline_s=0.01), begin=begin_and_wait(ids))
    assert by_name(found)["deaf"].status == "timed out"
    assert_ended(ids.read_text().split())


def test_process_that_a_step_leaves_behind_is_killed_and_counted(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    leaves = (
        hanging(ids)
        .replace("time.sleep(600)", "sys.exit()", 2)
        .replace("'import time; sys.exit()'", "'import time; time.sleep(600)'")
    )
    code, found = check(tmp_path / "out", step("leaves", leaves))
    result = by_name(found)["leaves"]
    assert (code, result.status, result.left_behind) == (0, "passed", 1)
    assert_ended(ids.read_text().split()[1:])
    assert "left 1 processes running" in report.markdown(found)


def test_last_lines_of_a_failure_are_in_both_files_and_the_whole_in_the_log(tmp_path: Path) -> None:
    code, found = check(
        tmp_path,
        step("breaks", "for i in range(100): print('line', i)\nraise SystemExit('no room left')"),
        step("next", "pass"),
    )
    assert code == 1
    result = by_name(found)["breaks"]
    assert (result.status, result.reason) == ("failed", "exit code 1")
    assert result.last_lines == [f"line {i}" for i in range(61, 100)] + ["no room left"]
    assert "no room left" in (tmp_path / report.MARKDOWN_FILE).read_text()
    assert "line 0\n" in (tmp_path / report.LOG_FILE).read_text()
    assert by_name(found)["next"].status == "passed"


@pytest.mark.parametrize(
    ("written", "more", "reason"),
    [
        ('{"ratio": 1.0}', {}, ""),
        ('{"ratio": 1.2}', {}, "ratio is 1.2, not between 0.9 and 1.1"),
        ('{"ratio": null}', {}, "ratio is None, not between 0.9 and 1.1"),
        ('{"ratio": 1.0}', {"wants": ("speed",)}, "it gave no speed"),
        ("{", {}, "JSONDecodeError"),
    ],
)
def test_step_passes_only_with_its_figures(tmp_path: Path, written: str, more: Any, reason: str) -> None:
    writes = step(
        "writes",
        f"(folder / 'figures.json').write_text({written!r})",
        figures=figures,
        bounds={"ratio": (0.9, 1.1)},
        **more,
    )
    code, found = check(tmp_path, writes)
    assert code == bool(reason)
    assert reason in by_name(found)["writes"].reason and bool(by_name(found)["writes"].reason) == bool(reason)


def test_step_that_is_not_possible_here_names_its_reason(tmp_path: Path) -> None:
    code, found = check(
        tmp_path,
        step("breaks", "raise SystemExit(1)"),
        step("builds_on_it", "pass", after="breaks"),
        step(
            "for_two", "pass", obstacle=lambda setting: f"needs 2 GPUs, this machine has {setting.num_gpus}"
        ),
    )
    assert code == 1
    reasons = {name: (r.status, r.reason) for name, r in by_name(found).items()}
    assert reasons["builds_on_it"] == ("not run", "needs the step breaks, which is: failed")
    assert reasons["for_two"] == ("not run", "needs 2 GPUs, this machine has 1")


def test_total_deadline_shortens_a_step_and_leaves_out_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now[0]))
    steps = [
        step("long", "pass", deadline_s=500),
        step("shortened", "pass", deadline_s=500),
        step("late", "pass", deadline_s=500),
    ]
    took = {"versions": 10.0, "long": 300.0, "shortened": 160.0}

    def begin(command: Command, log: Path) -> Started:
        now[0] += took[log.parent.name]
        return processes.start(command, log)

    code, found = check(tmp_path, *steps, flags=("--limit-s", "500"), begin=begin)
    results = by_name(found)
    assert results["long"].deadline_s == 500 - 10 - gpu_check.RESERVE_S
    assert results["shortened"].deadline_s == 500 - 310 - gpu_check.RESERVE_S
    assert (results["late"].status, results["late"].reason) == (
        "not run",
        "the 500 s of --limit-s are used up",
    )
    assert (code, found.seconds) == (0, 470)


def test_without_a_gpu_the_check_says_so_and_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.run(
            gpu_check.main, ["--output", str(tmp_path)], steps=[machine(num_gpus=0), step("next", "pass")]
        )
        == 2
    )
    assert "no GPU was found by torch 2.11.0" in capsys.readouterr().err
    assert not (tmp_path / report.JSON_FILE).exists()


def test_torch_that_does_not_import_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = step(
        "versions", "raise ImportError('libcudart.so.13: cannot open shared object file')", figures=figures
    )
    assert cli.run(gpu_check.main, ["--output", str(tmp_path)], steps=[broken]) == 2
    assert "libcudart.so.13: cannot open" in capsys.readouterr().err


def test_the_program_itself_finds_no_gpu_here(tmp_path: Path) -> None:
    """Starts the check like `make gpu-check`, with hidden GPUs."""
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", "--output", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "no GPU was found" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("target", "command"),
    [
        ("gpu-check", "tools/gpu_check.py --output runs/gpu_check --shape tiny"),
        ("gpu-bundle", "tools/gpu_bundle.py --shape tiny"),
    ],
)
def test_make_starts_the_programs_without_an_environment(target: str, command: str) -> None:
    line = ["make", "--dry-run", "--no-print-directory", target]
    line += ["ARGS=--shape tiny", "VENV=nowhere", "PYTHON=python3.12"]
    # `make test` may run this test, and would pass its own flags and variables on to this make
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f'"python3.12" {command}\n'


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--steps", "11"], "there is no such step. Choose from versions (0)"),
        (["--hf-model", "nowhere"], "--hf-model nowhere"),
        (["--limit-s", "0"], "--limit-s must be > 0"),
        (["--sglang-python", "nowhere"], "--sglang-python nowhere is not a file"),
        (["--scratch", "nowhere"], "--scratch nowhere is not a folder"),
        (["--merge", "nowhere"], "nowhere is not a report"),
    ],
)
def test_wrong_flags_are_refused(
    tmp_path: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(gpu_check.main, ["--output", str(tmp_path / "out"), *flags], steps=[machine()]) == 2
    assert says in capsys.readouterr().err


def test_chosen_steps_bring_those_that_they_need(tmp_path: Path) -> None:
    steps = [step("base", "pass"), step("one", "pass", after="base", number=7), step("two", "pass", number=8)]
    _, found = check(tmp_path, *steps, flags=("--steps", "7"))
    assert [r.status for r in found.steps] == ["passed", "passed", "passed", "not run"]
    assert found.steps[3].reason == "not chosen"


def test_check_that_is_killed_leaves_its_report_and_no_process(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    program = (
        "from pathlib import Path\nfrom tools import gpu_check\nfrom tests.unit.tools.test_gpu_check import *\n"
        "gpu_check.end_on_signals()\n"
        f"gpu_check.main(['--output', {str(tmp_path)!r}], steps=[machine(), step('hangs', hanging(Path({str(ids)!r})))])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    pids = [int(pid) for pid in wait_for(ids).split()]
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 128 + signal.SIGTERM
    assert_ended(pids)
    found = report.read(tmp_path / report.JSON_FILE)
    assert [(r.name, r.status, r.reason) for r in found.steps] == [
        ("versions", "passed", ""),
        ("hangs", "not run", "not reached"),
    ]


def test_reports_of_chosen_steps_are_joined(tmp_path: Path) -> None:
    steps = [step("one", "pass"), step("two", "raise SystemExit(3)")]
    for name in ("one", "two"):
        check(tmp_path / name, *steps, flags=("--steps", name, "--commit", "abc"))
    files = [str(tmp_path / name / report.JSON_FILE) for name in ("one", "two")]
    assert cli.run(gpu_check.main, ["--output", str(tmp_path), "--merge", *files]) == 1
    found = by_name(report.read(tmp_path / report.JSON_FILE))
    assert (found["one"].status, found["two"].status) == ("passed", "failed")


def test_reports_of_two_commits_are_not_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        check(tmp_path / name, flags=("--commit", name))
    files = [str(tmp_path / name / report.JSON_FILE) for name in ("one", "two")]
    assert cli.run(gpu_check.main, ["--output", str(tmp_path), "--merge", *files]) == 2
    assert "different commits" in capsys.readouterr().err


def test_an_emulated_check_says_that_nothing_was_measured(tmp_path: Path) -> None:
    assert cli.run(gpu_check.main, ["--output", str(tmp_path)], steps=[machine(emulated=True)]) == 0
    assert report.read(tmp_path / report.JSON_FILE).emulated
    assert "no figure below is a measurement" in (tmp_path / report.MARKDOWN_FILE).read_text()


def test_training_speeds_stand_side_by_side(tmp_path: Path) -> None:
    def writes(name: str, speeds: dict[str, float]) -> Step:
        text = json.dumps({f"measured {kind} tokens_per_s": speed for kind, speed in speeds.items()})
        return step(name, f"(folder / 'figures.json').write_text({text!r})", figures=figures)

    check(
        tmp_path,
        writes("bf16", {"rasft packed": 47000.4, "sft packed": 50000.0}),
        writes("fp8", {"rasft packed": 61000.0}),
    )
    table = (
        (tmp_path / report.MARKDOWN_FILE).read_text().split("## Tokens per second of a training step\n\n")[1]
    )
    assert table.splitlines()[:4] == [
        "|  | the step bf16 | the step fp8 |",
        "| --- | --- | --- |",
        "| rasft packed | 47,000 | 61,000 |",
        "| sft packed | 50,000 |  |",
    ]


def test_gap_of_the_emulation_shows_the_result_of_its_test(tmp_path: Path) -> None:
    tests = {
        "tests/gpu/a.py::test_fp8[x]": "PASSED",
        "tests/gpu/a.py::test_fp8[y]": "FAILED",
        "tests/gpu/a.py::test_ipc": "SKIPPED",
    }
    covers = {"fp8": "test_fp8", "ipc": "test_ipc", "speed": "its figures"}
    check(
        tmp_path,
        step(
            "tests",
            f"(folder / 'figures.json').write_text({json.dumps(tests)!r})",
            figures=figures,
            covers=covers,
        ),
    )
    lines = (tmp_path / report.MARKDOWN_FILE).read_text().splitlines()
    for row in (
        "| fp8 | tests | test_fp8 | failed, passed |",
        "| ipc | tests | test_ipc | skipped |",
        "| speed | tests | its figures | passed |",
    ):
        assert row in lines


def test_every_gap_of_the_emulation_is_closed_by_a_step() -> None:
    gaps = {
        gap["name"] for gap in tomllib.loads((ROOT / "tests/emulated_gpu/not_shown.toml").read_text())["gap"]
    }
    assert {gap for step in STEPS for gap in step.covers} == gaps
    source = "".join(path.read_text() for path in (ROOT / "tests/gpu").glob("*.py"))
    parts = [name for step in STEPS for part in step.covers.values() for name in part.split(", ")]
    named = {name.partition("[")[0] for name in parts if name.startswith("test_")}
    assert named and all(f"def {name}(" in source for name in named)


def test_first_run_is_the_command_of_the_readme() -> None:
    """The flags are equal except for paths, parallel sizes and the flags that make the run small."""
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^    torchrun --nproc-per-node 8 pretrain_rasft.py(.*)$", readme, re.MULTILINE)
    setting = Setting(
        shape="qwen2.5-1.5b",
        model=Path("DIR"),
        data=Path("train.jsonl"),
        material=ROOT,
        folder=ROOT,
        num_gpus=1,
    )
    (first_run,) = (step for step in STEPS if step.name == "first_run")
    ours, theirs = flags_of(first_run.command(setting).program[1:]), flags_of(shlex.split(command))
    for name in (
        "--tensor-model-parallel-size",
        "--sequence-parallel",
        "--export-hf",
        "--save",
        "--global-batch-size",
    ):
        theirs.pop(name, None)
    assert theirs.items() <= ours.items()


def flags_of(words: Sequence[str]) -> dict[str, str]:
    """Returns flag -> value; the value is empty for a flag that takes none."""
    return dict(re.findall(r"(--\S+)(?: (?!--)(\S+))?", " ".join(words)))


def test_peak_memory_is_that_of_the_fullest_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 1024\necho 4096\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    _, found = check(tmp_path / "out", step("next", "pass"))
    assert by_name(found)["next"].peak_gpu_memory_gib == 4.0


def test_torchrun_starts_steps_of_several_processes() -> None:
    command = Command(program=["pretrain_rasft.py", "--bf16"], num_processes=2)
    assert " ".join(command.line) == (
        "-m torch.distributed.run --standalone --nproc-per-node 2 pretrain_rasft.py --bf16"
    )
