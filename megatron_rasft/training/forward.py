"""The forward steps that the pipeline schedule runs for each micro-batch: the model, the log-probabilities, the loss."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor

from megatron_rasft.config.loss import PLAIN_CHUNK_TOKENS, LossConfig, fused_chunk_tokens
from megatron_rasft.machine.wgrad import MegatronOutputWeight
from megatron_rasft.monitoring import stalls
from megatron_rasft.objective.declaration import Objective
from megatron_rasft.objective.fused_logprobs import ReferenceLogits, fused_logprobs
from megatron_rasft.objective.logprobs import chunked_logprobs, chunked_logprobs_and_kl
from megatron_rasft.objective.token_losses import LossSums, PackedTokens, token_loss_sums
from megatron_rasft.training.batches import MicroBatch


class Forward:
    """The forward steps of one run, for Megatron's schedules.

    Args:
        objective: computes the loss.
        config: settings for computing log-probabilities.
        vocab_size: true vocabulary; padded entries have no probability.
    """

    def __init__(self, objective: Objective, config: LossConfig, vocab_size: int) -> None:
        self.objective = objective
        self.config = config
        self.vocab_size = vocab_size
        self.ref_output_weight: Tensor | None = None
        """[v/tp, h] of the frozen reference; set on the last stage if the objective has a full-vocabulary KL."""
        self.ref_hidden: dict[int, Tensor] = {}
        """``id()`` of a micro-batch -> the reference's hidden states for it, for the current step only."""

    def train_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable]:
        """Forward step of training: returns the model's output and the function that computes the loss from it."""
        batch = next(data_iterator)
        return self._run(model, batch, self._training_output), partial(self._loss, batch)

    def score_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable]:
        """Forward step of scoring: the loss function returns the log-probabilities unchanged."""
        batch = next(data_iterator)
        return self._run(model, batch, self._logprobs_output), lambda out, non_loss_data=True: out

    def reference_step(self, data_iterator: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable]:
        """Forward step under the reference's weights: keeps the hidden states for the KL of this step."""
        batch = next(data_iterator)
        return self._run(model, batch, self._keep_hidden), lambda out, non_loss_data=True: out

    def _run(self, model: Any, batch: MicroBatch, output: Callable[..., Tensor]) -> Tensor:
        stalls.tick()  # On a CPU, a step of many micro-batches may take longer than --stall-deadline-s.
        return model(
            batch.tokens,
            batch.position_ids,
            None,
            packed_seq_params=batch.packed_seq_params,
            output_processor=output,
            output_processor_context=batch,
        )

    def _logprobs_output(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatch,
        **_: Any,
    ) -> Tensor:
        """[s/cp(/tp), b, h] -> [b * s/cp] fp32 log-probabilities of the labels."""
        logprobs, _kl = self._logprobs_and_kl(hidden_states, output_layer, output_weight, context, None)
        return logprobs

    def _training_output(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: MicroBatch,
        **_: Any,
    ) -> Tensor:
        """[s/cp(/tp), b, h] -> [b * s/cp] log-probabilities, or [2, b * s/cp] with the KL to the reference as second row."""
        ref_hidden = None
        if self.objective.needs_reference_distribution():
            ref_hidden = self.ref_hidden[id(context)]
        logprobs, kl = self._logprobs_and_kl(hidden_states, output_layer, output_weight, context, ref_hidden)
        return logprobs if kl is None else torch.stack([logprobs, kl])

    def _logprobs_and_kl(
        self, hidden: Tensor, layer: Any, weight: Tensor | None, batch: MicroBatch, ref_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [b * s/cp], and the KL to the reference if its hidden states are given."""
        _await_weight(layer)
        hidden, weight = _flat(hidden, layer), layer.weight if weight is None else weight
        assert weight is not None
        reference = None
        if ref_hidden is not None:
            kl_term = self.objective.kl_term()
            assert self.ref_output_weight is not None and kl_term is not None, (
                "a KL objective must run reference_step before each training step"
            )
            reference = ReferenceLogits(
                hidden=_flat(ref_hidden, layer),
                weight=self.ref_output_weight,
                direction=kl_term.direction,
            )
        if _takes_fused_kernels(self.config, hidden, layer, weight):
            return self._fused(hidden, layer, weight, batch, reference)
        return self._plain(hidden, layer, weight, batch, reference)

    def _fused(
        self, hidden: Tensor, layer: Any, weight: Tensor, batch: MicroBatch, reference: ReferenceLogits | None
    ) -> tuple[Tensor, Tensor | None]:
        chunk_tokens = self.config.objective_logprob_chunk_tokens
        if chunk_tokens is None:
            chunk_tokens = fused_chunk_tokens(len(hidden), weight.shape[0] * weight.element_size())
        output = MegatronOutputWeight(
            weight=weight,
            tp_group=layer.tp_group,
            sums_hidden_grad=layer.allreduce_dgrad,
            is_fused=layer.gradient_accumulation_fusion,
        )
        return fused_logprobs(hidden, output, batch.labels, self.vocab_size, chunk_tokens, reference)

    def _plain(
        self, hidden: Tensor, layer: Any, weight: Tensor, batch: MicroBatch, reference: ReferenceLogits | None
    ) -> tuple[Tensor, Tensor | None]:
        given = self.config.objective_logprob_chunk_tokens
        chunk_tokens = PLAIN_CHUNK_TOKENS if given is None else given
        project = _projection(layer, weight)
        if reference is None:
            logprobs = chunked_logprobs(
                hidden, project, batch.labels, layer.tp_group, self.vocab_size, chunk_tokens
            )
            return logprobs, None
        return chunked_logprobs_and_kl(
            hidden,
            project,
            reference.hidden,
            _projection(layer, reference.weight),
            batch.labels,
            layer.tp_group,
            self.vocab_size,
            chunk_tokens,
            reference.direction,
        )

    def _keep_hidden(self, *, hidden_states: Tensor, context: MicroBatch, **_: Any) -> Tensor:
        self.ref_hidden[id(context)] = hidden_states.detach()
        return hidden_states.new_zeros(1)

    def _loss(self, batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Returns the loss's masked sum, its denominator, and [sum, count] of each metric.

        Megatron sums the first two over the global batch and divides once (--calculate-per-token-loss).
        """
        logprobs, kl = (output, None) if output.dim() == 1 else output.unbind(0)
        sums: LossSums = token_loss_sums(
            PackedTokens(
                logprobs=logprobs,
                loss_mask=batch.loss_mask,
                segment_ids=batch.segment_ids,
                num_segments=batch.num_segments,
                weights=batch.weights,
                are_counted=batch.are_counted,
                ref_logprobs=batch.ref_logprobs,
                old_logprobs=batch.old_logprobs,
                teacher_logprobs=batch.teacher_logprobs,
                kl=kl,
                cp_group=parallel_state.get_context_parallel_group(),
            ),
            self.objective,
        )
        count = sums.denominator.detach() + batch.num_uncomputed
        report = {"loss": torch.stack([sums.loss_sum.detach().float(), count.float()]), **sums.metrics}
        return sums.loss_sum, count.to(torch.int), report


def _takes_fused_kernels(config: LossConfig, hidden: Tensor, layer: Any, weight: Tensor) -> bool:
    """Whether the fused Triton kernels compute the log-probabilities."""
    if config.objective_logprob_kernels != "auto":
        return config.objective_logprob_kernels == "fused"
    # Only Megatron's own layer gathers a sharded weight before its use and scatters the gradient after it.
    is_sharded = hasattr(weight, "__fsdp_param__") or layer.gtp_remat_size > 1
    return hidden.is_cuda and not is_sharded


def _await_weight(layer: Any) -> None:
    """Waits for the output layer's weight under --overlap-param-gather.

    Megatron waits in a hook that runs before a module's forward (distributed_data_parallel.py). The layer's forward is not called
    here, only its weight is used, so the hooks are called by hand. Otherwise a weight in a bucket of its own would be read
    while it is still being gathered.
    """
    for hook in layer._forward_pre_hooks.values():
        hook(layer, ())


def _flat(hidden: Tensor, output_layer: Any) -> Tensor:
    """[s/cp(/tp), b, h] -> [b * s/cp, h], complete on every tensor-parallel rank."""
    if output_layer.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=output_layer.tp_group)
    return hidden.transpose(0, 1).reshape(-1, hidden.shape[-1])


