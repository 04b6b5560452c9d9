"""A folder without a table is described by Megatron-Bridge; all other folders are refused."""

from pathlib import Path

import pytest
import torch

from megatron_rasft.bridge import folder as folder_module
from megatron_rasft.bridge.folder import BridgedFolder
from megatron_rasft.errors import ModelFolderError
from tests.tiny_models import write_folder as write_folder_with_table
from tests.unit.bridge.stand_ins import TENSORS, StandInBridge, write_folder


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "import_auto_bridge", lambda flag: StandInBridge)


def test_sizes_come_from_the_provider_and_tensors_from_the_files(tmp_path: Path) -> None:
    folder = BridgedFolder.open(write_folder(tmp_path / "acme"))
    assert folder.architecture == "AcmeForCausalLM"
    assert folder.hf_shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    assert (folder.shape.num_query_groups, folder.shape.head_dim, folder.shape.is_tied) == (2, 1, True)
    assert torch.equal(folder.read("model.norm.weight"), TENSORS["model.norm.weight"])
    args = folder.megatron_args()
    expected = {"num_layers": 3, "vocab_size": 4, "padded_vocab_size": 4, "max_position_embeddings": 16}
    assert expected.items() <= args.items()
    assert args["num_experts"] is None and not args["untie_embeddings_and_output_weights"]


def test_a_model_of_several_parts_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "acme", architectures=["AcmeForConditionalGeneration"])
    with pytest.raises(ModelFolderError, match=r"acme.*AcmeForConditionalGeneration"):
        BridgedFolder.open(path)


def test_a_model_with_a_table_is_refused(tmp_path: Path) -> None:
    path = write_folder_with_table("llama", tmp_path / "llama")
    with pytest.raises(ModelFolderError, match=r"--model-source bridge.*LlamaForCausalLM"):
        BridgedFolder.open(path)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "acme", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelFolderError, match=r"acme.*quantization_config.*--model-source bridge"):
        BridgedFolder.open(path)


def test_a_setting_that_megatron_bridge_ignores_is_refused(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "acme", rope_scaling={"rope_type": "linear", "factor": 4.0})
    with pytest.raises(ModelFolderError, match=r"acme.*linear"):
        BridgedFolder.open(path)


def test_an_error_of_megatron_bridge_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: StandInBridge, load_weights: bool) -> None:
        raise NotImplementedError("no such model\nand a page of advice")

    monkeypatch.setattr(StandInBridge, "to_megatron_provider", fail)
    with pytest.raises(ModelFolderError, match=r"acme.*Megatron-Bridge.*no such model$"):
        BridgedFolder.open(write_folder(tmp_path / "acme"))
