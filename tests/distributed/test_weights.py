"""Loading and exporting under tensor, pipeline, virtual-pipeline and data parallelism, over gloo."""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks_harness import run_ranks
from tests.tiny_models import CASES, hf_model, some_tokens, write_folder


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
    outcome = run_ranks(Path(__file__).with_name("weights_worker.py"), world_size, root)
    # On four ranks: three models of six heads, and gpt-oss has two layouts less, because its experts are not split.
    skipped = 3 + 2 if world_size == 4 else 0
    with_experts = sum("num_experts_per_tok" in overrides for _, overrides in CASES.values())
    expected = layouts * len(CASES) - skipped + expert_layouts * with_experts
    assert outcome.logs[0].count("round trip") == expected
