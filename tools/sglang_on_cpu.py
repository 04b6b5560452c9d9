"""Starts the real SGLang server on a machine without a GPU: for tests, and to try a run before GPUs are available.

    python sglang_on_cpu.py --model-path DIR --port N [any flag of sglang.launch_server]

Runs in the server's own environment (CPU torch, no sgl-kernel), which `make servers` creates, with SGLang 0.5.17 to 0.5.23;
tools/serve_rollouts.py --cpu uses it. The missing modules are replaced at module level, so that an import of this file prepares a
process for SGLang, also a worker of SGLang that is spawned.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.machinery
import multiprocessing
import os
import runpy
import sys
import types
from collections.abc import Callable
from typing import Any

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
# More threads than free cores make decoding a hundred times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of mallopt, from glibc's malloc.h."""

_LOOKED_UP = (
    "fused_gdn_gating_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_qkvzba_split_reshape_cat_cpu",
    "fused_sigmoid_gating_delta_rule_update_cpu",
    "fused_sigmoid_mul_cpu",
)
"""Operators that models look up when they are imported (Qwen3-Next, Qwen3.5). Without AMX there is no kernel, so calling them is an error."""

DEFAULTS = {
    "--device": "cpu",
    "--attention-backend": "torch_native",
    "--sampling-backend": "pytorch",
    "--host": "127.0.0.1",
    "--max-total-tokens": "20000",  # without this limit the KV cache takes all free memory
    "--max-running-requests": "64",
}


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Replaces the only compiled kernel that SGLang calls on a CPU without AMX: stores the cache slots of each request's new
    tokens.

    Args:
        req_pool_indices: [b] rows of ``req_to_token``.
        req_to_token: [rows, pool_len] cache slot of each token; modified in place.
        start_offset: [b] position of the first token of each request whose slot is stored.
        end_offset: [b] position after the last token whose slot is stored.
        out_cache_loc: [tokens] the slots, concatenated over the requests.
        pool_len: not used.
    """
    offset = 0
    for row, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        slots = out_cache_loc[offset : offset + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        offset += end - start


def missing_kernel(name: str) -> Callable[..., Any]:
    """Returns a placeholder for a kernel that SGLang imports but does not call on a CPU."""
    if name.startswith("__"):
        raise AttributeError(name)

    def call(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} is not available on a CPU")

    return call


def bridge() -> None:
    """Provides the modules and functions that SGLang imports or calls and that a CPU environment lacks."""
    kernels: Any = types.ModuleType("sgl_kernel")
    kernels.__version__ = "0.0.0"
    kernels.__path__ = []
    kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    kernels.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu
    kernels.__getattr__ = missing_kernel
    sys.modules.setdefault("sgl_kernel", kernels)
    recurrent: Any = types.ModuleType("sgl_kernel.mamba")
    recurrent.__getattr__ = missing_kernel
    sys.modules.setdefault("sgl_kernel.mamba", recurrent)
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # A torchvision built for CUDA does not load with a CPU torch. Its import, and that of transformers, succeeds once these
        # operators are defined. A torchvision that loads defines them itself, and a second definition ends the process.
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
    for operator in _LOOKED_UP:
        torch.library.define(f"sgl_kernel::{operator}", "() -> ()")
    # /weights_checker calls both of these.
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def keep_freed_memory() -> None:
    """Makes the C library reuse freed memory. Otherwise each bucket of a weight sync needs new pages, which halves the speed."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def fork_workers() -> None:
    """Makes SGLang fork its workers. It asks for spawn, with which each worker imports torch and SGLang again, for 7 seconds.

    A fork is safe here: there is no CUDA context, and the server starts its threads after its workers.
    """
    set_start_method = multiprocessing.set_start_method

    def forked(method: str | None, force: bool = False) -> None:
        set_start_method("fork" if method == "spawn" else method, force)

    multiprocessing.set_start_method = forked


def bind_ranks(flags: list[str]) -> None:
    """Assigns one core to each tensor-parallel rank. SGLang requires this if there is only one NUMA node."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tp", "--tp-size", "--tensor-parallel-size", type=int, default=1)
    num_ranks = parser.parse_known_args(flags)[0].tp
    if num_ranks > 1:
        cores = sorted(os.sched_getaffinity(0))
        bound = [str(cores[rank % len(cores)]) for rank in range(num_ranks)]
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(bound))


if not torch.cuda.is_available():
    bridge()
    keep_freed_memory()


def serve(flags: list[str]) -> None:
    """Runs the server in this process until it ends.

    Args:
        flags: flags of sglang.launch_server. Flags of ``DEFAULTS`` are added if they are absent.
    """
    for flag, value in DEFAULTS.items():
        if not any(a == flag or a.startswith(flag + "=") for a in flags):
            flags = [*flags, flag, value]
    if "--sleep-on-idle" not in flags:
        flags = [*flags, "--sleep-on-idle"]  # without this an idle server uses half a core
    sys.argv[1:] = flags
    bind_ranks(flags)
    if not torch.cuda.is_available():
        fork_workers()
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    serve(sys.argv[1:])
