"""An unusable folder is refused in one line when it is opened."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rasft.errors import ModelFolderError
from megatron_rasft.weights.architecture import megatron_args
from megatron_rasft.weights.folder import HfFolder
from tests.tiny_models import write_folder

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    cases = (
        "llama",
        "qwen2_tied",
        "qwen3",
        "mistral",
        "phi3",
        "mixtral",
        "seed_oss",
        "smollm3",
        "qwen3_moe",
        "gemma3",
    )
    folders = {case: write_folder(case, root / case) for case in cases}
    folders["sharded"] = write_folder("llama", root / "sharded", max_shard_size="60KB")
    return folders


@pytest.fixture
def folder(made: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies a test folder and changes its config.json and tensors."""

    def copy(
        case: str = "llama", config: dict | None = None, tensors: Callable[[dict], None] | None = None
    ) -> Path:
        target = tmp_path / case
        target.mkdir()
        for path in made[case].iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        if config:
            merged = json.loads((target / "config.json").read_text()) | config
            (target / "config.json").write_text(json.dumps(merged))
        if tensors:
            state = load_file(target / WEIGHTS)
            tensors(state)
            save_file(state, target / WEIGHTS)
        return target

    return copy


def refusal(path: Path) -> str:
    with pytest.raises(ModelFolderError) as caught:
        HfFolder.open(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_sharded_and_single_folders_hold_the_same(made: dict[str, Path]) -> None:
    single, sharded = HfFolder.open(made["llama"]), HfFolder.open(made["sharded"])
    assert len({t.file for t in sharded.tensors.values()}) > 1
    assert list(single.table.hf_shapes) == list(sharded.table.hf_shapes)
    for name in single.tensors:
        assert torch.equal(single.read(name), sharded.read(name))


def test_slices_are_read_along_either_dimension(made: dict[str, Path]) -> None:
    opened = HfFolder.open(made["llama"])
    name = "model.layers.2.mlp.down_proj.weight"
    whole = opened.read(name)
    assert torch.equal(opened.read(name, 0, 3, 9), whole[3:9])
    assert torch.equal(opened.read(name, 1, 3, 9), whole[:, 3:9])


def test_missing_folder_and_missing_config(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")
    assert "config.json" in refusal(tmp_path)


def test_folder_without_weights(folder: Callable[..., Path]) -> None:
    path = folder()
    (path / WEIGHTS).rename(path / "pytorch_model.bin")
    assert "pytorch_model.bin" in refusal(path)
    (path / "pytorch_model.bin").unlink()
    assert WEIGHTS in refusal(path)


def test_missing_shard_file(folder: Callable[..., Path]) -> None:
    path = folder("sharded")
    next(path.glob("model-00002-*")).unlink()
    assert "model-00002-of" in refusal(path)


@pytest.mark.parametrize(
    "damage,word",
    [
        (lambda b: b[:-10], "truncated"),
        (lambda b: b[:4], "truncated"),
        (lambda b: b"", "truncated"),
        (lambda b: b"\xff" * 64 + b[64:], "not safetensors"),
        (lambda b: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_damaged_shard_file(folder: Callable[..., Path], damage: Callable[[bytes], bytes], word: str) -> None:
    path = folder()
    (path / WEIGHTS).write_bytes(damage((path / WEIGHTS).read_bytes()))
    assert word in refusal(path) and WEIGHTS in refusal(path)


def test_an_output_layer_that_is_missing_may_be_the_embedding(folder: Callable[..., Path]) -> None:
    path = folder(tensors=lambda s: s.pop("lm_head.weight"))
    assert "tie_word_embeddings to true" in refusal(path)
    (path / "config.json").write_text(
        (path / "config.json")
        .read_text()
        .replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    HfFolder.open(path)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_link(path: Path) -> None:
    path.symlink_to("../blobs/gone")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("case", ["llama", "sharded"])
@pytest.mark.parametrize(
    ("make", "word"),
    [(make_folder, "is a folder"), (os.mkfifo, "regular file"), (make_link, "../blobs/gone"), (make_loop, "cannot be read")],
)  # fmt: skip
def test_a_shard_that_is_no_file_is_named(
    folder: Callable[..., Path], case: str, make: Callable[[Path], None], word: str
) -> None:
    path = folder(case)
    shard = max(path.glob("*.safetensors"))
    shard.unlink()
    make(shard)
    assert word in refusal(path) and shard.name in refusal(path)


def test_a_shard_that_may_not_be_read_is_not_missing(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plain = folder(), Path.open

    def refuse(self: Path, *args: Any, **more: Any) -> Any:
        if self.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return plain(self, *args, **more)

    monkeypatch.setattr(Path, "open", refuse)
    message = refusal(path)
    assert WEIGHTS in message and "Permission denied" in message and "missing" not in message


INDEX = "model.safetensors.index.json"
FIRST = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "file",
    [
        "../other/model-00001-of-00002.safetensors",
        "/etc/passwd",
        "a/../../b.safetensors",
        7,
        None,
        "",
        "a\0b",
        ["x"],
    ],
)
def test_an_index_entry_outside_the_folder_is_refused(folder: Callable[..., Path], file: Any) -> None:
    path = folder("sharded")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][FIRST] = file
    (path / INDEX).write_text(json.dumps(index))
    assert INDEX in refusal(path) and FIRST in refusal(path)


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"NaN", b"null", b"\xff\xfe", b"3", b'"text"', b"[" * 100_000, b'{"weight_map": []}', None]
)  # fmt: skip
def test_any_content_of_a_json_file_gives_one_line(
    folder: Callable[..., Path], name: str, content: bytes | None
) -> None:
    path = folder("sharded")
    (path / name).unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path / name)
    else:
        (path / name).write_bytes(content)
    if name != INDEX and content == b'{"weight_map": []}':
        return  # an object, which other tests change
    assert name in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        {"model": [1]},
        {"model": {"vocab": 3}},
        {"model": {"vocab": {"a": "x", "b": 1}}},
        {"model": {"vocab": {"a": float("nan")}}},
        {"added_tokens": [{"id": True}]},
        {"added_tokens": [3]},
        {"added_tokens": 3},
    ],
)
def test_a_tokenizer_of_another_format_gives_one_line(folder: Callable[..., Path], content: Any) -> None:
    path = folder()
    (path / "tokenizer.json").write_text(json.dumps(content))
    assert "tokenizer.json" in refusal(path)


