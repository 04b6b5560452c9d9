"""Compares base, SFT and its variants, RL and RASFT on the same data, steps and learning rate.

reproduce.py --setting settings/cpu.toml --output DIR        everything: trainings, evaluations, table and plots
reproduce.py --setting FILE --output DIR --task N            one training and its evaluation, for a job array
reproduce.py --setting FILE --output DIR --tables-only       table and plots of the finished results
reproduce.py --setting FILE --output DIR --dry-run           print the commands instead of running them

A training runs pretrain_rasft.py, an evaluation tools/evaluate.py. Methods differ only in their own flags. After an
interruption the same command continues with the first training that has no evaluation. Results with other flags or data
are an error.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # lets the file run from a checkout that is not installed

from examples.benchmark_reproduction import preloading, records  # noqa: E402
from examples.benchmark_reproduction.comparison import DEFAULT_REFERENCE, write_comparison  # noqa: E402
from megatron_rasft.errors import RasftError  # noqa: E402
from megatron_rasft.tools import cli  # noqa: E402
from megatron_rasft.weights.tracker import has_checkpoint  # noqa: E402

CHECKPOINTS = "checkpoints"
"""Folder of a training's checkpoints, in that of its task."""
_CHECKPOINTS_OF = {"first": "first_checkpoints", "model": CHECKPOINTS}
"""Folder of an exported model -> folder of the checkpoints of its training."""


class TrainingStopped(Exception):
    """A training has saved its state and ended before its last step."""


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
    "sdft": ["--objective", "sdft", "--curriculum-mode", "all"],
    "rasft": ["--objective", "rasft", "--rasft-weighting", "adaptive"],
    "rasft_published": ["--objective", "rasft", "--rasft-weighting", "published"],
}
"""Method -> its flags. The base model is evaluated without a training."""


@dataclass(kw_only=True)
class Setting:
    """Content of a file of settings/."""

    title: str
    model: str
    seeds: list[int]
    train: dict[str, Any]
    """Flags of all trainings. ``{seed}`` in a value is replaced by the seed."""
    evaluate: dict[str, Any]
    """Flags of all evaluations."""
    greedy: dict[str, Any] = field(default_factory=dict)
    """Other flags of a second evaluation. If empty, there is no second evaluation."""
    prepare: list[list[str]] = field(default_factory=list)
    """Commands that make the model and the data. Every call runs them first, so they must return quickly if the files exist."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    method_flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Method -> flags for its trainings only."""
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> ``of`` (a method), and flags that change it. ``after`` holds the same for a training that runs first and whose model
    the variant begins with, such as SFT before GRPO. Variants are for choosing constants by experiment. A variant runs only if
    ``methods`` names it."""
    num_processes: int = 1
    save_interval: int = 0
    """Steps between the checkpoints of a training; 0: none. With checkpoints, a training that is stopped or killed goes on when the
    same command runs again. Only the newest is kept, and none after the evaluation."""
    num_jobs: int = 1
    """Trainings that run at a time on one machine. If there are several, their seconds depend on each other."""
    preload: bool = False
    """Fork each program from a process that has imported everything. Saves ten seconds each; only without a GPU."""
    compare_with: str = ""
    """Model whose published numbers are added to the table."""

    def __post_init__(self) -> None:
        firsts = [variant["after"] for variant in self.variants.values() if "after" in variant]
        changed = [str(variant.get("of")) for variant in (*self.variants.values(), *firsts)]
        known = [*METHODS, *self.variants]
        unknown = [m for m in self.methods if m not in known]
        unknown += [m for m in [*self.method_flags, *changed] if m not in METHODS]
        if unknown:
            raise ValueError(f"method {unknown[0]!r} is unknown. Methods are {', '.join(known)}.")
        if len(set(known)) < len(known) or "base" in changed:
            raise ValueError(
                "variants must have names other than the methods', and be variants of a method other than base."
            )
        if not self.seeds:
            raise ValueError("seeds must name at least one seed.")
        if self.preload and self.num_processes > 1:
            raise ValueError("preload = true needs num_processes = 1.")


@dataclass(frozen=True)
class Task:
    """One training and its evaluation."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        return self.method if self.method == "base" else f"{self.method}-seed{self.seed}"


