"""Fixtures for tests of every kind."""

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import kept_sources
from tests.servers.running import ServerPool

kept_sources.keep()

# A shell starts its background jobs with Ctrl-C switched off, and their children inherit this.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "server_pool" in getattr(item, "fixturenames", ()):
            item.add_marker("servers")


def pytest_collection_finish() -> None:
    """Excludes all imported objects from garbage collections, each of which would take a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _server_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerPool]:
    pool = ServerPool(tmp_path_factory.mktemp("servers"))
    yield pool
    pool.close()


@pytest.fixture
def server_pool(_server_pool: ServerPool) -> Iterator[ServerPool]:
    """Real SGLang servers, each started at its first use. Their logs are shown if the test fails."""
    yield _server_pool
    print(_server_pool.logs())


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama with a tokenizer, which server tests may share."""
    from tests.tiny_policy import write_model

    return write_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's process groups for a single process. The test module must have enabled the CPU backend."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if torch.cuda.is_available():
        pytest.skip("the CPU backend is off because CUDA is available")
    store = tmp_path_factory.mktemp("dist") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(123)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
