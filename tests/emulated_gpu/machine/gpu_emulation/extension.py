"""Replaces transformer_engine_torch, the C++ extension of Transformer Engine, by its enumerations and kernels in plain torch.

Kernels that ``kernels`` and ``attention`` lack can be imported, but calling them raises NotEmulated.
"""

import enum
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from gpu_emulation import attention, fp8, kernels, packed_halves
from gpu_emulation.placement import on_gpu

NAME = "transformer_engine_torch"
_CUDNN_VERSION = 92400
_CUBLAS_VERSION = 130100


class NotEmulated(NotImplementedError):
    """Raised when a kernel is called that is not emulated."""


class DType(enum.IntEnum):
    """Data types, with the numbers of transformer_engine.h."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class _OpenEnum(type):
    """An enumeration that creates members when they are accessed. Transformer Engine only compares them with each other."""

    @property
    def __members__(cls) -> dict[str, Any]:
        return {name: getattr(cls, name) for name in cls._names}  # type: ignore[attr-defined]

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = cls(len(cls._names))  # type: ignore[attr-defined]
        cls._names.append(name)  # type: ignore[attr-defined]
        setattr(cls, name, value)
        return value


def _enumeration(name: str) -> type:
    names: list[str] = []

    def named(self: Any) -> str:
        return names[int(self)]

    return _OpenEnum(name, (int,), {"_names": names, "name": property(named)})


_ENUMERATIONS = (
    "CommOverlapAlgo",
    "CommOverlapType",
    "Float8BlockScaleTensorFormat",
    "NVTEQBHistogramMode",
    "NVTERoutingMapFormat",
    "NVTEScalingMode",
    "NVTE_Bias_Type",
    "NVTE_Fused_Attn_Backend",
    "NVTE_Mask_Type",
    "NVTE_QKV_Format",
    "NVTE_QKV_Layout",
    "NVTE_Softmax_Type",
)


def _missing(name: str) -> type:
    """Returns a class, which can also be used in annotations and ``isinstance``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotEmulated(
            f"transformer_engine_torch.{name} is not emulated: see tests/emulated_gpu/not_shown.toml"
        )

    return type(name, (), {"__new__": call})


class _Extension(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _missing(name)
        setattr(self, name, value)
        return value


def load(framework: str) -> None:
    """Provides the extension. Called instead of transformer_engine.common.load_framework_extension."""
    assert framework == "torch"
    module = _Extension(NAME)
    module.__file__ = __file__
    module.DType = DType  # type: ignore[attr-defined]
    module.FP8FwdTensors = fp8.FP8FwdTensors  # type: ignore[attr-defined]
    module.FP8BwdTensors = fp8.FP8BwdTensors  # type: ignore[attr-defined]
    for name in _ENUMERATIONS:
        setattr(module, name, _enumeration(name))
    for source in (kernels, attention, fp8, packed_halves):
        for name in source.KERNELS:
            setattr(module, name, on_gpu(getattr(source, name)))
    backends: Any = module.NVTE_Fused_Attn_Backend

    def get_fused_attn_backend(params: Any) -> tuple[Any, str]:
        """Supports 16-bit types only, like cuDNN."""
        if params.qkv_dtype in (DType.kBFloat16, DType.kFloat16):
            return backends.NVTE_F16_arbitrary_seqlen, ""
        return backends.NVTE_No_Backend, "fused attention takes BF16 and FP16"

    answers = {
        "get_cudnn_version": lambda: _CUDNN_VERSION,
        "get_cublasLt_version": lambda: _CUBLAS_VERSION,
        "get_num_cublas_streams": lambda: 4,
        "get_fused_attn_backend": get_fused_attn_backend,
        "device_supports_multicast": lambda *args: False,
        "ubuf_built_with_mpi": lambda: False,
    }
    for name, answer in answers.items():
        setattr(module, name, answer)
    # Transformer Engine imports all names with an asterisk, so every name must exist.
    for name in _names_in_use() - vars(module).keys():
        setattr(module, name, _missing(name))
    sys.modules[NAME] = module


def _names_in_use() -> set[str]:
    """The attributes that Transformer Engine's Python code uses of its extension."""
    root = Path(os.environ["EMULATED_GPU_TE"], "transformer_engine", "pytorch")
    sources = (path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    return {name for source in sources for name in re.findall(r"\btex\.(\w+)", source)}


def fail(framework: str) -> None:
    """Raises the error of an extension that was built for another torch."""
    raise ImportError(
        f"{NAME}.cpython-312-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda29c10_cuda_check_implementationEiPKcS2_jb"
    )
