"""A checkpoint that the flags or the problems do not fit is refused before anything is built."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core.dist_checkpointing import serialization
from megatron.training import training

from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.checkpoints.state_files import architecture_of, write_state
from megatron_rasft.errors import CheckpointError
from megatron_rasft.model.fp8_scales import UNPICKLE
from megatron_rasft.monitoring.status import RunStatus
from megatron_rasft.objective.families import OBJECTIVES
from megatron_rasft.training import resume_checks
from megatron_rasft.training.resume_checks import check_resume, refuse_other_flags, scheduler_settings
from tests.unit.checkpoints.stand_ins import args_with_architecture
from tests.unit.training.stand_ins import config_of, demonstrations, refresh_of

FLAGS = {
    "lr": 1e-3,
    "min_lr": 1e-5,
    "lr_decay_style": "cosine",
    "lr_warmup_init": 0.0,
    "lr_warmup_iters": 2,
    "lr_warmup_samples": 0,
    "lr_warmup_fraction": None,
    "lr_decay_iters": None,
    "lr_decay_samples": None,
    "lr_wsd_decay_iters": None,
    "lr_wsd_decay_samples": None,
    "lr_wsd_decay_style": "exponential",
    "train_iters": 9,
    "train_samples": None,
    "global_batch_size": 8,
    "rampup_batch_size": None,
    "step_batch_size_schedule": None,
    "weight_decay": 0.1,
    "start_weight_decay": 0.1,
    "end_weight_decay": 0.1,
    "weight_decay_incr_style": "constant",
    "override_opt_param_scheduler": False,
    "use_checkpoint_opt_param_scheduler": False,
    "optimizer": "adam",
    "decoupled_lr": None,
    "decoupled_min_lr": None,
    "data_parallel_random_init": False,
}


def flags(**changes: Any) -> Namespace:
    return Namespace(**FLAGS | changes)


def filled_in(args: Namespace) -> Namespace:
    """The arguments as a checkpoint holds them: Megatron fills in the length of the decay when it builds the scheduler."""
    unit = "iters" if args.train_samples is None else "samples"
    decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    return Namespace(**vars(args) | {f"lr_decay_{unit}": decay})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr_decay_iters": 20, "global_batch_size": 3},
        {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 0},
        {"train_iters": None, "train_samples": 50, "lr_warmup_iters": 0, "lr_warmup_samples": 7},
        {"start_weight_decay": 0.0, "end_weight_decay": 0.3, "weight_decay_incr_style": "linear"},
    ],
)
def test_settings_are_those_of_megatrons_scheduler(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    args = flags(**changes)
    settings = scheduler_settings(args)
    monkeypatch.setattr(training, "get_args", lambda: args)
    scheduler = training.get_optimizer_param_scheduler(SimpleNamespace(param_groups=[]))
    state = scheduler.state_dict()
    del state["num_steps"]
    assert settings == state


RESUME = Resume(folder=Path("save"), step=7)


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({}, {"lr": 1e-4}, ["--lr 0.001 (now 0.0001)"]),
        ({}, {"min_lr": 0.0, "lr": 1e-4}, ["--lr 0.001", "--min-lr 1e-05 (now 0.0)"]),
        ({}, {"train_iters": 12}, ["--train-iters 9 (now 12)"]),
        (
            {},
            {"global_batch_size": 16, "train_iters": 5},
            ["--global-batch-size 8 (now 16)", "--train-iters"],
        ),
        ({}, {"lr_decay_iters": 20}, ["--lr-decay-iters not given (now 20)"]),
        ({"lr_decay_style": "linear"}, {}, ["--lr-decay-style linear (now cosine)"]),
        ({}, {"lr_warmup_iters": 3}, ["--lr-warmup-iters 2 (now 3)"]),
        (
            {},
            {"weight_decay": 0.2, "start_weight_decay": 0.2, "end_weight_decay": 0.2},
            ["--weight-decay 0.1 (now 0.2)"],
        ),
        (
            {"train_iters": None, "train_samples": 80},
            {"train_iters": None, "train_samples": 96},
            ["--train-samples 80 (now 96)"],
        ),
    ],
)
def test_another_schedule_is_named_with_both_values_and_both_ways_out(
    before: dict[str, Any], now: dict[str, Any], named: list[str]
) -> None:
    saved = filled_in(flags(**before))
    with pytest.raises(CheckpointError) as raised:
        refuse_other_flags(RESUME, saved, scheduler_settings(saved), flags(**now))
    message = str(raised.value)
    assert all(part in message for part in [*named, "iter_0000007", "--override-opt_param-scheduler"])
    assert message.count("(now") == len(named), "each flag once, and no flag that only follows from another"
    for accepted in ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"):
        refuse_other_flags(RESUME, saved, scheduler_settings(saved), flags(**now, **{accepted: True}))


def test_the_same_flags_are_accepted() -> None:
    for changes in ({}, {"train_iters": None, "train_samples": 80}):
        saved = filled_in(flags(**changes))
        refuse_other_flags(RESUME, saved, scheduler_settings(saved), flags(**changes))


def test_a_schedule_that_the_checkpoints_flags_did_not_set_is_named_in_steps() -> None:
    schedule = scheduler_settings(flags(train_iters=12))
    with pytest.raises(CheckpointError, match=r"--lr-decay-iters 12 \(now 9\)"):
        refuse_other_flags(RESUME, filled_in(flags()), schedule, flags())


def test_another_optimizer_is_refused_in_any_case() -> None:
    saved = filled_in(flags())
    now = flags(optimizer="sgd", override_opt_param_scheduler=True)
    with pytest.raises(CheckpointError, match=r"--optimizer adam \(now sgd\).*--hf-model"):
        refuse_other_flags(RESUME, saved, scheduler_settings(saved), now)


# ---- the whole check


class Checked:
    """A saved run of eight problems, and the arguments that resume it."""

    def __init__(self, save: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.args: Any = args_with_architecture(
            **FLAGS,
            save=str(save),
            export_hf=None,
            hf_model="model",
            no_load_optim=False,
            fp8=None,
            fp8_recipe="delayed",
        )
        self.resume = Resume(folder=save, step=7, is_own=True)
        monkeypatch.setattr(resume_checks, "initial_fingerprint", lambda folder, converted: "weights")
        saved = filled_in(self.args)
        common = {"args": saved, "opt_param_scheduler": scheduler_settings(saved)}
        monkeypatch.setattr(resume_checks.dist_checkpointing, "load_common_state_dict", lambda folder: common)
        self.write_state()

    def write_state(self, **changes: Any) -> None:
        refresh = refresh_of(config_of()).state_dict()
        state = {"architecture": architecture_of(self.args), "refresh": refresh, "initial_weights": "weights"}
        assert self.resume.checkpoint is not None
        write_state(self.resume.checkpoint, json.loads(json.dumps({**state, **changes})), {})

    def check(self, num_problems: int = 8, objective: str = "rasft") -> None:
        problems: Any = SimpleNamespace(demonstrations=demonstrations(num_problems))
        check_resume(self.args, config_of(objective=OBJECTIVES[objective]()), self.resume, problems)


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checked:
    return Checked(tmp_path / "save", monkeypatch)


def test_the_same_run_is_resumed(checked: Checked) -> None:
    checked.check()
    checked.resume = Resume()
    checked.check(num_problems=3)


def test_other_problems_are_refused(checked: Checked) -> None:
    with pytest.raises(CheckpointError, match="--train-data"):
        checked.check(num_problems=7)


def test_another_reference_is_refused_where_there_is_one(checked: Checked) -> None:
    checked.write_state(initial_weights="others")
    with pytest.raises(CheckpointError, match=r"model.*--hf-model"):
        checked.check()
    checked.check(objective="sft")


def test_another_model_is_refused(checked: Checked) -> None:
    checked.args.hidden_size += 8
    with pytest.raises(CheckpointError, match="hidden_size"):
        checked.check()


def test_another_schedule_is_refused_unless_the_optimizer_is_not_loaded(checked: Checked) -> None:
    checked.args.lr = 1e-4
    with pytest.raises(CheckpointError, match=r"--lr 0\.001"):
        checked.check()
    checked.args.no_load_optim = True
    checked.check()


def test_a_checkpoint_without_an_optimizer_is_named(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        resume_checks.dist_checkpointing, "load_common_state_dict", lambda folder: {"args": checked.args}
    )
    with pytest.raises(CheckpointError, match="--no-load-optim"):
        checked.check()


def test_a_damaged_index_is_one_error_without_tracebacks(
    checked: Checked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        resume_checks.dist_checkpointing, "load_common_state_dict", serialization.load_common_state_dict
    )
    folder = checked.resume.checkpoint
    assert folder is not None
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / ".metadata").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="iter_0000007"):
        checked.check()
    assert not [record for record in caplog.records if record.name == "root"]


def test_other_formats_are_left_to_the_load(checked: Checked) -> None:
    checked.args.lr = 1e-4
    checked.write_state(config={"rasft": {}, "megatron": {"ckpt_format": "torch"}})
    checked.check()


def test_scales_that_are_a_pickle_are_refused_from_another_run(
    checked: Checked, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked.args.fp8 = "e4m3"
    checked.write_state(has_fp8_scales=True)
    checked.check()
    checked.resume = Resume(folder=checked.resume.folder, step=7)
    with pytest.raises(CheckpointError, match=UNPICKLE):
        checked.check()
    monkeypatch.setenv(UNPICKLE, "1")
    checked.check()


def test_a_finished_run_is_not_checked(checked: Checked) -> None:
    checked.resume = Resume(folder=checked.resume.folder, step=9, is_own=True)
    RunStatus(state="finished", step=9).write(checked.args.save)
    checked.check(num_problems=3)
