"""A run's own files in a checkpoint are read as written, and errors name the checkpoint and the way out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rasft.checkpoints import state_files
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.checkpoints.state_files import (
    QUEUE_FILE,
    STATE_FILE,
    architecture_of,
    checkpoint_failure,
    expired,
    load_explained,
    read_arrays,
    read_state,
    save_explained,
    write_state,
)
from megatron_rasft.errors import CheckpointError, FailedElsewhere
from megatron_rasft.model.fp8_scales import UNPICKLE
from tests.unit.checkpoints.stand_ins import args_with_architecture

ARRAYS = {
    "tokens": np.arange(1000, dtype=np.int32),
    "weights": np.array([0.1, -2.5]),
    "are_rollouts": np.array([True, False]),
    "ref_logprobs": np.array([-0.1, -np.inf, -0.0, 1e-40], np.float32),
}


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    return state


def test_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    write_state(tmp_path / "iter_0000003", {"queue": [[2, 2]]}, ARRAYS)
    state = state_of(tmp_path / "iter_0000003")
    assert state["queue"] == [[2, 2]]
    found = read_arrays(tmp_path / "iter_0000003", state)
    assert found.keys() == ARRAYS.keys()
    for name, values in ARRAYS.items():
        assert found[name].dtype == values.dtype
        assert found[name].tobytes() == values.tobytes()
    write_state(tmp_path / "iter_0000004", {"queue": []}, {})
    assert read_arrays(tmp_path / "iter_0000004", state_of(tmp_path / "iter_0000004")) == {}
    assert not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize("damage", ["missing", "cut", "one bit", "of another save"])
def test_arrays_that_are_not_those_of_the_state_are_refused(tmp_path: Path, damage: str) -> None:
    for step in (2, 4, 6):
        write_state(tmp_path / f"iter_{step:07d}", {"queue": []}, ARRAYS)
        (tmp_path / f"iter_{step:07d}" / "metadata.json").touch()  # Megatron writes this file last
    folder = tmp_path / "iter_0000006"
    path = folder / QUEUE_FILE
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        write_state(tmp_path / "other", {"queue": []}, ARRAYS | {"weights": np.array([0.1, -2.0])})
        path.write_bytes((tmp_path / "other" / QUEUE_FILE).read_bytes())
    with pytest.raises(CheckpointError, match=r"step 2, 4: .*--ckpt-step") as raised:
        read_arrays(folder, state_of(folder))
    assert str(path) in str(raised.value)


def test_a_save_that_fails_leaves_the_former_state_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state(tmp_path, {"queue": [[1, 2]]}, ARRAYS)
    kept = (tmp_path / STATE_FILE).read_bytes(), (tmp_path / QUEUE_FILE).read_bytes()

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_state(tmp_path, {"queue": []}, {})
    assert ((tmp_path / STATE_FILE).read_bytes(), (tmp_path / QUEUE_FILE).read_bytes()) == kept


ARCHITECTURE = architecture_of(args_with_architecture())  # type: ignore[arg-type]


def saved(save: Path, step: int = 2, **state: Any) -> Resume:
    """A checkpoint of this architecture."""
    folder = save / f"iter_{step:07d}"
    write_state(folder, {"architecture": ARCHITECTURE, **state}, ARRAYS)
    (folder / "metadata.json").touch()
    return Resume(folder=save, step=step)


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = read_state(saved(tmp_path, verdicts={"correct": 3}), ARCHITECTURE)
    assert state["verdicts"] == {"correct": 3}


def test_a_checkpoint_without_a_state_is_of_another_program(tmp_path: Path) -> None:
    (tmp_path / "iter_0000002").mkdir()
    with pytest.raises(CheckpointError, match=rf"iter_0000002.*{STATE_FILE}.*--hf-model"):
        read_state(Resume(folder=tmp_path, step=2), ARCHITECTURE)


def test_a_checkpoint_of_another_model_names_the_arguments_that_differ(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"iter_0000002.*hidden_size 32 != 48.*--hf-model"):
        read_state(saved(tmp_path), ARCHITECTURE | {"hidden_size": 48})


@pytest.mark.parametrize(("is_chosen", "named_by"), [(True, "--ckpt-step"), (False, "latest_checkpointed")])
def test_a_missing_checkpoint_is_named_with_its_origin(
    tmp_path: Path, is_chosen: bool, named_by: str
) -> None:
    saved(tmp_path, step=2)
    resume = Resume(folder=tmp_path, step=4, is_chosen=is_chosen)
    with pytest.raises(CheckpointError, match=rf"iter_0000004.*{named_by}.*step 2"):
        read_state(resume, ARCHITECTURE)


def test_a_checkpoint_that_was_never_completed_is_not_offered(tmp_path: Path) -> None:
    saved(tmp_path, step=2)
    (tmp_path / "iter_0000002" / "metadata.json").unlink()
    resume = saved(tmp_path, step=4)
    (tmp_path / "iter_0000004" / STATE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE}.*another --save") as raised:
        read_state(resume, ARCHITECTURE)
    assert "step 2" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (AssertionError("lr differs\nand more"), "--override-opt_param-scheduler"),
        (OSError("short file"), "iter_0000002"),
        (json.JSONDecodeError("no JSON", "", 0), "iter_0000002"),
        (RuntimeError(f"set {UNPICKLE}=1"), f"{UNPICKLE}=1"),
    ],
)
def test_an_error_of_megatrons_load_names_the_checkpoint(tmp_path: Path, error: Exception, name: str) -> None:
    with pytest.raises(CheckpointError) as raised, load_explained(Resume(folder=tmp_path, step=2)):
        raise error
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_other_errors_of_a_load_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), load_explained(Resume(folder=tmp_path, step=2)):
        raise RuntimeError("out of memory")


def test_an_error_of_a_save_names_the_folder_and_its_free_space(tmp_path: Path) -> None:
    folder = tmp_path / "missing" / "iter_0000002"
    pattern = r"step 2 .*iter_0000002: .*No space left.*GiB.*--save"
    with (
        pytest.raises(CheckpointError, match=pattern),
        save_explained("the checkpoint of step 2", folder),
    ):
        raise OSError(28, "No space left on device")


def test_the_reason_of_the_first_failed_rank_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: Any = {3: (OSError("disk gone"), None), 1: (OSError("disk full\nmore"), None)}
    assert checkpoint_failure(CheckpointException("", failures)) == "rank 1: disk full"
    assert checkpoint_failure(OSError("disk full\nmore")) == "disk full"
    monkeypatch.setattr(state_files.dist, "get_rank", lambda: 1)
    with pytest.raises(FailedElsewhere):
        checkpoint_failure(CheckpointException("", {}))


LOST_PEERS = [
    RuntimeError(
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:4711"
    ),
    RuntimeError("Connection reset by peer"),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistNetworkError("failed to recv, got 0 bytes"),
    CheckpointException("save", {1: (dist.DistBackendError("aborted"), None)}),  # type: ignore[dict-item]
]


@pytest.mark.parametrize("error", LOST_PEERS, ids=str)
def test_a_rank_lost_during_a_save_is_not_a_full_disk(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="another rank ended") as raised, save_explained("it", tmp_path):
        raise error
    assert "GiB" not in str(raised.value)


@pytest.mark.parametrize(
    ("keep", "interval", "deleted"),
    [
        (1, None, [2, 3, 4, 6, 8]),
        (2, None, [2, 3, 4, 6]),
        (2, 4, [2, 3, 6]),
        (9, None, [3]),  # 3 is the folder of a killed save
    ],
)
def test_checkpoints_other_than_the_newest_expire(
    tmp_path: Path, keep: int, interval: int | None, deleted: list[int]
) -> None:
    for step in (2, 3, 4, 6, 8, 10, 12):
        (tmp_path / f"iter_{step:07d}").mkdir()
        if step != 3:
            (tmp_path / f"iter_{step:07d}" / "metadata.json").touch()
    (tmp_path / "iter_old").mkdir()
    (tmp_path / "iter_0000001").symlink_to(tmp_path / "iter_old")
    found = expired(tmp_path, 10, keep, interval)
    assert [path.name for path in found] == [f"iter_{step:07d}" for step in deleted]
