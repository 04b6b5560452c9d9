"""The configuration that a run writes beside its checkpoints, and that tools read later."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_rasft.config import RasftConfig
from megatron_rasft.files import write_json, written_to

CONFIG_FILE = "config.json"
"""Name of the configuration's file in --save."""


@dataclass(frozen=True, kw_only=True)
class SavedConfig:
    """The value of every flag of one run."""

    rasft: dict[str, Any]
    """Group of this package's flags -> flag -> value."""
    megatron: dict[str, str]
    """Megatron's argument -> value as text."""

    @classmethod
    def of(cls, args: argparse.Namespace, config: RasftConfig) -> Self:
        """Collects the values of the present run."""
        return cls(rasft=config.as_dict(), megatron={k: str(v) for k, v in sorted(vars(args).items())})

    @classmethod
    def read(cls, save: Path) -> Self | None:
        """Reads the configuration of the run that wrote ``save``; None if the folder has no ``CONFIG_FILE``.

        Raises:
            ValueError: the file does not hold a run's configuration.
        """
        path = save / CONFIG_FILE
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if all(isinstance(content[part], dict) for part in ("rasft", "megatron")):
                return cls(rasft=content["rasft"], megatron=content["megatron"])
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(
            f"{path} does not hold the configuration of a run. Give the --save folder of a run, or delete this file to continue "
            "without it."
        )

    def write(self, save: Path) -> None:
        """Writes the configuration into a run's folder.

        Raises:
            RasftError: the file cannot be written.
        """
        path = save / CONFIG_FILE
        with written_to(path, "--save"):
            write_json(path, {"rasft": self.rasft, "megatron": self.megatron})

    @property
    def hf_model(self) -> str | None:
        """The run's --hf-model; None if the file does not hold it."""
        path = self.rasft.get("run", {}).get("hf_model")
        return path if isinstance(path, str) else None
