"""Flags out of range name the flag and the way out, and every field says what it means."""

import ast
import inspect
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any

import pytest

from megatron_rasft.config import (
    HeldoutConfig,
    RasftConfig,
    RolloutConfig,
    RunConfig,
    SyncConfig,
)
from megatron_rasft.training.arguments import add_arguments


def defaults(**changes: Any) -> Namespace:
    values = {f.name: getattr(kind(), f.name) for kind in RasftConfig.rooms().values() for f in fields(kind)}
    return Namespace(**{**values, **changes})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (RolloutConfig, "rollout_num_samples", 0),
        (RolloutConfig, "rollout_max_new_tokens", 0),
        (RolloutConfig, "rollout_batch_size", -1),
        (RolloutConfig, "rollout_temperature", -0.1),
        (RolloutConfig, "rollout_top_p", 0.0),
        (RolloutConfig, "rollout_top_p", 1.5),
        (RolloutConfig, "rollout_repetition_penalty", 0.0),
        (RolloutConfig, "rollout_seed", -1),
        (RolloutConfig, "rollout_engine", "replay"),
        (RolloutConfig, "rollout_replay", ["rollouts.jsonl"]),  # which the embedded engine does not read
        (RunConfig, "rasft_refresh_interval", 0),
        (SyncConfig, "sync_bucket_mib", 0),
        (SyncConfig, "sync_timeout_s", 0.0),
        (SyncConfig, "sync_port", 70000),
        (SyncConfig, "sync_proof_interval", -1),
        (SyncConfig, "sync_method", "disk"),  # without a folder
        (HeldoutConfig, "heldout_interval", -1),
        (HeldoutConfig, "heldout_num_samples", 0),
        (HeldoutConfig, "heldout_temperature", -1.0),
        (HeldoutConfig, "heldout_num_samples", 4),  # greedy
        (HeldoutConfig, "heldout_data", ["rows.csv"]),
        (HeldoutConfig, "heldout_data", ["rows.jsonl", "rows.jsonl"]),
    ],
)
def test_a_value_out_of_range_names_its_flag(kind: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        kind(**{name: value})


@pytest.mark.parametrize("objective", ["raft", "grpo"])
def test_objectives_on_rollouts_need_rollouts(objective: str) -> None:
    with pytest.raises(ValueError, match="--curriculum-mode"):
        RasftConfig.from_args(defaults(objective=objective, curriculum_mode="off"))


def test_the_tree_reads_back_from_arguments() -> None:
    config = RasftConfig.from_args(defaults(rollout_num_samples=7))
    assert config.rollout.rollout_num_samples == 7
    assert config.samples_rollouts
    assert not RasftConfig.from_args(defaults(objective="sft")).samples_rollouts
    assert RasftConfig.from_args(defaults(objective="sft", heldout_data=["a.jsonl"])).verifies


@pytest.mark.parametrize(
    ("flags", "skips"),
    [
        ([], False),
        (["--objective-grpo-dapo"], True),
        (["--objective-grpo-dapo", "--no-weighting-skip-degenerate"], False),
        (["--weighting-skip-degenerate"], True),
    ],
)
def test_dapo_skips_degenerate_groups_unless_told_otherwise(flags: list[str], skips: bool) -> None:
    args = add_arguments(ArgumentParser()).parse_args(["--objective", "grpo", *flags])
    assert RasftConfig.from_args(args).weighting.weighting_skip_degenerate is skips


@pytest.mark.parametrize("kind", RasftConfig.rooms().values(), ids=RasftConfig.rooms())
def test_every_field_is_documented(kind: type) -> None:
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    documented = {
        a.target.id
        for a, b in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(a, ast.AnnAssign)
        and isinstance(a.target, ast.Name)
        and isinstance(b, ast.Expr)
        and isinstance(b.value, ast.Constant)
    }
    assert documented == {f.name for f in fields(kind)}


def test_no_field_has_two_rooms() -> None:
    names = [f.name for kind in RasftConfig.rooms().values() for f in fields(kind)]
    assert len(names) == len(set(names))
