"""The output folder of an evaluation: its protocol, its samples and its results."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rasft.errors import DataError
from megatron_rasft.files import write_json, write_text
from megatron_rasft.tools.evaluation import comparison_tables
from megatron_rasft.tools.evaluation.benchmarks import Benchmark
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.tools.evaluation.known_sets import KNOWN_SETS
from megatron_rasft.tools.evaluation.summary import Summary

TABLE_WRITERS: dict[str, Callable[[comparison_tables.Results, str], str]] = {
    "markdown": comparison_tables.markdown,
    "csv": comparison_tables.comma_separated,
    "latex": comparison_tables.latex,
}
_TABLE_FILES = {"markdown": "results.md", "csv": "results.csv", "latex": "results.tex"}
_NUM_NEAR = 3
"""Maximum number of other evaluations that an error lists."""


class OutputFolder:
    """A folder with ``protocol.json``, ``samples/``, ``summary.json`` and the tables ``results.*``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.markdown = path / _TABLE_FILES["markdown"]
        self._protocol = path / "protocol.json"
        self._summary = path / "summary.json"
        self._samples = path / "samples"

    def samples_of(self, benchmark: Benchmark) -> Path:
        """Returns the file of a benchmark's samples."""
        return self._samples / f"{benchmark.name}.jsonl"

    def stores(self) -> list[Path]:
        """Returns the files of samples of all benchmarks, sorted by name."""
        return sorted(self._samples.glob("*.jsonl"))

    def check(self, drawn_by: dict[str, Any], benchmarks: Sequence[Benchmark]) -> None:
        """Checks that stored samples belong to this evaluation. Called before a model is loaded.

        Args:
            drawn_by: every setting that influences a sample, by name.
            benchmarks: the benchmarks to evaluate.

        Raises:
            ValueError: stored samples were drawn with other settings or from another file.
        """
        if not self._protocol.is_file():
            return
        protocol = json.loads(self._protocol.read_text(encoding="utf-8"))
        for name, value in drawn_by.items():
            stored = protocol["drawn_by"].get(name)
            if stored != value:
                raise ValueError(
                    f"--output {self.path} holds samples drawn with {name} {stored!r}, not {value!r}. Give another folder, or "
                    "the earlier flags."
                )
        for benchmark in benchmarks:
            file, samples = protocol["files"].get(benchmark.name), self.samples_of(benchmark)
            if file is not None and file["sha256"] != benchmark.sha256 and samples.exists():
                raise ValueError(
                    f"{samples} was drawn from {file['path']} with sha256 {file['sha256'][:12]}..., but {benchmark.path} has "
                    f"{benchmark.sha256[:12]}.... Give another --output or the earlier file, or delete the samples."
                )

    def write_protocol(
        self, drawn_by: dict[str, Any], config: EvaluationConfig, benchmarks: Sequence[Benchmark]
    ) -> None:
        """Writes all settings and the files of the benchmarks, including those of earlier evaluations in this folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        files = {}
        if self._protocol.is_file():
            files = json.loads(self._protocol.read_text(encoding="utf-8"))["files"]
        for b in benchmarks:
            files[b.name] = {"path": str(b.path), "sha256": b.sha256, "verified": b.is_verified}
        write_json(self._protocol, {"drawn_by": drawn_by, "config": asdict(config), "files": files})

    def check_exists(self) -> None:
        """Checks that an evaluation wrote this folder.

        Raises:
            DataError: it does not exist, or holds something else.
        """
        if not self.path.is_dir():
            raise DataError(
                f"the folder {self.path} does not exist. Give the folder that was --output of `evaluate.py run`{self._near()}."
            )
        if not self._protocol.is_file() and not self._summary.is_file():
            raise DataError(
                f"{self.path} is not a folder of an evaluation: it holds neither {self._protocol.name} nor "
                f"{self._summary.name}. Give the folder that was --output of `evaluate.py run`{self._near()}."
            )

    def _near(self) -> str:
        """Returns the evaluations in and beside this folder as a clause; "" if there are none."""
        others = [
            file.parent for place in (self.path, self.path.parent) for file in place.glob("*/protocol.json")
        ]
        by_path = {str(folder): folder for folder in others if folder != self.path}
        nearest = difflib.get_close_matches(str(self.path), by_path, n=_NUM_NEAR, cutoff=0.0)
        return f", for example {', '.join(nearest)}" if nearest else ""

    def read_summaries(self) -> tuple[str, list[Summary]]:
        """Returns the label and the summaries of a finished evaluation.

        Raises:
            DataError: the folder does not exist, or holds no results.
        """
        self.check_exists()
        if not self._summary.is_file():
            raise DataError(
                f"{self.path} holds no results: {self._summary.name} does not exist. Run the evaluation to its end."
            )
        content = json.loads(self._summary.read_text(encoding="utf-8"))
        return content["label"], [Summary.from_dict(values) for values in content["benchmarks"]]

    def add_summary(self, label: str, compared_with: str, summary: Summary) -> None:
        """Adds or replaces the results of one benchmark, and writes the tables again.

        Args:
            label: name of the row in the tables.
            compared_with: model whose published results are added to the tables; "" adds none.
            summary: the results.
        """
        earlier = self.read_summaries()[1] if self._summary.is_file() else []
        order = {name: place for place, name in enumerate(KNOWN_SETS)}
        summaries = sorted(
            [s for s in earlier if s.name != summary.name] + [summary],
            key=lambda s: (order.get(s.name, len(order)), s.name),
        )
        write_json(self._summary, {"label": label, "benchmarks": [s.as_dict() for s in summaries]})
        for name, write in TABLE_WRITERS.items():
            write_text(self.path / _TABLE_FILES[name], write({label: summaries}, compared_with))
