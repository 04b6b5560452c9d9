"""The Triton kernels compiled for Hopper. This needs no GPU and finds errors that the interpreter accepts."""

import re
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_rasft.objective import logit_kernels

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
ALIGNED = ("logits", "ref_logits", "labels", "out", "terms", "row_stride", "ref_row_stride", "width")
"""Arguments that are multiples of 16 in a run: addresses, and widths with Megatron's padding."""


def assembly(kernel: Any, dtype: torch.dtype, kind: int) -> str:
    """The PTX of a kernel for a vocabulary of many tiles."""
    types = {
        "logits": TYPES[dtype],
        "ref_logits": TYPES[dtype],
        "labels": "i64",
        "out": "fp32",
        "terms": "fp32",
    }
    constants = {"KIND": kind, "ROWS": 1, "COLUMNS": logit_kernels._TILE}
    names = [parameter.name for parameter in kernel.params]
    source = ASTSource(
        fn=kernel,
        signature={
            n: "constexpr" if n in constants else f"*{types[n]}" if n in types else "i32" for n in names
        },
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in names if n in ALIGNED},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", logit_kernels.KL_KINDS.values())
def test_logits_are_read_and_written_16_bytes_at_a_time(
    dtype: torch.dtype, kind: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # Each of 256 threads holds 16 logits of the policy, and with a KL 16 of the reference.
    vectors = 16 * dtype.itemsize // 16
    num_inputs = 1 if kind == logit_kernels.NO_REFERENCE else 2
    statistics = assembly(logit_kernels._statistics_kernel, dtype, kind)
    gradient = assembly(logit_kernels._gradient_kernel, dtype, kind)
    for code in (statistics, gradient):
        assert len(re.findall(r"ld\.global\.v4\.b32", code)) == vectors * num_inputs
    assert len(re.findall(r"st\.global\.v4\.b32", gradient)) == vectors
