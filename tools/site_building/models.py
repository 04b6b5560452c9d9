"""The generated page about models: families with a table, published models that they take, and what is refused and why."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.architecture import ModelDescription
from megatron_rasft.weights.config_values import BRIDGE
from megatron_rasft.weights.families import FAMILIES, OTHER_NAMES, REFUSED, Family

CONFIGS = Path(__file__).resolve().parents[2] / "tests/unit/weights/model_configs.json"
"""Sizes and settings of published models: name -> config.json."""

BRIDGE_ANSWERS = CONFIGS.with_name("bridge_answers.json")
"""The version of Megatron-Bridge, and why it refuses models that the tables refuse; null if it trains them."""

SERVED = Path(__file__).with_name("served_families.json")
"""Results of benchmarks/served_families.py."""

_STEPS = {
    "all": "computed",
    "compute": "loaded",
    "load": "failed",
    "start": "not started",
}
"""Step of benchmarks/served_families.py that failed -> the word for it, the best first."""

_START = """\
# Models

Which models `--hf-model` takes. The tables are made from [the families](../megatron_rasft/weights/families/__init__.py) and from the
configurations of {number} published models. The tables accept {accepted} of them, and Megatron-Bridge {version} accepts {bridged} more
(`--model-source bridge`). Tests read these configurations, in [model_configs.json](../tests/unit/weights/model_configs.json), and the answers of
Megatron-Bridge to them. The weights of these models were not loaded: the tests compare a small random model of every family with
transformers (logits within 1e-5).

TP, PP, CP, DP and EP are tensor, pipeline, context, data and expert parallelism. FP8 is `tools/convert_checkpoint.py --fp8`.
Weight sync sends the tensors that are trained, under the names of an export. [Checkpoints](checkpoints.md) has the limits of each family.
"""
_SERVED = """\
## Weight sync

The weights of a small random model of each family were sent to a real server of SGLang {version} on a CPU, which had started with other
weights (`python -m benchmarks.served_families`). The table above has the result:

- computed: the served log-probabilities are those of transformers (within {tolerance} nats, float32).
- loaded: the server has the same weights, bit for bit, as after it has read them from a folder. On a CPU it cannot compute with them.
- failed: the server does not have the weights that were sent.
- not started: SGLang cannot start the model on a CPU, so nothing is known.

SGLang serves Seed-OSS, SmolLM3 and others by transformers' classes, with other names of weights than its own classes have, and so do classes
that see images. `--sync-proof checksum` does not know these names: with servers of such models on a CPU, set `--sync-proof off`.

The first error of each server that did not compute follows. A run refuses qwen2_yarn: SGLang ignores the attention factor of its config.json.

| model | error |
| --- | --- |
"""
_REFUSED = """\
## Refused

An error names the missing feature before anything is loaded. {bridge}: the last column has its answers.
"""


def read_configs() -> dict[str, dict[str, Any]]:
    """Name of a published model -> its config.json."""
    configs: dict[str, dict[str, Any]] = json.loads(CONFIGS.read_text(encoding="utf-8"))
    return configs


def read_bridge_answers() -> dict[str, Any]:
    """The content of BRIDGE_ANSWERS."""
    answers: dict[str, Any] = json.loads(BRIDGE_ANSWERS.read_text(encoding="utf-8"))
    return answers


def refusal_of(config: dict[str, Any]) -> str | None:
    """Returns why a config.json is refused; None if it is accepted."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config))
        try:
            ModelDescription.read(folder)
        except ModelFolderError as error:
            return str(error).removeprefix(f"model folder {folder}: ")
    return None


def models_page() -> str:
    """One row for each family, then one for each refused model."""
    configs, bridge = read_configs(), read_bridge_answers()
    refusals = {name: refusal_of(config) for name, config in configs.items()}
    names: dict[str, list[str]] = {architecture: [] for architecture in FAMILIES}
    for name, config in configs.items():
        if refusals[name] is None:
            (architecture,) = config["architectures"]
            names[OTHER_NAMES.get(architecture, architecture)].append(name)
    known = sum(map(len, names.values()))
    results = json.loads(SERVED.read_text(encoding="utf-8"))
    rows = [_family_row(family, names[architecture], results) for architecture, family in FAMILIES.items()]
    refused = [
        f"| {name} | {_reason(reason)} | {_cell(bridge['reasons'][name] or 'trains it')} |"
        for name, reason in refusals.items()
        if reason is not None
    ]
    bridged = [name for name, reason in refusals.items() if reason and bridge["reasons"][name] is None]
    seen = {architecture for config in configs.values() for architecture in config["architectures"]}
    refused += [f"| {name} | {reason} | not asked |" for name, reason in REFUSED.items() if name not in seen]
    return "\n".join(
        [
            _START.format(
                number=len(configs), accepted=known, version=bridge["megatron-bridge"], bridged=len(bridged)
            ),
            "| family | published models that are accepted | layouts | weight sync | FP8 |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            *_served_section(results),
            _REFUSED.format(bridge=BRIDGE[:1].upper() + BRIDGE[1:]),
            "| model | reason | Megatron-Bridge |",
            "| --- | --- | --- |",
            *refused,
            "",
        ]
    )


def _served_section(results: dict[str, Any]) -> list[str]:
    """What servers did with small models, and why some of them computed nothing."""
    start = _SERVED.format(version=results["version"], tolerance=results["tolerance"]).rstrip()
    failed = {case: found for case, found in results["cases"].items() if found["step"] != "all"}
    return [start, *(f"| {case} | {_reason(found['reason'])} |" for case, found in failed.items()), ""]


def _sync_cell(architecture: str, results: dict[str, Any]) -> str:
    """Returns the last step that succeeded on a server with a model of the family."""
    steps = {case["step"] for case in results["cases"].values() if case["architecture"] == architecture}
    return next((words for step, words in _STEPS.items() if step in steps), "not tried")


def _family_row(family: Family, names: list[str], results: dict[str, Any]) -> str:
    layouts = "TP, PP, CP, DP" + (", EP" if family.has_experts else "")
    sync = _sync_cell(family.architecture, results)
    fp8 = "yes"
    if family.has_expert_biases:
        fp8 = "no"
    elif family.is_carried is not Family.is_carried:
        fp8 = "not of a folder with tensors that exports copy"
    return f"| {family.architecture} | {', '.join(names) or '-'} | {layouts} | {sync} | {fp8} |"


def _reason(text: str) -> str:
    """A refusal without the advice that all have."""
    return _cell(text.removesuffix(f"; {BRIDGE}"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
