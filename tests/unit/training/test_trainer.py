"""The shapes that the kernels of a precision ask for and FP8's first scales."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state

from megatron_rasft.training import trainer as trainer_module
from megatron_rasft.training.batches import WIDTH_SLACK, BatchLayout
from megatron_rasft.training.trainer import Trainer
from megatron_rasft.types import TrainingSample


def layout(monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool = True, **flags: object) -> BatchLayout:
    """The layout of a trainer at tensor-parallel size 4 with sequence parallelism, and context-parallel size 2."""
    defaults: dict[str, object] = {
        "tensor_model_parallel_size": 4,
        "context_parallel_size": 2,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "sequence_parallel": True,
        "distributed_backend": "nccl" if has_gpu else "gloo",
        "micro_batch_size": 1,
        "fp8": None,
        "fp4": None,
        "fp8_recipe": "tensorwise",
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    for name, value in (("rank", 0), ("world_size", 2)):
        monkeypatch.setattr(parallel_state, f"get_data_parallel_{name}", lambda value=value: value)
    monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda: 0)
    trainer = Trainer.__new__(Trainer)
    trainer.args = SimpleNamespace(**{**defaults, **flags})
    trainer.max_tokens = 8192
    trainer.config = SimpleNamespace(run=SimpleNamespace(rasft_batch_layout="packed"))  # type: ignore[assignment]
    return trainer.layout


def test_the_next_part_is_prepared_before_one_is_scored() -> None:
    notes: list[str] = []

    def prepare(batch: int) -> int:
        notes.append(f"prepare {batch}")
        return batch

    trainer = Trainer.__new__(Trainer)
    trainer.prepare = prepare  # type: ignore[assignment,method-assign]
    for prepared in trainer._one_ahead([1, 2, 3]):  # type: ignore[list-item]
        notes.append(f"score {prepared}")
    assert notes == ["prepare 1", "prepare 2", "score 1", "prepare 3", "score 2", "score 3"]


@pytest.mark.parametrize(
    ("recipe", "per_rank"), [("tensorwise", 16), ("delayed", 16), ("mxfp8", 32), ("blockwise", 128)]
)
def test_fp8_pads_to_what_its_kernels_need_and_no_further(
    recipe: str, per_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layout(monkeypatch, fp8="hybrid", fp8_recipe=recipe).token_multiple == per_rank * 4 * 2
    without = layout(monkeypatch, fp8="hybrid", fp8_recipe=recipe, sequence_parallel=False)
    assert without.token_multiple == per_rank * 2


def test_widths_are_coarse_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu, on_cpu = layout(monkeypatch), layout(monkeypatch, has_gpu=False)
    assert (on_gpu.token_multiple, on_gpu.width_slack) == (8 * 4 * 2, WIDTH_SLACK)
    assert (on_cpu.token_multiple, on_cpu.width_slack) == (4 * 2, 0.0)


@pytest.mark.parametrize(
    ("state", "recipe", "lacks_scales"),
    [
        ({"has_fp8_scales": True}, "delayed", False),
        ({"has_fp8_scales": False}, "delayed", True),  # of a run in BF16, say
        ({}, "delayed", True),
        ({"has_fp8_scales": False}, "tensorwise", False),
    ],
)
def test_scales_that_a_checkpoint_lacks_are_set_after_a_resume(
    monkeypatch: pytest.MonkeyPatch, state: dict, recipe: str, lacks_scales: bool
) -> None:
    trainer = Trainer.__new__(Trainer)
    trainer.args = SimpleNamespace(load="folder", save="folder", fp8="hybrid", fp8_recipe=recipe)
    trainer.model, trainer.optimizer, trainer.scheduler = [], None, None
    trainer._checkpointing_context = {}
    monkeypatch.setattr(trainer_module.checkpointing, "checkpoint_exists", lambda load: True)
    monkeypatch.setattr(trainer_module.checkpointing, "load_checkpoint", lambda *args, **kwargs: (2, 0.0))
    for name, value in (("read_state", state), ("read_arrays", {}), ("chosen_folder", None)):
        monkeypatch.setattr(trainer_module, name, lambda *args, value=value: value)
    assert trainer.resume() == (state, {})
    assert trainer.iteration == 2 and trainer._lacks_scales == lacks_scales


def test_no_batch_is_cut_while_a_background_save_is_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron may fork then (iter_finalize_fn in megatron/training/checkpointing.py)."""
    trainer, done = Trainer.__new__(Trainer), list[str]()
    trainer._saving_step, trainer.args = 2, SimpleNamespace(save="folder")
    may_end = threading.Event()
    monkeypatch.setattr(
        trainer_module.training, "maybe_finalize_async_save", lambda blocking: done.append("completed")
    )

    def cut() -> None:
        assert may_end.wait(20)
        done.append("cut")

    with ThreadPoolExecutor(1) as trainer._cutter:
        trainer._cutter.submit(cut)
        threading.Timer(0.2, may_end.set).start()
        assert trainer.finish_saves(is_blocking=False) == 2
    assert done == ["cut", "completed"]


def test_scales_of_a_few_probes_are_set_again_from_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    trainer = Trainer.__new__(Trainer)
    trainer.args = SimpleNamespace(global_batch_size=6, use_distributed_optimizer=False)
    trainer.stop = SimpleNamespace(check=lambda: None)  # type: ignore[assignment]
    trainer._lacks_scales = True
    monkeypatch.setattr(trainer, "prepare", lambda batch: batch)
    monkeypatch.setattr(trainer, "_on_device", lambda batch: seen.append(len(batch.samples)))
    monkeypatch.setattr(trainer, "_score", lambda batch: [None] * len(batch.samples))
    monkeypatch.setattr(trainer_module, "set_delayed_scales", lambda forward: None)
    sample = TrainingSample(
        problem_id="p", kind="demonstration", prompt_ids=[1], response_ids=[2], weight=1.0
    )
    for num in (4, 20, 20):  # the probes of a sync with servers come first
        assert len(trainer.score([sample] * num, with_reference=False)) == num
    assert seen == [4, 6]
