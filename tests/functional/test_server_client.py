"""The HTTP client against real servers of the oldest and the newest version."""

import json
from pathlib import Path

import pytest

from megatron_rasft.errors import ServerError
from megatron_rasft.servers.client import ServerClient
from megatron_rasft.servers.record import ServerRecord
from tests.servers.running import NEWEST, OLDEST, VERSIONS, ServerPool


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_server_is_probed(server_pool: ServerPool, served_model: Path, version: str) -> None:
    server = server_pool.get(version, served_model)
    with ServerClient(server.url) as client:
        info = client.probe()
        assert (info.version, info.model_path, info.tp_size) == (version, str(served_model), 1)
        assert info.has_update_session == (version == NEWEST)
        assert info.has_weights_checker and not info.is_deterministic and not info.has_memory_saver
        assert info.weight_version is None and info.weight_label == "default"
        assert info.model_config == json.loads((served_model / "config.json").read_text())
        assert info.architectures == ("LlamaForCausalLM",)
        assert info.max_total_tokens == 20000


@pytest.mark.parametrize("version", VERSIONS)
def test_the_requests_around_an_update_of_a_real_server(
    server_pool: ServerPool, served_model: Path, version: str
) -> None:
    server = server_pool.get(version, served_model)
    with ServerClient(server.url) as client:
        before = client.checksums()
        assert len(before) == 1 and "model.embed_tokens.weight" in before[0]
        client.pause()
        client.flush_cache()
        record = ServerRecord(server.url, client, client.probe())
        record.begin_update()  # has no effect on the old server
        record.end_update()
        client.set_weight_version(7)
        client.resume()
        assert client.weight_version() == 7
        assert client.checksums() == before
        client.update_weights_from_disk(served_model)
        assert client.checksums() == before
        with pytest.raises(ServerError, match="update_weights_from_disk"):
            client.update_weights_from_disk(served_model / "nothing")
        assert client.checksums() == before
        with pytest.raises(ServerError, match="destroy_weights_update_group"):
            client.destroy_weights_update_group("nobody")
        values = client.weights_by_name("model.norm.weight", truncate_size=4)
        assert len(values) == 4


def test_a_second_update_session_is_refused_until_the_first_is_closed(
    server_pool: ServerPool, served_model: Path
) -> None:
    server = server_pool.get(NEWEST, served_model)
    with ServerClient(server.url) as client:
        client.begin_weight_update()
        with pytest.raises(ServerError, match="begin_weight_update"):
            client.begin_weight_update()
        client.end_weight_update()
        client.begin_weight_update()
        client.end_weight_update()


def test_a_request_to_a_frozen_server_ends_at_its_deadline(
    server_pool: ServerPool, served_model: Path
) -> None:
    server = server_pool.get(OLDEST, served_model)
    server.freeze()
    try:
        with (
            ServerClient(server.url) as client,
            pytest.raises(ServerError, match=r"did not answer within|the deadline ended"),
        ):
            client.weight_version(deadline_s=1.0)
    finally:
        server.thaw()
