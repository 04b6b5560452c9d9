"""Compares the methods in synthetic worlds that two CPU cores can hold.

run.py --output DIR                                  the kept worlds, methods and seeds of study.toml
run.py --output DIR --worlds NAME ... --methods NAME ... --seeds N ...
run.py --output DIR --split dev --worlds development     for looking for better rules: other problems, other worlds
run.py --output DIR --worlds development --split dev --rates 3e-4 1e-3 ...     a sweep of the learning rate for each method
run.py --output DIR --tables-only                    the tables of what is finished; on a fresh clone, of the shipped results
run.py --output DIR --fresh                          without the shipped results and base models

A training runs pretrain_rasft.py, an evaluation tools/evaluate.py, as examples/benchmark_reproduction describes. Trainings whose
results are in records/ do not run again. After an interruption the same command continues. Base models that do not exist are
pre-trained first. DIR/results.md holds the tables, DIR/results.png the plot, and DIR/records every result that the tables use.
"""

import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # lets the file run from a checkout that is not installed

from examples.benchmark_reproduction import preloading, reproduce  # noqa: E402
from examples.benchmark_reproduction.reproduce import Setting, Task  # noqa: E402
from examples.proving_ground import regimes  # noqa: E402
from examples.proving_ground.kept import (  # noqa: E402
    Origin,
    Result,
    Shelf,
    describe_agreement,
    describe_others,
    origin_of,
    read_finished,
    read_records,
    record_file,
)
from examples.proving_ground.make_world import write_world  # noqa: E402
from examples.proving_ground.results import write_results  # noqa: E402
from examples.proving_ground.worlds import CORPORA, DEVELOPMENT, KEPT, KINDS, RETAINED, WORLDS  # noqa: E402
from megatron_rasft.errors import RasftError  # noqa: E402
from megatron_rasft.tools import cli  # noqa: E402

FOLDER = Path(__file__).parent


def make_bases(names: Iterable[str], folder: Path, num_jobs: int) -> None:
    """Pre-trains the base models that do not exist yet, and those that they begin with.

    Raises:
        RasftError: a pre-training failed. The message names its log.
    """
    lineages = [_missing_lineage(name, folder) for name in dict.fromkeys(names)]
    with ThreadPoolExecutor(num_jobs) as pool:
        for level in itertools.zip_longest(*lineages):
            list(pool.map(lambda name: _make_base(name, folder), dict.fromkeys(filter(None, level))))


def _missing_lineage(name: str, folder: Path) -> list[str]:
    """Returns a base model that does not exist, after those that it begins with and that do not exist either."""
    if not name or _exists(name, folder):
        return []
    return [*_missing_lineage(CORPORA[name].begins_with, folder), name]


def _exists(name: str, folder: Path) -> bool:
    return (folder / name / "config.json").exists()


