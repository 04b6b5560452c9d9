"""Tests and measures this repository on a machine with GPUs, and writes a report.

    python tools/gpu_check.py --output DIR [--steps NAME_OR_NUMBER ...] [--shape tiny]

Needs Python 3.12, torch and the packages of pyproject.toml, but neither make nor a network nor model weights. Each step runs in
its own processes with a deadline. After a failed step the check continues. It rewrites gpu_check.json, gpu_check.md and
gpu_check.log in --output after every step, so that a killed check leaves its results so far.

Exit code: 0 if every step passed or could not run for a stated reason, 1 if a step failed or timed out, 2 if there is no GPU
or a flag is wrong.
"""

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.tools import cli
from tools.gpu_checking import report as reports
from tools.gpu_checking.processes import ROOT, Ended, Start, run, start
from tools.gpu_checking.report import Figure, Report, Result, Status
from tools.gpu_checking.steps import OUTPUT_FILE, SIZES, STEPS, Setting, Step

LIMIT_S = 1500.0
LAST_LINES = 40
RESERVE_S = 30.0
"""Part of --limit-s that is reserved for killing a step and removing its files."""

SHORTEST_S = 10.0
"""Minimum remaining time to begin a step, seconds."""
LOG_BYTES = 1 << 20
"""Number of bytes at the end of a step's output that are kept, because the end shows the failure."""


class CannotCheck(ValueError):
    """Raised if the check cannot begin, because there is no GPU or a flag is wrong."""


def main(argv: Sequence[str] | None = None, begin: Start = start, steps: Sequence[Step] = STEPS) -> int:
    """Runs the check; returns the exit code, see above.

    Args:
        begin: starts a program. Tests pass a function that forks a process which has imported everything.
        steps: the steps to choose from.
    """
    options = parser(steps).parse_args(argv)
    if options.merge:
        return merge(options.merge, options.output)
    check_flags(options)
    with tempfile.TemporaryDirectory(prefix="gpu_check-", dir=options.scratch) as scratch:
        return Check(options, begin, steps, Path(scratch)).run()


def end_on_signals() -> None:
    """Turns SIGTERM and SIGHUP into an exception, so that the processes of the running step are ended too."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)


def parser(steps: Sequence[Step]) -> argparse.ArgumentParser:
    """Builds the parser with all flags."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, required=True, help="folder for the report")
    made.add_argument(
        "--shape", choices=list(SIZES), default="qwen2.5-1.5b", help="size of the random model and the work"
    )
    made.add_argument(
        "--hf-model", type=Path, help="a real model for the training runs; the benchmarks keep --shape"
    )
    made.add_argument(
        "--steps", nargs="+", metavar="STEP", help=f"only these, by name or number: {_names(steps)}"
    )
    made.add_argument(
        "--limit-s",
        type=float,
        default=LIMIT_S,
        help="the whole check ends within this time, seconds (%(default)s)",
    )
    made.add_argument(
        "--sglang-python", type=Path, help="interpreter of an environment with SGLang, for the step colocated"
    )
    made.add_argument(
        "--scratch",
        type=Path,
        help="folder with 50 GB free for checkpoints, which are removed (default: TMPDIR)",
    )
    made.add_argument("--commit", help="commit of this checkout, for machines without git")
    made.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="run nothing; join reports of earlier checks into --output",
    )
    return made


def check_flags(options: argparse.Namespace) -> None:
    """Refuses wrong flags.

    Raises:
        CannotCheck: the message names the flag.
    """
    if options.hf_model is not None and not (options.hf_model / "config.json").is_file():
        raise CannotCheck(
            f"--hf-model {options.hf_model} has no config.json: give the folder of a Hugging Face model."
        )
    if options.limit_s <= 0:
        raise CannotCheck(f"--limit-s must be > 0, got {options.limit_s:g}. Use {LIMIT_S:g} for 25 minutes.")
    if options.sglang_python is not None and not options.sglang_python.is_file():
        raise CannotCheck(f"--sglang-python {options.sglang_python} is not a file.")
    if options.scratch is not None and not options.scratch.is_dir():
        raise CannotCheck(f"--scratch {options.scratch} is not a folder.")


