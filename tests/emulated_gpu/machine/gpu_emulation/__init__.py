"""A machine with GPUs, emulated on a CPU: what torch.cuda, NCCL and Transformer Engine's extension answer there.

Tensors stay in the CPU's memory and know on which side they are (placement.py), gloo carries the collectives, and Transformer Engine's
own Python runs on kernels in plain torch.
Nothing of the product is imported here, least of all its backend for CPUs. ``not_shown.toml`` lists what this cannot show.

Two environment variables describe the machine; only tests know them:

    EMULATED_GPU       the packages it has, separated by commas: transformer_engine, apex. Empty: a GPU without either.
                       transformer_engine_of_another_torch: an extension that fails to load.
    EMULATED_GPU_TE    folder with the Python files of Transformer Engine
"""

import os
import sys

from gpu_emulation import imports

PACKAGES = frozenset({"transformer_engine", "transformer_engine_of_another_torch", "apex"})


def packages() -> set[str]:
    """The packages that this process's machine has."""
    named = {name for name in os.environ["EMULATED_GPU"].split(",") if name}
    if unknown := named - PACKAGES:
        raise ValueError(f"EMULATED_GPU names {sorted(unknown)}; known: {sorted(PACKAGES)}")
    return named


def install() -> None:
    """Emulate the machine in this process, as soon as it imports torch."""
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
    # At the end: this folder holds nothing that another package should take.
    sys.path.append(os.environ["EMULATED_GPU_TE"])

    # It imports them for its export to ONNX alone.
    for name in ("onnx", "onnx_ir", "onnxscript"):
        imports.stand_in(name)

    def replace_loader() -> None:
        from gpu_emulation import extension

        common = sys.modules["transformer_engine.common"]
        common.load_framework_extension = extension.load if works else extension.fail  # type: ignore[attr-defined]
        del os.environ["NVTE_PROJECT_BUILDING"]

    # Transformer Engine loads CUDA's libraries and its own when it is imported, except where this is set.
    def skip_libraries() -> None:
        os.environ["NVTE_PROJECT_BUILDING"] = "1"

    imports.after("transformer_engine.common", replace_loader, before=skip_libraries)
