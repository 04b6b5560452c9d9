"""Compares the memory that capacity planning calculates with Megatron's own tensors, for every setting of examples/slurm.

Usage:
    python benchmarks/planned_memory.py
    python benchmarks/planned_memory.py llama-3.3-70b qwen3-30b-a3b

Each layout is built by the run's own start and by Megatron's functions, on the meta device: one process takes the place of the
fullest rank in a fake process group of the whole world. It needs no GPU and about a second for each layout. FP8 copies of weights
are counted from the built matrices, as Transformer Engine keeps them. If `make emulated-gpu` was run, activations are compared too:
one layer of each model, with all widths divided by the same number, keeps tensors in Transformer Engine's own Python code.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

# lets the file run from a checkout that is not installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()
cpu_backend.use_cpu_fused_adam()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import training  # noqa: E402

from megatron_rasft.machine.megatron_calls import quiet  # noqa: E402
from megatron_rasft.model import model_source  # noqa: E402
from megatron_rasft.model.model_chunks import build_chunk  # noqa: E402
from megatron_rasft.tools.capacity.choosing import LayoutEstimate  # noqa: E402
from megatron_rasft.tools.capacity.layout_tables import Table  # noqa: E402
from megatron_rasft.tools.capacity.layouts import Model  # noqa: E402
from megatron_rasft.tools.capacity.memory import GIB  # noqa: E402
from megatron_rasft.training import startup  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from tests.emulated_gpu.traced_layers import Trace, is_installed, trace_settings  # noqa: E402
from tests.slurm_settings import SETTINGS, Setting, model_folder  # noqa: E402

_FP8_COPIES = 2
"""Bytes that Transformer Engine keeps for an element of a linear layer's weight in FP8: one row by row, one column by column.
tests/emulated_gpu/test_activations.py measures them."""


@dataclass(frozen=True, kw_only=True)
class BuiltMemory:
    """Bytes that Megatron allocates on one rank before its first step, and for the states of the optimizer."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """Buffers of the modules, for example the counts of tokens per expert."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A setting with its calculated and its built memory."""

    name: str
    estimate: LayoutEstimate
    built: BuiltMemory

    def ratio(self, part: str) -> float:
        """Calculated bytes as a multiple of the built ones."""
        built = getattr(self.built, part) + (self.built.buffers if part == "weights" else 0)
        calculated: float = getattr(self.estimate.memory, part) / built
        return calculated


class _OnMeta(TorchFunctionMode):
    """Moves every tensor that names a device to the meta device. torch.device("meta") moves those that name none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's optimizers accept tensors of CUDA types alone
            return func(args[0]).replace("meta.", "")
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        if func is torch.Tensor.to:
            args = tuple(torch.device("meta") if isinstance(a, torch.device) else a for a in args)
        return func(*args, **kwargs)


def compare(path: Path) -> Comparison:
    """Builds a setting's layout in a forked process, whose state of Megatron then ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_compare, path).result()


def _compare(path: Path) -> Comparison:
    setting = Setting(path)
    with tempfile.TemporaryDirectory() as folder:
        model = Model.read(model_folder(path.stem, Path(folder)))
        estimate = setting.estimate(model)
        return Comparison(name=path.stem, estimate=estimate, built=_build(setting, model, estimate))


def _build(setting: Setting, model: Model, estimate: LayoutEstimate) -> BuiltMemory:
    """Builds model and optimizer as the rank with the fullest stage would."""
    at = estimate.layout
    # Megatron's order of ranks has pipeline stages last
    rank = estimate.memory.stage * at.tp * at.cp * at.dp
    with _one_of_many_ranks(rank, at.num_gpus):
        args, _, _ = startup.parse(setting.command_line(model))
        args.train_iters = 1000  # the length of the schedule, which needs no memory
        args.use_gloo_process_groups = False  # they would wait for the other ranks
        startup.start(args)
        with quiet(), torch.device("meta"), _OnMeta():
            chunks, optimizer, _ = training.setup_model_and_optimizer(
                ModelType.encoder_or_decoder, partial(build_chunk, args)
            )
            parts = getattr(optimizer, "chained_optimizers", [optimizer])
            for part in parts:
                part.init_state_fn(part.optimizer, part.config)
    return _measured(chunks, parts, is_fp8=setting.precision == "fp8")


