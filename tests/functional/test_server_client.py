"""The control plane of real servers, of both kinds."""

import json
from pathlib import Path

import pytest

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from tests.servers.running import NEWEST, OLDEST, VERSIONS, ServerPool


@pytest.mark.parametrize("version", VERSIONS)
def test_what_a_real_server_says_of_itself(server_pool: ServerPool, served_model: Path, version: str) -> None:
    server = server_pool.get(version, served_model)
    with ServerClient(server.url) as control:
        info = control.info
        assert (info.version, info.model_path, info.tp_size) == (version, str(served_model), 1)
        assert info.has_update_session == (version == NEWEST)
        assert info.has_weights_checker and not info.is_deterministic and not info.has_memory_saver
        assert info.weight_version is None and info.weight_label == "default"
        assert info.model_config == json.loads((served_model / "config.json").read_text())
        assert info.architectures == ("LlamaForCausalLM",)
        assert info.max_total_tokens == 20000


@pytest.mark.parametrize("version", VERSIONS)
def test_the_steps_around_an_update_on_a_real_server(
    server_pool: ServerPool, served_model: Path, version: str
) -> None:
    server = server_pool.get(version, served_model)
    with ServerClient(server.url) as control:
        before = control.checksums()
        assert len(before) == 1 and "model.embed_tokens.weight" in before[0]
        control.pause()
        control.flush_cache()
        control.begin_weight_update()
        control.end_weight_update()
        control.set_weight_version(7)
        control.resume()
        assert control.weight_version() == 7
        assert control.checksums() == before
        control.update_weights_from_disk(served_model, weight_version=8)
        assert control.weight_version() == 8
        with pytest.raises(ServerError, match="update_weights_from_disk"):
            control.update_weights_from_disk(served_model / "nothing", weight_version=9)
        assert control.weight_version() == 8
        with pytest.raises(ServerError, match="destroy_weights_update_group"):
            control.destroy_weights_update_group("nobody")
        values = control.weights_by_name("model.norm.weight", truncate_size=4)
        assert len(values) == 4


def test_a_session_left_open_is_refused_and_can_be_closed(
    server_pool: ServerPool, served_model: Path
) -> None:
    server = server_pool.get(NEWEST, served_model)
    with ServerClient(server.url) as control:
        control.begin_weight_update()
        with pytest.raises(ServerError, match="begin_weight_update"):
            control.begin_weight_update()
        control.end_weight_update()
        control.begin_weight_update()
        control.end_weight_update()


def test_a_frozen_server_costs_no_more_than_the_deadline(server_pool: ServerPool, served_model: Path) -> None:
    server = server_pool.get(OLDEST, served_model)
    server.freeze()
    try:
        with (
            ServerClient(server.url) as control,
            pytest.raises(ServerError, match="gave no answer within 1"),
        ):
            control.weight_version(deadline_s=1.0)
    finally:
        server.thaw()
