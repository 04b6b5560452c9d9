"""Reads a run's metrics.jsonl, config.json and model card."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rasft import metrics
from megatron_rasft.config.saved import SavedConfig
from megatron_rasft.monitoring.status import RunStatus

CARD_ENDING = "Written by megatron_rasft."
"""Text that identifies a model card of this project among README files."""

Record = dict[str, float]
"""Metric name -> value of one step or refresh. "time" is in seconds since 1970."""

_OF_A_STEP = (
    metrics.LOSS,
    metrics.GRAD_NORM,
    metrics.LEARNING_RATE,
    metrics.TOKENS_PER_S,
    metrics.STEP_S,
    metrics.NUM_TOKENS,
    metrics.NUM_SAMPLES,
    metrics.RATIO_MEAN,
    metrics.RATIO_CLIP_FRAC,
    metrics.DEMONSTRATION_WEIGHT,
    metrics.ROLLOUT_WEIGHT,
    metrics.WRONG_ROLLOUT_WEIGHT,
    metrics.CROSS_ENTROPY,
    "time",
)
"""Metrics that are kept for each step, because long runs have many steps. For refreshes all metrics are kept."""

PHASES = {
    "training": "training steps",
    "generate": "sampling rollouts",
    "sync": "weight sync to servers",
    "verify": "verification of rollouts",
    "reference": "reference log-probabilities",
    "score": "scoring the difficulty",
    "other": "other: start-up, held-out, saves, pauses",
}
"""Phase of a run -> its name on the page."""


class NoRecordsError(ValueError):
    """A folder has no records of a run, or none yet."""


@dataclass
class RunRecords:
    """Metrics and settings of one run.

    Steps are numbered from 1. The step of a refresh or held-out measurement is the number of steps before it.
    """

    name: str
    metrics_path: Path | None = None
    rollouts_path: Path | None = None
    reference_cache_path: Path | None = None
    """The run's log-probabilities of the reference, if it stored them."""
    config: dict[str, Any] = field(default_factory=dict)
    """Content of config.json. Empty if it does not exist."""
    card: dict[str, str] = field(default_factory=dict)
    """Row name -> value in the exported model's card. Empty if it does not exist."""
    steps: dict[int, Record] = field(default_factory=dict)
    refreshes: dict[int, Record] = field(default_factory=dict)
    heldout: dict[int, Record] = field(default_factory=dict)
    num_repeated: int = 0
    """Number of steps that the run repeated after a resume. The last record of each is kept."""
    num_unreadable: int = 0
    """Number of skipped lines of metrics.jsonl, such as an incomplete last line."""

    def setting(self, package: str, name: str) -> Any:
        """Returns a flag's value in config.json, or None if it is missing."""
        return self.config.get("rasft", {}).get(package, {}).get(name)

    def megatron(self, name: str) -> str | None:
        """Returns one of Megatron's arguments as text, or None if it is missing or None."""
        value = self.config.get("megatron", {}).get(name)
        return None if value in (None, "None") else str(value)

    @property
    def model_folder(self) -> Path | None:
        """The run's --hf-model; None if it is unknown."""
        folder = self.setting("run", "hf_model") or self.megatron("hf_model") or self.card.get("Base model")
        return Path(folder) if folder else None

    def points(self, name: str) -> list[tuple[float, float]]:
        """Returns (step, value) of a metric that steps record."""
        return _points(self.steps, name)

    def refresh_points(self, name: str) -> list[tuple[float, float]]:
        """Returns (step, value) of a metric that refreshes or held-out measurements record."""
        return _points(self.refreshes, name) or _points(self.heldout, name)

    def total(self, name: str) -> float:
        """Returns the sum of a metric over the steps."""
        return sum(record.get(name, 0.0) for record in self.steps.values())

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase. ``other`` is the rest of the wall-clock time."""
        sums = dict.fromkeys(PHASES, 0.0)
        for record in self.steps.values():
            sums["training"] += record.get(metrics.STEP_S, 0.0)
        for record in self.refreshes.values():
            sync = record.get(metrics.SYNC_S, 0.0)
            sums["sync"] += sync
            for name, phase in metrics.REFRESH_PHASES.items():
                within = sync if phase == "generate" else 0.0  # "generate" includes the weight sync
                sums[phase] += max(0.0, record.get(name, 0.0) - within)
        times = [
            r["time"]
            for part in (self.steps, self.refreshes, self.heldout)
            for r in part.values()
            if "time" in r
        ]
        if times:
            sums["other"] = max(
                0.0, max(times) - min(times) - sum(sums.values()) + self._before_first(min(times))
            )
        return sums

    def _before_first(self, time: float) -> float:
        """Returns the seconds of the phases in the first record. That record's time does not include them."""
        for record in (*self.refreshes.values(), *self.steps.values()):
            if record.get("time") == time:
                return sum(record.get(name, 0.0) for name in (metrics.STEP_S, *metrics.REFRESH_PHASES))
        return 0.0


