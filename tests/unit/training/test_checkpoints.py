"""What a run leaves beside Megatron's files comes back as it was, or is refused with the way out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rasft.errors import CheckpointError
from megatron_rasft.training.checkpoints import QUEUE_FILE, STATE_FILE, read_arrays, write_state

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
        (tmp_path / f"iter_{step:07d}" / "metadata.json").touch()  # which Megatron writes last
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
    with pytest.raises(CheckpointError, match=r"is damaged.*of step 2, 4: give it as --ckpt-step") as raised:
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
