"""Runs unmodified Megatron on a machine without CUDA, over gloo.

Megatron uses torch.cuda's streams, devices and random states on every machine. A CPU is a single device that computes
everything in order, so ``enable`` replaces these functions by trivial ones. On a machine with CUDA ``enable`` does
nothing, so the same program runs there unchanged.
"""

import contextlib
import logging
import sys
import types
from collections import defaultdict
from typing import Any

import torch
from torch.optim._functional import adam, adamw
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_HOST_MEMORY_BYTES = 8 << 30
"""Total memory in get_device_properties. Megatron only logs it."""

_GPU_KERNELS = ("transformer_engine", "apex", "amp_C")
"""Packages that Megatron uses whenever they can be imported, even without a GPU. ``enable`` blocks their import."""


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


_REPLACED = frozenset((torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.type))
"""Methods that get other arguments or results on a CPU."""


class _CudaToCpu(TorchFunctionMode):
    """Replaces device='cuda' by the CPU in every torch call, makes .cuda() return the tensor, and ignores pin_memory.

    Tensor.type() still returns 'torch.cuda.FloatTensor' and the like, because Megatron's optimizers accept no others
    (core/optimizer/distrib_optimizer.py).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A tiny model's step makes thousands of these calls, most of them without keyword arguments.
        if func in _REPLACED:
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.to:
                args = tuple(_CPU if _is_cuda(a) else a for a in args)
            elif len(args) == 1 and not kwargs:
                return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if not kwargs:
            return func(*args)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        return func(*args, **kwargs)


class _NullStream:
    """Replaces torch.cuda.Stream and Event. A CPU computes in order, so waiting and recording do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_NullStream":
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_stream(self, *args: Any) -> None: ...

    def wait_event(self, *args: Any) -> None: ...

    def record_event(self, *args: Any) -> "_NullStream":
        return self

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


is_enabled = False
"""Whether ``enable`` has replaced torch.cuda's functions in this process."""


def _not_compiled(function: Any = None, **options: Any) -> Any:
    """Replaces torch.compile, also as a decorator with options."""
    return (lambda decorated: decorated) if function is None else function


def _avoid_compiler() -> None:
    """Keeps torch's compiler from being imported, which takes 2.5 seconds of CPU time in each process.

    Megatron decorates functions with torch.compile, which a tiny model on a CPU does not need. Methods of optimizers, at their first
    call, import the compiler to exclude themselves from compilation (torch/_compile.py).
    """
    torch.compile = _not_compiled  # type: ignore[assignment]
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(torch.optim.Optimizer, name)
        setattr(torch.optim.Optimizer, name, getattr(method, "__wrapped__", method))


def enable() -> bool:
    """Replaces torch.cuda's functions on a machine without CUDA. Call this before importing Megatron.

    Returns:
        True if the replacements are in place; False if CUDA is available, and nothing was changed.
    """
    global is_enabled
    if torch.cuda.is_available():
        return False
    if is_enabled:
        return True
    is_enabled = True
    for name in _GPU_KERNELS:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    _avoid_compiler()
    stream = _NullStream()
    answers = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": lambda *a: None,
        "synchronize": lambda *a, **k: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *a: stream,
        "default_stream": lambda *a: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "manual_seed": lambda s: torch.default_generator.manual_seed(int(s)) and None,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_capability": lambda *a, **k: (9, 0),
        "get_device_properties": lambda *a, **k: types.SimpleNamespace(
            major=9, minor=0, name="cpu", multi_processor_count=1, total_memory=_HOST_MEMORY_BYTES
        ),
        "memory_stats": lambda *a, **k: defaultdict(int),
        "reset_peak_memory_stats": lambda *a, **k: None,
    }
    for counter in ("allocated", "reserved"):
        answers[f"memory_{counter}"] = answers[f"max_memory_{counter}"] = lambda *a, **k: 0
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.cuda.Stream = torch.cuda.Event = _NullStream  # type: ignore[assignment,misc]
    # Megatron imports torch.utils.cpp_extension, which warns if a CUDA compiler is installed without a CUDA runtime.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

    import megatron.core.tensor_parallel.random as mcore_random

    mcore_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # CudaRNGStatesTracker.fork warns if the CPU's random state has changed. Here that state is the tracked one.
    logging.getLogger(mcore_random.__name__).addFilter(
        lambda r: "CPU RNG state changed" not in r.getMessage()
    )
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    # The function converts the split sizes of an all-to-all to Python numbers only if they are on a GPU.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_thd = _rotating_at_once(rope_utils._apply_rotary_pos_emb_thd)
    _CudaToCpu().__enter__()
    return True


def _rotating_at_once(rotate: Any) -> Any:
    """Makes Megatron rotate all sequences of a pack in one call, which is a seventh of a tiny model's step faster.

    It rotates them one by one, unless there are as many frequencies as tokens in the pack (rope_utils.py). Then it takes them for those
    of the complete pack, and here they are.
    """

    def rotate_all(
        t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *rest: Any, **more: Any
    ) -> Any:
        of_pack = torch.cat([freqs[:length] for length in cu_seqlens.diff().tolist()])
        return rotate(t, cu_seqlens, of_pack, *rest, **more)

    return rotate_all


class CpuFusedAdam(torch.optim.Optimizer):
    """Adam and AdamW with the interface and the state layout of Transformer Engine's FusedAdam.

    Megatron's DistributedOptimizer (core/optimizer/distrib_optimizer.py) cannot restore torch.optim.AdamW, which keeps a
    'step' tensor for each parameter. An assertion fails before the first step, a reshardable load raises
    KeyError('step'), and all parameters get the same step tensor, which then advances once per parameter. With 'step' in
    the param group, Megatron takes its branch for FusedAdam, and checkpoints have the same layout as on a GPU.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **unused: Any,
    ) -> None:
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas}
        super().__init__(params, {**defaults, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:  # type: ignore[override]
        update = adamw if self.adam_w_mode else adam
        for group in self.param_groups:
            # Also for groups without parameters on this rank: checkpoints require the same step on all ranks.
            group["step"] = int(group.get("step", 0)) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            update(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [torch.tensor(float(group["step"] - 1)) for _ in params],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def use_cpu_fused_adam() -> bool:
    """Makes Megatron use CpuFusedAdam if neither Transformer Engine nor Apex provides FusedAdam.

    Returns:
        True if Megatron now uses CpuFusedAdam, False if it found a FusedAdam.
    """
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return False
    optimizer.Adam = distrib_optimizer.Adam = CpuFusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    return True
