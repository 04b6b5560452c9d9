"""One rank of test_weights.py: loads, compares and exports every case in every layout of its world size.

Usage: weights_worker.py RANK WORLD_SIZE ROOT, where ROOT contains a model folder and CASE.logits.pt for each case.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

from megatron.core import parallel_state as ps  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_rasft.errors import CheckpointError  # noqa: E402
from megatron_rasft.tools.capacity.layouts import Layout, Model, padded_vocabulary, stage_chunks  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from megatron_rasft.weights.gathering import ExpertGroups  # noqa: E402
from megatron_rasft.weights.loading import load_into  # noqa: E402
from tests.chunk_tensors import export  # noqa: E402
from tests.tiny_models import CASES, build_chunks, some_tokens  # noqa: E402

LAYOUTS: dict[int, list[tuple[int, int, int | None]]] = {
    2: [(2, 1, None), (1, 2, None), (1, 2, 2), (1, 1, None)],
    4: [(2, 2, None), (4, 1, None), (2, 2, 2)],
}
"""World size -> (tp, pp, vpp). The remaining factor of the world size is data parallelism."""

EXPERT_LAYOUTS = {2: [(1, 1, 2, 1), (2, 1, 2, 1)], 4: [(1, 2, 2, 1), (2, 1, 2, 2), (2, 1, 2, 1)]}
"""World size -> (tp, pp, ep, expert tp) for the cases with experts."""
WHOLE_EXPERT_LAYOUTS = {2: [(2, 1, 1, 1)], 4: [(2, 2, 1, 1), (4, 1, 2, 1)]}
"""Further layouts of the cases whose experts have biases, which Megatron does not split."""
EXPERT_CASES = [case for case in CASES if "num_experts_per_tok" in CASES[case][1]]

WHOLE_EXPERT_CASES = [case for case in CASES if CASES[case][0] == "GptOss"]


def main(rank: int, world_size: int, root: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/store{world_size}", rank=rank, world_size=world_size
    )
    for tp, pp, vpp in LAYOUTS[world_size]:
        ps.initialize_model_parallel(tp, pp, virtual_pipeline_model_parallel_size=vpp)
        model_parallel_cuda_manual_seed(123)
        for case in CASES:
            if tp == 4 and CASES[case][1]["num_attention_heads"] == 6:
                continue  # six heads cannot be divided among four ranks
            if tp == 1 or case not in WHOLE_EXPERT_CASES:
                check(case, root, f"tp{tp}pp{pp}vpp{vpp}", vpp)
        ps.destroy_model_parallel()
    for tp, pp, ep, etp in EXPERT_LAYOUTS[world_size] + WHOLE_EXPERT_LAYOUTS[world_size]:
        ps.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
        model_parallel_cuda_manual_seed(123)
        is_common = (tp, pp, ep, etp) in EXPERT_LAYOUTS[world_size]
        for case in EXPERT_CASES if is_common else WHOLE_EXPERT_CASES:
            if etp > 1 and case in WHOLE_EXPERT_CASES:
                continue
            check(case, root, f"w{world_size}tp{tp}pp{pp}ep{ep}etp{etp}", None)
        ps.destroy_model_parallel()
    check_shared_failure(root)
    dist.destroy_process_group()


def check(case: str, root: Path, layout: str, vpp: int | None) -> None:
    folder = CountingFolder.open(root / case)
    planned = Model.read(root / case)
    tp = ps.get_tensor_model_parallel_world_size()
    chunks, offsets = build_chunks(folder, padded_vocabulary(planned, tp), vpp)
    check_planned(planned, chunks, vpp)
    experts = ExpertGroups(
        ps.get_expert_model_parallel_group(),
        ps.get_expert_tensor_parallel_group(),
        ps.get_expert_data_parallel_rank() == 0,
    )
    with torch.no_grad():
        for chunk in chunks:
            for param in chunk.parameters():
                param.fill_(float("nan"))
    CountingFolder.num_read = 0
    load_into(
        chunks,
        folder,
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=ps.get_tensor_model_parallel_world_size(),
        layer_offsets=offsets,
        pp_group=ps.get_pipeline_model_parallel_group(),
        experts=experts.ranks,
    )
    held = sum(param.numel() for chunk in chunks for param in chunk.parameters())
    num_read = CountingFolder.num_read
    assert 0 < num_read <= held, f"{case} {layout}: read {num_read} elements for {held} parameters"
    compare_logits(chunks, case, root, layout, vpp)
    out = root / f"{case}-{layout}"
    export(
        chunks,
        folder,
        out,
        layer_offsets=offsets,
        tp_group=ps.get_tensor_model_parallel_group(),
        stage=ps.get_pipeline_model_parallel_rank(),
        is_first_replica=ps.get_data_parallel_rank(with_context_parallel=True) == 0,
        experts=experts,
    )
    # read on every rank, to check that export only returns when the folder is complete
    exported = HfFolder.open(out)
    if dist.get_rank() == 0:
        for name in folder.tensors:
            assert torch.equal(exported.read(name), folder.read(name)), f"{case} {layout}: {name}"
        print("round trip", case, layout, flush=True)


def check_planned(model: Model, chunks: list, vpp: int | None) -> None:
    """Compares the parameters of this rank in capacity planning with those that Megatron has built, one by one."""
    tp, pp = ps.get_tensor_model_parallel_world_size(), ps.get_pipeline_model_parallel_world_size()
    if model.shape.latent is not None and tp > 1:
        return  # planned are Transformer Engine's layers, which do not split the latents
    layout = Layout(
        tp=tp,
        pp=pp,
        cp=1,
        dp=ps.get_data_parallel_world_size(),
        ep=ps.get_expert_model_parallel_world_size(),
        chunks=vpp or 1,
        expert_tp=ps.get_expert_tensor_parallel_world_size(),
    )
    planned = stage_chunks(model, layout, ps.get_pipeline_model_parallel_rank())
    for chunk, expected in zip(chunks, planned, strict=True):
        dense, expert = [], []
        for name, param in chunk.named_parameters():
            (expert if ".experts." in name else dense).append(param.numel())
        assert (Counter(dense), Counter(expert)) == (expected.dense, expected.expert), layout


class CountingFolder(HfFolder):
    """A folder that counts the elements that are read."""

    num_read: ClassVar[int] = 0

    def read(self, *args: Any) -> torch.Tensor:
        tensor = super().read(*args)
        CountingFolder.num_read += tensor.numel()
        return tensor


def compare_logits(chunks: list, case: str, root: Path, layout: str, vpp: int | None) -> None:
    """Forward through the pipeline schedule; the last stage compares its share of the vocabulary."""
    tokens = some_tokens()
    micro_batches = [tokens[:1], tokens[1:]]

    def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        output = model(batch, torch.arange(batch.shape[1])[None], None)
        return output, lambda logits, non_loss_data=True: logits

    found = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in chunks] if vpp else iter(micro_batches),
        model=chunks if vpp else chunks[0],
        num_microbatches=2,
        seq_length=tokens.shape[1],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not ps.is_pipeline_last_stage(ignore_virtual=True):
        return
    got = torch.cat(found)
    expected = torch.load(root / f"{case}.logits.pt")
    width = got.shape[-1]
    padded = width * ps.get_tensor_model_parallel_world_size()
    expected = torch.nn.functional.pad(expected, (0, padded - expected.shape[-1]))
    start = width * ps.get_tensor_model_parallel_rank()
    gap = (got - expected[..., start : start + width]).abs().max().item()
    assert gap < 1e-5, f"{case} {layout}: logits differ by {gap}"


def check_shared_failure(root: Path) -> None:
    """A disk error on one rank is raised on all ranks, and no files are left."""
    ps.initialize_model_parallel(1, 2)
    model_parallel_cuda_manual_seed(123)
    folder = HfFolder.open(root / "llama")
    chunks, offsets = build_chunks(folder, 128)
    out = root / "failed" / "out"
    if ps.get_pipeline_model_parallel_rank() == 1:
        from megatron_rasft.weights.exporting import ShardWriter

        def full_disk(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
            raise OSError(28, "No space left on device")

        ShardWriter.write = full_disk  # type: ignore[method-assign]
    try:
        export(
            chunks,
            folder,
            out,
            layer_offsets=offsets,
            stage=ps.get_pipeline_model_parallel_rank(),
            is_first_replica=ps.get_data_parallel_rank() == 0,
        )
    except CheckpointError as error:
        assert "No space left" in str(error)
    else:
        raise AssertionError("export returned, though a stage could not write")
    assert list(out.parent.iterdir()) == []
    ps.destroy_model_parallel()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
