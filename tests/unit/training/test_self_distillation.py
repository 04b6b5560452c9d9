"""Self-distillation in a real trainer equals transformers in fp64: the teacher's log-probabilities, the loss and the gradient."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megatron_rasft.types import TrainingSample
from tests.forking import call_on_ranks
from tests.tiny_policy import write_model

PROMPTS = ([3, 4, 5], [7, 8])
TEACHER_PROMPTS = ([9, 3, 4, 5, 10, 11, 6, 12], [13, 7, 8, 14, 2])
RESPONSES = ([5, 6, 20, 0], [21, 4])
WEIGHTS = (1.0, 1.0)


def samples(prompts: tuple[list[int], ...]) -> list[TrainingSample]:
    return [
        TrainingSample(
            problem_id=str(i), kind="rollout", prompt_ids=prompt, response_ids=RESPONSES[i], weight=WEIGHTS[i]
        )
        for i, prompt in enumerate(prompts)
    ]


def _distil(rank: int, folder: str) -> None:
    import pretrain_rasft
    from tests.distributed.ranks_harness import trainer

    pretrain_rasft.cpu_backend.enable()
    pretrain_rasft.cpu_backend.use_cpu_fused_adam()
    flags = "--objective sdft --global-batch-size 2 --lr 1e-4 --lr-warmup-iters 0 --lr-decay-style constant"
    notes: dict[str, Any] = {"teacher": [], "loss": [], "kl": [], "grad_norm": []}
    with trainer(Path(folder, "model"), Path(folder, "none.jsonl"), flags.split()) as run:
        for step in range(2):
            teacher = run.score(samples(TEACHER_PROMPTS), with_reference=True)
            batch = samples(PROMPTS)
            for sample, values in zip(batch, teacher, strict=True):
                sample.teacher_logprobs = values
            run.export(f"{folder}/policy{step}")
            result = run.step(batch, 2)
            notes["teacher"].append([values.tolist() for values in teacher])
            notes["loss"].append(result.metrics["loss"])
            notes["kl"].append(result.metrics["teacher_kl_nats"])
            notes["grad_norm"].append(result.grad_norm)
    Path(folder, "notes.json").write_text(json.dumps(notes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distilled")
    write_model(path / "model")
    call_on_ranks(_distil, path, 1)
    return path


@pytest.fixture(scope="module")
def notes(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "notes.json").read_text())
    return found


def opened(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def logprobs(model: Any, prompts: tuple[list[int], ...]) -> list[Tensor]:
    """Log-probabilities of each response's tokens after its prompt, each by a forward pass of its own."""
    found = []
    for prompt, response in zip(prompts, RESPONSES, strict=True):
        rows = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(response)[:, None])[:, 0])
    return found


@pytest.mark.parametrize("step", [0, 1])
def test_the_teacher_is_the_first_model_after_its_own_prompt(
    folder: Path, notes: dict[str, Any], step: int
) -> None:
    expected = logprobs(opened(folder / "model"), TEACHER_PROMPTS)
    for found, values in zip(notes["teacher"][step], expected, strict=True):
        assert found == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_has_the_loss_and_the_gradient_of_transformers(
    folder: Path, notes: dict[str, Any], step: int
) -> None:
    policy = opened(folder / f"policy{step}")
    with torch.no_grad():
        teacher = torch.cat(logprobs(opened(folder / "model"), TEACHER_PROMPTS))
    mine = torch.cat(logprobs(policy, PROMPTS))
    gap = teacher - mine.detach()
    # Each token's log p is multiplied by log p_teacher - log p, which is detached.
    (-(gap * mine).sum() / len(mine)).backward()
    norm = torch.stack([p.grad.norm() for p in policy.parameters() if p.grad is not None]).norm()
    assert notes["grad_norm"][step] == pytest.approx(norm.item(), rel=1e-4)
    assert notes["loss"][step] == pytest.approx((gap.square() / 2).mean().item(), rel=1e-4)
    assert notes["kl"][step] == pytest.approx(-gap.mean().item(), rel=1e-4, abs=1e-6)
    assert norm > 1e-2, "a vanishing gradient would hide an error"


def test_steps_bring_the_policy_nearer_to_the_teacher(notes: dict[str, Any]) -> None:
    first, second = notes["loss"]
    assert second < first
