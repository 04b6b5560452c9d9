"""What Megatron-Bridge answers to the published configurations that our tables refuse.

`.venv-bridge/bin/python -m tests.bridge.answers` writes the answers down again, for the tests and for the page about models.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_rasft.errors import ModelFolderError
from tests.emulated_gpu import running
from tools.site_building.models import BRIDGE_ANSWERS, read_configs, refusal_of

_TOLD = "ANSWERS "
"""Begins the line of a process on the emulated machine that has the answers."""


def ask() -> dict[str, Any]:
    """Asks Megatron-Bridge in a process on the emulated machine, because its import needs Transformer Engine."""
    done = running.command([sys.executable, "-m", __spec__.name, "--here"], "transformer_engine")
    for line in done.stdout.splitlines():
        if line.startswith(_TOLD):
            answers: dict[str, Any] = json.loads(line.removeprefix(_TOLD))
            return answers
    raise AssertionError(done.stdout)


def _ask_here() -> dict[str, Any]:
    refused = {name: config for name, config in read_configs().items() if refusal_of(config) is not None}
    return {
        "megatron-bridge": importlib.metadata.version("megatron-bridge"),
        "reasons": {name: _reason(config) for name, config in refused.items()},
    }


def _reason(config: dict[str, Any]) -> str | None:
    """Why Megatron-Bridge cannot train a model; None if it can."""
    from megatron_rasft.bridge.folder import describe

    with TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(config))
        try:
            describe(Path(name))
        except ModelFolderError as error:
            return str(error).replace(name, "FOLDER")
    return None


if __name__ == "__main__":
    if sys.argv[1:] == ["--here"]:
        print(f"{_TOLD}{json.dumps(_ask_here())}")
    else:
        BRIDGE_ANSWERS.write_text(json.dumps(ask(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
