"""examples/recipes: each recipe fits its GPUs, a run accepts it, and both read the same layout from it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_rasft.config.config_file import read_flags
from megatron_rasft.machine import cpu_backend
from megatron_rasft.tools.capacity.choosing import LayoutEstimate, estimate_layouts
from megatron_rasft.tools.capacity.commands import training_flags
from megatron_rasft.tools.capacity.config import AssumptionConfig, CapacityConfig
from megatron_rasft.tools.capacity.layouts import Model

cpu_backend.enable()

from megatron_rasft.model import model_source  # noqa: E402
from megatron_rasft.training import startup  # noqa: E402
from megatron_rasft.weights.folder import HfFolder  # noqa: E402
from tests import slurm_settings  # noqa: E402
from tools import plan  # noqa: E402

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
QWEN3_600M = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-06,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MODELS = slurm_settings.MODELS | {"qwen3-0.6b-24gb": QWEN3_600M}
"""Recipe -> config.json of its model."""


def planned(recipe: Path, folder: Path, *flags: str) -> tuple[Model, CapacityConfig, list[LayoutEstimate]]:
    """What tools/plan.py calculates from a recipe."""
    (folder / "config.json").write_text(json.dumps(MODELS[recipe.stem]), encoding="utf-8")
    args = plan.parser().parse_args(["--hf-model", str(folder), "--config", str(recipe), *flags])
    model, config = Model.read(args.hf_model), CapacityConfig.from_args(args)
    precision = "fp8" if args.fp8 else "bf16"
    return (
        model,
        config,
        estimate_layouts(model, config, AssumptionConfig.from_args(args), precision=precision),
    )


def run_args(flags: list[str], num_gpus: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(model_source.HfFolder, "open", partial(HfFolder.open, with_weights=False))
    monkeypatch.setenv("WORLD_SIZE", str(num_gpus))
    monkeypatch.setattr("sys.argv", ["pretrain_rasft.py"])
    return startup.parse(flags)[0]


def without_fp8(recipe: Path, folder: Path) -> Path:
    """A copy that this machine accepts."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    copy = folder / recipe.name
    copy.write_text("\n".join(line for line in lines if not line.startswith("fp8_")), encoding="utf-8")
    return copy


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_its_gpus_and_gives_a_run_this_layout(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config, (estimate, *others) = planned(recipe, tmp_path)
    assert estimate.excess_gib(config) <= 0 and not others, "the recipe fixes the layout"
    flags = ["--hf-model", model.path, "--train-data", "train.jsonl", "--config", str(recipe)]
    flags += ["--rollout-server-file", "servers.txt"] if config.rollout_gpus else []
    if "fp8_format" in recipe.read_text(encoding="utf-8"):
        with pytest.raises(ValueError, match=rf"{recipe.name}, line \d+: --fp8-format needs"):
            run_args(flags, estimate.layout.num_gpus, monkeypatch)
        flags[flags.index(str(recipe))] = str(without_fp8(recipe, tmp_path))
    args, layout = run_args(flags, estimate.layout.num_gpus, monkeypatch), estimate.layout
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (layout.tp, layout.pp)
    assert (args.context_parallel_size, args.expert_model_parallel_size) == (layout.cp, layout.ep)
    assert (args.virtual_pipeline_model_parallel_size or 1) == layout.chunks
    assert (args.recompute_granularity or "none") == layout.recompute
    assert args.data_parallel_size == layout.dp and args.use_distributed_optimizer
    assert args.sequence_parallel == (layout.tp > 1)


def test_every_recipe_has_a_model_and_a_line_in_the_readme() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in RECIPES} == MODELS.keys()
    assert all(f"`{path.name}`" in readme for path in RECIPES)


def test_plan_reads_the_run_of_a_recipe(tmp_path: Path) -> None:
    _, config, _ = planned(FOLDER / "qwen3-32b.toml", tmp_path)
    assert (config.num_gpus, config.rollout_gpus, config.rollout_lag) == (32, 16, 1)
    assert (config.num_samples, config.max_new_tokens, config.refresh_interval) == (4, 4096, 32)
    assert (config.recompute, config.context_parallel_size) == ("selective", 1)
    _, config, _ = planned(FOLDER / "qwen3-0.6b-24gb.toml", tmp_path, "--max-new-tokens", "64")
    assert (config.num_gpus, config.rollout_gpus, config.max_new_tokens) == (1, 0, 64)


def test_plan_of_a_file_without_sizes_has_the_defaults_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "qwen3-8b.toml").write_text(
        "train_data = ['a.jsonl']\nfp8_format = 'hybrid'\n", encoding="utf-8"
    )
    _, config, _ = planned(tmp_path / "qwen3-8b.toml", tmp_path, "--max-new-tokens", "512")
    assert (config.seq_length, config.recompute, config.tensor_model_parallel_size) == (2048, "none", 1)
    assert config.num_layers_per_virtual_pipeline_stage == 0 and config.train_data == "a.jsonl"


def test_commands_of_a_recipe_name_it_with_the_changed_flags(tmp_path: Path) -> None:
    recipe = FOLDER / "qwen3-8b.toml"
    model, config, estimates = planned(recipe, tmp_path)
    flags = training_flags(model, estimates[0], config)
    assert flags[flags.index("--config") + 1] == str(recipe)
    assert {"--rollout-server-file", "--save"} <= {*flags} and not {"--seq-length", "--bf16"} & {*flags}
    model, config, estimates = planned(recipe, tmp_path, "--seq-length", "16384", "--num-samples", "8")
    flags = training_flags(model, estimates[0], config)
    assert flags[flags.index("--seq-length") + 1] == "16384"
    assert flags[flags.index("--rollout-num-samples") + 1] == "8" and "--micro-batch-size" not in flags


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("lr = 1\nlearning_rate = 1", 2, "--lr"),
        ("[plan]\nnum_gpu = 8", 2, "--num-gpus"),
        ("[plan]\n\nnum_gpus = 'many'", 3, "--num-gpus"),
        ("[plan]\nnum_gpus = 0", 2, "--num-gpus"),
    ],
)
def test_wrong_line_is_named(
    text: str, line: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=named) as raised:
        plan.main(["--hf-model", str(tmp_path), "--config", str(file)])
    assert str(raised.value).startswith(f"{file}, line {line}: ")


def test_plan_table_is_not_read_by_a_run() -> None:
    for recipe in RECIPES:
        names = {flag.name for flag in read_flags(str(recipe))}
        assert "num_gpus" not in names and "num_gpus" in {f.name for f in read_flags(str(recipe), "plan")}
