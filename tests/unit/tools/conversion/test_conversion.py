"""Complete conversions on disk: bit-equal in both directions, continued after a kill, refused for wrong input."""

import json
import os
import pickle
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_rasft.errors import CheckpointError, ModelFolderError, WeightsError
from megatron_rasft.tools.conversion import conversion
from megatron_rasft.tools.conversion.conversion import check_parameters, hf_to_megatron, megatron_to_hf
from megatron_rasft.tools.conversion.layerwise import layerwise_logits
from megatron_rasft.tools.conversion.round_trip import prove, prove_fp8
from megatron_rasft.tools.conversion.staging import StagedFolder
from megatron_rasft.tools.conversion.torch_dist import DistcpFile, TorchDistFolder, write_checkpoint_index
from megatron_rasft.weights.families import FAMILIES, NameTable
from megatron_rasft.weights.folder import HfFolder
from tests.tiny_models import CASES, hf_model, some_tokens, whole_blocks, write_folder
from tests.unit.weights.dequantizing import dequantize_blocks


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HfFolder]:
    root = tmp_path_factory.mktemp("hf")
    return {case: HfFolder.open(write_folder(case, root / case)) for case in CASES}


@pytest.fixture(scope="module")
def llama(folders: dict[str, HfFolder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint, which tests must not change."""
    path = tmp_path_factory.mktemp("megatron") / "llama"
    hf_to_megatron(folders["llama"], path)
    return path


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llama, tmp_path / "copied")


def template_of(path: Path) -> HfFolder:
    return HfFolder.open(path / "hugging_face", with_weights=False)


def assert_same_tensors(a: HfFolder, b: HfFolder) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert a.tensors[name].dtype == b.tensors[name].dtype
        assert torch.equal(a.read(name), b.read(name)), name


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal_and_computes_what_transformers_does(
    folders: dict[str, HfFolder], tmp_path: Path, case: str
) -> None:
    folder = folders[case]
    hf_to_megatron(folder, tmp_path / "megatron", num_workers=2)
    checkpoint = TorchDistFolder.open(tmp_path / "megatron")
    proof = prove(checkpoint, folder, is_export=False, num_workers=2)
    assert proof.faults == [] and proof.num_padding == 0
    assert proof.num_elements == sum(t.numel() for t in map(folder.read, folder.tensors))
    tokens = some_tokens()
    with torch.no_grad():
        expected = hf_model(case)(tokens).logits
    assert (layerwise_logits(checkpoint, folder, tokens) - expected).abs().max() < 1e-5

    megatron_to_hf(checkpoint, template_of(tmp_path / "megatron"), tmp_path / "back", num_workers=2)
    back = HfFolder.open(tmp_path / "back")
    assert_same_tensors(back, folder)
    assert prove(checkpoint, back, is_export=True).checksum == proof.checksum
    assert back.config == folder.config


def test_layers_are_stacked_and_cut_for_ranks(tmp_path: Path) -> None:
    """Chunks are single layers, cut along the dimension that tensor parallelism splits, so that a rank can read only its own
    bytes."""
    big = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 2, "vocab_size": 128}
    config = transformers.LlamaConfig(**big, num_attention_heads=8, num_key_value_heads=8)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    hf_to_megatron(HfFolder.open(tmp_path / "hf"), tmp_path / "megatron")
    tensors = TorchDistFolder.open(tmp_path / "megatron").tensors
    fc1, fc2 = (tensors[f"decoder.layers.mlp.linear_{name}.weight"] for name in ("fc1", "fc2"))
    assert tuple(fc1.size) == (2, 8192, 512) and tuple(fc2.size) == (2, 512, 4096)
    assert {tuple(c.sizes) for c in fc1.chunks} == {(1, 512, 512)}
    assert {tuple(c.sizes) for c in fc2.chunks} == {(1, 512, 512)}
    assert sorted(tuple(c.offsets) for c in fc2.chunks)[8] == (1, 0, 0)
    norm = tensors["decoder.layers.mlp.linear_fc1.layer_norm_weight"]
    assert [tuple(c.sizes) for c in norm.chunks] == [(1, 512)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_a_plain_rounding(
    folders: dict[str, HfFolder], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = folders["qwen3"]
    hf_to_megatron(folder, tmp_path / "megatron", dtype=dtype)
    checkpoint = TorchDistFolder.open(tmp_path / "megatron")
    assert prove(checkpoint, folder, is_export=False, dtype=dtype).faults == []
    unasked = prove(checkpoint, folder, is_export=False).faults
    assert len(unasked) == len(folder.tensors)
    assert unasked[0] == f"model.embed_tokens.weight is {str(dtype)[6:]}, not float32"
    megatron_to_hf(checkpoint, template_of(tmp_path / "megatron"), tmp_path / "back")
    back = HfFolder.open(tmp_path / "back")
    assert back.config["dtype"] == str(dtype).removeprefix("torch.")
    for name in folder.tensors:
        assert torch.equal(back.read(name), folder.read(name).to(dtype))


def retyped(path: Path, source: HfFolder, config_dtype: str, dtypes: dict[str, torch.dtype]) -> HfFolder:
    """Copies a folder. Each tensor gets the type of the first key that its name contains."""
    shutil.copytree(source.path, path)
    (path / "config.json").write_text(json.dumps(source.config | {"dtype": config_dtype}))
    state = {
        name: tensor.to(next(dtype for part, dtype in dtypes.items() if part in name))
        for name, tensor in load_file(path / "model.safetensors").items()
    }
    save_file(state, path / "model.safetensors", {"format": "pt"})
    return HfFolder.open(path)


def test_weights_trained_in_fp32_are_not_rounded_to_the_templates_type(
    folders: dict[str, HfFolder], llama: Path, tmp_path: Path
) -> None:
    template = retyped(tmp_path / "bf16", folders["llama"], "bfloat16", {"": torch.bfloat16})
    checkpoint = TorchDistFolder.open(llama)
    megatron_to_hf(checkpoint, template, tmp_path / "out")
    back = HfFolder.open(tmp_path / "out")
    assert_same_tensors(back, folders["llama"])
    assert back.config == template.config | {"dtype": "float32"}
    assert "| Weights | float32 |" in (tmp_path / "out/README.md").read_text()
    assert prove(checkpoint, back, is_export=True).faults == []
    assert "model.norm.weight is bfloat16, not float32" in prove(checkpoint, template, is_export=True).faults

    megatron_to_hf(checkpoint, template, tmp_path / "fp8", is_fp8=True)
    assert load_file(tmp_path / "fp8/model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "fp8/config.json").read_text())["dtype"] == "bfloat16"
    assert "| fp8 in blocks of 128 x 128, the rest bfloat16 |" in (tmp_path / "fp8/README.md").read_text()
    assert prove_fp8(checkpoint, template, tmp_path / "fp8").faults == []


@pytest.mark.parametrize("matrices,norms", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_folder_of_two_types_comes_back_bit_equal(
    folders: dict[str, HfFolder], tmp_path: Path, matrices: torch.dtype, norms: torch.dtype
) -> None:
    name = str(matrices).removeprefix("torch.")
    folder = retyped(tmp_path / "hf", folders["llama"], name, {"norm": norms, "": matrices})
    hf_to_megatron(folder, tmp_path / "megatron")
    checkpoint = TorchDistFolder.open(tmp_path / "megatron")
    megatron_to_hf(checkpoint, template_of(tmp_path / "megatron"), tmp_path / "out")
    back = HfFolder.open(tmp_path / "out")
    assert_same_tensors(back, folder)
    assert back.config == folder.config
    assert f"| Weights | {name}, {str(norms)[6:]} |" in (tmp_path / "out/README.md").read_text()
    assert prove(checkpoint, folder, is_export=False).faults == []
    assert prove(checkpoint, back, is_export=True).faults == []


def test_layers_of_different_types_are_widened_and_named(
    folders: dict[str, HfFolder], tmp_path: Path
) -> None:
    """A checkpoint stores the parameter of all layers in one type."""
    wide = {"2.mlp.down_proj": torch.float32, "1.self_attn.k_proj": torch.float32, "": torch.bfloat16}
    folder = retyped(tmp_path / "hf", folders["llama"], "bfloat16", wide)
    hf_to_megatron(folder, tmp_path / "megatron")
    checkpoint = TorchDistFolder.open(tmp_path / "megatron")
    megatron_to_hf(checkpoint, template_of(tmp_path / "megatron"), tmp_path / "out")
    back = HfFolder.open(tmp_path / "out")
    assert all(torch.equal(back.read(name).float(), folder.read(name).float()) for name in folder.tensors)
    widened = [name for name, stored in folder.tensors.items() if stored.dtype != back.tensors[name].dtype]
    assert len(widened) == 3 + 4 * 3 - 1
    faults = prove(checkpoint, folder, is_export=False).faults
    assert sorted(faults) == sorted(f"{name} is float32, not bfloat16" for name in widened)


def test_export_splits_files_and_transformers_loads_them(llama: Path, tmp_path: Path) -> None:
    megatron_to_hf(
        TorchDistFolder.open(llama),
        template_of(llama),
        tmp_path / "out",
        max_shard_bytes=60_000,
        num_workers=3,
    )
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    expected = hf_model("llama").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_companions_and_card_travel(folders: dict[str, HfFolder], tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(folders["llama"].path, source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "training_args.bin").write_bytes(b"x")
    hf_to_megatron(HfFolder.open(source), tmp_path / "megatron")
    megatron_to_hf(
        TorchDistFolder.open(tmp_path / "megatron"), template_of(tmp_path / "megatron"), tmp_path / "out"
    )
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out/training_args.bin").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "| Architecture | LlamaForCausalLM |" in card and "library_name: transformers" in card
    assert "Objective" not in card  # converted weights do not come from a run


def test_query_groups_of_zeros_are_added_and_left_out_again(
    folders: dict[str, HfFolder], tmp_path: Path
) -> None:
    folder = folders["qwen2_tied"]  # 6 heads in 2 groups, with a bias
    hf_to_megatron(folder, tmp_path / "megatron", query_groups=4)
    checkpoint = TorchDistFolder.open(tmp_path / "megatron")
    head = folder.shape.head_dim
    qkv = checkpoint.read("decoder.layers.self_attention.linear_qkv.weight", (1,))
    assert qkv.shape[0] == 4 * 5 * head and (qkv[2 * 5 * head :] == 0).all()
    assert checkpoint.tensors["decoder.layers.self_attention.linear_proj.weight"].size[2] == 12 * head
    proof = prove(checkpoint, folder, is_export=False)
    assert proof.faults == [] and proof.num_padding > 0
    megatron_to_hf(checkpoint, template_of(tmp_path / "megatron"), tmp_path / "back")
    assert_same_tensors(HfFolder.open(tmp_path / "back"), folder)


def test_layers_that_are_not_stacked_and_a_padded_vocabulary_are_read(
    folders: dict[str, HfFolder], llama: Path, tmp_path: Path
) -> None:
    checkpoint, folder = TorchDistFolder.open(llama), folders["llama"]
    (tmp_path / "single").mkdir()
    with DistcpFile(tmp_path / "single" / "a.distcp") as file:
        for parameter in folder.table.stored_parameters():
            tensor = checkpoint.read(parameter.key, parameter.position)
            if tensor.shape[0] == 101:
                tensor = torch.cat([tensor, torch.full((27, 48), 7.0)])
            file.write_chunk(parameter.single_key, tensor, [0] * tensor.ndim, tensor.shape)
    write_checkpoint_index(tmp_path / "single", file.records)
    single = TorchDistFolder.open(tmp_path / "single")
    megatron_to_hf(single, template_of(llama), tmp_path / "out")
    assert_same_tensors(HfFolder.open(tmp_path / "out"), folder)
    assert prove(single, folder, is_export=True).num_padding == 2 * 27 * 48
    tokens = some_tokens()
    assert torch.equal(layerwise_logits(single, folder, tokens), layerwise_logits(checkpoint, folder, tokens))


def checkpoint_of(path: Path, chunks: dict[tuple[int, ...], torch.Tensor], shape: tuple) -> TorchDistFolder:
    """Makes a checkpoint of one tensor, "key", from chunks by their offsets."""
    path.mkdir()
    with DistcpFile(path / "a.distcp") as file:
        for offsets, chunk in chunks.items():
            file.write_chunk("key", chunk, offsets, shape)
    write_checkpoint_index(path, file.records)
    return TorchDistFolder.open(path)


class Scanned(list):
    """A list that counts how often it is iterated over."""

    count = 0

    def __iter__(self) -> Iterator:
        self.count += 1
        return super().__iter__()


@pytest.mark.parametrize("split", [(1, 1, 2, 3), (2, 3, 6, 1), (1, 4, 5, 2)])
def test_chunks_cut_along_several_axes_are_looked_up_not_searched(
    tmp_path: Path, split: tuple[int, ...]
) -> None:
    whole = torch.arange(4 * 6 * 6 * 4.0).view(4, 6, 6, 4)
    starts = product(*(range(0, size, step) for size, step in zip(whole.shape, split, strict=True)))
    cut = {s: whole[tuple(slice(a, a + n) for a, n in zip(s, split, strict=True))] for s in starts}
    checkpoint = checkpoint_of(tmp_path / "cut", cut, tuple(whole.shape))
    scanned = Scanned(checkpoint.tensors["key"].chunks)
    checkpoint.tensors["key"].chunks = scanned
    for index in [*product(range(4), range(6)), *((layer,) for layer in range(4)), ()]:
        checkpoint.read_ahead("key", index)
        assert torch.equal(checkpoint.read("key", index), whole[index])
    assert scanned.count == 3  # once each for zero, one and two leading dimensions


def test_chunk_of_another_type_than_its_index_says_is_refused(tmp_path: Path) -> None:
    cut = {(0, 0): torch.ones(1, 3), (1, 0): torch.ones(1, 3, dtype=torch.float64)}
    checkpoint = checkpoint_of(tmp_path / "cut", cut, (2, 3))
    with pytest.raises(CheckpointError, match=r"key is torch\.float64"):
        checkpoint.read("key")


class Killed(BaseException):
    """Simulates SIGKILL: no code under test catches it."""


def test_killed_conversion_continues_with_the_missing_files(
    folders: dict[str, HfFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, done = conversion.write_layer, []

    def until_third(file: DistcpFile, *args: object) -> None:
        if len(done) == 3:
            raise Killed
        plain(file, *args)
        done.append(file)

    monkeypatch.setattr(conversion, "write_layer", until_third)
    with pytest.raises(Killed):
        hf_to_megatron(folders["llama"], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    done.clear()
    counted: list[int] = []
    hf_to_megatron(folders["llama"], tmp_path / "out", on_progress=counted.append)
    assert len(done) == 3 and len(counted) == 6  # three of six files were finished
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert prove(TorchDistFolder.open(tmp_path / "out"), folders["llama"], is_export=False).faults == []


def test_killed_export_continues_with_the_missing_files(
    folders: dict[str, HfFolder], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, done = conversion.write_file, []

    def until_second(*args: object) -> None:
        if len(done) == 2:
            raise Killed
        plain(*args)
        done.append(args)

    def export() -> None:
        megatron_to_hf(
            TorchDistFolder.open(llama), template_of(llama), tmp_path / "out", max_shard_bytes=60_000
        )

    monkeypatch.setattr(conversion, "write_file", until_second)
    with pytest.raises(Killed):
        export()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(conversion, "write_file", plain)
    export()
    assert_same_tensors(HfFolder.open(tmp_path / "out"), folders["llama"])


def test_files_of_other_work_are_not_reused(
    folders: dict[str, HfFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_layer", fail)
        with pytest.raises(Killed):
            hf_to_megatron(folders["llama"], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"out\.partial .*\(dtype\)"):
        hf_to_megatron(folders["llama"], tmp_path / "out", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"out\.partial .*\(input\)"):
        hf_to_megatron(folders["qwen3"], tmp_path / "out")
    hf_to_megatron(folders["llama"], tmp_path / "out")


def test_output_in_use_is_refused(folders: dict[str, HfFolder], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"--output .*/out"):
        hf_to_megatron(folders["llama"], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_processes_do_not_write_one_output(folders: dict[str, HfFolder], tmp_path: Path) -> None:
    other = StagedFolder(tmp_path / "out", {"any": "work"})
    with pytest.raises(CheckpointError, match=r"another process.*out\.partial"):
        hf_to_megatron(folders["llama"], tmp_path / "out")
    other.close()


def test_too_little_disk_space_is_reported_before_anything_is_written(
    folders: dict[str, HfFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 1 << 40, 1000))
    with pytest.raises(CheckpointError, match=r"0\.1 GiB .* 0\.0 GiB"):
        hf_to_megatron(folders["llama"], tmp_path / "out")
    assert not list(tmp_path.rglob("*.distcp"))


@pytest.mark.parametrize(
    "where,num_kept",
    [
        ("tools.conversion.torch_dist.DistcpFile.write_chunk", 0),
        ("tools.conversion.staging.write_json", 0),
        ("tools.conversion.conversion.write_checkpoint_index", 6),
        ("tools.conversion.conversion.copy_companions", 6),
        ("tools.conversion.staging.Path.rename", 6),
    ],
)
def test_full_disk_ends_in_one_line_and_keeps_finished_files(
    folders: dict[str, HfFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, num_kept: int
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"megatron_rasft.{where}", full)
        with pytest.raises(CheckpointError, match=r"out\.partial: the disk is full"):
            hf_to_megatron(folders["llama"], tmp_path / "out", num_workers=2)
    plain, done = conversion.write_layer, []

    def count(*args: Any) -> None:
        plain(*args)
        done.append(args)

    monkeypatch.setattr(conversion, "write_layer", count)
    hf_to_megatron(folders["llama"], tmp_path / "out")
    assert len(done) == 6 - num_kept
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def test_disk_that_is_full_after_the_last_file_of_an_export_ends_in_one_line(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "write_card", full)
    with pytest.raises(CheckpointError, match=r"out\.partial: the disk is full"):
        megatron_to_hf(TorchDistFolder.open(llama), template_of(llama), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]


@pytest.mark.parametrize("target", ["empty", "missing"])
def test_output_that_is_a_link_is_refused_before_anything_is_written(
    folders: dict[str, HfFolder], tmp_path: Path, target: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match="symbolic link"):
        hf_to_megatron(folders["llama"], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "out"}


def first_file(path: Path) -> Path:
    return path / "release" / "__1_0.distcp"


def remove_metadata(path: Path) -> None:
    (path / "release/.metadata").unlink()


def truncate(path: Path) -> None:
    data = first_file(path).read_bytes()
    first_file(path).write_bytes(data[: len(data) // 2])


def other_format(path: Path) -> None:
    (path / "release/metadata.json").write_text('{"sharded_backend": "zarr"}')


def garbage_index(path: Path) -> None:
    (path / "release/.metadata").write_bytes(b"garbage")


def running_index(path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple:
            return exec, ("raise SystemExit('ran')",)

    (path / "release/.metadata").write_bytes(pickle.dumps(Runs()))


def other_pickle(path: Path) -> None:
    (path / "release/.metadata").write_bytes(pickle.dumps({"state_dict_metadata": {}}))


def file_elsewhere(path: Path) -> None:
    """Moves a file out of the folder, and changes the index to find it there."""
    index = path / "release/.metadata"
    first_file(path).rename(path / "__1_0.distcp")
    content = pickle.loads(index.read_bytes())
    for place in content.storage_data.values():
        place.relative_path = place.relative_path.replace("__1_0.distcp", "../__1_0.distcp")
    index.write_bytes(pickle.dumps(content))


def no_file(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace_file(path: Path) -> None:
        (path / "release" / name).unlink()
        make(path / "release" / name)

    return replace_file


@pytest.mark.parametrize(
    "damage,pattern",
    [
        (other_pickle, r"\.metadata"),
        (file_elsewhere, r"\.\./__1_0\.distcp.* outside"),
        *(
            (no_file(name, make), re.escape(name))
            for name in ("__1_0.distcp", ".metadata", "metadata.json")
            for make in (Path.mkdir, os.mkfifo)
        ),
        (remove_metadata, r"\.metadata"),
        (truncate, r"__1_0.distcp .* \d+ bytes"),
        (lambda path: first_file(path).unlink(), "__1_0.distcp"),
        (other_format, "'zarr'.*'torch_dist'"),
        (garbage_index, r"\.metadata"),
        (running_index, "builtins.exec"),
        (lambda path: (path / "release/metadata.json").unlink(), "metadata.json"),
        (
            lambda path: (path / "latest_checkpointed_iteration.txt").write_text("soon"),
            "latest_checkpointed_iteration.txt .*'soon'",
        ),
        (lambda path: (path / "latest_checkpointed_iteration.txt").unlink(), "--save"),
    ],
)
def test_damaged_checkpoint_is_refused_when_opened(
    copied: Path, damage: Callable[[Path], None], pattern: str
) -> None:
    damage(copied)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        TorchDistFolder.open(copied)
    assert "\n" not in str(caught.value) and str(copied) in str(caught.value)


def test_damaged_record_is_named(copied: Path, tmp_path: Path) -> None:
    data = bytearray(first_file(copied).read_bytes())
    data[: len(data) // 4] = b"\xff" * (len(data) // 4)
    first_file(copied).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.\S+ in __1_0.distcp"):
        megatron_to_hf(TorchDistFolder.open(copied), template_of(copied), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def changed(folders: dict[str, HfFolder], tmp_path: Path) -> Callable[..., HfFolder]:
    """Copies a folder with one changed element of one tensor."""

    def change(name: str, value: float, dtype: torch.dtype = torch.float32) -> HfFolder:
        path = shutil.copytree(folders["llama"].path, tmp_path / "changed")
        state = {key: tensor.to(dtype) for key, tensor in load_file(path / "model.safetensors").items()}
        state[name].view(-1)[-3] = value
        save_file(state, path / "model.safetensors", {"format": "pt"})
        return HfFolder.open(path)

    return change


MATRICES = (
    "model.embed_tokens.weight",
    "model.layers.2.mlp.up_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
)


@pytest.mark.parametrize("name", [*MATRICES, "model.layers.3.self_attn.k_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_in_both_directions(
    changed: Callable[..., HfFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    folder = changed(name, value)
    with pytest.raises(WeightsError, match=name) as error:
        hf_to_megatron(folder, tmp_path / "megatron", num_workers=2)
    assert str(folder.path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["changed"]
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "is_finite", lambda tensor: True)
        hf_to_megatron(folder, tmp_path / "megatron")
    checkpoint, template = TorchDistFolder.open(tmp_path / "megatron"), template_of(tmp_path / "megatron")
    for is_fp8 in (False, True):
        with pytest.raises(WeightsError, match=name) as error:
            megatron_to_hf(checkpoint, template, tmp_path / "out", is_fp8=is_fp8)
        assert str(tmp_path / "megatron") in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"changed", "megatron"}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_that_overflow_as_float16_are_refused_in_both_directions(
    changed: Callable[..., HfFolder], tmp_path: Path, stored: torch.dtype
) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    folder = changed(name, -70_000.0, stored)
    with pytest.raises(WeightsError, match=rf"--dtype: {name} .*7.*e\+04.*float16 .*bfloat16"):
        hf_to_megatron(folder, tmp_path / "megatron", dtype=torch.float16)
    hf_to_megatron(folder, tmp_path / "megatron", dtype=torch.bfloat16)
    checkpoint, template = TorchDistFolder.open(tmp_path / "megatron"), template_of(tmp_path / "megatron")
    with pytest.raises(WeightsError, match=rf"--dtype: {name} .*7.*e\+04.*float16 "):
        megatron_to_hf(checkpoint, template, tmp_path / "out", dtype=torch.float16)
    megatron_to_hf(checkpoint, template, tmp_path / "out", dtype=torch.float32)
    assert HfFolder.open(tmp_path / "out").read(name).min() < -65504


def named(faults: list[str]) -> list[tuple[str, str]]:
    """Returns (tensor, kind of fault) for each line."""
    kinds = ("differs", "not finite", "missing", "unknown")
    return [(fault.split()[0], next(kind for kind in kinds if kind in fault)) for fault in faults]


def test_proof_names_a_changed_tensor_and_one_that_is_not_finite(
    folders: dict[str, HfFolder], llama: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folders["llama"].path, changed)
    state = load_file(changed / "model.safetensors")
    state["model.layers.2.mlp.up_proj.weight"][3, 4] += 1e-7
    state["model.norm.weight"][5] = float("nan")
    save_file(state, changed / "model.safetensors", {"format": "pt"})
    proof = prove(TorchDistFolder.open(llama), HfFolder.open(changed), is_export=True)
    assert named(proof.faults) == [
        ("model.layers.2.mlp.up_proj.weight", "differs"),
        ("model.norm.weight", "not finite"),
        ("model.norm.weight", "differs"),
    ]
    assert "3 faults" in proof.describe()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fp8_proof_names_a_tensor_that_is_not_finite(
    folders: dict[str, HfFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr(
        conversion, "is_finite", lambda tensor: True
    )  # the conversion itself refuses such a tensor
    broken = shutil.copytree(folders["llama"].path, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight"):
        state[name].view(-1)[5] = value
    save_file(state, broken / "model.safetensors", {"format": "pt"})
    hf_to_megatron(HfFolder.open(broken), tmp_path / "megatron")
    checkpoint, template = TorchDistFolder.open(tmp_path / "megatron"), template_of(tmp_path / "megatron")
    megatron_to_hf(checkpoint, template, tmp_path / "out", is_fp8=True)
    faults = prove_fp8(checkpoint, template, tmp_path / "out").faults
    assert [fault for fault in named(faults) if "_scale_inv" not in fault[0]] == [
        ("model.layers.2.mlp.up_proj.weight", "not finite"),
        ("model.norm.weight", "not finite"),
    ]


def test_proof_reads_the_folder_a_few_rows_at_a_time(
    folders: dict[str, HfFolder], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = HfFolder.open(shutil.copytree(folders["llama"].path, tmp_path / "changed"))
    state = load_file(changed.path / "model.safetensors")
    state["lm_head.weight"][-1, -1] += 1
    state["model.norm.weight"][-1] += 1
    save_file(state, changed.path / "model.safetensors", {"format": "pt"})
    plain, sizes = HfFolder.read, []

    def read(self: HfFolder, *args: Any) -> torch.Tensor:
        sizes.append((tensor := plain(self, *args)).nbytes)
        return tensor

    checkpoint = TorchDistFolder.open(llama)
    expected = prove(checkpoint, changed, is_export=False)
    monkeypatch.setattr("megatron_rasft.tools.conversion.round_trip.BLOCK_BYTES", 1000)
    monkeypatch.setattr(HfFolder, "read", read)
    found = prove(checkpoint, changed, is_export=False)
    assert found == expected and [fault.split()[0] for fault in found.faults] == [
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert max(sizes) <= 1000


def without(path: Path, key: str) -> TorchDistFolder:
    checkpoint = TorchDistFolder.open(path)
    del checkpoint.tensors[key]
    return checkpoint


def test_checkpoint_of_another_model_is_refused(folders: dict[str, HfFolder], llama: Path) -> None:
    checkpoint = TorchDistFolder.open(llama)
    biased = NameTable(FAMILIES["Qwen2ForCausalLM"], folders["llama"].shape)
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.self_attention\.linear_qkv\.bias"):
        check_parameters(checkpoint, biased)
    heads = replace(folders["llama"].shape, num_attention_heads=6, head_dim=8)
    with pytest.raises(CheckpointError, match=r"attention heads .*\(6 of 8 in 2 groups\)"):
        check_parameters(checkpoint, NameTable(FAMILIES["LlamaForCausalLM"], heads))
    with pytest.raises(CheckpointError, match=r"linear_qkv.weight .*\[4, 96, 48\]"):
        check_parameters(checkpoint, folders["llama_groups_are_heads"].table)
    missing = without(llama, "decoder.final_layernorm.weight")
    with pytest.raises(CheckpointError, match=r"decoder\.final_layernorm\.weight"):
        check_parameters(missing, folders["llama"].table)
    checkpoint.tensors["decoder.layers.mtp.weight"] = checkpoint.tensors["output_layer.weight"]
    with pytest.raises(CheckpointError, match=r"unknown .* decoder\.layers\.mtp\.weight"):
        check_parameters(checkpoint, folders["llama"].table)


def test_fp8_export_holds_blocks_and_scales(tmp_path: Path) -> None:
    big = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1, "vocab_size": 64}
    config = transformers.LlamaConfig(**big, num_attention_heads=4, num_key_value_heads=2)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "hf")
    folder = HfFolder.open(tmp_path / "hf")
    hf_to_megatron(folder, tmp_path / "megatron")
    checkpoint = TorchDistFolder.open(tmp_path / "megatron")
    megatron_to_hf(checkpoint, folder, tmp_path / "out", is_fp8=True)
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "fp8" and written["weight_block_size"] == [128, 128]
    assert "modules_to_not_convert" not in written
    state = load_file(tmp_path / "out/model.safetensors")
    for name in folder.tensors:
        weight = folder.read(name)
        if not name.endswith("_proj.weight"):  # embedding, norms, output layer
            assert torch.equal(state[name], weight)
            continue
        values, scales = state[name], state[name + "_scale_inv"]
        assert values.dtype == torch.float8_e4m3fn and scales.shape == tuple(
            -(-n // 128) for n in weight.shape
        )
        error = (dequantize_blocks(values, scales) - weight.float()).abs()
        # half a step of a 3-bit mantissa, or of the smallest subnormal
        assert (error <= weight.float().abs() / 16 + scales.max() * 2**-10).all()
    assert prove_fp8(checkpoint, folder, tmp_path / "out").faults == []


@pytest.mark.parametrize("case", ["llama", "qwen2_tied", "qwen3", "mistral", "phi3", "mixtral", "qwen3_moe"])
def test_transformers_loads_an_fp8_folder_as_it_is_meant(tmp_path: Path, case: str) -> None:
    """Without a GPU transformers multiplies by the scales itself, for complete blocks only."""
    folder = HfFolder.open(write_folder(case, tmp_path / "hf", torch.bfloat16, sizes=whole_blocks(case)))
    hf_to_megatron(folder, tmp_path / "megatron")
    megatron_to_hf(TorchDistFolder.open(tmp_path / "megatron"), folder, tmp_path / "fp8", is_fp8=True)
    state = load_file(tmp_path / "fp8/model.safetensors")
    meant = {
        name: dequantize_blocks(tensor, state[name + "_scale_inv"])
        if name + "_scale_inv" in state
        else tensor
        for name, tensor in state.items()
        if not name.endswith("_scale_inv")
    }
    plain = shutil.copytree(tmp_path / "hf", tmp_path / "plain")
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    expected, loaded = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (plain, tmp_path / "fp8")
    )
    assert expected.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_fp8_proof_names_every_fault(tmp_path: Path, folders: dict[str, HfFolder], llama: Path) -> None:
    checkpoint = TorchDistFolder.open(llama)
    megatron_to_hf(checkpoint, folders["llama"], tmp_path / "out", is_fp8=True)
    state = load_file(tmp_path / "out/model.safetensors")
    state["model.layers.0.mlp.up_proj.weight_scale_inv"] *= 2
    del state["model.norm.weight"]
    state["more"] = torch.ones(1)
    save_file(state, tmp_path / "out/model.safetensors")
    assert named(prove_fp8(checkpoint, folders["llama"], tmp_path / "out").faults) == [
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "differs"),
        ("model.norm.weight", "missing"),
        ("more", "unknown"),
    ]


def test_expert_routers_stay_out_of_fp8(folders: dict[str, HfFolder], tmp_path: Path) -> None:
    hf_to_megatron(folders["qwen3_moe"], tmp_path / "megatron")
    template = template_of(tmp_path / "megatron")
    megatron_to_hf(TorchDistFolder.open(tmp_path / "megatron"), template, tmp_path / "out", is_fp8=True)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes["model.layers.0.mlp.gate.weight"] == "BF16"
    assert dtypes["model.layers.0.mlp.experts.5.up_proj.weight"] == "F8_E4M3"
    kept = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    assert kept == [*(f"model.layers.{layer}.mlp.gate" for layer in range(4)), "lm_head"]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"\x00" * 40 + data[40:]])
def test_damaged_safetensors_are_refused_before_anything_is_written(
    folders: dict[str, HfFolder], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    shutil.copytree(folders["llama"].path, tmp_path / "hf")
    weights = tmp_path / "hf/model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ModelFolderError, match=r"model\.safetensors"):
        hf_to_megatron(HfFolder.open(tmp_path / "hf"), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