def read_run(
    folder: Path | None, metrics_path: Path | None = None, rollouts_path: Path | None = None
) -> RunRecords:
    """Reads the metrics and settings of a run, and finds its rollouts.

    Args:
        folder: the --save folder of the run; None if only files are given.
        metrics_path: value of --metrics; None selects the file in the folder, or else the file that config.json names.
        rollouts_path: value of --rollouts; None as for metrics_path.

    Raises:
        NoRecordsError: no file was found.
        ValueError: a given path does not exist, or config.json is damaged.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"RUN_DIR {folder} is not a folder. Give the --save folder of a run.")
    for flag, path in (("--metrics", metrics_path), ("--rollouts", rollouts_path)):
        if path is not None and not path.is_file():
            raise ValueError(f"{flag} {path} is not a file.")
    run = RunRecords(_name_of(folder or metrics_path or rollouts_path))
    if folder is not None:
        saved = SavedConfig.read(folder)
        run.config = {} if saved is None else asdict(saved)
        run.card = _read_card(folder, run.megatron("export_hf"))
    run.metrics_path = metrics_path or _find(folder, "metrics.jsonl", run.setting("run", "rasft_metrics"))
    run.rollouts_path = rollouts_path or _find(
        folder, "rollouts.jsonl", run.setting("rollout", "rollout_store")
    )
    run.reference_cache_path = _find(folder, "ref_logprobs.sqlite", run.setting("run", "rasft_ref_cache"))
    if run.metrics_path is None and run.rollouts_path is None:
        raise NoRecordsError(
            f"RUN_DIR {folder} has neither metrics.jsonl nor rollouts.jsonl. Give the --save folder of a run, or its files with "
            "--metrics and --rollouts."
        )
    if run.metrics_path is not None:
        _read_metrics(run.metrics_path, run)
    return run


def has_ended(folder: Path) -> bool:
    """Returns whether the status.json of a run says that it has finished, was stopped, or failed."""
    status = RunStatus.read(folder)
    return status is not None and status.state != "running"


def lines_with_offsets(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields the offset and content of every line, including an incomplete last line."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _read_metrics(path: Path, run: RunRecords) -> None:
    for _, line in lines_with_offsets(path):
        try:
            record = json.loads(line)
            event, step = record["event"], int(record["step"])
            values = {
                k: float(v) for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v)
            }
        except (ValueError, TypeError, KeyError, AttributeError):
            run.num_unreadable += 1
            continue
        if event == "step":
            run.num_repeated += step in run.steps
            run.steps[step] = {name: values[name] for name in _OF_A_STEP if name in values}
        elif event == "refresh":
            part = run.heldout if metrics.HELDOUT_SOLVE_RATE in values else run.refreshes
            part[step] = values
    for part in (run.steps, run.refreshes, run.heldout):
        ordered = sorted(part.items())
        part.clear()
        part.update(ordered)


def _points(records: dict[int, Record], name: str) -> list[tuple[float, float]]:
    return [(step, record[name]) for step, record in records.items() if name in record]


def _name_of(path: Path | None) -> str:
    assert path is not None, "a run must have a folder or a file"
    return path.resolve().name


def _find(folder: Path | None, name: str, configured: Any) -> Path | None:
    candidates = [] if folder is None else [folder / name]
    if isinstance(configured, str):
        candidates.append(Path(configured))
    return next((path for path in candidates if path.is_file()), None)


def _read_card(folder: Path, exported: str | None) -> dict[str, str]:
    """Reads the model card in the --export-hf folder, or in a folder below the run's."""
    places = [Path(exported)] if exported else []
    for path in (place / "README.md" for place in [*places, *sorted(folder.glob("*/"))]):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        if CARD_ENDING in text:
            rows = dict(re.findall(r"^\| (\w.*?) \| (.*) \|$", text, re.MULTILINE))
            return rows | {"Exported to": str(path.parent)}
    return {}
