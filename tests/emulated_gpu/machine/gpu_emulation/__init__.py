"""Emulates a machine with GPUs on a CPU: torch.cuda, NCCL and the C++ extension of Transformer Engine.

Tensors are in the CPU's memory with a mark that says whether they are on the GPU (placement.py). gloo runs the collectives.
Transformer Engine's own Python code runs on kernels in plain torch.
This package does not import the product, in particular not its CPU backend. ``not_shown.toml`` lists the gaps of the emulation.

Two environment variables, which only tests use, describe the machine:

    EMULATED_GPU       installed packages, separated by commas: transformer_engine, apex. Empty: a GPU without either.
                       transformer_engine_of_another_torch: its extension cannot be loaded.
    EMULATED_GPU_TE    folder with the Python files of Transformer Engine
"""

import os
import sys

from gpu_emulation import imports

PACKAGES = frozenset({"transformer_engine", "transformer_engine_of_another_torch", "apex"})


def packages() -> set[str]:
    """The packages that are installed on the emulated machine."""
    named = {name for name in os.environ["EMULATED_GPU"].split(",") if name}
    if unknown := named - PACKAGES:
        raise ValueError(f"EMULATED_GPU names {sorted(unknown)}; known: {sorted(PACKAGES)}")
    return named


def install() -> None:
    """Emulates the machine in this process from the moment it imports torch."""
    installed = packages()
    if installed & {"transformer_engine", "transformer_engine_of_another_torch"}:
        _install_transformer_engine(works="transformer_engine" in installed)
    else:
        imports.hide("transformer_engine")
    if "apex" in installed:
        imports.provide("fused_weight_gradient_mlp_cuda", "gpu_emulation.apex_gradients")
    else:
        imports.hide("fused_weight_gradient_mlp_cuda")
    imports.hide("apex")
    imports.hide("amp_C")
    imports.after("torch", _after_torch)


def _after_torch() -> None:
    from gpu_emulation import collectives, device, placement

    device.install()
    placement.install()
    collectives.install()


def _install_transformer_engine(*, works: bool) -> None:
    # Appended at the end of the path, so that nothing in this folder hides another package.
    sys.path.append(os.environ["EMULATED_GPU_TE"])

    # Transformer Engine imports them only for its ONNX export.
    for name in ("onnx", "onnx_ir", "onnxscript"):
        imports.stand_in(name)

    def replace_loader() -> None:
        from gpu_emulation import extension

        common = sys.modules["transformer_engine.common"]
        common.load_framework_extension = extension.load if works else extension.fail  # type: ignore[attr-defined]
        del os.environ["NVTE_PROJECT_BUILDING"]

    # If this is set, Transformer Engine does not load CUDA's libraries and its own when it is imported.
    def skip_libraries() -> None:
        os.environ["NVTE_PROJECT_BUILDING"] = "1"

    imports.after("transformer_engine.common", replace_loader, before=skip_libraries)