def _names(steps: Sequence[Step]) -> str:
    return ", ".join(f"{step.name} ({step.number})" for step in steps)


def merge(paths: Sequence[Path], output: Path) -> int:
    """Merges reports. If several reports ran a step, the last of these counts."""
    try:
        found = [reports.read(path) for path in paths]
    except ValueError as error:
        raise CannotCheck(f"--merge: {error}") from error
    if len({(report.commit, report.shape, report.emulated) for report in found}) > 1:
        raise CannotCheck(
            "--merge: the reports are of different commits or shapes. Merge only reports of one commit and shape."
        )
    joined = replace(found[-1], seconds=sum(r.seconds for r in found), limit_s=sum(r.limit_s for r in found))
    for report in found[:-1]:
        for i, step in enumerate(joined.steps):
            earlier = next((s for s in report.steps if s.name == step.name and s.status != "not run"), None)
            if step.status == "not run" and earlier is not None:
                joined.steps[i] = earlier
    output.mkdir(parents=True, exist_ok=True)
    joined.write(output)
    print(f"wrote {output / reports.MARKDOWN_FILE}")
    return joined.exit_code


class Check:
    """A check: runs the steps in order, and rewrites the report after each."""

    def __init__(
        self, options: argparse.Namespace, begin: Start, steps: Sequence[Step], scratch: Path
    ) -> None:
        self._ends = time.monotonic() + options.limit_s
        self._begin = begin
        self._steps = steps
        self._chosen = chosen(steps, options.steps)
        self._output: Path = options.output
        self._report = Report(
            commit=options.commit or commit(),
            began=datetime.now(UTC).isoformat(timespec="seconds"),
            shape=options.shape
            if options.hf_model is None
            else f"{options.shape}; runs of {options.hf_model}",
            limit_s=options.limit_s,
            steps=[_not_run(step, "not reached" if step in self._chosen else "not chosen") for step in steps],
        )
        material = scratch / "files"
        self._setting = Setting(
            shape=options.shape,
            model=options.hf_model or material / "model",
            data=material / "train.jsonl",
            material=material,
            folder=scratch,
            num_gpus=0,
            sglang_python=options.sglang_python,
        )

    def run(self) -> int:
        """Runs the chosen steps; returns the exit code."""
        self._output.mkdir(parents=True, exist_ok=True)
        (self._output / reports.LOG_FILE).unlink(missing_ok=True)
        for index, step in enumerate(self._steps):
            if step not in self._chosen:
                continue
            began = time.monotonic()
            result = self._report.steps[index] = self._result(step)
            if index == 0:
                self._look_at_machine(result)
            self._report.seconds += time.monotonic() - began
            self._report.write(self._output)
            print(
                f"{result.status:9} {result.seconds:4.0f} s  {step.name}: {result.reason or step.title}",
                flush=True,
            )
        print(f"wrote {self._output / reports.MARKDOWN_FILE}", flush=True)
        return self._report.exit_code

    def _look_at_machine(self, versions: Result) -> None:
        """Copies the facts that the first step found into the report.

        Raises:
            CannotCheck: there is no GPU, or torch does not report it.
        """
        if "num_gpus" not in versions.figures:
            last = versions.last_lines[-1] if versions.last_lines else versions.reason
            raise CannotCheck(f"torch cannot report the GPUs with {sys.executable}: {last}")
        num_gpus = versions.figures["num_gpus"]
        assert isinstance(num_gpus, int)
        if not num_gpus:
            raise CannotCheck(
                f"no GPU was found by torch {versions.figures['torch']}. Run the check on a machine with a CUDA GPU and "
                "a driver that supports this torch."
            )
        self._report.emulated = bool(versions.figures.pop("emulated", False))
        self._report.machine, versions.figures = versions.figures, {}
        self._setting = replace(self._setting, num_gpus=num_gpus)

    def _result(self, step: Step) -> Result:
        """Runs one step, unless an obstacle prevents it."""
        needed = next((r for r in self._report.steps if r.name == step.after), None)
        obstacle = step.obstacle(self._setting)
        if needed is not None and needed.status != "passed":
            obstacle = f"needs the step {step.after}, which is: {needed.status}"
        left_s = self._ends - time.monotonic() - RESERVE_S
        if left_s < min(SHORTEST_S, step.deadline_s):
            obstacle = f"the {self._report.limit_s:g} s of --limit-s are used up"
        if obstacle:
            return _not_run(step, obstacle)
        folder = self._setting.folder / step.name
        folder.mkdir()
        try:
            return self._run(step, replace(self._setting, folder=folder), min(step.deadline_s, left_s))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, step: Step, setting: Setting, deadline_s: float) -> Result:
        command = step.command(setting)
        log = setting.folder / OUTPUT_FILE
        ended = run(command, log, deadline_s, self._begin)
        result = _not_run(step, "")
        result.command = shlex.join(["python", *command.line])
        result.seconds, result.deadline_s = round(ended.seconds, 1), round(deadline_s, 1)
        result.peak_gpu_memory_gib, result.left_behind = ended.peak_gpu_memory_gib, ended.left_behind
        figures_fault = ""
        try:
            result.figures = dict(step.figures(setting.folder))
        except (OSError, ValueError, KeyError, StopIteration, SyntaxError) as error:
            figures_fault = f"the figures of the step cannot be read: {type(error).__name__}: {error}"
        result.status, result.reason = _verdict(step, ended, result.figures, figures_fault)
        if result.status != "passed":
            result.last_lines = _last_lines(log)
        self._keep(step, result, log)
        return result

    def _keep(self, step: Step, result: Result, log: Path) -> None:
        """Appends the end of a step's output to the log of the check."""
        with (self._output / reports.LOG_FILE).open("ab") as kept, log.open("rb") as output:
            kept.write(f"==== {step.name}: {result.status}\n{result.command}\n".encode())
            output.seek(max(0, log.stat().st_size - LOG_BYTES))
            kept.write(output.read() + b"\n")


