"""Writes GPUs and versions of this machine as JSON. Fails if Transformer Engine cannot be imported."""

import importlib
import importlib.metadata
import json
import os
import sys
import traceback
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

PACKAGES = (
    "megatron-core",
    "transformers",
    "triton",
    "transformer-engine",
    "flash-attn",
    "liger-kernel",
    "nvidia-resiliency-ext",
)
EXTENSIONS = {"apex": "amp_C", "apex's gradient fusion": "fused_weight_gradient_mlp_cuda"}
"""Optional compiled modules that Megatron imports."""


def versions() -> dict[str, Any]:
    """Collects all facts except those about Transformer Engine. torch must be importable."""
    import torch

    nccl = torch.cuda.nccl.version() if torch.cuda.is_available() else ()
    found: dict[str, Any] = {
        "emulated": "EMULATED_GPU" in os.environ,  # tests/emulated_gpu
        "num_gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "NCCL": ".".join(map(str, nccl)) or None,
    }
    if found["num_gpus"]:
        gpu = torch.cuda.get_device_properties(0)
        found["GPU"] = torch.cuda.get_device_name(0)
        found["compute capability"] = f"{gpu.major}.{gpu.minor}"
        found["GPU memory, GiB"] = round(gpu.total_memory / 2**30, 1)
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    for name, module in EXTENSIONS.items():
        # Searched on the path, because the project puts a module of the second name into sys.modules if Apex is missing.
        found[name] = PathFinder.find_spec(module) is not None
    return found


def main() -> int:
    """Prints and writes the facts; returns 1 if Transformer Engine cannot be imported, after writing --json."""
    found = versions()
    Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(found), encoding="utf-8")
    code = 0
    try:
        # imported after torch, because its extension is linked with torch's libraries
        importlib.import_module("transformer_engine.pytorch")
    except Exception:
        # a wheel for another torch raises OSError or ImportError, a missing library raises RuntimeError
        traceback.print_exc()
        code = 1
    print(json.dumps(found, indent=1), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
