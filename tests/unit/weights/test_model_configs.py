"""110 published configurations are accepted or refused, each refusal with its reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.tools.capacity.layouts import Model
from megatron_rasft.weights.config_values import BRIDGE
from megatron_rasft.weights.families import FAMILIES, OTHER_NAMES, REFUSED
from tools.site_building.models import models_page, read_bridge_answers, read_configs, refusal_of

CONFIGS = read_configs()

REASONS = {
    "Kimi-K2-Thinking": "'pack-quantized'",
}
"""Model of a family with a table -> part of the reason why it is refused."""

BILLIONS = {
    "Qwen2.5-0.5B-Instruct": 0.494,
    "Qwen2.5-7B-Instruct+YaRN (model card recipe)": 7.616,
    "Qwen2.5-72B-Instruct": 72.706,
    "Qwen3-0.6B": 0.596,
    "DeepSeek-R1-0528-Qwen3-8B": 8.191,
    "Qwen3-8B-FP8": 8.191,
    "Qwen3-32B": 32.762,
    "Qwen3-30B-A3B": 30.532,
    "Qwen3-235B-A22B": 235.094,
    "DeepSeek-V3/R1": 671.026,
    "Llama-3.1-8B-Instruct": 8.030,
    "Llama-3.2-1B-Instruct": 1.236,
    "Llama-3.1-405B-Instruct": 405.853,
    "Mistral-Nemo-2407": 12.248,
    "Mistral-7B-v0.1": 7.242,
    "Mixtral-8x7B-v0.1": 46.703,
    "Phi-3-mini-4k-instruct": 3.821,
    "Phi-3.5-mini-instruct": 3.821,
    "Phi-4-mini-instruct": 3.836,
    "phi-4": 14.660,
    "deepseek-coder-6.7b (linear rope)": 6.740,
    "gemma-3-1b-it": 1.000,
    "gemma-3-4b-it": 3.880,
    "ERNIE-4.5-0.3B": 0.361,
    "GLM-4-9B-0414": 9.400,
    "glm-4-9b-chat-hf": 9.400,
    "Seed-OSS-36B-Instruct": 36.151,
    "gpt-oss-20b": 20.915,
    "gpt-oss-120b": 116.829,
    "SmolLM3-3B": 3.075,
}
"""Number of parameters in 1e9, as the model cards or the folders of these models give it."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_configuration_is_accepted_or_refused_with_its_reason(name: str) -> None:
    (architecture,) = CONFIGS[name]["architectures"]
    reason = refusal_of(CONFIGS[name])
    if OTHER_NAMES.get(architecture, architecture) not in FAMILIES:
        assert reason is not None and architecture in reason and REFUSED[architecture] in reason
        assert BRIDGE in reason
    elif name in REASONS:
        assert reason is not None and REASONS[name] in reason
    else:
        assert reason is None


def test_90_configurations_are_accepted_by_the_tables_or_by_megatron_bridge() -> None:
    refused = [name for name, config in CONFIGS.items() if refusal_of(config) is not None]
    by_neither = [name for name in refused if read_bridge_answers()["reasons"][name] is not None]
    assert len(CONFIGS) - len(by_neither) >= 90, by_neither


@pytest.mark.parametrize("name", BILLIONS)
def test_an_accepted_model_has_its_published_size(name: str, tmp_path: Path) -> None:
    assert size_of(CONFIGS[name], tmp_path) == pytest.approx(BILLIONS[name], abs=0.001)


def size_of(config: dict[str, Any], folder: Path) -> float:
    (folder / "config.json").write_text(json.dumps(config))
    return Model.read(folder).num_parameters / 1e9


def test_the_page_has_every_family_and_every_model_once() -> None:
    page = models_page()
    for architecture in FAMILIES:
        assert f"\n| {architecture} |" in page
    cells = [
        cell.strip() for line in page.splitlines() for part in line.split("|") for cell in part.split(",")
    ]
    for name in CONFIGS:
        assert cells.count(name) == 1, name
