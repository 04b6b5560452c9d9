"""Megatron loads the chosen checkpoint, and the run's state is loaded with it."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rasft.checkpoints import checkpointer
from megatron_rasft.checkpoints.checkpointer import Checkpointer, load_converted_weights
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.checkpoints.state_files import STATE_FILE, architecture_of
from megatron_rasft.errors import CheckpointError
from megatron_rasft.model.fp8_scales import DelayedScales
from tests.unit.checkpoints.stand_ins import args_with_architecture

ARRAYS = {"tokens": np.arange(3, dtype=np.int32)}


class Trained:
    """A trainer after two steps. It records when its parameters are gathered and its threads paused."""

    def __init__(self) -> None:
        self.model: list[torch.nn.Module] = []
        self.optimizer: Any = "optimizer"
        self.scheduler: Any = "scheduler"
        self.scales = DelayedScales(is_used=True, forward=lambda batches: None)
        self.iteration = 2
        self.floating_point_operations = 5.0
        self.notes: list[str] = []

    @contextlib.contextmanager
    def parameters_gathered(self) -> Any:
        self.notes.append("gathered")
        yield

    def pause_preparation(self) -> None:
        self.notes.append("paused")


class Megatron:
    """Replaces the functions of megatron.training that a Checkpointer calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, args: Any) -> None:
        self.args = args
        self.calls: list[Any] = []
        self.is_written = True
        monkeypatch.setattr(checkpointer.checkpointing, "save_checkpoint", self.save)
        monkeypatch.setattr(checkpointer.checkpointing, "load_checkpoint", self.load)
        monkeypatch.setattr(checkpointer.training, "maybe_finalize_async_save", self.finalize)
        monkeypatch.setattr(checkpointer, "is_empty_async_queue", lambda: self.is_written)
        monkeypatch.setattr(checkpointer, "write_in_background", lambda queue: self.calls.append("queue"))

    def save(self, step: int, *parts: Any, checkpointing_context: Any) -> None:
        self.calls.append(("save", step, *parts))

    def load(self, *parts: Any, checkpointing_context: Any = None) -> tuple[int, float]:
        self.calls.append(("load", self.args.load, self.args.ckpt_step, *parts))
        return 2, 7.0

    def finalize(self, blocking: bool) -> None:
        self.calls.append(("finalize", blocking))


def args_of(save: Path, **changes: Any) -> Any:
    defaults = {
        "save": str(save),
        "load": "given",
        "ckpt_step": None,
        "async_save": False,
        "fp8": None,
        "fp8_recipe": "delayed",
        "ckpt_format": "torch_dist",
        "rasft_keep_checkpoints": None,
        "save_retain_interval": None,
        "override_opt_param_scheduler": False,
        "use_checkpoint_opt_param_scheduler": False,
        "lr": 1e-4,
        "min_lr": 1e-6,
    }
    return args_with_architecture(**defaults | changes)


def saved(
    monkeypatch: pytest.MonkeyPatch, save: Path, **changes: Any
) -> tuple[Checkpointer, Trained, Megatron]:
    args, trainer = args_of(save, **changes), Trained()
    megatron = Megatron(monkeypatch, args)
    own = Checkpointer(args, trainer, Resume(), torch.device("cpu"))
    own.save(lambda: ({"queue": [[1, 1]]}, ARRAYS))
    return own, trainer, megatron


def test_a_checkpoint_brings_back_state_step_and_operations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, trainer, megatron = saved(monkeypatch, tmp_path)
    assert megatron.calls == [("save", 2, [], "optimizer", "scheduler", 5.0)]
    assert trainer.notes == ["gathered"]
    after = Trained()
    after.iteration = 0
    resume = Resume(folder=tmp_path, step=2, is_own=True)
    loaded = Checkpointer(megatron.args, after, resume, torch.device("cpu")).load()
    assert loaded is not None
    state, arrays = loaded
    assert state["queue"] == [[1, 1]]
    assert state["architecture"] == architecture_of(megatron.args)
    assert arrays["tokens"].tolist() == [0, 1, 2]
    assert (after.iteration, megatron.args.iteration, after.floating_point_operations) == (2, 2, 7.0)
    assert after.scales.are_missing, "no pass had set them before the save"


def test_megatron_loads_the_chosen_checkpoint_and_the_flags_stay_as_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, trainer, megatron = saved(monkeypatch, tmp_path)
    resume = Resume(folder=tmp_path, step=2)
    Checkpointer(megatron.args, trainer, resume, torch.device("cpu")).load()
    assert megatron.calls[-1] == ("load", str(tmp_path), 2, [], "optimizer", "scheduler")
    assert (megatron.args.load, megatron.args.ckpt_step) == ("given", None)


