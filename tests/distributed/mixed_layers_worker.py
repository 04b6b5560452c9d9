"""One rank of test_mixed_layers.py: trains, exports and samples a model in every layout.

Usage: mixed_layers_worker.py RANK WORLD_SIZE ROOT, where ROOT has the name of a case and contains its model folder "model".
"""

import contextlib
import faulthandler
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()
cpu_backend.use_cpu_fused_adam()

from megatron_rasft.types import Request, SamplingParams, TrainingSample  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from tests.distributed.parity_cases import COMMON, batches  # noqa: E402
from tests.distributed.ranks_harness import trainer  # noqa: E402

_COMMON = {
    "dp2": "",
    "tp2 sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "cp2": "--context-parallel-size 2",
}
_DENSE = {
    **_COMMON,
    "dp2 padded": "--rasft-batch-layout padded --micro-batch-size 2",
    "tp2": "--tensor-model-parallel-size 2",
}
LAYOUTS = {"qwen3_5": _DENSE, "gemma3": _DENSE, "gpt_oss": _COMMON}
"""Case -> layout -> flags. Without sequence parallelism Megatron refuses to split the attention of models with experts."""

PROMPTS = [[5, 17, 99], [3], [88, 2, 45, 45, 7, 60, 31, 12], [71, 70]]
NEW_TOKENS = 12
NUCLEUS = 0.8


def params(temperature: float, top_p: float, num_rows: int) -> SamplingParams:
    return SamplingParams(
        num_samples=2,
        max_new_tokens=NEW_TOKENS,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=1.0,
        # a part of the vocabulary, so that rows end at different steps and are refilled and moved
        stop_ids=frozenset() if temperature == 0 else frozenset(range(0, 101, 6)),
        max_batch_size=num_rows,
    )


MODES = {
    "greedy": params(0.0, 1.0, 64),
    "nucleus": params(1.0, NUCLEUS, 64),
    "few rows": params(1.0, NUCLEUS, 3),
}


def main(rank: int, world_size: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=world_size)
    results = {}
    for layout, flags in LAYOUTS[root.name].items():
        faulthandler.dump_traceback_later(400, exit=True)
        with contextlib.redirect_stdout(io.StringIO()):
            results[layout] = run_layout(f"{COMMON} --objective dft --adam-eps 1e-3 {flags}".split(), root)
    if rank == 0:
        torch.save(results, root / "results.pt")
    dist.destroy_process_group()


def run_layout(flags: list[str], root: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with trainer(root / "model", root / "none.jsonl", flags) as run:
        for mode, chosen in MODES.items():
            groups = run.generate(requests(1 if mode == "greedy" else 2), chosen)
            result[mode] = [[(r.token_ids, r.logprobs) for r in group] for group in groups]
        scores = run.score(samples_of(result["few rows"]), with_reference=False)
        result["scores"] = [v.tolist() for v in scores]
        batch = batches("dft")[0]
        step = run.step(batch, len(batch))
        result["loss"], result["grad_norm"] = step.metrics["loss"], step.grad_norm
        run.export(str(root / "out"))
        folder = HfFolder.open(root / "out")
        result["weights"] = {name: folder.read(name).clone() for name in folder.tensors}
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(root / "out")
        dist.barrier()
    return result


def requests(num_samples: int) -> list[Request]:
    return [
        Request(prompt_ids=p, seeds=[100 * i + k for k in range(num_samples)]) for i, p in enumerate(PROMPTS)
    ]


def samples_of(groups: list) -> list[TrainingSample]:
    """The sampled responses as training samples; [] on ranks other than 0, which get none."""
    return [
        TrainingSample(
            problem_id=str(i),
            kind="rollout",
            is_counted=True,
            prompt_ids=PROMPTS[i],
            response_ids=ids,
            weight=1.0,
            ref_logprobs=None,
        )
        for i, group in enumerate(groups)
        for ids, _ in group
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