@contextmanager
def _one_of_many_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Makes this process a rank of a world whose other ranks do not exist."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    without_weights = mock.patch.object(
        model_source.HfFolder, "open", partial(HfFolder.open, with_weights=False)
    )
    with (
        without_weights,
        mock.patch.object(dist, "all_gather_object", _gather_own),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _gather_own(gathered: list[Any], own: Any, group: Any = None) -> None:
    """Gathers this rank's object in place of every other's. Megatron gathers names of groups of parameters, which are the same."""
    gathered[:] = [own] * len(gathered)


def _measured(chunks: Sequence[Any], optimizers: Sequence[Any], *, is_fp8: bool) -> BuiltMemory:
    held = [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    matrices = [
        param
        for chunk in chunks
        for name, param in chunk.named_parameters()
        if ".layers." in name and param.dim() == 2 and "router" not in name
    ]
    states = [
        tensor
        for optimizer in optimizers
        for group in optimizer.optimizer.param_groups
        for param in group["params"]
        for tensor in (param, *optimizer.optimizer.state[param].values())
    ]
    copies = _FP8_COPIES * sum(matrix.numel() for matrix in matrices) if is_fp8 else 0
    return BuiltMemory(
        weights=sum(buffer.param_data.nbytes for buffer in held) + copies,
        gradients=sum(buffer.grad_data.nbytes for buffer in held),
        optimizer=sum(tensor.untyped_storage().nbytes() for tensor in _distinct(states)),
        buffers=sum(buffer.nbytes for chunk in chunks for _, buffer in chunk.named_buffers()),
    )


def _distinct(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor of each storage."""
    return list({tensor.untyped_storage()._cdata: tensor for tensor in tensors}.values())


def table(comparisons: Sequence[Comparison], traced: dict[str, Trace]) -> Table:
    """One row per setting.

    Args:
        traced: setting -> what a narrow layer keeps. The ratio of its traced and calculated elements scales the activations.
    """
    parts = ("weights", "gradients", "optimizer")
    rows = []
    for each in comparisons:
        at, memory = each.estimate.layout, each.estimate.memory
        cells = [each.name, f"tp {at.tp} pp {at.pp} cp {at.cp} ep {at.ep} dp {at.dp}", str(memory.stage)]
        for part in parts:
            built = getattr(each.built, part) + (each.built.buffers if part == "weights" else 0)
            cells += [f"{getattr(memory, part) / GIB:.2f}", f"{built / GIB:.2f}"]
        scaled = "-"
        if layer := traced.get(each.name):
            scaled = f"{memory.activations * layer.kept / layer.calculated / GIB:.2f}"
        rows.append((*cells, f"{memory.activations / GIB:.2f}", scaled))
    header = ("setting", "layout", "stage", *(f"{p}{s}" for p in parts for s in ("", " built")))
    title = "GiB on the fullest rank: calculated, and built by Megatron or traced and scaled"
    return Table(title, (*header, "activations", "traced"), tuple(rows), frozenset({"layout"}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [path.stem for path in SETTINGS]
    parser.add_argument(
        "names", nargs="*", metavar="SETTING", help=f"Settings, all by default: {', '.join(names)}"
    )
    given = parser.parse_args().names or names
    if unknown := set(given) - set(names):
        parser.error(
            f"{', '.join(sorted(unknown))}: there is no such setting. Choose from {', '.join(names)}."
        )
    comparisons = [compare(path) for path in SETTINGS if path.stem in given]
    traced = trace_settings() if is_installed() else {}
    print(table(comparisons, traced).plain())
    if not traced:
        print("Activations are not traced: make emulated-gpu", file=sys.stderr)


if __name__ == "__main__":
    main()
