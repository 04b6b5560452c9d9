"""Runs the comparison the method claims: base, SFT and its variants, RL and RASFT at matched data, steps and rate.

reproduce.py --setting settings/cpu.toml --output DIR        everything, then tables and plots
reproduce.py --setting FILE --output DIR --task N            one training and its evaluation, for a job array
reproduce.py --setting FILE --output DIR --tables-only       tables and plots of what is there
reproduce.py --setting FILE --output DIR --dry-run           print the commands instead of running them

Each training is pretrain_rasft.py with the same flags but for the method's own, each evaluation tools/evaluate.py.
Killed, the same command goes on with the first training that has no evaluation yet. Results that other flags or data
made are refused.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # runs from a checkout that is not installed

from examples.benchmark_reproduction import records  # noqa: E402
from examples.benchmark_reproduction.comparison import DEFAULT_REFERENCE, write_comparison  # noqa: E402

METHODS: dict[str, list[str]] = {
    "base": [],
    "sft": ["--objective", "sft"],
    "sft_kl": ["--objective", "sft_kl"],
    "dft": ["--objective", "dft"],
    "asft": ["--objective", "asft"],
    "profit": ["--objective", "profit"],
    "iw_sft": ["--objective", "iw_sft"],
    "raft": ["--objective", "raft", "--curriculum-mode", "all"],
    "grpo": ["--objective", "grpo", "--curriculum-mode", "all"],
    "rasft": ["--objective", "rasft", "--rasft-weighting", "adaptive"],
    "rasft_published": ["--objective", "rasft", "--rasft-weighting", "published"],
}
"""Method -> what tells it from the others; base is not trained."""


@dataclass(kw_only=True)
class Setting:
    """One file of settings/."""

    title: str
    model: str
    seeds: list[int]
    train: dict[str, Any]
    """Flags of every training."""
    evaluate: dict[str, Any]
    """Flags of every evaluation."""
    prepare: list[list[str]] = field(default_factory=list)
    """Commands that make model and data; run before anything else, they must be quick where all is there."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    method_flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> ``of``, the method that it is, and the flags that tell it from that: to choose constants by runs. Run where
    ``methods`` names them."""
    num_processes: int = 1
    num_jobs: int = 1
    """Trainings at a time on one machine; more than one, and their seconds depend on each other."""
    compare_with: str = ""
    """Published model whose numbers stand in the table."""

    def __post_init__(self) -> None:
        changed = [str(variant.get("of")) for variant in self.variants.values()]
        known = [*METHODS, *self.variants]
        unknown = [m for m in self.methods if m not in known]
        unknown += [m for m in [*self.method_flags, *changed] if m not in METHODS]
        if unknown:
            raise ValueError(f"method {unknown[0]!r} is unknown. Known are {', '.join(known)}.")
        if len(set(known)) < len(known) or "base" in changed:
            raise ValueError("variants need names of their own, and a method that is trained.")
        if not self.seeds:
            raise ValueError("seeds must name at least one seed.")


@dataclass(frozen=True)
class Task:
    """One training and its evaluation."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return self.method if self.method == "base" else f"{self.method}-seed{self.seed}"


def read_setting(path: Path) -> Setting:
    """The file's fields, $VARIABLES of the environment put in.

    Raises:
        ValueError: a field or variable is unknown, or the file is no TOML.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return Setting(**_expanded(content))
    except (tomllib.TOMLDecodeError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"--setting {path}: {error}") from error


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expanded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    if not isinstance(value, str):
        return value
    text = os.path.expandvars(value.replace("${PYTHON}", sys.executable))
    if "$" in text:
        raise ValueError(f"{value!r} names an environment variable that is not set. Set it.")
    return text


def tasks_of(setting: Setting) -> list[Task]:
    """Base once, every other method for each seed; the order that --task counts in."""
    tasks = [Task("base", 1)] if "base" in setting.methods else []  # whichever --seeds: it is not done again
    return tasks + [Task(m, seed) for seed in setting.seeds for m in setting.methods if m != "base"]


def training_command(setting: Setting, task: Task, output: Path) -> list[str]:
    """pretrain_rasft.py with this method's flags and seed."""
    program = str(ROOT / "pretrain_rasft.py")
    return [*_launcher(setting), program, *training_flags(setting, task, output)]


def training_flags(setting: Setting, task: Task, output: Path) -> list[str]:
    """Of the program alone; none for base, which is not trained."""
    if task.method == "base":
        return []
    own = dict(setting.variants.get(task.method, {}))
    method = own.pop("of", task.method)
    flags = {
        "--hf-model": setting.model,
        **setting.train,
        "--seed": task.seed,
        "--data-seed": task.seed,
        "--rollout-seed": task.seed,
        **setting.method_flags.get(method, {}),
        **own,
        "--export-hf": output / "model",
        "--rasft-metrics": output / "metrics.jsonl",
        "--rollout-store": output / "rollouts.jsonl",
    }
    return [*METHODS[method], *_as_flags(flags)]


def evaluation_command(setting: Setting, task: Task, output: Path) -> list[str]:
    """tools/evaluate.py on what the training exported, or on the model itself."""
    program = str(ROOT / "tools" / "evaluate.py")
    return [*_launcher(setting), program, "run", *evaluation_flags(setting, task, output)]


def evaluation_flags(setting: Setting, task: Task, output: Path) -> list[str]:
    """Of the program alone."""
    flags = {
        "--model": setting.model if task.method == "base" else output / "model",
        "--label": task.name,
        "--output": output / "evaluation",
        **setting.evaluate,
        "--seed": task.seed,
    }
    if setting.compare_with:
        flags["--compare-with"] = setting.compare_with
    return list(_as_flags(flags))