def _projection(output_layer: Any, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the output layer for tokens that are already gathered: [t, h] -> [t, v/tp].

    The gradient of the hidden states must be summed over the tensor-parallel ranks. With sequence parallelism the backward pass of
    the gather does this; otherwise the all-reduce of the linear layer does it.
    """

    def project(hidden: Tensor) -> Tensor:
        logits = linear_with_grad_accumulation_and_async_allreduce(
            hidden[:, None],
            weight,
            None,
            gradient_accumulation_fusion=output_layer.gradient_accumulation_fusion and weight.requires_grad,
            allreduce_dgrad=output_layer.allreduce_dgrad,
            sequence_parallel=False,
            tp_group=output_layer.tp_group,
        )
        return logits[:, 0]

    return project


def run_forward_only(step: Callable, batches: Sequence[MicroBatch], model: Sequence[Any]) -> list[Any]:
    """Runs a forward step over the micro-batches of this rank.

    Returns:
        On the last pipeline stage the result of the step's loss function for each micro-batch; on the others [].
    """
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    iterators = [iter(batches) for _ in model]
    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(model),
            num_microbatches=len(batches),
            seq_length=batches[0].tokens.shape[1] * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
    for chunk, was_training in zip(model, training, strict=True):
        chunk.train(was_training)
    return results