def _make_base(name: str, folder: Path) -> None:
    if _exists(name, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, log, begins_with = (
        folder / f"{name}.unfinished",
        folder / f"{name}.log",
        CORPORA[name].begins_with,
    )
    command = [sys.executable, str(FOLDER / "pretrain_base.py"), name, "--output", str(unfinished)]
    command += ["--begin-with", str(folder / begins_with)] if begins_with else []
    print(f"{time.strftime('%H:%M:%S')} pre-training of {name}, see {log}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RasftError(f"the pre-training of {name} failed, see {log}")
    unfinished.replace(folder / name)


def check_bases(worlds: Iterable[str], folder: Path, num: int) -> None:
    """Prints whether the base models solve what their worlds say. The line is kept in each model's folder.

    A model outside its bounds does not stop the study, but its results do not show what the world is for.

    Args:
        num: problems of each kind to sample.

    Raises:
        RasftError: a model could not be sampled. The message names the log.
    """
    for world in worlds:
        if not _is_measured(world, folder, num):
            arguments = [str(folder), "--worlds", world, "--num", str(num)]
            log = folder / f"{world}.regime.log"
            # In a process of its own: torch's threads of this process would hang in the trainings that are forked from it.
            preloading.run_program(Path(regimes.__file__), arguments, log)
            if not _is_measured(world, folder, num):
                raise RasftError(f"the base model of {world} could not be sampled, see {log}")
            print(regimes.regime_file(folder, world).read_text(encoding="utf-8"), end="", flush=True)


def _is_measured(world: str, folder: Path, num: int) -> bool:
    kept = regimes.regime_file(folder, world)
    return kept.exists() and regimes.num_measured(kept.read_text(encoding="utf-8")) >= num


def setting_of(study: dict[str, Any], world: str, folder: Path, split: str, bases: Path) -> Setting:
    """Returns the trainings and evaluations of one world.

    Args:
        study: content of study.toml.
        world: name of the world.
        folder: folder of the world's data.
        split: held-out problems to evaluate, ``test`` or ``dev``.
        bases: folder of the base models.
    """
    setting = Setting(title=WORLDS[world].title, model=str(bases / WORLDS[world].base), preload=True, **study)  # type: ignore[arg-type]
    files = [f"{kind}={folder / split / kind}.jsonl" for kind in (*KINDS, *RETAINED)]
    return dataclasses.replace(
        setting,
        train={**setting.train, "--train-data": str(folder / "train-{seed}.jsonl")},
        evaluate={**setting.evaluate, "--benchmarks": files},
    )


@dataclass(frozen=True)
class World:
    """A world in a study: its trainings, and the results that exist."""

    name: str
    setting: Setting
    root: Path
    """Folder of the trainings."""
    origins: Mapping[Task, Origin]
    """Task -> what it is made from, in the order of the tables."""
    shelf: Shelf

    def run(self, task: Task) -> None:
        """Trains, evaluates and records one task."""
        reproduce.run_task(self.setting, task, self.root, keeps_models=False)
        self.record(task)

    def record(self, task: Task) -> None:
        """Records a finished task."""
        self.shelf.add(read_finished(self.name, task, self.root / task.name, self.origins[task]))

    @property
    def results(self) -> list[Result]:
        """The results, in the order of the tables."""
        return [result for task in self.origins if (result := self.shelf.get(task))]


def run(args: argparse.Namespace) -> None:
    """Runs what the flags select, and writes the tables of everything that is finished.

    Raises:
        ValueError: a flag is wrong, or results of other flags or data exist.
        RasftError: a command failed.
    """
    study = tomllib.loads((FOLDER / "study.toml").read_text(encoding="utf-8"))
    groups = groups_of(study, args.methods, args.seeds)
    if args.rates:
        groups = at_rates(study, groups, args.rates)
    if args.limit:
        study["evaluate"]["--limit"] = args.limit
    if args.steps:
        study["train"]["--train-iters"] = args.steps
    names = _chosen(args.worlds)
    bases = (args.bases or (args.output if args.fresh else FOLDER) / "bases").resolve()
    if not args.tables_only:
        make_bases([WORLDS[name].base for name in names], bases, study["num_jobs"])
        check_bases(names, bases, args.limit or 100)
    worlds = [_open_world(name, study, groups, bases, args) for name in names]
    if not args.tables_only:
        try:
            reproduce.call_all(_calls(worlds, groups), study["num_jobs"])
        except reproduce.TrainingStopped as stopped:
            print(stopped)
            return
    files = [regimes.regime_file(bases, name) for name in names]
    lines = [path.read_text(encoding="utf-8").strip() for path in files if path.exists()]
    results = [result for world in worlds for result in world.results]
    missing = {world.name: [t.name for t in world.origins if not world.shelf.get(t)] for world in worlds}
    print(write_results(results, args.output, args.against, lines, missing))
    if args.fresh:
        for world in worlds:
            shipped = read_records(record_file(FOLDER / "records", args.split, world.name))
            print(f"{world.name}: {describe_agreement(world.results, shipped)}")


def _open_world(
    name: str, study: dict[str, Any], groups: Sequence[dict[str, Any]], bases: Path, args: argparse.Namespace
) -> World:
    """Writes the data of a world, and finds the results that exist: in the output folder, and those that were shipped.

    Raises:
        ValueError: the output folder has a training of other flags or data.
    """
    data, root = (args.output / "data" / name).resolve(), (args.output / args.split / name).resolve()
    setting = setting_of(study, name, data, args.split, bases)
    num_train = setting.train["--train-iters"] * setting.train["--global-batch-size"]
    seeds = sorted({seed for group in groups for seed in group["seeds"]})
    write_world(WORLDS[name], data, seeds, min(num_train, args.num_train))
    tasks = list(dict.fromkeys(task for group in groups for task in tasks_of(setting, group)))
    reproduce.check_results(setting, tasks, root)
    origins = {task: origin_of(setting, task, {data: "DATA", bases: "BASES"}) for task in tasks}
    world = World(name, setting, root, origins, Shelf(record_file(args.output / "records", args.split, name)))
    sources = [world.shelf.path] + ([] if args.fresh else [record_file(FOLDER / "records", args.split, name)])
    for source in sources:
        others = world.shelf.take(read_records(source), origins)
        if others:
            print(f"{source}: {describe_others(others, origins)}", flush=True)
    for task in tasks:
        if not world.shelf.get(task) and (root / task.name / "done").exists():
            world.record(task)
    return world


def _calls(worlds: Sequence[World], groups: Sequence[dict[str, Any]]) -> list[Callable[[], None]]:
    """The trainings that are missing: group by group, in each seed by seed, so that the worlds advance together."""
    wanted = [
        (world, task)
        for group in groups
        for seed in group["seeds"]
        for world in worlds
        for task in tasks_of(world.setting, {**group, "seeds": [seed]})
    ]
    missing = {(world.name, task): world for world, task in wanted if not world.shelf.get(task)}
    return [partial(world.run, task) for (_, task), world in missing.items()]


def groups_of(
    study: dict[str, Any], methods: Sequence[str] | None, seeds: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Takes the groups out of the study, each with its methods and seeds, or makes one of the command line's.

    The study gets the methods and seeds of all groups.

    Args:
        methods: given on the command line. They have the seeds of their groups, or those of the first group.
        seeds: given on the command line. They hold for all methods.
    """
    groups: list[dict[str, Any]] = study.pop("groups")
    if methods:
        of = {m: [seed for g in groups if m in g["methods"] for seed in g["seeds"]] for m in methods}
        groups = [{"methods": [m], "seeds": of[m] or groups[0]["seeds"]} for m in methods]
    if seeds:
        groups = [{"methods": group["methods"], "seeds": list(seeds)} for group in groups]
    study["methods"] = list(dict.fromkeys(method for group in groups for method in group["methods"]))
    study["seeds"] = groups[0]["seeds"]
    return groups


def at_rates(
    study: dict[str, Any], groups: Sequence[dict[str, Any]], rates: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the groups with a variant of each method for each learning rate, named like ``sft@3e-4``. Adds the variants to the study."""

    def at(method: str, rate: str) -> str:
        name = f"{method}@{rate}"
        study["variants"][name] = {**study["variants"].get(method, {"of": method}), "--lr": float(rate)}
        return name

    swept = [
        {**group, "methods": [at(m, rate) for m in group["methods"] if m != "base" for rate in rates]}
        for group in groups
    ]
    study["methods"] = list(dict.fromkeys(method for group in swept for method in group["methods"]))
    return swept


def tasks_of(setting: Setting, group: Mapping[str, Any]) -> list[Task]:
    """Returns the tasks of a group, in their order."""
    return reproduce.tasks_of(dataclasses.replace(setting, methods=group["methods"], seeds=group["seeds"]))


def _chosen(names: Sequence[str]) -> list[str]:
    groups = {"kept": list(KEPT), "development": list(DEVELOPMENT)}
    return [world for name in names for world in groups.get(name, [name])]


def main(argv: list[str] | None = None) -> int:
    """Runs the command line. Returns the exit code as ``cli.run`` defines it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of all results")
    parser.add_argument(
        "--worlds", nargs="+", default=["kept"], choices=["kept", "development", *WORLDS], metavar="NAME",
        help=f"kept, development, or some of {', '.join(WORLDS)}; default: kept",
    )  # fmt: skip
    parser.add_argument(
        "--split", choices=("test", "dev"), default="test", help="held-out problems; default: test"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="default: those of study.toml")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="default: those of study.toml")
    parser.add_argument(
        "--rates", nargs="+", metavar="LR",
        help="train each method at each of these learning rates; default: at its rate in study.toml",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of a training; default: that of study.toml"
    )
    parser.add_argument(
        "--num-train",
        type=int,
        default=960,
        metavar="N",
        help="training problems of a seed; default: %(default)s",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="evaluate only N problems of each kind; default: all"
    )
    parser.add_argument(
        "--bases", type=Path, metavar="DIR", help="folder of base models; default: the shipped ones"
    )
    parser.add_argument(
        "--fresh", action="store_true",
        help="use neither the shipped base models nor the shipped results: make everything in --output",
    )  # fmt: skip
    parser.add_argument(
        "--against", default="rasft", metavar="NAME", help="method of comparison; default: rasft"
    )
    parser.add_argument("--tables-only", action="store_true", help="write the tables, and run nothing")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each of two trainings at a time has one core
    return cli.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
