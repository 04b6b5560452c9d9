"""The settings of examples/slurm as bash reads them, and the models they are for."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rasft.config.command_line import run_parser
from megatron_rasft.config.config_file import CONFIG_FLAG, config_words
from megatron_rasft.tools.capacity.choosing import LayoutEstimate, estimate_layouts
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model
from tools import plan

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples" / "slurm"
SETTINGS = sorted(FOLDER.glob("settings/*.sh"))
MODELS: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "unit" / "examples" / "slurm_models.json").read_text(encoding="utf-8")
)
"""Name of a setting -> the config.json of its model."""


@dataclass
class Setting:
    """The values of a settings file, as bash reads them, and the flags of its recipe."""

    path: Path
    values: dict[str, str] = field(init=False)
    recipe: Path = field(init=False)
    flags: list[str] = field(init=False)
    """The recipe's flags, each with its value in one word, except lists."""

    def __post_init__(self) -> None:
        names = "TRAINER_NODES SERVER_NODES NUM_GPUS SERVERS_PER_NODE SERVER_TP".split()
        shown = " ".join(f'"${{{name}}}"' for name in names)
        program = f'set -eu; source "$0"; printf "%s\\0" {shown} "${{FLAGS[@]}}"'
        words = subprocess.run(
            ["bash", "-c", program, str(self.path)], capture_output=True, text=True, check=True
        ).stdout.split("\0")[:-1]
        self.values = dict(zip(names, words, strict=False))
        config, recipe = words[len(names) :]
        assert config == CONFIG_FLAG, f"{self.path} names its recipe only"
        self.recipe = ROOT / recipe
        self.flags = config_words([CONFIG_FLAG, str(self.recipe)], run_parser()[0]._option_string_actions)

    def number(self, name: str) -> int:
        return int(self.values[name])

    def config(self) -> CapacityConfig:
        """The recipe's run for capacity planning."""
        flags = ["--hf-model", "model", CONFIG_FLAG, str(self.recipe)]
        return CapacityConfig.from_args(plan.parser().parse_args(flags))

    @property
    def precision(self) -> str:
        """The value of capacity planning's ``precision``."""
        return "fp8" if any(flag.startswith("--fp8-format") for flag in self.flags) else "bf16"

    def estimate(self, model: Model) -> LayoutEstimate:
        """What capacity planning calculates for the setting's layout."""
        return estimate_layouts(model, self.config(), AssumptionConfig(), precision=self.precision)[0]

    def command_line(self, model: Model) -> list[str]:
        """The flags with which the job script starts the run, without FP8, which needs a GPU."""
        flags = ["--hf-model", model.path, "--train-data", "train.jsonl"]
        flags += ["--rollout-server-file", "servers.txt"] if self.number("SERVER_NODES") else []
        return [*flags, *(flag for flag in self.flags if not flag.startswith("--fp8-"))]


def model_folder(name: str, folder: Path, **changes: Any) -> Path:
    """Writes the config.json of a setting's model into a folder, and returns the folder.

    Args:
        changes: values that replace the model's.
    """
    (folder / "config.json").write_text(json.dumps({**MODELS[name], **changes}), encoding="utf-8")
    return folder
