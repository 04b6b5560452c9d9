"""The kernels as a GPU gets them: Triton compiles them for one without having it."""

import re
from pathlib import Path
from typing import Any

import pytest
from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_rasft.objective import logit_kernels

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"logits": "*bf16", "ref_logits": "*bf16", "labels": "*i64", "out": "*fp32", "terms": "*fp32"}
DIVISIBLE = (*POINTERS, "row_stride", "ref_row_stride", "num_tokens", "width")
"""By 16, as Megatron pads them; the true vocabulary and a shard's first id need not be."""


def machine_code(kernel: Any, kind: int) -> str:
    """PTX of a kernel for rows of a large vocabulary."""
    names: list[str] = kernel.arg_names
    constants = {"KIND": kind, "ROWS": 1, "COLUMNS": logit_kernels._TILE}
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in DIVISIBLE if name in names},
    )
    return compile_kernel(source, target=HOPPER, options={"num_warps": 8}).asm["ptx"]


@pytest.mark.parametrize("kind", logit_kernels.KL_KINDS.values())
def test_kernels_compile_for_hopper_with_vector_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: int
) -> None:
    """A load of 16 bytes a thread wherever a row is read or written: without it the kernels are bound by instructions."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    statistics = machine_code(logit_kernels._statistics_kernel, kind)
    gradient = machine_code(logit_kernels._gradient_kernel, kind)
    rows = 1 if kind == logit_kernels.NO_REFERENCE else 2
    assert len(re.findall(r"ld\.global\.v4\.b32", statistics)) == 2 * rows  # 16 logits a thread: two of 8
    assert len(re.findall(r"ld\.global\.b16", statistics)) == 1  # the label's logit
    assert len(re.findall(r"ld\.global\.v4\.b32", gradient)) == 2 * rows
    assert len(re.findall(r"st\.global\.v4\.b32", gradient)) == 2
    assert not re.findall(r"(?:ld|st)\.global\.b16", gradient)
