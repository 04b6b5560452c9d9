"""Records the modules and kernels that a run on the emulated machine used, to distinguish the GPU path from the CPU path."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Facts:
    """Modules, arguments and kernels that one rank used."""

    backend: str
    """Backend of the default process group."""
    distributed_backend: str
    """Megatron's argument of this name."""
    transformer_impl: str
    """Megatron's argument of this name."""
    optimizer: str
    """Python module of the Adam class that Megatron uses."""
    cpu_backend_is_on: bool
    core_attention: list[str]
    """Classes of the model's core attention, with their Python modules."""
    layers: list[str]
    """Classes of the model's layers that have parameters."""
    gradient_accumulation_fusion: bool
    """Megatron's argument of this name."""
    kernels: dict[str, int]
    """Emulated kernel -> number of calls until the end of the process."""


def record(path: Path) -> None:
    """Writes the facts of this process to ``path`` when it ends. Pass it to ``prepare``, to be called before the program."""
    from megatron_rasft.objective import logit_kernels
    from megatron_rasft.training.trainer import Trainer

    found: dict[str, Any] = {}
    build = Trainer.__init__

    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        found.update(_of(self))

    plain_launch = logit_kernels.launch

    def counted_launch(*args: Any) -> None:
        from gpu_emulation.kernels import CALLS

        CALLS["fused_logprobs"] += 1
        plain_launch(*args)

    def write() -> None:
        from gpu_emulation.kernels import CALLS

        path.write_text(json.dumps({**found, "kernels": dict(CALLS)}))

    logit_kernels.launch = counted_launch
    Trainer.__init__ = init  # type: ignore[method-assign]
    Finalize(None, write, exitpriority=0)  # atexit is not run in a forked rank


def _of(trainer: Any) -> dict[str, Any]:
    import torch.distributed as dist
    from megatron.core import optimizer

    from megatron_rasft.machine import cpu_backend

    modules = [m for chunk in trainer.chunks for m in chunk.modules()]
    attention = [m.core_attention for m in modules if hasattr(m, "core_attention")]
    with_parameters = {type(m) for m in modules if next(m.parameters(recurse=False), None) is not None}
    return {
        "backend": dist.get_backend(),
        "distributed_backend": trainer.args.distributed_backend,
        "transformer_impl": trainer.args.transformer_impl,
        "optimizer": optimizer.Adam.__module__,
        "cpu_backend_is_on": cpu_backend.is_enabled,
        "core_attention": sorted({f"{type(a).__module__}.{type(a).__name__}" for a in attention}),
        "layers": sorted(f"{kind.__module__}.{kind.__name__}" for kind in with_parameters),
        "gradient_accumulation_fusion": trainer.args.gradient_accumulation_fusion,
    }


def read(paths: Sequence[Path]) -> list[Facts]:
    """Reads the facts of all ranks, in the order of the paths."""
    return [Facts(**json.loads(path.read_text())) for path in paths]
