"""Sampling with Transformer Engine's layers: the decode step can be captured, and a replay samples the same tokens."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from tests import recorded_graphs
from tests.emulated_gpu import running
from tests.emulated_gpu.conftest import Bench


def sample_with_graphs(evidence: Path) -> None:
    """Makes a run sample with graphs, and writes the numbers of captures and replays to ``evidence``. Pass it to ``prepare``."""
    from megatron_rasft.training.trainer import Trainer

    generate = Trainer.generate

    def on_a_gpu(self: Trainer, *args: Any) -> Any:
        with recorded_graphs.on_a_gpu(self.sampler) as graphs:
            result = generate(self, *args)
        evidence.write_text(json.dumps([graphs.num_captured, graphs.num_replayed]))
        return result

    Trainer.generate = on_a_gpu  # type: ignore[method-assign]


def rollouts(folder: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    return [(r["problem_id"], r["sample_index"], r["response_ids"], r["response_logprobs"]) for r in rows]


def test_a_captured_step_samples_the_same_rollouts_as_an_eager_step(bench: Bench, tmp_path: Path) -> None:
    evidence = tmp_path / "graphs.json"
    for name, prepare in (("eager", []), ("captured", [partial(sample_with_graphs, evidence)])):
        outcome = running.run(
            tmp_path / f"{name}-logs",
            bench.flags("policy", "--train-iters", "1", "--bf16", "--save", str(tmp_path / name)),
            prepare_rank=lambda rank, prepare=prepare: prepare,
        )
        assert outcome.codes == [0], outcome.output
    num_captured, num_replayed = json.loads(evidence.read_text())
    assert 0 < num_captured < num_replayed
    eager = rollouts(tmp_path / "eager")
    assert eager and rollouts(tmp_path / "captured") == eager