def test_missing_tensor(folder: Callable[..., Path]) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    path = folder(tensors=lambda s: s.pop(name))
    assert name in refusal(path)


def test_extra_tensor(folder: Callable[..., Path]) -> None:
    path = folder(tensors=lambda s: s.update({"model.layers.4.input_layernorm.weight": torch.ones(48)}))
    assert "model.layers.4.input_layernorm.weight" in refusal(path)


def test_misshapen_tensor(folder: Callable[..., Path]) -> None:
    path = folder(tensors=lambda s: s.update({"model.norm.weight": torch.ones(47)}))
    assert "model.norm.weight has shape [47]" in refusal(path)


def test_old_inverse_frequency_buffers_are_ignored(folder: Callable[..., Path]) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    assert len(HfFolder.open(folder(tensors=lambda s: s.update(extra))).tensors) == 3 + 9 * 4


def test_stored_output_of_a_tied_model_must_be_the_embedding(folder: Callable[..., Path]) -> None:
    def store_copy(state: dict) -> None:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    path = folder("qwen2_tied", tensors=store_copy)
    assert "lm_head.weight" not in HfFolder.open(path).tensors
    state = load_file(path / WEIGHTS)
    state["lm_head.weight"][100, 5] += 1
    save_file(state, path / "changed.safetensors")
    (path / "changed.safetensors").rename(path / WEIGHTS)
    assert "lm_head.weight" in refusal(path)


