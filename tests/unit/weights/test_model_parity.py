"""In one process: a loaded GPTModel computes the same as transformers, and exporting it gives the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open

from megatron_rasft.errors import CheckpointError, ModelFolderError, WeightsError
from megatron_rasft.machine import cpu_backend

cpu_backend.enable()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402

from megatron_rasft.generation.kv_cache import (  # noqa: E402
    Decode,
    KeyValueCache,
    Prefill,
    rotary_frequencies,
)
from megatron_rasft.generation.policy_sampler import generation_mode  # noqa: E402
from megatron_rasft.tools.conversion.conversion import hf_to_megatron  # noqa: E402
from megatron_rasft.weights.architecture import megatron_args  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from megatron_rasft.weights.gathering import gather_tensors  # noqa: E402
from megatron_rasft.weights.loading import load_into  # noqa: E402
from megatron_rasft.weights.shard_files import INDEX_FILE  # noqa: E402
from tests.chunk_tensors import export  # noqa: E402
from tests.tiny_models import CASES, build_chunks, hf_model, save_model, some_tokens, write_folder  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HfFolder]:
    root = tmp_path_factory.mktemp("hf")
    return {case: HfFolder.open(write_folder(case, root / case)) for case in CASES}


def load(folder: HfFolder) -> tuple[list, list[int]]:
    chunks, offsets = build_chunks(folder, padded_vocab_size=128)
    with torch.no_grad():
        for param in chunks[0].parameters():
            param.fill_(float("nan"))  # so that the test detects parameters that are not loaded
    load_into(chunks, folder, tp_rank=0, tp_size=1, layer_offsets=offsets)
    return chunks, offsets


def assert_same_tensors(a: HfFolder, b: HfFolder) -> None:
    assert a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert a.tensors[name].dtype == b.tensors[name].dtype
        assert torch.equal(a.read(name), b.read(name)), name


@torch.no_grad()
def logits(chunks: list, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return chunks[0](tokens, positions, None)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(folders: dict[str, HfFolder], case: str) -> None:
    chunks, _ = load(folders[case])
    tokens = some_tokens(length=min(128, megatron_args(folders[case])["max_position_embeddings"]))
    with torch.no_grad():
        expected = hf_model(case)(tokens).logits
    vocab = expected.shape[-1]
    got = logits(chunks, tokens)
    assert expected.std() > 0.1
    assert (got[..., :vocab] - expected).abs().max() < 1e-5
    assert (got[..., vocab:] == 0).all()


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def become_gradients(model: torch.nn.Module) -> None:
    """Puts the gradient of each parameter in its place, so that it gets the parameter's name and layout in a folder."""
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.zeros_like(param) if param.grad is None else param.grad)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_those_of_transformers(
    folders: dict[str, HfFolder], tmp_path: Path, case: str
) -> None:
    """The first step of training: the backward pass of every kind of layer."""
    folder, tokens, reference = folders[case], some_tokens(length=32), hf_model(case)
    reference.get_input_embeddings().padding_idx = None  # training does not know padding tokens
    chunks, offsets = load(folder)
    chunks[0].train()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    vocab = folder.shape.vocab_size
    losses = (
        next_token_loss(chunks[0](tokens, positions, None)[..., :vocab], tokens),
        next_token_loss(reference(tokens).logits, tokens),
    )
    for loss, model in zip(losses, (chunks[0], reference), strict=True):
        loss.backward()
        become_gradients(model)
    assert (losses[0] - losses[1]).abs() < 1e-5
    save_model(reference, tmp_path / "gradients")
    expected = HfFolder.open(tmp_path / "gradients")
    largest = max(expected.read(name).abs().max().item() for name in expected.tensors)
    for name, tensor in gather_tensors(chunks, folder.table, layer_offsets=offsets, tp_group=None):
        if tensor is not None and name not in folder.table.buffers:
            assert (tensor - expected.read(name)).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("case", CASES)
def test_megatron_loads_what_was_converted(folders: dict[str, HfFolder], tmp_path: Path, case: str) -> None:
    """Loads with Megatron's own loader, which must find every parameter of the model, with any padding."""
    hf_to_megatron(folders[case], tmp_path / "megatron")
    chunks, _ = build_chunks(folders[case], padded_vocab_size=128)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = chunks[0].sharded_state_dict(metadata=metadata)
    with torch.no_grad():
        for param in chunks[0].parameters():
            param.fill_(float("nan"))
    # Megatron calls stored keys that the model lacks missing, and keys of the model that are not stored unexpected
    state, _, unexpected = dist_checkpointing.load(
        {"model": sharded}, str(tmp_path / "megatron" / "release"), strict="return_all"
    )
    assert not unexpected
    chunks[0].load_state_dict(state["model"])
    with torch.no_grad():
        expected = hf_model(case)(some_tokens()).logits
    got = logits(chunks, some_tokens())
    assert (got[..., : expected.shape[-1]] - expected).abs().max() < 1e-5
    assert state["checkpoint_version"] == 3.0 and state["args"].num_layers == 4