@pytest.mark.parametrize(
    ("flag", "after"),
    [("override_opt_param_scheduler", (1e-4, 1e-6)), ("use_checkpoint_opt_param_scheduler", (1e-3, 0.0))],
)
def test_parameter_groups_have_the_saved_rates_while_they_are_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flag: str, after: tuple[float, float]
) -> None:
    _, trainer, megatron = saved(monkeypatch, tmp_path, **{flag: True})
    groups = [{"max_lr": 1e-4, "min_lr": 1e-6}, {"max_lr": 5e-3, "min_lr": 1e-6}]
    steps: list[int] = []
    trainer.optimizer = SimpleNamespace(param_groups=groups)
    trainer.scheduler = SimpleNamespace(step=steps.append)
    common = {"opt_param_scheduler": {"max_lr": 1e-3, "min_lr": 0.0}}
    monkeypatch.setattr(checkpointer.dist_checkpointing, "load_common_state_dict", lambda folder: common)

    def load(*parts: Any, checkpointing_context: Any = None) -> tuple[int, float]:
        assert groups == [{"max_lr": 1e-3, "min_lr": 0.0}, {"max_lr": 5e-3, "min_lr": 0.0}]
        trainer.optimizer = SimpleNamespace(param_groups=[dict(group) for group in groups])
        return 2, 7.0

    monkeypatch.setattr(checkpointer.checkpointing, "load_checkpoint", load)
    Checkpointer(megatron.args, trainer, Resume(folder=tmp_path, step=2), torch.device("cpu")).load()
    usual, own_rate = trainer.optimizer.param_groups
    assert (usual["max_lr"], usual["min_lr"]) == after and own_rate["max_lr"] == 5e-3
    assert steps == [0] * (flag == "override_opt_param_scheduler"), "the next step has the new rate"


def test_a_run_without_a_checkpoint_loads_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own, _, megatron = saved(monkeypatch, tmp_path)
    megatron.calls.clear()
    assert own.load() is None
    assert megatron.calls == []


def test_a_checkpoint_of_another_program_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, trainer, megatron = saved(monkeypatch, tmp_path)
    (tmp_path / "iter_0000002" / STATE_FILE).unlink()
    resume = Resume(folder=tmp_path, step=2)
    with pytest.raises(CheckpointError, match="iter_0000002"):
        Checkpointer(megatron.args, trainer, resume, torch.device("cpu")).load()


def test_a_background_save_is_finished_when_all_ranks_have_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = {"async_save": True, "distributed_timeout_minutes": 1, "optimizer_cpu_offload": False}
    own, trainer, megatron = saved(monkeypatch, tmp_path, **flags)
    megatron.is_written = False
    assert own.finish(is_blocking=False) is None
    megatron.is_written = True
    assert own.finish() == 2
    assert own.finish() is None
    assert trainer.notes == ["gathered", "paused", "paused"], "Megatron may fork when it finalizes"
    assert megatron.calls[0] == "queue"
    assert megatron.calls[2:] == [("finalize", False), ("finalize", True)]


@pytest.mark.parametrize("is_async", [False, True])
def test_old_checkpoints_are_deleted_when_the_new_one_is_complete(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_async: bool
) -> None:
    old = tmp_path / "iter_0000001"
    old.mkdir()
    flags = {"async_save": is_async, "distributed_timeout_minutes": 1, "optimizer_cpu_offload": False}
    own, _, megatron = saved(monkeypatch, tmp_path, rasft_keep_checkpoints=1, **flags)
    if is_async:
        megatron.is_written = False
        own.finish(is_blocking=False)
        assert old.exists(), "the new checkpoint is incomplete"
        megatron.is_written = True
        own.finish()
    assert not old.exists() and (tmp_path / "iter_0000002").exists()


def test_a_rank_that_ends_during_a_background_save_is_named_as_the_cause(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = {"async_save": True, "distributed_timeout_minutes": 1, "optimizer_cpu_offload": False}
    own, _, _ = saved(monkeypatch, tmp_path, **flags)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4711")
    error = own.lost_save(lost)
    assert error is not None and "step 2" in str(error) and "another rank" in str(error)
    assert own.lost_save(RuntimeError("out of memory")) is own.lost_save(None) is None
    own.finish()
    assert own.lost_save(lost) is None, "the checkpoint is complete"


def test_converted_weights_are_loaded_into_model_and_optimizer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    args, reloaded = args_of(tmp_path), list[str]()
    megatron = Megatron(monkeypatch, args)
    optimizer = SimpleNamespace(reload_model_params=lambda: reloaded.append("reloaded"))
    common = {"args": args_with_architecture()}
    monkeypatch.setattr(checkpointer.dist_checkpointing, "load_common_state_dict", lambda path: common)
    load_converted_weights(args, [], optimizer, "scheduler", tmp_path / "release")
    assert megatron.calls == [("load", str(tmp_path), None, [], optimizer, "scheduler")]
    assert reloaded == ["reloaded"] and args.load == "given"
    common["args"].num_layers += 1
    with pytest.raises(CheckpointError, match="num_layers"):
        load_converted_weights(args, [], optimizer, "scheduler", tmp_path / "release")
