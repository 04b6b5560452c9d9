"""Weights that Megatron-Bridge does not load, or does not give back bit for bit, are an error before the run begins."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rasft.bridge import folder as folder_module
from megatron_rasft.bridge.folder import BridgedFolder
from megatron_rasft.bridge.tensors import BridgedTensors
from megatron_rasft.errors import ModelFolderError
from tests.unit.bridge.stand_ins import TENSORS, StandInBridge, write_folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BridgedFolder:
    monkeypatch.setattr(folder_module, "import_auto_bridge", lambda flag: StandInBridge)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 0)
    return BridgedFolder.open(write_folder(tmp_path / "acme"))


def tensors_of(folder: BridgedFolder) -> BridgedTensors:
    return BridgedTensors([folder.bridge.chunk()], folder)


def test_the_plan_is_what_is_gathered(folder: BridgedFolder) -> None:
    tensors = tensors_of(folder)
    tensors.load()
    dtypes = {"model.norm.weight": torch.bfloat16}
    gathered = {name: tensor for name, tensor in tensors.gather(dtypes=dtypes) if tensor is not None}
    assert [(p.name, p.shape, p.dtype) for p in tensors.plan(dtypes=dtypes)] == [
        (name, tuple(tensor.shape), tensor.dtype) for name, tensor in gathered.items()
    ]
    assert gathered["model.norm.weight"].dtype == torch.bfloat16
    assert torch.equal(gathered["model.embed_tokens.weight"], TENSORS["model.embed_tokens.weight"])


def test_other_ranks_gather_nothing(folder: BridgedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tensors_of(folder)
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 1)
    assert list(tensors.gather()) == [(name, None) for name in TENSORS]


def _leave_out(bridge: StandInBridge) -> None:
    del bridge.streamed["model.norm.weight"]


def _rename(bridge: StandInBridge) -> None:
    bridge.streamed["model.norm.scale"] = bridge.streamed.pop("model.norm.weight")


def _round(bridge: StandInBridge) -> None:
    bridge.streamed["model.norm.weight"] = bridge.streamed["model.norm.weight"] + 1e-3


def _pad(bridge: StandInBridge) -> None:
    bridge.streamed["model.embed_tokens.weight"] = torch.zeros(8, 2)


def _skip(bridge: StandInBridge) -> None:
    bridge.loaded = []


FAULTS: dict[str, tuple[Callable[[StandInBridge], None], str]] = {
    "left out": (_leave_out, "model.norm.weight"),
    "renamed": (_rename, "model.norm.scale"),
    "rounded": (_round, "model.norm.weight"),
    "padded": (_pad, "model.embed_tokens.weight"),
    "never loaded": (_skip, "parameter weight"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_lossy_conversion_is_refused(folder: BridgedFolder, case: str) -> None:
    spoil, named = FAULTS[case]
    spoil(folder.bridge)
    with pytest.raises(ModelFolderError, match=f"acme.*Megatron-Bridge.*{named}"):
        tensors_of(folder).load()
    assert folder.hf_shapes.keys() == TENSORS.keys()


def test_a_stored_copy_of_the_tied_output_may_be_left_out(
    folder: BridgedFolder,
) -> None:
    folder.tensors["lm_head.weight"] = folder.tensors["model.embed_tokens.weight"]
    tensors_of(folder).load()
    assert folder.hf_shapes.keys() == TENSORS.keys()