@pytest.mark.parametrize("case", ["qwen2_yarn", "smollm3", "qwen3_5", "mistral", "gemma3", "gpt_oss"])
def test_sampling_computes_the_logits_of_training(folders: dict[str, HfFolder], case: str) -> None:
    """The tokens of two prompts in one pass, then one further token of each from the cache."""
    chunks, _ = load(folders[case])
    tokens, length = some_tokens(), some_tokens().shape[1]
    expected = logits(chunks, tokens)
    frequencies, rows = rotary_frequencies(chunks[0].rotary_pos_emb, length), torch.arange(2)
    last = torch.full((2,), length - 1)
    cache = KeyValueCache(2, length)
    with generation_mode(chunks, cache):
        cache.step = Prefill(frequencies=frequencies[:-1], prompts=rows, rows=rows, lengths=last)
        first = chunks[0](tokens[:, :-1], None, None)
        mask = torch.zeros(2, 1, 1, length)
        cache.step = Decode(frequencies=frequencies[last], rows=rows, positions=last, mask=mask)
        following = chunks[0](tokens[None, :, -1], None, None)
    assert (first - expected[:, :-1]).abs().max() < 1e-5
    assert (following[0] - expected[:, -1]).abs().max() < 1e-5


def test_llama3_scaling_changes_the_logits(folders: dict[str, HfFolder]) -> None:
    """Shows that the case with scaling tests something."""
    chunks, _ = load(folders["llama_scaled_tied"])
    tokens = some_tokens()
    scaled = logits(chunks, tokens)
    model = chunks[0]
    freqs = torch.arange(0, 8, 2, dtype=torch.float32) / 8
    model.rotary_pos_emb.inv_freq = 1.0 / 500000.0**freqs
    type(model.rotary_pos_emb).forward.cache_clear()
    assert (logits(chunks, tokens) - scaled).abs().max() > 1e-4


