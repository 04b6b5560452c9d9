"""convert_checkpoint.py --bridge with the real Megatron-Bridge, for the families that need it according to docs/checkpoints.md.

Run it in an environment with Megatron-Bridge (NVIDIA's NeMo container, or `pip install 'megatron-bridge[te]'`):

    python -m pytest -m bridge

Without a GPU, bridge_on_cpu.py replaces the CUDA calls of a conversion.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 64,
}


def convert(direction: str, source: Path, target: Path, *more: str) -> None:
    command = [sys.executable, str(ROOT / "tests/bridge/bridge_on_cpu.py"), "tools/convert_checkpoint.py"]
    command += [direction, "--input", str(source), "--output", str(target), *more]
    command += ["--bridge", "megatron-bridge"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"wrote {target}, by Megatron-Bridge" in result.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.bridge
@pytest.mark.parametrize("family", ["Gemma2", "Gemma3"])
def test_a_round_trip_is_bit_equal(family: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(1)
    config: Any = {"Gemma2": transformers.Gemma2Config, "Gemma3": transformers.Gemma3TextConfig}[family](
        **SHAPE, bos_token_id=2, eos_token_id=1, pad_token_id=0
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    convert("hf-to-megatron", tmp_path / "model", tmp_path / "megatron")
    convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back", "--hf-model", str(tmp_path / "model"))
    before, after = weights(tmp_path / "model"), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
