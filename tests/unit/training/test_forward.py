"""The forward steps with a stand-in for the model: log-probabilities, KL, loss, and the choice of kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_rasft.config import LossConfig
from megatron_rasft.objective.declaration import Objective
from megatron_rasft.objective.families.kl_regularised import Asft, SftKl
from megatron_rasft.objective.families.likelihood import Dft, Sft
from megatron_rasft.objective.families.rasft import Rasft
from megatron_rasft.training import forward
from megatron_rasft.training.batches import MicroBatch
from megatron_rasft.training.forward import Forward, run_forward_only

VOCAB, PADDED, HIDDEN = 11, 16, 6
MASK = (0, 1, 1, 1, 0, 0, 1, 0)
"""Two sequences of four tokens: three response tokens and one."""


@pytest.fixture(autouse=True)
def one_context_parallel_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward.parallel_state, "get_context_parallel_group", lambda: None)


class OutputLayer(nn.Module):
    """The attributes of Megatron's output layer that are read. Its own forward is never called."""

    tp_group = None
    sequence_parallel = False
    allreduce_dgrad = False
    gradient_accumulation_fusion = False
    gtp_remat_size = 1

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", weight)


class StandInModel:
    """A last pipeline stage whose hidden states [s, b, h] are given, with the output layer of a Megatron model."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden = hidden
        self.layer = OutputLayer(weight)

    def __call__(
        self, tokens: Tensor, positions: Tensor, mask: None, *, output_processor: Callable, **rest: Any
    ) -> Tensor:
        return output_processor(
            hidden_states=self.hidden,
            output_layer=self.layer,
            output_weight=None,
            context=rest["output_processor_context"],
        )


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(seed: int = 0) -> StandInModel:
    """Two sequences of four tokens in the padded layout."""
    return StandInModel(
        drawn(4, 2, HIDDEN, seed=seed).requires_grad_(), drawn(PADDED, HIDDEN, seed=seed + 1).requires_grad_()
    )


def batch() -> MicroBatch:
    num_tokens = len(MASK)
    return MicroBatch(
        tokens=torch.zeros(2, 4, dtype=torch.int64),
        position_ids=torch.zeros(2, 4, dtype=torch.int64),
        labels=torch.arange(num_tokens) % VOCAB,
        loss_mask=torch.tensor(MASK, dtype=torch.float32),
        segment_ids=torch.arange(num_tokens) // 4,
        weights=torch.tensor([0.5, 2.0]),
        are_counted=torch.tensor([True, True]),
        num_uncomputed=torch.tensor(0),
        ref_logprobs=torch.linspace(-3.0, -1.0, num_tokens),
        old_logprobs=None,
        teacher_logprobs=None,
        packed_seq_params=None,
        sample_indices=[0, 1],
    )


def log_softmax(stand_in: StandInModel) -> Tensor:
    """Logits [t, v] in fp64, without the padded entries of the vocabulary."""
    hidden = stand_in.hidden.transpose(0, 1).reshape(-1, HIDDEN).double()
    return (hidden @ stand_in.layer.weight[:VOCAB].double().T).log_softmax(dim=-1)


def label_logprobs(stand_in: StandInModel) -> Tensor:
    """Log-probabilities [t] in fp64."""
    return log_softmax(stand_in).gather(1, batch().labels[:, None])[:, 0]


def forward_of(objective: Objective, **flags: Any) -> Forward:
    return Forward(objective, LossConfig(**flags), VOCAB)


@pytest.mark.parametrize("chunk_tokens", [None, 0, 3])
def test_scoring_returns_the_log_probabilities_of_the_labels(chunk_tokens: int | None) -> None:
    stand_in = model()
    steps = forward_of(Rasft(), objective_logprob_chunk_tokens=chunk_tokens)
    output, unchanged = steps.score_step(iter([batch()]), stand_in)
    torch.testing.assert_close(output.double(), label_logprobs(stand_in), rtol=0, atol=1e-5)
    assert unchanged(output, non_loss_data=True) is output


@pytest.mark.parametrize("chunk_tokens", [0, 3])
def test_training_returns_the_weighted_sum_and_the_number_of_tokens(chunk_tokens: int) -> None:
    stand_in = model()
    steps = forward_of(Dft(), objective_logprob_chunk_tokens=chunk_tokens)
    output, loss_of = steps.train_step(iter([batch()]), stand_in)
    loss, count, report = loss_of(output)
    found = torch.autograd.grad(loss, [stand_in.hidden, stand_in.layer.weight])

    logprobs, weights = label_logprobs(stand_in), torch.tensor([0.5, 2.0]).repeat_interleave(4)
    expected = (torch.tensor(MASK) * weights * logprobs.detach().exp() * -logprobs).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (count.item(), count.dtype) == (4, torch.int)
    assert report["loss"].tolist() == pytest.approx([expected.item(), 4], rel=1e-5)
    for mine, theirs in zip(
        found, torch.autograd.grad(expected, [stand_in.hidden, stand_in.layer.weight]), strict=True
    ):
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", [SftKl(), Asft()], ids=["forward", "reverse"])
def test_a_kl_objective_compares_with_the_hidden_states_of_the_reference_step(objective: Objective) -> None:
    policy, reference, micro_batch = model(), model(seed=5), batch()
    steps = forward_of(objective, objective_logprob_chunk_tokens=3)
    steps.ref_output_weight = reference.layer.weight.detach()
    steps.reference_step(iter([micro_batch]), reference)
    output, _ = steps.train_step(iter([micro_batch]), policy)
    p, r = log_softmax(policy), log_softmax(reference)
    kl = ((r - p) * r.exp()).sum(1) if objective.name == "sft_kl" else ((p - r) * p.exp()).sum(1)
    torch.testing.assert_close(output[0].double(), label_logprobs(policy), rtol=0, atol=1e-5)
    torch.testing.assert_close(output[1].double(), kl, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kernels", "is_fused"), [("auto", False), ("plain", False), ("fused", True)])
def test_the_flag_chooses_the_kernels_and_auto_is_plain_on_a_cpu(
    kernels: Any, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fused(hidden: Tensor, *rest: Any) -> tuple[Tensor, None]:
        calls.append(hidden.shape)
        return hidden.sum(1), None

    monkeypatch.setattr(forward, "fused_logprobs", fused)
    forward_of(Sft(), objective_logprob_kernels=kernels).score_step(iter([batch()]), model())
    assert calls == ([(8, HIDDEN)] if is_fused else [])


def test_the_hooks_that_wait_for_the_weight_run_before_it_is_read() -> None:
    """Megatron's hook replaces the parameter's content when the gather has ended."""
    stand_in = model()
    gathered, stand_in.layer.weight = stand_in.layer.weight, torch.zeros(PADDED, HIDDEN)
    stand_in.layer.register_forward_pre_hook(lambda layer, inputs: setattr(layer, "weight", gathered))
    output, _ = forward_of(Sft()).score_step(iter([batch()]), stand_in)
    torch.testing.assert_close(output.double(), label_logprobs(stand_in), rtol=0, atol=1e-5)


def test_forward_only_runs_without_dropout_and_gradients_and_restores_the_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks = [torch.nn.Linear(1, 1), torch.nn.Linear(1, 1).eval()]
    seen: dict[str, Any] = {}

    def schedule(**given: Any) -> list[str]:
        seen.update(given, modes=[c.training for c in chunks], has_grad=torch.is_grad_enabled())
        return ["result"]

    monkeypatch.setattr(forward, "get_forward_backward_func", lambda: schedule)
    monkeypatch.setattr(forward.parallel_state, "get_context_parallel_world_size", lambda: 2)
    assert run_forward_only(print, [batch(), batch()], chunks) == ["result"]
    assert seen["modes"] == [False, False] and not seen["has_grad"]
    assert (seen["num_microbatches"], seen["seq_length"], seen["micro_batch_size"]) == (2, 8, 2)
    assert len(seen["data_iterator"]) == 2, "one iterator for each model chunk"
    assert [c.training for c in chunks] == [True, False]