def test_gradients_of_gpt_oss_equal_those_of_transformers(folders: dict[str, HfFolder]) -> None:
    """Of sinks, interleaved experts and biases, which no other family has."""
    chunks, _ = load(folders["gpt_oss"])
    model, tokens = hf_model("gpt_oss"), some_tokens()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    for logits in (chunks[0](tokens, positions, None)[..., :101], model(tokens).logits):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    ours = {name: p.grad for name, p in chunks[0].named_parameters()}
    theirs = {name: p.grad for name, p in model.named_parameters()}
    layer, experts = "decoder.layers.1.", theirs["model.layers.1.mlp.experts.gate_up_proj"]
    expected = {
        "self_attention.core_attention.softmax_offset": theirs["model.layers.1.self_attn.sinks"],
        "self_attention.linear_proj.bias": theirs["model.layers.1.self_attn.o_proj.bias"],
        "mlp.router.bias": theirs["model.layers.1.mlp.router.bias"],
        "mlp.experts.local_experts.2.linear_fc1.weight": torch.cat(
            [experts[2, :, ::2].T, experts[2, :, 1::2].T]
        ),
        "mlp.experts.local_experts.2.linear_fc2.bias": theirs["model.layers.1.mlp.experts.down_proj_bias"][2],
    }
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, name
        assert (ours[layer + name] - gradient).abs().max() < 1e-7, name


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("window_size", (40, 0)),
        ("activation_func_clamp_value", None),
        ("glu_linear_offset", 0.0),
        ("softmax_type", "vanilla"),
    ],
)
def test_each_part_of_gpt_oss_changes_the_logits(
    folders: dict[str, HfFolder], setting: str, value: Any
) -> None:
    """Shows that the case tests something."""
    chunks, _ = load(folders["gpt_oss"])
    expected = logits(chunks, some_tokens())
    changed, _ = build_chunks(folders["gpt_oss"], 128, **{setting: value})
    changed[0].load_state_dict(chunks[0].state_dict(), strict=setting != "softmax_type")
    assert (logits(changed, some_tokens()) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_equal(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    folder = HfFolder.open(write_folder(case, tmp_path / "in", dtype))
    chunks, offsets = load(folder)  # fp32 represents bf16 values exactly
    export(chunks, folder, tmp_path / "out", layer_offsets=offsets)
    assert_same_tensors(HfFolder.open(tmp_path / "out"), folder)
    carried = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX_FILE]
    files = carried if folder.carried else ["model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        *files,
    ]
    reference = hf_model(case).to(dtype)
    loaded = type(reference).from_pretrained(tmp_path / "out")
    expected = reference.state_dict()
    assert loaded.dtype == dtype
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_wrapped_bf16_model_round_trips(tmp_path: Path) -> None:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    folder = HfFolder.open(write_folder("qwen2_tied", tmp_path / "in", torch.bfloat16))
    chunks, offsets = build_chunks(folder, 128, params_dtype=torch.bfloat16, bf16=True)
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(config, ddp_config, Float16Module(config, chunks[0]))
    addresses = [p.data_ptr() for p in wrapped.parameters()]
    load_into([wrapped], folder, tp_rank=0, tp_size=1, layer_offsets=offsets)
    assert addresses == [
        p.data_ptr() for p in wrapped.parameters()
    ]  # changed in place, because DDP's buffer holds the parameters
    export([wrapped], folder, tmp_path / "out", layer_offsets=offsets)
    assert_same_tensors(HfFolder.open(tmp_path / "out"), folder)


def test_biases_of_routers_stay_in_fp32(tmp_path: Path) -> None:
    """A rounded bias would choose other experts. Megatron's Float16Module rounds all buffers."""
    from megatron.core.transformer.module import Float16Module

    folder = HfFolder.open(write_folder("glm4_moe", tmp_path / "in"))
    chunks, offsets = build_chunks(folder, 128, params_dtype=torch.bfloat16, bf16=True)
    wrapped = [Float16Module(chunks[0].config, chunks[0])]
    load_into(wrapped, folder, tp_rank=0, tp_size=1, layer_offsets=offsets)
    export(wrapped, folder, tmp_path / "out", layer_offsets=offsets, dtype=torch.bfloat16)
    out = HfFolder.open(tmp_path / "out")
    biases = [name for name in out.tensors if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    for name in out.tensors:
        expected = folder.read(name)
        assert torch.equal(out.read(name), expected if name in biases else expected.bfloat16()), name


def test_export_in_another_dtype_says_so_in_the_config(tmp_path: Path, folders: dict[str, HfFolder]) -> None:
    folder = folders["llama"]
    chunks, offsets = load(folder)
    export(chunks, folder, tmp_path / "out", layer_offsets=offsets, dtype=torch.bfloat16)
    out = HfFolder.open(tmp_path / "out")
    assert out.config == folder.config | {"dtype": "bfloat16"}
    for name in folder.tensors:
        assert torch.equal(out.read(name), folder.read(name).to(torch.bfloat16))


def test_export_splits_files_and_writes_an_index(tmp_path: Path, folders: dict[str, HfFolder]) -> None:
    folder = folders["qwen3"]
    chunks, offsets = load(folder)
    export(chunks, folder, tmp_path / "out", layer_offsets=offsets, max_shard_bytes=60_000)
    assert_same_tensors(HfFolder.open(tmp_path / "out"), folder)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in hf_model("qwen3").parameters())
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_mixed_dtypes_in_one_file_stay_readable(tmp_path: Path, folders: dict[str, HfFolder]) -> None:
    from safetensors.torch import load_file, save_file

    path = write_folder("llama", tmp_path / "in", torch.bfloat16)
    state = load_file(path / "model.safetensors")
    for name in state:
        if "norm" in name:
            state[name] = state[name].float()
    save_file(state, path / "model.safetensors", {"format": "pt"})
    folder = HfFolder.open(path)
    chunks, offsets = load(folder)
    export(chunks, folder, tmp_path / "out", layer_offsets=offsets)
    assert_same_tensors(HfFolder.open(tmp_path / "out"), folder)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_companion_files_travel_and_pickles_do_not(tmp_path: Path) -> None:
    path = write_folder("llama", tmp_path / "in")
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    (path / "training_args.bin").write_bytes(b"x")
    (path / "modeling_custom.py").write_text("raise SystemExit")
    config = json.loads((path / "config.json").read_text())
    original = dict(config)
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_custom.Custom"}
    (path / "config.json").write_text(json.dumps(config))
    folder = HfFolder.open(path)
    chunks, offsets = load(folder)
    export(chunks, folder, tmp_path / "out", layer_offsets=offsets)
    out = tmp_path / "out"
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (out / "additional_chat_templates/tools.jinja").exists() and (out / "tokenizer.json").exists()
    assert json.loads((out / "config.json").read_text()) == original
    assert not (out / "training_args.bin").exists() and not (out / "modeling_custom.py").exists()


@pytest.mark.parametrize("has_code", [True, False])
def test_code_of_a_family_without_classes_in_transformers_travels(tmp_path: Path, has_code: bool) -> None:
    """A model that transformers has no classes for cannot be loaded without it."""
    path = write_folder("mimo", tmp_path / "in")
    config = json.loads((path / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_mimo.MiMoConfig",
        "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    code = {"configuration_mimo.py": "", "modeling_mimo.py": "from .configuration_mimo import MiMoConfig"}
    for name, text in code.items() if has_code else ():
        (path / name).write_text(text)
    folder = HfFolder.open(path)
    chunks, offsets = load(folder)
    export(chunks, folder, tmp_path / "out", layer_offsets=offsets)
    assert json.loads((tmp_path / "out/config.json").read_text()).get("auto_map") == (
        auto_map if has_code else None
    )
    assert {p.name for p in (tmp_path / "out").glob("*.py")} == (set(code) if has_code else set())


def test_export_refuses_a_folder_in_use(tmp_path: Path, folders: dict[str, HfFolder]) -> None:
    chunks, offsets = load(folders["llama"])
    (tmp_path / "out").mkdir()
    export(chunks, folders["llama"], tmp_path / "out", layer_offsets=offsets)  # empty: taken
    before = (tmp_path / "out/config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match=str(tmp_path)):
        export(chunks, folders["llama"], tmp_path / "out", layer_offsets=offsets)
    assert (tmp_path / "out/config.json").stat().st_mtime_ns == before


def test_an_export_removes_its_own_killed_predecessors(tmp_path: Path, folders: dict[str, HfFolder]) -> None:
    chunks, offsets = load(folders["llama"])
    for name in (".out.partial-1a2b", ".outer.partial-1a2b", "out.partial-1a2b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stage-0000-00000.safetensors").touch()
    export(chunks, folders["llama"], tmp_path / "out", layer_offsets=offsets)
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".outer.partial-1a2b", "out.partial-1a2b"}


def test_failed_export_leaves_nothing(
    tmp_path: Path, folders: dict[str, HfFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_rasft.weights.exporting import ShardWriter

    def full_disk(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        raise OSError(28, "No space left on device")

    chunks, offsets = load(folders["llama"])
    monkeypatch.setattr(ShardWriter, "write", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        export(chunks, folders["llama"], tmp_path / "out", layer_offsets=offsets)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_exported_nor_loaded(
    tmp_path: Path, folders: dict[str, HfFolder], value: float
) -> None:
    from megatron_rasft.weights import exporting

    folder, name = folders["llama"], "model.layers.2.mlp.down_proj.weight"
    chunks, offsets = load(folder)
    (parameter,) = (p for n, p in chunks[0].named_parameters() if "layers.2.mlp.linear_fc2.weight" in n)
    with torch.no_grad():
        parameter[3, 4] = value
    with pytest.raises(CheckpointError, match=name):
        export(chunks, folder, tmp_path / "out", layer_offsets=offsets)
    assert list(tmp_path.iterdir()) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "is_finite", lambda tensor: True)
        export(chunks, folder, tmp_path / "out", layer_offsets=offsets)
    with pytest.raises(WeightsError, match=name) as error:
        load(HfFolder.open(tmp_path / "out"))
    assert str(tmp_path / "out") in str(error.value)


@pytest.mark.parametrize(
    "built,loaded,words",
    [
        ("qwen2_tied", "llama_scaled_tied", "has no counterpart"),  # parameters without tensors: QKV bias
        ("llama_scaled_tied", "qwen2_tied", "without a parameter"),
        ("llama", "llama_groups_are_heads", "has shape"),
    ],
)
def test_model_of_another_architecture_is_refused(
    folders: dict[str, HfFolder], built: str, loaded: str, words: str
) -> None:
    chunks, offsets = build_chunks(folders[built], 128)
    with pytest.raises(ModelFolderError, match=words):
        load_into(chunks, folders[loaded], tp_rank=0, tp_size=1, layer_offsets=offsets)


@pytest.mark.parametrize("case", CASES)
def test_gathered_tensors_are_those_of_the_table(folders: dict[str, HfFolder], case: str) -> None:
    """Weight sync and export send these tensors, under these names."""
    folder = folders[case]
    chunks, offsets = load(folder)
    got = dict(gather_tensors(chunks, folder.table, layer_offsets=offsets, tp_group=None))
    assert sorted(got) == sorted(folder.table.hf_shapes)
    assert all(tensor is not None and torch.equal(tensor, folder.read(name)) for name, tensor in got.items())