def read_setting(path: Path) -> Setting:
    """Reads a file of settings/, and replaces $VARIABLES by their values in the environment.

    Raises:
        ValueError: the file cannot be read as TOML, a field is unknown or wrong, or a variable is not set.
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
    """Returns the tasks in the order of --task: base once, then every method for each seed."""
    # The base model always has seed 1, so that another --seeds does not evaluate it again.
    tasks = [Task("base", 1)] if "base" in setting.methods else []
    return tasks + [Task(m, seed) for seed in setting.seeds for m in setting.methods if m != "base"]


def training_command(setting: Setting, task: Task, output: Path) -> list[str]:
    """Returns the command of a training."""
    return [*_trainer(setting), *training_flags(setting, task, output)]


def first_training_command(setting: Setting, task: Task, output: Path) -> list[str]:
    """Returns the command of the training whose model the task's training begins with; [] if it begins with the base model."""
    flags = first_training_flags(setting, task, output)
    return [*_trainer(setting), *flags] if flags else []


def _trainer(setting: Setting) -> list[str]:
    return [*_launcher(setting), str(ROOT / "pretrain_rasft.py")]


def training_flags(setting: Setting, task: Task, output: Path) -> list[str]:
    """Returns the flags of pretrain_rasft.py. Empty for base, which is not trained."""
    if task.method == "base":
        return []
    own = dict(setting.variants.get(task.method, {}))
    model = output / "first" if own.pop("after", None) else setting.model
    return _flags_of(setting, {"of": task.method, **own}, task.seed, str(model), output, "model")


def first_training_flags(setting: Setting, task: Task, output: Path) -> list[str]:
    """Returns the flags of the training whose model the task's training begins with; [] if it begins with the base model."""
    first = setting.variants.get(task.method, {}).get("after")
    return _flags_of(setting, first, task.seed, setting.model, output, "first") if first else []


def _flags_of(
    setting: Setting, own: Mapping[str, Any], seed: int, model: str, output: Path, export: str
) -> list[str]:
    own = dict(own)
    method = own.pop("of")
    flags = {
        "--hf-model": model,
        **setting.train,
        "--seed": seed,
        "--data-seed": seed,
        "--rollout-seed": seed,
        **setting.method_flags.get(method, {}),
        **own,
        "--export-hf": output / export,
        "--rasft-metrics": output / "metrics.jsonl",
        "--rollout-store": output / "rollouts.jsonl",
        **_checkpoint_flags(setting, output / _CHECKPOINTS_OF[export]),
    }
    return [*METHODS[method], *_as_flags(_with_seed(flags, seed))]


def _checkpoint_flags(setting: Setting, folder: Path) -> dict[str, Any]:
    if not setting.save_interval:
        return {}
    # Megatron deletes each checkpoint after the next one, unless its step is a multiple of --save-retain-interval, which must itself
    # be a multiple of --save-interval.
    return {
        "--save": folder,
        "--save-interval": setting.save_interval,
        "--save-retain-interval": 10**9 // setting.save_interval * setting.save_interval,
    }


def evaluations(setting: Setting) -> list[str]:
    """Returns the names of a model's evaluations: ``evaluation``, and ``greedy`` if the setting has flags for it.

    Each evaluation has a folder of its name.
    """
    return ["evaluation", "greedy"] if setting.greedy else ["evaluation"]


def evaluation_command(
    setting: Setting, task: Task, output: Path, evaluation: str = "evaluation"
) -> list[str]:
    """Returns the command that evaluates the exported model of a training, or the base model."""
    program = str(ROOT / "tools" / "evaluate.py")
    return [*_launcher(setting), program, "run", *evaluation_flags(setting, task, output, evaluation)]


def evaluation_flags(setting: Setting, task: Task, output: Path, evaluation: str = "evaluation") -> list[str]:
    """Returns the flags of tools/evaluate.py for one of ``evaluations``."""
    flags = {
        "--model": setting.model if task.method == "base" else output / "model",
        "--label": task.name,
        "--output": output / evaluation,
        **setting.evaluate,
        **(setting.greedy if evaluation == "greedy" else {}),
        "--seed": task.seed,
    }
    if setting.compare_with:
        flags["--compare-with"] = setting.compare_with
    return list(_as_flags(flags))


