"""Runs a script that uses Megatron-Bridge on a machine without a GPU: python bridge_on_cpu.py SCRIPT ARGS

It replaces the CUDA calls of a conversion, which calls no kernels. Megatron-Bridge writes checkpoints in spawned processes, which
import this file first. The replacement is therefore done at module level.
"""

import importlib
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def patch() -> None:
    """Replaces torch.cuda's functions: some before Megatron-Bridge is imported, and some after."""
    device = types.SimpleNamespace(
        major=9, minor=0, total_memory=80 * 2**30, name="cpu", multi_processor_count=1
    )
    for name, result in {
        "set_device": None,
        "current_device": torch.device("cpu"),
        "synchronize": None,
        "empty_cache": None,
        "is_initialized": False,
        "get_device_properties": device,
        "get_device_capability": (9, 0),
    }.items():
        setattr(torch.cuda, name, lambda *args, _result=result, **kwargs: _result)
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    init = dist.init_process_group

    def init_gloo(backend: Any = None, *args: Any, device_id: Any = None, **kwargs: Any) -> None:
        init("gloo", *args, **kwargs)

    dist.init_process_group = init_gloo
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.manual_seed(seed)

    importlib.import_module(
        "megatron.bridge"
    )  # before is_available returns True, so that no module expects a device
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.tensor_parallel.random as random

    # Megatron has no public names for the state of the GPU's generator, and for whether the fused kernel of gradients exists.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    layers._grad_accum_fusion_available = True
    torch.cuda.Stream = lambda *args, **kwargs: None  # type: ignore[assignment,misc]
    torch.cuda.is_available = lambda: True


if not torch.cuda.is_available():
    patch()

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