def chosen(steps: Sequence[Step], names: Sequence[str] | None) -> list[Step]:
    """Returns the named steps and the steps that they need, in the order of the check.

    Raises:
        CannotCheck: no step has such a name or number.
    """
    if names is None:
        return list(steps)
    for name in names:
        if not any(name in (step.name, str(step.number)) for step in steps):
            raise CannotCheck(f"--steps {name}: there is no such step. Choose from {_names(steps)}.")
    wanted = [step for step in steps if {step.name, str(step.number)} & set(names)]
    needed = {step.after for step in wanted}
    return [step for i, step in enumerate(steps) if i == 0 or step in wanted or step.name in needed]


def commit() -> str:
    """Commit of this checkout, with a plus if files were changed; "unknown" if git cannot tell."""
    described = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(
            described, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _not_run(step: Step, reason: str) -> Result:
    return Result(
        name=step.name,
        number=step.number,
        title=step.title,
        status="not run",
        reason=reason,
        deadline_s=step.deadline_s,
        covers=dict(step.covers),
    )


def _verdict(step: Step, ended: Ended, figures: Mapping[str, Figure], fault: str) -> tuple[Status, str]:
    """Returns whether the step passed, and the reason if it did not."""
    if ended.code is None:
        return "timed out", f"still running after {ended.seconds:.0f} s"
    if ended.code != 0:
        return "failed", f"exit code {ended.code}"
    if fault:
        return "failed", fault
    missing = [name for name in (*step.wants, *step.bounds) if name not in figures]
    if missing:
        return "failed", f"it gave no {', '.join(missing)}"
    for name, (least, most) in step.bounds.items():
        value = figures[name]
        if not isinstance(value, int | float) or not least <= value <= most:
            return "failed", f"{name} is {value}, not between {least:g} and {most:g}"
    return "passed", ""


def _last_lines(log: Path) -> list[str]:
    """Returns the end of a step's output, without the lines that torchrun adds when a rank fails."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    launcher = (
        i for i, line in enumerate(lines) if "torch/distributed/elastic/" in line and "exitcode" in line
    )
    return lines[: next(launcher, None)][-LAST_LINES:]


if __name__ == "__main__":
    end_on_signals()
    sys.exit(cli.run(main))