def _with_seed(flags: dict[str, Any], seed: int) -> dict[str, Any]:
    """Replaces ``{seed}`` in the texts."""
    return {flag: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for flag, v in flags.items()}


def _launcher(setting: Setting) -> list[str]:
    if setting.num_processes == 1:
        return [sys.executable]
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.num_processes),
    ]  # fmt: skip


def _as_flags(flags: dict[str, Any]) -> Iterator[str]:
    """Words of a command line. True means a flag without a value, a list means several values."""
    for flag, value in flags.items():
        yield flag
        if value is not True:
            yield from map(str, value if isinstance(value, list) else [value])


def record_of(setting: Setting, task: Task) -> records.Record:
    """Returns the provenance of the task's result."""
    return records.make_record(flags_of(setting, task), setting.num_processes)


def flags_of(setting: Setting, task: Task) -> dict[str, list[str]]:
    """Returns the flags of the task's trainings and evaluations, with ``.`` for the task's folder."""
    here = Path()
    flags = {name: evaluation_flags(setting, task, here, name) for name in evaluations(setting)}
    first = first_training_flags(setting, task, here)
    trainings = {"first training": first} if first else {}
    trainings["training"] = training_flags(setting, task, here)
    return trainings | flags


def check_results(setting: Setting, tasks: Sequence[Task], root: Path) -> None:
    """Checks that existing results and trained weights come from the same flags and data.

    Raises:
        ValueError: a result has other flags or data. The message names it and the first difference.
    """
    for task in tasks:
        output = root / task.name
        kept = "done" if (output / "done").exists() else "begun"
        if kept == "begun" and not _has_begun(output):
            continue
        stored = records.read_record(output / kept)
        difference = stored and records.describe_difference(stored, record_of(setting, task))
        if difference:
            raise ValueError(
                f"{output} has results of another setting: {difference}. Give another --output, or delete the folder."
            )


def _has_begun(output: Path) -> bool:
    """Whether a training of the task has left a model or a checkpoint."""
    return any(
        _is_model(output / model) or has_checkpoint(output / checkpoints)
        for model, checkpoints in _CHECKPOINTS_OF.items()
    )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists()


def run_task(setting: Setting, task: Task, root: Path, keeps_models: bool) -> None:
    """Trains, evaluates and deletes the weights. Skips the parts that are finished.

    The file ``begun`` holds the provenance while the task runs. It is renamed to ``done`` at the end.

    Raises:
        RasftError: a command failed. The message names its log.
        TrainingStopped: the training was stopped before its end.
    """
    output = root / task.name
    begun, done = output / "begun", output / "done"
    if done.exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    if not _is_model(output / "model"):
        begun.write_text(json.dumps(record_of(setting, task), indent=1) + "\n", encoding="utf-8")
        if task.method != "base":
            _train(setting, task, output)
    for name in evaluations(setting):
        run_logged(setting, evaluation_command(setting, task, output, name), output / f"{name}.log")
    begun.replace(done)
    for name in ("first", *_CHECKPOINTS_OF.values()):
        shutil.rmtree(output / name, ignore_errors=True)
    if task.method != "base" and not keeps_models:
        shutil.rmtree(output / "model")


def _train(setting: Setting, task: Task, output: Path) -> None:
    """Runs the trainings of a task that are not finished.

    Raises:
        TrainingStopped: a training was stopped before its end.
    """
    first_checkpoints, checkpoints = (has_checkpoint(output / name) for name in _CHECKPOINTS_OF.values())
    if not (checkpoints or (first_checkpoints and not _is_model(output / "first"))):
        # A new training would otherwise append to the files of a killed training.
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            (output / name).unlink(missing_ok=True)
        for name in ("first", _CHECKPOINTS_OF["first"]):
            shutil.rmtree(output / name, ignore_errors=True)
    first = first_training_command(setting, task, output)
    trainings = [("first", "first_training", first)] if first else []
    for name, log, command in [*trainings, ("model", "training", training_command(setting, task, output))]:
        if _is_model(output / name):
            continue
        shutil.rmtree(output / name, ignore_errors=True)
        run_logged(setting, command, output / f"{log}.log")
        if not _is_model(output / name):  # it exits with 0 before the end of a Slurm allocation
            raise TrainingStopped(
                f"{task.name}: stopped; the same command continues it, see {output / f'{log}.log'}"
            )


