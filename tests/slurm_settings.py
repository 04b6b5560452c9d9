"""The settings of examples/slurm as bash reads them, and the models they are for."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rasft.tools.capacity.choosing import LayoutEstimate, estimate_layouts
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "slurm"
SETTINGS = sorted(FOLDER.glob("settings/*.sh"))
MODELS: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "unit" / "examples" / "slurm_models.json").read_text(encoding="utf-8")
)
"""Name of a setting -> the config.json of its model."""


@dataclass
class Setting:
    """The values of a settings file, as bash reads them."""

    path: Path
    values: dict[str, str] = field(init=False)
    flags: list[str] = field(init=False)

    def __post_init__(self) -> None:
        names = "TRAINER_NODES SERVER_NODES NUM_GPUS SERVERS_PER_NODE SERVER_TP ROLLOUT_LAG".split()
        shown = " ".join(f'"${{{name}}}"' for name in names)
        program = f'set -eu; source "$0"; printf "%s\\0" {shown} "${{FLAGS[@]}}"'
        words = subprocess.run(
            ["bash", "-c", program, str(self.path)], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        self.values = dict(zip(names, words, strict=False))
        self.flags = words[len(names) :]

    def number(self, name: str) -> int:
        return int(self.values[name])

    def config(self) -> CapacityConfig:
        """The run for capacity planning, with every size that the flags fix."""
        given: dict[str, Any] = {
            "num_gpus": self.number("NUM_GPUS")
            * (self.number("TRAINER_NODES") + self.number("SERVER_NODES")),
            "rollout_gpus": self.number("NUM_GPUS") * self.number("SERVER_NODES"),
            "rollout_lag": self.number("ROLLOUT_LAG"),
            "recompute": self.value("--recompute-granularity", "none"),
        }
        sizes = ("seq_length", "global_batch_size", "micro_batch_size", "save_interval")
        for name in (*sizes, "tensor_model_parallel_size", "pipeline_model_parallel_size"):
            given[name] = int(self.value(f"--{name.replace('_', '-')}", "1"))
        for name in ("context_parallel_size", "expert_model_parallel_size"):
            given[name] = int(self.value(f"--{name.replace('_', '-')}", "1"))
        given["num_layers_per_virtual_pipeline_stage"] = int(
            self.value("--num-layers-per-virtual-pipeline-stage", "0")
        )
        given["max_new_tokens"] = int(self.value("--rollout-max-new-tokens", ""))
        return CapacityConfig(**given)

    def value(self, flag: str, default: str) -> str:
        return self.flags[self.flags.index(flag) + 1] if flag in self.flags else default

    @property
    def precision(self) -> str:
        """The value of capacity planning's ``precision``."""
        return "fp8" if "--fp8-format" in self.flags else "bf16"

    def estimate(self, model: Model) -> LayoutEstimate:
        """What capacity planning calculates for the setting's layout."""
        return estimate_layouts(model, self.config(), AssumptionConfig(), precision=self.precision)[0]

    def command_line(self, model: Model) -> list[str]:
        """The flags with which the job script starts the run, without FP8, which needs a GPU."""
        engine = ["--rollout-engine", "embedded"]
        if self.number("SERVER_NODES"):
            engine = ["--rollout-engine", "sglang", "--rollout-server-file", "servers.txt"]
            engine += ["--rollout-lag", self.values["ROLLOUT_LAG"]]
        flags = ["--hf-model", model.path, "--train-data", "train.jsonl", *engine, *self.flags]
        if "--fp8-format" in flags:
            at = flags.index("--fp8-format")
            flags[at : at + 4] = []
        return flags


def model_folder(name: str, folder: Path, **changes: Any) -> Path:
    """Writes the config.json of a setting's model into a folder, and returns the folder.

    Args:
        changes: values that replace the model's.
    """
    (folder / "config.json").write_text(json.dumps({**MODELS[name], **changes}), encoding="utf-8")
    return folder
