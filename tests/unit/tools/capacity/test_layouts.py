"""Counts of parameters, and the layouts that are considered. tests/distributed compares the shares of ranks with Megatron's."""

import json
import math
from pathlib import Path

import pytest

from megatron_rasft.tools.capacity.config import CapacityConfig
from megatron_rasft.tools.capacity.layouts import Layout, Model, candidates, padded_vocabulary, stage_chunks
from megatron_rasft.weights.architecture import ModelDescription
from megatron_rasft.weights.families import NameTable
from tests.tiny_models import CASES, write_folder


@pytest.mark.parametrize("case", CASES)
def test_count_is_that_of_the_folder(tmp_path: Path, case: str) -> None:
    model = Model.read(write_folder(case, tmp_path / case))
    described = ModelDescription.read(tmp_path / case)
    sizes = NameTable(described.family, described.shape).hf_shapes.values()
    assert model.num_parameters == sum(map(math.prod, sizes))
    assert (model.num_active_parameters < model.num_parameters) == (model.top_k > 0)


def test_70b_has_the_published_number_of_parameters(llama_70b: Model) -> None:
    assert (
        llama_70b.num_parameters == 70_553_706_496
    )  # the index of the published folder gives twice this number as bytes


def test_added_query_groups_are_counted_in_the_trainer_only(tmp_path: Path) -> None:
    plain = Model.read(write_folder("llama", tmp_path / "llama"))
    padded = Model.read(tmp_path / "llama", query_groups=4)
    layout = Layout(tp=4, pp=1, cp=1, dp=1, expert_tp=4)
    (chunk,) = stage_chunks(padded, layout, 0)
    # two groups of two heads and two keys and values, of 12 rows each, in each of four layers, over four ranks
    qkv, proj = 4 * 12 * (2 + 2) * 48 // 4, 4 * 2 * 12 * 48 // 4
    assert chunk.dense[qkv] == chunk.dense[proj] == 4
    assert padded.num_parameters == plain.num_parameters


def test_vocabulary_is_padded_for_every_rank(llama_70b: Model) -> None:
    assert [padded_vocabulary(llama_70b, tp) for tp in (1, 4, 8)] == [128256, 128512, 129024]


def test_every_layout_divides_what_it_splits(llama_70b: Model) -> None:
    config = CapacityConfig(num_gpus=32)
    found = list(candidates(llama_70b, config, 32))
    assert len(found) == len(set(found)) > 50
    for at in found:
        assert at.num_gpus == 32 and at.tp <= 8 and 80 % (at.pp * at.chunks) == 0
        assert config.global_batch_size % at.dp == 0 and at.ep == 1
        assert at.pp > 1 or at.chunks == 1


def test_heads_that_do_not_split_are_left_out(tmp_path: Path) -> None:
    config = json.loads((Path(__file__).parent / "llama-3.1-70b" / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({**config, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64})
    )
    sizes = {at.tp for at in candidates(Model.read(tmp_path), CapacityConfig(), 8)}
    assert sizes == {1}
    path.write_text(
        json.dumps({**config, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64})
    )
    sizes = {at.tp for at in candidates(Model.read(tmp_path, query_groups=8), CapacityConfig(), 8)}
    assert sizes == {1, 2, 4, 8}


def test_experts_are_spread_over_the_ranks_of_a_stage(tmp_path: Path) -> None:
    model = Model.read(write_folder("mixtral", tmp_path / "mixtral"))
    config = CapacityConfig(expert_model_parallel_size=4, recompute="none", tensor_model_parallel_size=2)
    for at in candidates(model, config, 8):
        assert at.tp * at.cp * at.dp % 4 == 0 and at.expert_tp == 1
        assert at.num_expert_replicas == at.tp * at.cp * at.dp // 4
        (chunk, *_) = stage_chunks(model, at, 0)
        assert chunk.expert.total() == 2 * len(chunk.layers)  # one of four experts with two weights
