"""Which servers fit a trainer's model."""

from typing import Any

import pytest

from megatron_rasft.servers.fit import duplicates, misfit
from tests.unit.sync.stand_ins import StandIn

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "tie_word_embeddings": False,
}


def misfit_of(**changes: Any) -> str:
    server = StandIn("http://a:1")
    server.change(**changes)
    return misfit(server.info, CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"architectures": ("Qwen2ForCausalLM", "Other")},
        {"model_config": CONFIG},
        {"model_config": {"hidden_size": 64, "num_hidden_layers": 7}},
        {"tp_size": 8},
    ],
    ids=["nothing known", "one of several architectures", "same model", "unknown field", "tensor-parallel"],
)
def test_a_server_fits_if_nothing_known_differs(changes: dict[str, Any]) -> None:
    assert misfit_of(**changes) == ""


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dp_size": 2}, ["--dp-size 2", "Start several servers"]),
        ({"pp_size": 4}, ["--pp-size 4", "Start several servers"]),
        ({"architectures": ("LlamaForCausalLM",)}, ["LlamaForCausalLM", "Qwen2ForCausalLM", "--hf-model"]),
        ({"model_config": {"vocab_size": 99}}, ["vocab_size", "99", "100", "--hf-model"]),
        ({"model_config": {"tie_word_embeddings": True}}, ["tie_word_embeddings", "--hf-model"]),
    ],
)
def test_a_misfit_names_what_differs_and_the_way_out(changes: dict[str, Any], named: list[str]) -> None:
    found = misfit_of(**changes)
    assert all(text in found for text in named)


def test_without_a_model_only_the_parallelism_is_checked() -> None:
    server = StandIn("http://a:1")
    server.change(architectures=("LlamaForCausalLM",))
    assert misfit(server.info, None) == ""
    server.change(dp_size=2)
    assert misfit(server.info, None) != ""


def test_addresses_of_one_server_are_duplicates() -> None:
    servers = [StandIn(url) for url in ("http://127.0.0.1:1", "http://localhost:1", "http://127.0.0.1:2")]
    for server in servers:
        server.change(random_seed=7)
    assert list(duplicates([s.info for s in servers])) == ["http://localhost:1"]
    servers[1].change(random_seed=8)
    assert duplicates([s.info for s in servers]) == {}, "two servers behind one address"
