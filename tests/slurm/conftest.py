"""One cluster for all tests of a session, and the runs on it."""

from collections.abc import Iterator

import pytest

from tests.emulated_gpu import running
from tests.slurm import cluster
from tests.slurm.fork_server import programs_forked
from tests.slurm.runs import Runs

NUM_NODES = 8
"""Runs wait for events for most of their time, so several go on side by side."""


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Cluster]:
    with cluster.Cluster(NUM_NODES) as started:
        yield started


@pytest.fixture(scope="session")
def runs(slurm: cluster.Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs whose programs are forked from processes that have imported everything."""
    emulated, add_paths = running.parent("transformer_engine"), running.add_paths
    with (
        programs_forked(slurm.folder / "cpu") as on_cpu,
        programs_forked(slurm.folder / "gpu", emulated, add_paths) as on_gpus,
    ):
        # read when a program runs, unlike the machine's other variables
        on_gpus |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
        yield Runs(slurm, tmp_path_factory.mktemp("slurm"), interpreter=on_cpu, on_emulated_gpus=on_gpus)
