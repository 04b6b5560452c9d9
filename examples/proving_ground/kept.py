"""Records of finished trainings: one line of JSON each, small enough for the repository.

A record says what its training was made from, as checksums. A study uses a record only if it would run the same training.
"""

import hashlib
import json
import statistics
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.benchmark_reproduction.comparison import read_curve
from examples.benchmark_reproduction.records import checksum, checksums_of
from examples.benchmark_reproduction.reproduce import Setting, Task, evaluations, flags_of
from examples.proving_ground.worlds import KINDS
from megatron_rasft import files

Scores = NDArray[np.float64]
"""Share of correct samples of each problem, [problems] or [seeds, problems]."""

Origin = dict[str, str]
"""``training``, ``evaluation``, ``data`` and ``base`` -> checksum of the flags or files."""

PACKAGES = ("torch", "megatron-core", "transformers")


@dataclass(frozen=True)
class Outcome:
    """A model's samples of the problems of one kind."""

    num_samples: int
    """Samples of each problem, at most 9."""
    correct: str
    """Correct samples of each problem, one digit each."""
    mean_tokens: float
    """Mean length of the samples."""

    @property
    def scores(self) -> list[float]:
        return [int(digit) / self.num_samples for digit in self.correct]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One training in one world, evaluated."""

    world: str
    method: str
    seed: int
    sampled: Mapping[str, Outcome]
    """Kind of problem -> samples at temperature 1."""
    greedy: Mapping[str, Outcome]
    """Kind of problem -> the greedy response."""
    trained_tokens: float
    generated_tokens: float
    seconds: float
    made_from: Origin
    commit: str = ""
    versions: Mapping[str, str]
    """Package of ``PACKAGES`` -> its version."""

    @property
    def task(self) -> Task:
        return Task(self.method, self.seed)

    def scores(self, kinds: Sequence[str], *, is_greedy: bool = False) -> Scores:
        """Scores of the problems of several kinds, one kind after the other."""
        outcomes = self.greedy if is_greedy else self.sampled
        return np.array([score for kind in kinds for score in outcomes[kind].scores])

    @property
    def samples(self) -> tuple[Any, ...]:
        """What another run of the same training has again, if it computes the same numbers."""
        return self.sampled, self.greedy, self.trained_tokens, self.generated_tokens

    @property
    def response_tokens(self) -> float:
        """Mean length of the sampled responses to the trained kinds."""
        return statistics.fmean(self.sampled[kind].mean_tokens for kind in KINDS)

    @property
    def solved_once(self) -> Scores:
        """Whether at least one sample of a problem of the trained kinds is correct: pass@k with all samples."""
        return (self.scores(KINDS) > 0).astype(float)


def origin_of(setting: Setting, task: Task, names: Mapping[Path, str]) -> Origin:
    """Returns what a task is made from. It is the same on every machine, wherever the folders are.

    Args:
        setting: the setting of the task's world.
        task: the task.
        names: folder that paths begin with -> its name.
    """
    plain = flags_of(setting, task)
    flags = {part: [_renamed(word, names) for word in words] for part, words in plain.items()}
    data = {_renamed(file, names): digest for file, digest in checksums_of(plain).items()}
    judged = evaluations(setting)
    return {
        "training": _digest({part: words for part, words in flags.items() if part not in judged}),
        "evaluation": _digest({part: words for part, words in flags.items() if part in judged}),
        "data": _digest(data),
        "base": weights_checksum(Path(setting.model)),
    }


def _renamed(text: str, names: Mapping[Path, str]) -> str:
    for folder, name in names.items():
        text = text.replace(str(folder), name)
    return text


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def weights_checksum(model: Path) -> str:
    """Returns the beginning of the SHA-256 of a model's weights, or an empty text without them."""
    path = model / "model.safetensors"
    return checksum(path)[:16] if path.is_file() else ""


def read_finished(world: str, task: Task, folder: Path, made_from: Origin) -> Result:
    """Reads the folder of a finished task."""
    curve = read_curve(folder / "metrics.jsonl")
    return Result(
        world=world,
        method=task.method,
        seed=task.seed,
        sampled=_outcomes(folder / "evaluation"),
        greedy=_outcomes(folder / "greedy"),
        trained_tokens=curve.total_tokens,
        generated_tokens=round(curve.total_generated),
        seconds=round(curve.total_seconds, 1),
        made_from=made_from,
        commit=files.read_json_object(folder / "done")["commit"],
        versions={package: metadata.version(package) for package in PACKAGES},
    )


def _outcomes(folder: Path) -> dict[str, Outcome]:
    summaries = files.read_json_object(folder / "summary.json")["benchmarks"]
    return {
        values["name"]: Outcome(
            values["num_samples"],
            "".join(str(round(score * values["num_samples"])) for score in values["scores"]),
            round(values["mean_tokens"], 2),
        )
        for values in summaries
    }


def record_file(folder: Path, split: str, world: str) -> Path:
    """Returns the file of a world's records."""
    return folder / split / f"{world}.jsonl"


def read_records(path: Path) -> list[Result]:
    """Reads the records of a world; [] without a file."""
    if not path.is_file():
        return []
    return [_from_line(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _from_line(line: str) -> Result:
    values = json.loads(line)
    for name in ("sampled", "greedy"):
        values[name] = {kind: Outcome(**outcome) for kind, outcome in values[name].items()}
    return Result(**values)


def write_records(results: Iterable[Result], path: Path) -> None:
    """Writes the records of a world, sorted, so that two files with the same trainings are equal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(results, key=lambda result: (result.method, result.seed))
    files.write_text(path, "".join(json.dumps(asdict(result)) + "\n" for result in ordered))


class Shelf:
    """The results of a world that a study has, and the file that holds them. Several threads may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._results: dict[Task, Result] = {}
        self._lock = threading.Lock()

    def add(self, result: Result) -> None:
        """Adds a result and writes the file."""
        with self._lock:
            self._results[result.task] = result
            write_records(self._results.values(), self.path)

    def take(self, found: Iterable[Result], origins: Mapping[Task, Origin]) -> list[Result]:
        """Adds the records of trainings that the study would run in the same way.

        Args:
            found: records.
            origins: what the study makes each task from.

        Returns:
            The records of tasks of the study that were made from something else.
        """
        others = []
        for result in found:
            if result.made_from == origins.get(result.task):
                self._results.setdefault(result.task, result)
            elif result.task in origins:
                others.append(result)
        return others

    def get(self, task: Task) -> Result | None:
        return self._results.get(task)


def describe_agreement(results: Sequence[Result], shipped: Iterable[Result]) -> str:
    """Says how many results have the same samples as the shipped ones of the same training."""
    by_task = {result.task: result for result in shipped}
    pairs = [
        (r, by_task[r.task])
        for r in results
        if r.task in by_task and r.made_from == by_task[r.task].made_from
    ]
    different = [ours.task.name for ours, theirs in pairs if ours.samples != theirs.samples]
    text = f"{len(pairs) - len(different)} of {len(pairs)} trainings that were shipped have the same samples again"
    return f"{text}, not {', '.join(different)}." if different else f"{text}."


def describe_others(others: Sequence[Result], origins: Mapping[Task, Origin]) -> str:
    """Says how many records are not used, and in what the first of them differs."""
    first = others[0]
    differences = [
        part for part, digest in origins[first.task].items() if first.made_from.get(part) != digest
    ]
    return (
        f"{first.world}: {len(others)} records are not used, because they were made from other flags or files. "
        f"{first.task.name} has another {', '.join(differences)}."
    )
