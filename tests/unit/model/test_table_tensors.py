"""A trainer loads its folder's weights, and exports and syncs them under the folder's names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.forking import call_on_ranks
from tests.tiny_policy import write_model


def _use(rank: int, folder: str) -> None:
    import pretrain_rasft
    from megatron_rasft.weights.exporting import export
    from tests.distributed.ranks_harness import trainer

    pretrain_rasft.cpu_backend.enable()
    pretrain_rasft.cpu_backend.use_cpu_fused_adam()
    found: dict[str, Any] = {}
    flags = ["--objective", "sft", "--global-batch-size", "1"]
    with trainer(Path(folder, "model"), Path(folder, "none.jsonl"), flags) as run:
        export(run.tensors, run.folder, f"{folder}/exported", dtype=torch.float32, facts={"Objective": "sft"})
        with torch.no_grad():
            for parameter in run.chunks[0].parameters():
                parameter.zero_()
        run.tensors.load()
        export(run.tensors, run.folder, f"{folder}/loaded", dtype=torch.float32)
        sync = run.weight_sync(lambda url: pytest.fail("no server is asked"))
        found["sync"] = type(sync).__name__
        sync.close()
    Path(folder, "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_model(folder / "model")
    call_on_ranks(_use, folder, 1)
    return folder


@pytest.mark.parametrize("name", ["exported", "loaded"])
def test_loaded_weights_are_exported_bit_for_bit(folder: Path, name: str) -> None:
    expected = load_file(folder / "model" / "model.safetensors")
    found = load_file(folder / name / "model.safetensors")
    assert found.keys() == expected.keys()
    assert not [key for key, tensor in expected.items() if not tensor.float().equal(found[key])]


def test_only_an_export_with_facts_has_a_card(folder: Path) -> None:
    assert "| Objective | sft |" in (folder / "exported" / "README.md").read_text()
    assert not (folder / "loaded" / "README.md").exists()


def test_servers_are_asked_only_in_a_sync(folder: Path) -> None:
    assert json.loads((folder / "found.json").read_text()) == {"sync": "WeightSync"}