@pytest.mark.parametrize(
    ("case", "config", "named"),
    [
        (
            "llama",
            {"architectures": ["GPT2LMHeadModel"]},
            "Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ("llama", {"architectures": None}, "model_type 'llama'"),
        ("llama", {"architectures": "LlamaForCausalLM"}, "architectures, found 'LlamaForCausalLM'"),
        (
            "llama",
            {"architectures": ["Gemma2ForCausalLM"]},
            "Gemma2ForCausalLM",
        ),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"hidden_activation": "silu"}, "hidden_activation 'silu'"),
        ("gemma3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "'linear'"),
        ("gemma3", {"rope_local_base_freq": 10000.5, "rope_parameters": None}, "--rotary-base"),
        ("llama", {"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM"),
        ("llama", {"architectures": ["DeepseekV32ForCausalLM"]}, "DeepseekV32ForCausalLM"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "short_factor"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers [0]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ("llama", {"quantization_config": "int4"}, "quant_method 'int4'"),
        ("llama", {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "'e5m2'"),
        ("llama", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "[128]"),
        ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta, found '1e4'"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias"),
        ("seed_oss", {"attention_bias": False}, "attention_bias"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2]}, "no_rope_layers"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 0.5,
                    "attention_factor": 2.0,
                }
            },
            "attention_factor",
        ),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}}, "--rotary-base"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "linear_attention"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ("llama", {"tie_word_embeddings": True, "num_hidden_layers": 10**12}, "num_hidden_layers"),
        ("llama", {"num_hidden_layers": 10**9}, "layers"),
    ],
)
def test_unsupported_features(folder: Callable[..., Path], case: str, config: dict, named: str) -> None:
    assert named in refusal(folder(case, config))


def test_experts_are_arguments_of_megatron(made: dict[str, Path], folder: Callable[..., Path]) -> None:
    mixtral = megatron_args(HfFolder.open(made["mixtral"]))
    assert (mixtral["num_experts"], mixtral["moe_router_topk"], mixtral["moe_ffn_hidden_size"]) == (4, 2, 40)
    assert not mixtral["moe_router_pre_softmax"] and mixtral["rotary_base"] == 1_000_000
    unnormalized = megatron_args(HfFolder.open(folder("qwen3_moe", {"norm_topk_prob": False})))
    assert unnormalized["moe_router_pre_softmax"] and unnormalized["moe_ffn_hidden_size"] == 24


@pytest.mark.parametrize("key,value", [("low_freq_factor", 2.0), ("high_freq_factor", 8.0)])
def test_llama3_scaling_that_megatron_cannot_represent(
    folder: Callable[..., Path], key: str, value: float
) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert key in refusal(folder("llama", {"rope_parameters": rope | {key: value}}))


def test_rope_of_older_folders_is_read(folder: Callable[..., Path]) -> None:
    path = folder(
        "llama", {"rope_parameters": None, "rope_theta": 500000.0, "dtype": None, "torch_dtype": "float32"}
    )
    args = megatron_args(HfFolder.open(path))
    assert args["rotary_base"] == 500000 and args["use_rope_scaling"] is False
    old = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = json.loads((path / "config.json").read_text())
    config["rope_scaling"] = old | {"original_max_position_embeddings": 8192}
    (path / "config.json").write_text(json.dumps(config))
    args = megatron_args(HfFolder.open(path))
    assert (args["rotary_base"], args["use_rope_scaling"], args["rope_scaling_factor"]) == (
        500000,
        True,
        32.0,
    )


def test_integer_weights_are_refused(folder: Callable[..., Path]) -> None:
    path = folder(tensors=lambda s: s.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    assert "I8" in refusal(path)


def test_tokenizer_must_fit_the_embedding(folder: Callable[..., Path]) -> None:
    path = folder()
    tokenizer: dict[str, Any] = {"model": {"vocab": {"a": 0, "b": 100}}, "added_tokens": []}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    HfFolder.open(path)
    tokenizer["added_tokens"] = [{"id": 101, "content": "<extra>"}]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "101" in refusal(path) and "tokenizer" in refusal(path)


def test_megatron_has_all_arguments_of_a_folder(made: dict[str, Path]) -> None:
    import argparse

    from megatron_rasft.machine import cpu_backend

    cpu_backend.enable()
    from megatron.training.arguments import add_megatron_arguments

    known = vars(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args([]))
    for case in ("llama", "qwen2_tied", "qwen3"):
        assert set(megatron_args(HfFolder.open(made[case]))) <= set(known)
    args = megatron_args(HfFolder.open(made["qwen3"]))
    assert (args["kv_channels"], args["qk_layernorm"], args["add_qkv_bias"]) == (16, True, False)
    assert args["max_position_embeddings"] == 32768 and args["layernorm_epsilon"] == 1e-6
