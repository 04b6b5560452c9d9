"""--model-source bridge refuses, by name, the flags whose code knows only the models of our tables."""

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rasft.bridge import building
from megatron_rasft.config import RasftConfig
from megatron_rasft.config.heldout import HeldoutConfig
from megatron_rasft.config.rollout import RolloutConfig
from megatron_rasft.config.run import RunConfig
from megatron_rasft.model import model_source
from megatron_rasft.model.model_source import open_folder
from tests.unit.bridge.stand_ins import provider

BRIDGE = RunConfig(model_source="bridge")
SERVERS = RolloutConfig(rollout_engine="sglang", rollout_urls=["http://127.0.0.1:30000"])


def args_of(**given: Any) -> Any:
    flags = {name: f"--{name.replace('_', '-')}" for name in given}
    values = {"hf_model": "acme", "tensor_model_parallel_size": 1, **given}
    return SimpleNamespace(given_flags=flags, **values)


@pytest.mark.parametrize(
    ("args", "config", "named"),
    [
        (args_of(), {}, "--rollout-engine embedded"),
        (
            args_of(),
            {"rollout": SERVERS, "heldout": HeldoutConfig(heldout_data=["h.jsonl"])},
            "--heldout-data",
        ),
        (args_of(rasft_query_groups=4), {"rollout": SERVERS}, "--rasft-query-groups"),
        (args_of(use_megatron_fsdp=True), {"rollout": SERVERS}, "--use-megatron-fsdp"),
    ],
)
def test_flags_that_need_a_table_are_refused(args: Any, config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}.*--model-source bridge"):
        open_folder(args, RasftConfig(run=BRIDGE, **config))


def test_an_evaluation_that_samples_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--model-source bridge.*--server URL"):
        open_folder(args_of(), RasftConfig(run=BRIDGE, rollout=SERVERS), only_samples=True)


def test_servers_and_demonstrations_alone_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    folder: Any = SimpleNamespace(provider=provider(), shape=SimpleNamespace(vocab_size=4))
    monkeypatch.setattr(model_source, "BridgedFolder", SimpleNamespace(open=lambda path: folder))
    assert open_folder(args_of(), RasftConfig(run=BRIDGE, rollout=SERVERS)) is folder


def test_servers_of_latent_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    described = provider()
    described.multi_latent_attention = True
    shape = SimpleNamespace(vocab_size=4)
    folder: Any = SimpleNamespace(provider=described, shape=shape, architecture="AcmeForCausalLM")
    monkeypatch.setattr(model_source, "BridgedFolder", SimpleNamespace(open=lambda path: folder))
    with pytest.raises(ValueError, match=r"--rollout-engine sglang.*AcmeForCausalLM"):
        open_folder(args_of(), RasftConfig(run=BRIDGE, rollout=SERVERS))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (args_of(window_size=(4, 0)), "--window-size.*512"),
        (args_of(tensor_model_parallel_size=3), "--tensor-model-parallel-size 3.*4"),
    ],
)
def test_flags_that_change_the_architecture_are_refused(args: Any, named: str) -> None:
    folder: Any = SimpleNamespace(provider=provider(), shape=SimpleNamespace(vocab_size=4))
    with pytest.raises(ValueError, match=named):
        building.refuse_flags(args, folder)
