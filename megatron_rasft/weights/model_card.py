"""Writes the README.md of an exported model: the model's sizes, the base model and the training."""

import json
import math
from pathlib import Path

from megatron_rasft.config.saved import SavedConfig
from megatron_rasft.weights.folder import ModelFolder

CARD_FILE = "README.md"


def saved_run_facts(save: Path, iteration: int) -> dict[str, str]:
    """Returns the rows of a card that describe the run of a --save folder, as of step ``iteration``; {} for weights without a
    run."""
    try:
        saved = SavedConfig.read(save)
        return {} if saved is None else run_facts(saved, save / "metrics.jsonl", iteration)
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run_facts(saved: SavedConfig, metrics: Path | None, iteration: int) -> dict[str, str]:
    """Returns the rows of a card that describe a run.

    Args:
        saved: the run's configuration.
        metrics: the run's metrics.jsonl, which need not exist.
        iteration: the step of the weights.
    """
    rasft, megatron = saved.rasft, saved.megatron
    facts = {
        "Base model": saved.hf_model or "",
        "Objective": rasft["objective"]["objective"],
        "Demonstrations": ", ".join(rasft["data"]["train_data"]),
        "Rollout engine": rasft["rollout"]["rollout_engine"],
        "Steps": str(iteration),
        "Problems per step": megatron["global_batch_size"],
        "Learning rate": megatron["lr"],
    }
    return facts if metrics is None else {**facts, **_last_metrics(metrics, iteration)}


def _last_metrics(path: Path, iteration: int) -> dict[str, str]:
    """The last loss and solve rate up to step ``iteration``."""
    shown = {"objective/loss": "Loss of the last step", "verify/solve_rate": "Solve rate of the last refresh"}
    facts = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    for line in lines:
        record = json.loads(line)
        if record.get("step", math.inf) > iteration:
            break
        facts.update(
            {shown[key]: f"{record[key]:.4g}" for key in shown if math.isfinite(record.get(key, math.nan))}
        )
    return facts


def write_card(folder: Path, template: ModelFolder, title: str, facts: dict[str, str]) -> None:
    """Writes README.md into ``folder``.

    Args:
        folder: the model's folder.
        template: the model's description.
        title: the model's name.
        facts: further rows of the table, after those about the model.
    """
    shape = template.shape
    num_parameters = sum(math.prod(size) for size in template.hf_shapes.values())
    experts = f", {shape.num_experts} experts" if shape.num_experts else ""
    rows = {
        "Architecture": template.architecture,
        "Parameters": f"{num_parameters:,}",
        "Layers": f"{shape.num_layers} of width {shape.hidden_size}{experts}",
        "Vocabulary": f"{shape.vocab_size:,}",
        **facts,
    }
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "- megatron-rasft", "---", "", f"# {title}", ""]
    lines += ["| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    lines += ["", "Written by megatron_rasft.", ""]
    (folder / CARD_FILE).write_text("\n".join(lines), encoding="utf-8")


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
