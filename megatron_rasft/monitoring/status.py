"""The file status.json in --save, which says how a run ended: scripts read it, and so does the next start of the run.

The exit code separates a clean end (0) from a crash; this file separates a finished run from a stopped one. It is replaced in one
step, so it always holds a complete object.
"""

import dataclasses
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from megatron_rasft.files import write_json, written_to

STATUS_FILE = "status.json"

State = Literal["running", "stopped", "finished", "failed"]


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far a run is, and how it ended."""

    state: State
    """running: the run has begun. If its processes have ended, they were killed, or failed before they could write the reason.
    stopped: the same command resumes it. finished: all steps are trained and the export is written. failed: see ``reason``."""
    step: int = 0
    """The last step that was trained, or saved while the run goes on."""
    num_steps: int = 0
    """Steps of the whole run."""
    reason: str = ""
    """Why the run was stopped, or the first line of its error."""
    export_folder: str | None = None
    """Absolute path of the export that the run has begun, after its last step."""
    save_s: float | None = None
    """The longest save of the last start that has saved, seconds."""

    @classmethod
    def read(cls, save: Path | str | None) -> Self | None:
        """Reads the status of the run in a --save folder; None if there is none, or if the file is not a status."""
        try:
            content: Any = json.loads(Path(save or "", STATUS_FILE).read_text(encoding="utf-8"))
            known = {field.name for field in dataclasses.fields(cls)}
            return cls(**{name: value for name, value in content.items() if name in known})
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def write(self, save: Path | str) -> None:
        """Writes the status into a --save folder.

        Raises:
            RasftError: the file cannot be written.
        """
        path = Path(save, STATUS_FILE)
        with written_to(path, "--save"):
            write_json(path, {**dataclasses.asdict(self), "time": time.time()}, is_synced=True)

    def has_export(self, folder: str | None) -> bool:
        """Returns whether ``folder`` is the complete export of this run, which only begins an export that does not exist."""
        return (
            folder is not None and self.export_folder == os.path.abspath(folder) and _is_model(Path(folder))
        )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
