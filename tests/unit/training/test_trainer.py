"""A trainer in one process: a step, a batch without samples, and a gradient that is not finite."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rasft.types import SamplingParams, TrainingSample
from tests.forking import call_on_ranks
from tests.tiny_policy import write_mixture, write_model


def sample() -> TrainingSample:
    return TrainingSample(
        problem_id="p", kind="demonstration", prompt_ids=[3, 4], response_ids=[5, 6], weight=1.0
    )


def _train(rank: int, folder: str) -> None:
    import pretrain_rasft
    from megatron_rasft.training.trainer import Diverged
    from megatron_rasft.types import Request
    from tests.distributed.ranks_harness import trainer

    pretrain_rasft.cpu_backend.enable()
    pretrain_rasft.cpu_backend.use_cpu_fused_adam()
    flags = "--objective sft_kl --global-batch-size 1 --lr 1e-3 --lr-warmup-iters 4"
    notes: dict[str, Any] = {}

    def weights() -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in run.chunks[0].parameters()])

    with trainer(Path(folder, "model"), Path(folder, "none.jsonl"), flags.split()) as run:
        initial = weights()
        (policy,) = run.score([sample()], with_reference=False)
        sampling = SamplingParams(
            num_samples=1,
            temperature=1.0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=2,
            stop_ids=frozenset(),
            max_batch_size=1,
        )
        (answer,) = run.generate([Request(prompt_ids=[3, 4], seeds=[1])], sampling)[0]
        notes["sampled"] = len(answer.token_ids)
        scored = sample()
        scored.ref_logprobs = policy

        skipped = run.step([], 1)
        notes["skipped"] = skipped.is_skipped and torch.equal(weights(), initial) and run.iteration == 1

        result = run.step([scored], 1)
        notes["rates"] = [skipped.learning_rate, result.learning_rate]
        notes["trained"] = not result.is_skipped and not torch.equal(weights(), initial)
        notes["iteration"] = run.iteration
        notes["tokens"] = result.num_tokens
        notes["rank times"] = [skipped.rank_times is None, result.rank_times.slowest_s]
        notes["problems"] = run.args.consumed_train_samples
        (reference,) = run.score([sample()], with_reference=True)
        notes["reference stays"] = reference.tolist() == policy.tolist()
        notes["flags stay"] = (run.args.seq_length, run.args.micro_batch_size) == (run.max_tokens, 1)

        run.export(f"{folder}/exported")
        with torch.no_grad():
            next(run.chunks[0].parameters()).fill_(float("nan"))
        try:
            run.step([scored], 1)
        except Diverged:
            notes["diverged"] = run.iteration
    Path(folder, "notes.json").write_text(json.dumps(notes))


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("trainer")
    write_model(folder / "model")
    call_on_ranks(_train, folder, 1)
    found: dict[str, Any] = json.loads((folder / "notes.json").read_text())
    return found


def test_a_batch_without_samples_changes_no_weight_and_counts_as_a_step(notes: dict[str, Any]) -> None:
    assert notes["skipped"]


def test_a_step_changes_the_policy_and_not_the_reference(notes: dict[str, Any]) -> None:
    assert notes["trained"] and notes["reference stays"]
    assert (notes["iteration"], notes["problems"], notes["tokens"]) == (2, 2, 4)


def test_megatrons_schedule_measures_the_passes_of_a_step(notes: dict[str, Any]) -> None:
    is_none, slowest_s = notes["rank times"]
    assert is_none and slowest_s > 0


def test_the_warm_up_counts_from_the_first_step(notes: dict[str, Any]) -> None:
    assert notes["rates"] == pytest.approx([1e-3 / 4, 2e-3 / 4])


def test_a_steps_shape_is_not_left_in_the_flags(notes: dict[str, Any]) -> None:
    assert notes["flags stay"]


def test_the_policy_is_sampled(notes: dict[str, Any]) -> None:
    assert notes["sampled"] == 2


def test_a_gradient_that_is_not_finite_ends_the_run(notes: dict[str, Any]) -> None:
    assert notes["diverged"] == 3


def _balance_experts(rank: int, folder: str) -> None:
    import pretrain_rasft
    from tests.distributed.ranks_harness import trainer

    pretrain_rasft.cpu_backend.enable()
    pretrain_rasft.cpu_backend.use_cpu_fused_adam()
    # The learning rate is too small to change a weight.
    flags = "--objective sft --global-batch-size 1 --micro-batch-size 1 --lr 1e-30 --moe-token-dispatcher-type alltoall"
    flags += " --rasft-batch-layout padded --moe-aux-loss-coeff 0.1"

    def batch(num_prompt: int, are_counted: list[bool]) -> list[TrainingSample]:
        """Samples with equal tokens and the weight 0: only the loss of the routers has a gradient."""
        ids = [3, 9, 4, 7, 5, 8, 11, 6]
        return [
            TrainingSample(
                problem_id="p",
                kind="demonstration" if is_counted else "rollout",
                prompt_ids=ids[:num_prompt],
                response_ids=ids[num_prompt:],
                weight=0.0,
                is_counted=is_counted,
            )
            for is_counted in are_counted
        ]

    with trainer(Path(folder, "experts"), Path(folder, "none.jsonl"), flags.split()) as run:
        shapes = [(4, [True]), (1, [True]), (7, [True]), (4, [True, True, True]), (4, [True, False, False])]
        norms = [run.step(batch(*shape), 1).grad_norm for shape in shapes]
    Path(folder, "norms.json").write_text(json.dumps(norms))


def test_the_loss_of_routers_does_not_depend_on_the_denominator(tmp_path: Path) -> None:
    write_mixture(tmp_path / "experts", write_model(tmp_path / "model"))
    call_on_ranks(_balance_experts, tmp_path, 1)
    norms = json.loads((tmp_path / "norms.json").read_text())
    assert norms[0] > 1e-4 and norms == pytest.approx([norms[0]] * 5, rel=1e-4)
