"""One rank of test_training_parity.py: trains every case of its world size, and saves losses and weights.

Usage: parity_worker.py RANK WORLD_SIZE ROOT, where ROOT contains a Hugging Face folder for each model.
"""

import contextlib
import faulthandler
import io
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rasft import training
from megatron_rasft.machine import cpu_backend

cpu_backend.enable()
cpu_backend.use_cpu_fused_adam()

from megatron.core import parallel_state  # noqa: E402

from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig  # noqa: E402
from megatron_rasft.tools.capacity.layouts import Layout, Model  # noqa: E402
from megatron_rasft.tools.capacity.memory import estimate_memory  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from tests.distributed.parity_cases import COMMON, MODELS, NUM_STEPS, Case, batches, cases  # noqa: E402
from tests.distributed.ranks_harness import trainer  # noqa: E402

PLANNED = {1: [""], 2: ["", "--tensor-model-parallel-size 2 --sequence-parallel"]}
"""World size -> flags of the trainers whose memory is compared with that of capacity planning."""


def main(rank: int, world_size: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store{world_size}", rank=rank, world_size=world_size
    )
    results = {}
    for case in cases(world_size):
        faulthandler.dump_traceback_later(300, exit=True)
        print(case.key, file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            results[case.key] = train(case, root)
    for flags in PLANNED.get(world_size, []):
        faulthandler.dump_traceback_later(300, exit=True)
        with contextlib.redirect_stdout(io.StringIO()):
            check_planned_bytes(flags, root)
    if rank == 0:
        torch.save(results, root / f"results{world_size}.pt")
    dist.destroy_process_group()


def train(case: Case, root: Path) -> dict:
    """Trains one case. Returns losses and gradient norms of each step, and exported weights after the first and last."""
    result: dict = {"loss": [], "grad_norm": [], "weights": [], "metrics": []}
    with (
        widths_rounded(case.width_slack),
        trainer(
            root / MODELS[case.model],
            root / "none.jsonl",
            case.flags,
            case.has_distributed_optimizer,
            case.has_gradient_fusion,
        ) as run,
    ):
        for index, batch in enumerate(batches(case.objective)):
            step = run.step(batch, len(batch))
            assert not step.is_skipped
            result["loss"].append(step.metrics["loss"])
            result["grad_norm"].append(step.grad_norm)
            result["metrics"].append(step.metrics)
            if index in (0, NUM_STEPS - 1):
                result["weights"].append(exported(run, root / f"export{case.world_size}"))
        result["scores"] = [v.tolist() for v in run.score(batches(case.objective)[0], with_reference=False)]
    return result


@contextlib.contextmanager
def widths_rounded(slack: float) -> Iterator[None]:
    """Builds trainers that cut batches as on a GPU, which rounds the widths of micro-batches."""
    layout = training.trainer.batch_layout
    training.trainer.batch_layout = lambda *args, **named: replace(layout(*args, **named), width_slack=slack)
    yield
    training.trainer.batch_layout = layout


def check_planned_bytes(flags: str, root: Path) -> None:
    """Compares the memory that tools/plan.py calculates with the tensors of a real optimizer, in BF16."""
    model = root / MODELS["tied"]
    with trainer(model, root / "none.jsonl", f"{COMMON} --objective dft --bf16 {flags}".split()) as run:
        batch = batches("dft")[0]
        run.step(batch, len(batch))
        args = run.args
        layout = Layout(
            tp=args.tensor_model_parallel_size,
            pp=args.pipeline_model_parallel_size,
            cp=1,
            dp=parallel_state.get_data_parallel_world_size(),
            expert_tp=1,
        )
        planned = estimate_memory(
            Model.read(model), layout, CapacityConfig(), AssumptionConfig(), num_microbatches=1
        )
        if parallel_state.get_pipeline_model_parallel_rank() != planned.stage:
            return
        buffers = [buffer for chunk in run.model for buffer in chunk.buffers]
        assert sum(b.param_data.nbytes for b in buffers) == planned.weights
        assert sum(b.grad_data.nbytes for b in buffers) == planned.gradients
        adam = run.optimizer.chained_optimizers[0].optimizer
        masters = [p for group in adam.param_groups for p in group["params"]]
        moments = [t for state in adam.state.values() for t in state.values() if t.dim()]
        held = torch.tensor(sum(t.nbytes for t in [*masters, *moments]), dtype=torch.float64)
        padding = 12 * 64 * len(masters) + 12 * 128
        assert planned.optimizer - padding <= held <= planned.optimizer, (held, planned.optimizer)


def exported(run: object, path: Path) -> dict[str, torch.Tensor]:
    """Exports the weights, and returns them by name."""
    with run.parameters_gathered():  # the same context as in a sync by disk
        run.export(str(path))  # type: ignore[attr-defined]
    folder = HfFolder.open(path)
    tensors = {name: folder.read(name).clone() for name in folder.tensors}
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path)
    dist.barrier()
    return tensors


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