def run_logged(setting: Setting, command: Sequence[str], log: Path) -> None:
    print(f"{time.strftime('%H:%M:%S')} {log.parent.name}: {log.stem}", flush=True)
    if setting.preload:
        _, program, *arguments = command
        code = preloading.run_program(Path(program), arguments, log)
    else:
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
        code = done.returncode
    if code != 0:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RasftError(f"exit code {code}, see {log}: {last[0] if last else 'it is empty'}")


def run_tasks(setting: Setting, tasks: Sequence[Task], root: Path, keeps_models: bool) -> None:
    """Runs all tasks, ``num_jobs`` at a time. After a failure running tasks finish, and no others start."""
    call_all([partial(run_task, setting, task, root, keeps_models) for task in tasks], setting.num_jobs)


def call_all(calls: Sequence[Callable[[], None]], num_jobs: int) -> None:
    """Makes all calls in their order, ``num_jobs`` at a time. After a failure running calls finish, and no others start."""
    with ThreadPoolExecutor(num_jobs) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code as ``cli.run`` defines it."""
    return cli.run(reproduce, _build_parser().parse_args(argv))


def reproduce(args: argparse.Namespace) -> None:
    """Runs the tasks that the flags select.

    Raises:
        ValueError: a flag or the setting is wrong, or results of other flags or data exist.
        RasftError: a command failed.
    """
    setting = _with_flags(read_setting(args.setting), args)
    tasks = tasks_of(setting)
    if args.against != DEFAULT_REFERENCE and args.against not in setting.methods:
        raise ValueError(f"--against must be one of {', '.join(setting.methods)}, got {args.against}.")
    if args.task is not None and not 0 <= args.task < len(tasks):
        raise ValueError(f"--task must be 0 .. {len(tasks) - 1}, got {args.task}.")
    chosen = tasks if args.task is None else [tasks[args.task]]
    if args.dry_run:
        for command in commands_of(setting, chosen, args.output):
            print(shlex.join(command))
        return
    if not args.tables_only:
        _prepare(setting)
    check_results(setting, chosen, args.output)
    if not args.tables_only:
        try:
            run_tasks(setting, chosen, args.output.resolve(), args.keep_models)
        except TrainingStopped as stopped:
            print(stopped)
            return
    if args.task is None:
        runs = {(task.method, task.seed): args.output / task.name for task in tasks}
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


def commands_of(setting: Setting, tasks: Sequence[Task], root: Path) -> Iterator[list[str]]:
    """Yields the commands in the order in which they run."""
    yield from setting.prepare
    for task in tasks:
        output = root / task.name
        if task.method != "base":
            if first := first_training_command(setting, task, output):
                yield first
            yield training_command(setting, task, output)
        for name in evaluations(setting):
            yield evaluation_command(setting, task, output, name)


def _with_flags(setting: Setting, args: argparse.Namespace) -> Setting:
    methods, seeds = args.methods or setting.methods, args.seeds or setting.seeds
    return dataclasses.replace(setting, methods=methods, seeds=seeds)


def _prepare(setting: Setting) -> None:
    for command in setting.prepare:
        try:
            subprocess.run(command, cwd=ROOT, check=True)
        except subprocess.CalledProcessError as error:
            raise RasftError(str(error)) from error


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", type=Path, required=True, help="a file of settings/")
    parser.add_argument("--output", type=Path, required=True, help="folder of all results")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help=f"methods to run: {', '.join(METHODS)}, or variants of the setting; default: those of the setting",
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: those of the setting")
    parser.add_argument(
        "--against",
        metavar="NAME",
        default=DEFAULT_REFERENCE,
        help="method with which the others are compared; default: %(default)s",
    )
    parser.add_argument(
        "--task", type=int, metavar="N", help="run one task, counted from 0, and write no table"
    )
    parser.add_argument("--keep-models", action="store_true", help="keep the trained weights")
    parser.add_argument("--tables-only", action="store_true", help="write table and plots, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())
