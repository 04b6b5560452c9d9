"""What tests of every kind may ask for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.running import ServerPool


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "server_pool" in getattr(item, "fixturenames", ()):
            item.add_marker("servers")


@pytest.fixture(scope="session")
def _server_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    pool = ServerPool(tmp_path_factory.mktemp("servers"))
    yield pool
    pool.close()


@pytest.fixture
def server_pool(_server_pool: ServerPool) -> Iterator[ServerPool]:
    """Real SGLang servers, started when they are first asked for; their logs are shown if the test fails."""
    yield _server_pool
    print(_server_pool.logs())


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as every server test may serve it."""
    from tests.tiny_policy import write_model

    return write_model(tmp_path_factory.mktemp("served") / "model")