def _launcher(setting: Setting) -> list[str]:
    if setting.num_processes == 1:
        return [sys.executable]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.num_processes),
    ]  # fmt: skip


def _as_flags(flags: dict[str, Any]) -> Iterator[str]:
    """True is the bare flag, a list several values."""
    for flag, value in flags.items():
        yield flag
        if value is not True:
            yield from map(str, value if isinstance(value, list) else [value])


def record_of(setting: Setting, task: Task) -> records.Record:
    """What the task's result is made by."""
    here = Path()
    return records.make_record(
        training_flags(setting, task, here), evaluation_flags(setting, task, here), setting.num_processes
    )


def check_results(setting: Setting, tasks: Sequence[Task], root: Path) -> None:
    """Refuse results and trained weights that are there and were made in another way.

    Raises:
        ValueError: names the first of them and what differs.
    """
    for task in tasks:
        output = root / task.name
        kept = "done" if (output / "done").exists() else "begun"
        if kept == "begun" and not _has_model(output):
            continue
        stored = records.read_record(output / kept)
        difference = stored and records.describe_difference(stored, record_of(setting, task))
        if difference:
            raise ValueError(
                f"{output} holds results of another setting: {difference}. Give another --output, or delete the folder."
            )


def _has_model(output: Path) -> bool:
    return (output / "model" / "config.json").exists()


def run_task(setting: Setting, task: Task, root: Path, keeps_models: bool) -> None:
    """Train, evaluate, and drop the weights; whatever is there already is not done again.

    Raises:
        RuntimeError: a command failed; the message names its log.
    """
    output = root / task.name
    begun, done = output / "begun", output / "done"
    if done.exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    if not _has_model(output):
        begun.write_text(json.dumps(record_of(setting, task), indent=1) + "\n", encoding="utf-8")
        if task.method != "base":
            # A training that was killed leaves metrics; the next one would append to them.
            for name in ("metrics.jsonl", "rollouts.jsonl"):
                (output / name).unlink(missing_ok=True)
            shutil.rmtree(output / "model", ignore_errors=True)
            _run(training_command(setting, task, output), output / "training.log")
    _run(evaluation_command(setting, task, output), output / "evaluation.log")
    begun.touch()  # empty where an earlier version trained
    begun.replace(done)
    if task.method != "base" and not keeps_models:
        shutil.rmtree(output / "model")


def _run(command: Sequence[str], log: Path) -> None:
    print(f"{time.strftime('%H:%M:%S')} {log.parent.name}: {log.stem}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"exit code {done.returncode}, see {log}: {last[0] if last else 'it is empty'}")


def run_tasks(setting: Setting, tasks: Sequence[Task], root: Path, keeps_models: bool) -> None:
    """All tasks, ``num_jobs`` at a time; the first failure ends the run once those that have begun are over."""
    with ThreadPoolExecutor(setting.num_jobs) as pool:
        futures = [pool.submit(run_task, setting, task, root, keeps_models) for task in tasks]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 a command failed, 2 wrong arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", type=Path, required=True, help="a file of settings/")
    parser.add_argument("--output", type=Path, required=True, help="folder of all results")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help=f"of {', '.join(METHODS)} and the setting's variants"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="instead of the setting's")
    parser.add_argument(
        "--against",
        metavar="NAME",
        default=DEFAULT_REFERENCE,
        help="method that the differences are to (default: %(default)s)",
    )
    parser.add_argument("--task", type=int, metavar="N", help="only this one, from 0, and no tables")
    parser.add_argument("--keep-models", action="store_true", help="do not delete the trained weights")
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(argv)
    try:
        setting = read_setting(args.setting)
        setting = Setting(
            **{
                **vars(setting),
                "methods": args.methods or setting.methods,
                "seeds": args.seeds or setting.seeds,
            }
        )
        tasks = tasks_of(setting)
        if args.against != DEFAULT_REFERENCE and args.against not in setting.methods:
            raise ValueError(
                f"--against {args.against} is none of the methods: {', '.join(setting.methods)}."
            )
        if args.task is not None and not 0 <= args.task < len(tasks):
            raise ValueError(f"--task must be 0 .. {len(tasks) - 1}, got {args.task}.")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = tasks if args.task is None else [tasks[args.task]]
    if args.dry_run:
        for command in commands_of(setting, chosen, args.output):
            print(shlex.join(command))
        return 0
    try:
        if not args.tables_only:
            for command in setting.prepare:
                subprocess.run(command, cwd=ROOT, check=True)
        check_results(setting, chosen, args.output)
        if not args.tables_only:
            run_tasks(setting, chosen, args.output.resolve(), args.keep_models)
        if args.task is None:
            runs = {(t.method, t.seed): args.output / t.name for t in tasks}
            print(
                write_comparison(
                    setting.title,
                    runs,
                    args.output,
                    setting.compare_with,
                    setting.num_jobs,
                    reference=args.against,
                )
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def commands_of(setting: Setting, tasks: Sequence[Task], root: Path) -> Iterator[list[str]]:
    """What would be run, in this order."""
    yield from setting.prepare
    for task in tasks:
        output = root / task.name
        if task.method != "base":
            yield training_command(setting, task, output)
        yield evaluation_command(setting, task, output)


if __name__ == "__main__":
    sys.exit(main())
