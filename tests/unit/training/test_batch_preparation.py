"""A rank's layout, the order of preparation, and the thread that cuts micro-batches."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_rasft.data.sample_arrays import Batch, SampleArrays
from megatron_rasft.training import batch_preparation
from megatron_rasft.training.batch_preparation import BatchPreparer, batch_layout
from megatron_rasft.training.batches import WIDTH_SLACK, BatchLayout
from megatron_rasft.types import TrainingSample


def layout(monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool = True, **flags: object) -> BatchLayout:
    """The layout at tensor-parallel size 4 with sequence parallelism, and context-parallel size 2."""
    defaults: dict[str, object] = {
        "tensor_model_parallel_size": 4,
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": True,
        "distributed_backend": "nccl" if has_gpu else "gloo",
        "micro_batch_size": 1,
        "seq_length": 8192,
        "fp8": None,
        "fp4": None,
        "fp8_recipe": "tensorwise",
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for name, value in (("rank", 0), ("world_size", 2)):
        monkeypatch.setattr(parallel_state, f"get_data_parallel_{name}", lambda value=value: value)
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 0)
    return batch_layout(SimpleNamespace(**{**defaults, **flags}), is_packed=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recipe", "per_rank"), [("tensorwise", 16), ("delayed", 16), ("mxfp8", 32), ("blockwise", 128)]
)
def test_fp8_pads_to_the_multiple_of_its_kernels(
    recipe: str, per_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layout(monkeypatch, fp8="hybrid", fp8_recipe=recipe).token_multiple == per_rank * 4 * 2
    without = layout(monkeypatch, fp8="hybrid", fp8_recipe=recipe, sequence_parallel=False)
    assert without.token_multiple == per_rank * 2


def test_widths_are_coarse_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu, on_cpu = layout(monkeypatch), layout(monkeypatch, has_gpu=False)
    assert (on_gpu.token_multiple, on_gpu.width_slack) == (8 * 4 * 2, WIDTH_SLACK)
    assert (on_cpu.token_multiple, on_cpu.width_slack) == (4 * 2, 0.0)


def test_an_interleaved_pipeline_gets_a_multiple_of_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {"pipeline_model_parallel_size": 3, "virtual_pipeline_model_parallel_size": 2}
    assert layout(monkeypatch, **flags).micro_batch_multiple == 3
    assert layout(monkeypatch, pipeline_model_parallel_size=3).micro_batch_multiple == 1


def preparer() -> BatchPreparer:
    """A preparer in a world of one rank."""
    single = BatchLayout(
        micro_batch_size=1,
        seq_length=8,
        is_packed=True,
        dp_rank=0,
        dp_size=1,
        cp_rank=0,
        cp_size=1,
        token_multiple=1,
    )
    return BatchPreparer(single, [[0]], torch.device("cpu"))


def batch(*prompt_ids: int) -> Batch:
    samples = [
        TrainingSample(problem_id="p", kind="demonstration", prompt_ids=[i], response_ids=[9], weight=1.0)
        for i in prompt_ids
    ]
    return Batch(num_problems=len(samples), samples=SampleArrays.of(samples))


def test_a_batch_is_cut_into_this_ranks_micro_batches() -> None:
    preparing = preparer()
    prepared = preparing.prepare(batch(1, 2, 3))
    assert (prepared.facts.num_samples, prepared.facts.num_tokens) == (3, 6)
    tokens = torch.cat([b.tokens.flatten() for b in preparing.on_device(prepared)])
    assert sorted(tokens.tolist()) == [1, 2, 3, 9, 9, 9]


def test_the_next_batch_is_prepared_before_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    preparing = preparer()
    prepare = preparing.prepare

    def noted(given: Batch) -> Any:
        notes.append(f"prepare {given.num_problems}")
        return prepare(given)

    monkeypatch.setattr(preparing, "prepare", noted)
    for prepared in preparing.one_ahead([batch(1), batch(1, 2), batch(1, 2, 3)]):
        notes.append(f"use {prepared.facts.num_samples}")
    assert notes == ["prepare 1", "prepare 2", "use 1", "prepare 3", "use 2", "use 3"]


def test_a_pause_waits_until_all_batches_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def cut(*_: object) -> list[Any]:
        assert may_end.wait(600)
        return []

    monkeypatch.setattr(batch_preparation, "build_micro_batches", cut)
    preparing = preparer()
    prepared = [preparing.prepare(batch(1)), preparing.prepare(batch(1, 2))]
    threading.Timer(0.2, may_end.set).start()
    preparing.pause()
    assert [p.micro_batches.done() for p in prepared] == [True, True]
