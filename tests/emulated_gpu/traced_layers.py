"""Traces the tensors that Transformer Engine's layers keep for the backward pass, for the models of examples/slurm.

Each model is built with one and with two layers, all of its widths divided by its number of query groups, on the emulated machine. The
layers' own Python code decides which tensors it saves. ``trace_settings`` starts this file as a program.
"""

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.tools.capacity.layouts import Model
from megatron_rasft.tools.capacity.memory import kept_elements, layer_activations
from tests.emulated_gpu import running
from tests.slurm_settings import MODELS, SETTINGS, Setting, model_folder

TOKENS = 96
_WIDTHS = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size"),
    *("num_attention_heads", "num_key_value_heads"),
)
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What one layer of a model keeps."""

    kept: float
    """Bytes per token, in elements of two bytes."""
    calculated: float
    """The same number by capacity planning."""
    weight_copies: float
    """FP8 bytes that are kept for an element of the linear layers' weights."""


@dataclass
class _Kept:
    """The tensors that autograd saves, except the model's parameters and their FP8 copies."""

    model: torch.nn.Module

    def __post_init__(self) -> None:
        self.shapes = {tuple(p.shape) for p in self.model.parameters() if p.dim() == 2}
        self.own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.copies: dict[int, torch.UntypedStorage] = {}

    def pack(self, tensor: Any) -> Any:
        if hasattr(tensor, "_data") and hasattr(tensor, "_transpose"):  # Transformer Engine's Float8Tensor
            into = self.copies if tuple(tensor.shape) in self.shapes else self.storages
            for part in (tensor._data, tensor._transpose):
                if part is not None:
                    self._add(part, into)
        else:
            self._add(tensor, self.storages)
        return tensor

    def _add(self, tensor: torch.Tensor, into: dict[int, torch.UntypedStorage]) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            into[storage.data_ptr()] = storage  # a reference, so that the address is not used again


def is_installed() -> bool:
    """Whether `make emulated-gpu` was run."""
    return (running.TRANSFORMER_ENGINE / ".installed").is_file()


def trace_settings() -> dict[str, Trace]:
    """Traces one layer of every setting of examples/slurm, with its recomputation and precision."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "traces.json"
        outcome = running.run(Path(folder), [str(output)], program=Path(__file__))
        assert outcome.codes == [0], outcome.output
        return {name: Trace(**values) for name, values in json.loads(output.read_text()).items()}


def main(output: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    # the emulated device has no streams, and torch's own function asks for one
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    output.write_text(json.dumps({path.stem: asdict(_trace(Setting(path))) for path in SETTINGS}))
    dist.destroy_process_group()


def _trace(setting: Setting) -> Trace:
    name = setting.path.stem
    divisor = MODELS[name]["num_key_value_heads"]
    narrow = {key: MODELS[name][key] // divisor for key in _WIDTHS if key in MODELS[name]}
    recompute = setting.config().recompute
    with tempfile.TemporaryDirectory() as folder:
        one, two = (
            _kept(
                model_folder(
                    name,
                    Path(folder),
                    **narrow,
                    num_hidden_layers=number,
                    vocab_size=128,
                    tie_word_embeddings=True,
                ),
                setting,
            )
            for number in (1, 2)
        )
        model = Model.read(Path(folder))
    layer = layer_activations(model, is_fp8=setting.precision == "fp8")
    return Trace(
        kept=(two[0] - one[0]) / TOKENS / 2,
        calculated=kept_elements(model, layer, recompute),
        weight_copies=two[1],
    )


def _kept(folder: Path, setting: Setting) -> tuple[int, float]:
    """Returns the bytes that a model's forward pass keeps, and the bytes of FP8 copies per element of its layers' matrices."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_rasft.weights.folder import HfFolder
    from tests.tiny_models import build_chunks

    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"} if setting.precision == "fp8" else {}
    (model,), _ = build_chunks(
        HfFolder.open(folder, with_weights=False),
        128,
        transformer_impl="transformer_engine",
        apply_rope_fusion=True,
        bias_activation_fusion=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        **_RECOMPUTE[setting.config().recompute],
        **fp8,
    )
    model.cuda().bfloat16().train()
    kept = _Kept(model)
    positions = torch.arange(TOKENS)[None].cuda()
    ends = torch.tensor([0, 40, TOKENS], dtype=torch.int32).cuda()
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=56, max_seqlen_kv=56
    )
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        model(positions, positions, None, packed_seq_params=packing)
    elements = sum(p.numel() for p in model.decoder.layers.parameters() if p.dim() == 2)
    num_bytes, copies = (
        sum(storage.nbytes() for storage in found.values()) for found in (kept.storages, kept.copies)
    )
    return num_bytes, copies / elements


if __name__ == "__main__":
    main(Path(sys.argv[1]))
