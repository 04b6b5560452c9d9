"""Loading and exporting under tensor, pipeline, virtual-pipeline and data parallelism, over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import CASES, hf_model, some_tokens, write_folder

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights")
    for case in CASES:
        write_folder(case, path / case)
        with torch.no_grad():
            torch.save(hf_model(case)(some_tokens()).logits, path / f"{case}.logits.pt")
    return path


@pytest.mark.parametrize("world_size,layouts,expert_layouts", [(2, 4, 2), (4, 3, 3)])
def test_every_layout_loads_computes_and_exports_the_same(
    root: Path, world_size: int, layouts: int, expert_layouts: int
) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    worker = Path(__file__).with_name("weights_worker.py")
    command = [sys.executable, "-W", "ignore", str(worker)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(root)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * world_size, "\n".join(o[-3000:] for o in outputs)
    skipped = 3 if world_size == 4 else 0
    with_experts = sum("num_experts_per_tok" in overrides for _, overrides in CASES.values())
    expected = layouts * len(CASES) - skipped + expert_layouts * with_experts
    assert outputs[0].count("round trip") == expected
