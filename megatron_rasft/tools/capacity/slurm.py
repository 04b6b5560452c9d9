"""Writes the files of examples/slurm for a chosen layout: a job script that is submitted without arguments, settings and network."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rasft.files import written_to
from megatron_rasft.tools.capacity.choosing import LayoutEstimate
from megatron_rasft.tools.capacity.commands import run_flags
from megatron_rasft.tools.capacity.config import CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model
from megatron_rasft.tools.capacity.speed import serving_tp
from megatron_rasft.wording import counted

_COLUMNS = 110


def on_whole_nodes(estimates: Sequence[LayoutEstimate], config: CapacityConfig) -> list[LayoutEstimate]:
    """Returns the estimates whose servers have nodes of their own, as in examples/slurm/rasft.sbatch.

    Raises:
        ValueError: there are none.
    """
    kept = [e for e in estimates if e.rollout_gpus % config.gpus_per_node == 0]
    if not kept:
        raise ValueError(
            f"--slurm gives servers nodes of their own, and --rollout-gpus {config.rollout_gpus} does not fill nodes of "
            f"{config.gpus_per_node} GPUs. Use 0 or a multiple."
        )
    return kept


def settings_text(
    model: Model, estimate: LayoutEstimate, config: CapacityConfig, *, precision: str = "bf16", title: str
) -> str:
    """Returns a settings file of examples/slurm.

    Args:
        title: the comment in its first line.
    """
    per_node = config.gpus_per_node
    tp = serving_tp(model, config) if estimate.rollout_gpus else None
    flags = run_flags(model, estimate, config, precision=precision)
    lines = [
        "# shellcheck shell=bash disable=SC2034",
        f"# {title}",
        f"TRAINER_NODES={-(-estimate.layout.num_gpus // per_node)} SERVER_NODES={estimate.rollout_gpus // per_node}",
        f"NUM_GPUS={min(per_node, estimate.layout.num_gpus)}  # on a node",
        f"SERVERS_PER_NODE={per_node // tp if tp else 0} SERVER_TP={tp or 1}",
        "SERVER_FLAGS=()  # further flags of tools/serve_rollouts.py",
        "FLAGS=(  # of pretrain_rasft.py",
        *(f"    {line}" for line in _wrapped(flags)),
        ")",
    ]
    return "\n".join(lines) + "\n"


def _wrapped(flags: Sequence[str]) -> list[str]:
    """Returns the flags in lines of ``_COLUMNS``. A flag and its values stay on one line."""
    groups: list[str] = []
    for word in flags:
        if word.startswith("--") or not groups:
            groups.append(shlex.quote(word))
        else:
            groups[-1] += f" {shlex.quote(word)}"
    lines = [""]
    for group in groups:
        if lines[-1] and len(lines[-1]) + len(group) + 5 > _COLUMNS:
            lines.append("")
        lines[-1] += f" {group}" if lines[-1] else group
    return lines


def script_text(
    template: str, checkout: Path, folder: Path, num_nodes: int, config: CapacityConfig, model: Model
) -> str:
    """Returns rasft.sbatch with the values that the shipped script takes from the command line.

    Args:
        template: the shipped script.
        folder: folder of the settings and of the run.
    """
    text = re.sub(
        r"^#SBATCH --gpus-per-node=.*$",
        f"#SBATCH --nodes={num_nodes}\n#SBATCH --gpus-per-node={min(config.gpus_per_node, config.num_gpus)}",
        template,
        count=1,
        flags=re.MULTILINE,
    )
    given = {
        "CHECKOUT": checkout,
        "MODEL": Path(model.path).absolute(),
        "TRAIN_DATA": Path(config.train_data).absolute(),
        "RUN": folder,
        "NETWORK": folder / "network.sh",
    }
    lines = [f"export {name}=${{{name}:-{shlex.quote(str(path))}}}" for name, path in given.items()]
    lines.append(f'set -- {shlex.quote(str(folder / "settings.sh"))} "$@"')
    return text.replace("set -euo pipefail\n", "set -euo pipefail\n" + "\n".join(lines) + "\n", 1)


def write_job(
    folder: Path,
    model: Model,
    estimate: LayoutEstimate,
    config: CapacityConfig,
    *,
    precision: str,
    checkout: Path,
) -> Path:
    """Writes rasft.sbatch, settings.sh and network.sh into a folder. Returns the path of the script.

    Raises:
        ValueError: --train-data does not exist, or ``checkout`` is not a checkout.
        RasftError: the folder cannot be written.
    """
    if not Path(config.train_data).exists():
        raise ValueError(
            f"--train-data {config.train_data} does not exist. --slurm writes a job that reads it: name it."
        )
    folder = folder.absolute()
    # The job changes into the checkout
    config = replace(config, config=[str(Path(file).absolute()) for file in config.config])
    shipped = checkout / "examples" / "slurm"
    if not shipped.is_dir():  # the installed wheel
        raise ValueError(
            "--slurm writes a job that runs a checkout of this repository: run its tools/plan.py."
        )
    num_nodes = -(-config.num_gpus // config.gpus_per_node)
    script = script_text(
        (shipped / "rasft.sbatch").read_text(encoding="utf-8"), checkout, folder, num_nodes, config, model
    )
    title = f"{Path(model.path).name} on {counted(num_nodes, 'node')}, chosen by tools/plan.py: {estimate.memory.total / 2**30:.1f} GiB a GPU"
    with written_to(folder, "--slurm"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rasft.sbatch").write_text(script, encoding="utf-8")
        (folder / "settings.sh").write_text(
            settings_text(model, estimate, config, precision=precision, title=title), encoding="utf-8"
        )
        (folder / "network.sh").write_text(
            (shipped / "network.sh").read_text(encoding="utf-8"), encoding="utf-8"
        )
    return folder / "rasft.sbatch"
