"""The trainer: builds model, optimizer and schedule under Megatron, takes training steps, scores and samples.

In a run only machine/, model/, checkpoints/ and training/ call megatron.training, so they must be checked when Megatron's version
changes. Their statements about Megatron were verified with 0.19.2.
"""

import contextlib
import gc
import math
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import training
from megatron.training.global_vars import get_signal_handler
from megatron.training.utils import calc_params_l2_norm

from megatron_rasft.checkpoints.checkpointer import load_converted_weights
from megatron_rasft.config import RasftConfig
from megatron_rasft.data.sample_arrays import Batch
from megatron_rasft.errors import RasftError
from megatron_rasft.generation.policy_sampler import PolicySampler
from megatron_rasft.machine import megatron_calls
from megatron_rasft.machine.megatron_calls import overridden, quiet
from megatron_rasft.model.fp8_scales import DelayedScales, has_delayed_scales
from megatron_rasft.model.model_source import chunk_builder, model_tensors
from megatron_rasft.monitoring import early_stop
from megatron_rasft.monitoring.status import RunStatus
from megatron_rasft.monitoring.stopping import Allocation, StopRequest
from megatron_rasft.monitoring.stragglers import ComputeClock, RankTime, StepTimes, compare
from megatron_rasft.ranks import gather_to_all, kept_by_rank_zero
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.sync import WeightSync
from megatron_rasft.training.batch_preparation import (
    BatchPreparer,
    PreparedBatch,
    batch_layout,
    replica_ranks,
)
from megatron_rasft.training.batches import BatchFacts, MicroBatch
from megatron_rasft.training.forward import Forward, run_forward_only
from megatron_rasft.training.reference import FrozenReference
from megatron_rasft.training.scoring import Scorer
from megatron_rasft.training.warmup import WarmUp
from megatron_rasft.types import Request, Response, SamplingParams, TrainingSample
from megatron_rasft.weights.exporting import export
from megatron_rasft.weights.folder import ModelFolder


class Diverged(RasftError):
    """Raised on every rank if a step's gradient is not finite. Nothing of the step may be saved."""


@dataclass(kw_only=True)
class StepResult:
    """The report of one training step, the same on every rank."""

    metrics: dict[str, float]
    """Objective metrics, each divided once over the global batch."""
    grad_norm: float
    learning_rate: float
    is_skipped: bool
    """Whether the weights are unchanged: no problem had a sample, or --grad-norm-skip-threshold was exceeded."""
    batch: BatchFacts
    data_s: float = 0.0
    """Time spent waiting for the prepared batch, and in the reference's forward pass of a KL objective."""
    forward_backward_s: float = 0.0
    """Time of forward and backward, including the reduction of gradients."""
    optimizer_s: float = 0.0
    rank_times: StepTimes | None = None
    """None after a step that trained on nothing."""
    params_norm: float | None = None
    """None without --log-params-norm."""
    floating_point_operations: float = 0.0
    """Floating-point operations of forward and backward on all ranks, as Megatron counts them, without rollouts and reference."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed in the step, without padding."""
        return self.batch.num_tokens


class Trainer:
    """Model, optimizer and schedule of one run. Every method is a collective of the world.

    Args:
        args: Megatron's arguments.
        config: the run's configuration.
        folder: the folder --hf-model.
        converted: converted weights to begin with, instead of those in ``folder``.
    """

    def __init__(
        self, args: Any, config: RasftConfig, folder: ModelFolder, converted: Path | None = None
    ) -> None:
        self.args = args
        self.config = config
        self.folder = folder
        self.max_tokens = args.seq_length
        self.iteration = 0
        """Number of steps so far, skipped ones included."""
        self.floating_point_operations = 0.0
        """Floating-point operations of all steps so far, which Megatron's checkpoints store."""
        self._build_model(converted)
        self._build_reference()
        self._prepare_model_config()
        self.sampler = PolicySampler(self.chunks, folder.shape.vocab_size)
        self._clock = ComputeClock(self.sampler.device)
        # Megatron's public signals_received() gathers over all ranks at every call; StopRequest needs this rank's flag alone.
        self.stop = StopRequest(
            lambda: get_signal_handler()._signal_received or early_stop.has_come(),
            args.exit_duration_in_mins,
            training._TRAIN_START_TIME,
            self.sampler.device,
            Allocation.of_slurm(config.run.exit_before_end_s, _measured_save_s(args)),
        )
        layout = batch_layout(args, is_packed=config.run.rasft_batch_layout == "packed")
        self._preparer = BatchPreparer(layout, replica_ranks(), self.sampler.device)
        self.scales = DelayedScales(is_used=has_delayed_scales(args), forward=self._score_batches)
        self._scorer = Scorer(
            self._preparer,
            self._score_batches,
            self.scales,
            self.reference,
            self.parameters_gathered,
            lambda: self.stop.check(),
            args.global_batch_size,
        )
        self._warm_up = WarmUp(self.scheduler, args.global_batch_size, args.given_flags)
        if args.manual_gc:
            gc.disable()
            gc.collect()

    def _build_model(self, converted: Path | None) -> None:
        args = self.args
        # Megatron would load --load before the reference is copied. Its check for NaN raises in mid-backward, only on the ranks
        # that see the NaN, and the others would wait for them; ``train`` checks on all ranks instead.
        with quiet(), overridden(args, load=None, check_for_nan_in_loss_and_grad=False):
            self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
                ModelType.encoder_or_decoder, chunk_builder(args, self.folder)
            )
        self.chunks = unwrap_model(self.model)
        self.tensors = model_tensors(self.model, self.folder)
        self.tensors.load()
        # The optimizer was built on random weights, and its fp32 main parameters are still copies of them.
        self.optimizer.reload_model_params()
        if converted is not None:
            load_converted_weights(args, self.model, self.optimizer, self.scheduler, converted)

    def _build_reference(self) -> None:
        """Copies the initial weights, if the objective needs a reference."""
        objective = self.config.objective
        self.forward = Forward(objective, self.config.loss, self.folder.shape.vocab_size)
        self.reference = FrozenReference(self.model) if objective.needs_reference() else None
        if objective.needs_reference_distribution() and self.chunks[-1].post_process:
            assert self.reference is not None
            self.forward.ref_output_weight = self.reference.output_weight(self.chunks[-1])

    def _prepare_model_config(self) -> None:
        """Sets the hooks that Megatron's train() sets on the model's config."""
        args, config = self.args, get_model_config(self.model[0])
        config.grad_scale_func = self.optimizer.scale_loss
        config.moe_grad_scale_func = self._scale_of_router_losses
        config.finalize_model_grads_func = self._finalize_gradients
        config.timers = None
        if args.overlap_grad_reduce:
            config.no_sync_func = _one_or_list([m.no_sync for m in self.model])
            if args.align_grad_reduce:
                config.grad_sync_func = _one_or_list([m.start_grad_sync for m in self.model])
        if args.overlap_param_gather and args.align_param_gather:
            config.param_sync_func = _one_or_list([m.start_param_sync for m in self.model])
        self._model_config = config
        self._gradients_at = 0.0
        self._router_share = 1.0
        for chunk in self.model:
            chunk.train()

    def _scale_of_router_losses(self) -> torch.Tensor:
        """Returns the factor of the gradients of --moe-aux-loss-coeff and --moe-z-loss-coeff.

        Megatron multiplies these losses by the tokens of a micro-batch and expects a denominator of all tokens of the step (router.py).
        The denominator here counts response tokens, or those of demonstrations. Without this factor the losses would grow with
        the length of prompts and rollouts.
        """
        loss_scale: torch.Tensor = self.optimizer.scale_loss(torch.ones(1, device=self.sampler.device))
        return loss_scale * self._router_share

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Reduces the gradients, and records the time at which they are ready."""
        finalize_model_grads(*args, **kwargs)
        # Kernels run asynchronously: without this, the time of the backward pass would count as the optimizer's.
        torch.cuda.synchronize()
        self._gradients_at = time.monotonic()

    def parameters_gathered(self) -> AbstractContextManager[None]:
        """Returns a context in which every rank has all current parameters; see ``megatron_calls.parameters_gathered``."""
        return megatron_calls.parameters_gathered(self.args, self.model, are_stale=self.iteration > 0)

    # ---- the policy of a refresh

    def score(self, samples: Sequence[TrainingSample], *, with_reference: bool) -> list[memoryview]:
        """Returns the log-probabilities of the samples' responses; see Scorer.score."""
        return self._scorer.score(samples, with_reference=with_reference)

    def _score_batches(self, batches: list[MicroBatch]) -> list[Any]:
        return run_forward_only(self.forward.score_step, batches, self.model)

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """Samples responses from the current weights; see PolicySampler.generate."""
        replica = parallel_state.get_model_parallel_group()
        with self.parameters_gathered():
            return self.sampler.generate(requests, params, lambda: self.stop.is_asked(replica))

    # ---- the weights

    def weight_sync(self, records: ServerRecords) -> WeightSync:
        """Returns the object that sends this model's weights to the rollout servers that this process knows."""
        return WeightSync(
            self.config.sync,
            self.tensors,
            records=records,
            model_config=self.folder.config,
            device=self.sampler.device,
            export=self.export,
        )

    def export(self, path: str, facts: dict[str, str] | None = None) -> None:
        """Writes the model as a Hugging Face folder, in the type it is trained in, so that no update is rounded away.

        Args:
            path: must not exist, or be an empty folder.
            facts: rows of the model card that describe the run; None writes no card.
        """
        with self.parameters_gathered():
            export(self.tensors, self.folder, path, dtype=self.args.params_dtype, facts=facts)

    # ---- training steps

    def prepare(self, batch: Batch | None) -> PreparedBatch:
        """Distributes a global batch and starts to cut it; see BatchPreparer.prepare."""
        return self._preparer.prepare(batch)

    def pause_preparation(self) -> None:
        """Waits until no thread cuts batches."""
        self._preparer.pause()

    def step(self, samples: Sequence[TrainingSample], num_problems: int) -> StepResult:
        """Prepares rank 0's samples as a batch and trains on it at once."""
        batch = kept_by_rank_zero(lambda: Batch.of(samples, num_problems), None)
        return self.train(self.prepare(batch))

    def train(self, prepared: PreparedBatch) -> StepResult:
        """Takes one optimizer step on a global batch. A batch without samples only advances the schedules.

        Raises:
            Diverged: the gradient is not finite, unless --no-check-for-nan-in-loss-and-grad is given.
        """
        facts = prepared.facts
        if not facts.num_samples:
            return self._skip(facts)
        self._warm_up.set_rates(min(1.0, facts.mass) if self.config.scales_lr_by_mass else 1.0)
        learning_rate = _learning_rate(self.optimizer)
        began = time.monotonic()
        batches = self._preparer.on_device(prepared)
        cutting_s = time.monotonic() - began
        if self.scales.are_missing:
            with self.parameters_gathered():
                self.scales.set_from(lambda: batches)
        self._run_reference(batches)
        ready = time.monotonic()
        self._router_share = facts.num_counted / self._count_computed(batches)
        metrics, is_skipped, grad_norm = self._update(batches)
        self._count_step(facts)
        updated = time.monotonic()
        times, gathered = zip(
            *gather_to_all((self._rank_time(cutting_s), {k: float(v) for k, v in metrics.items()})),
            strict=True,
        )
        metrics = max(gathered, key=len)  # Only the last pipeline stage has the metrics.
        if self.args.check_for_nan_in_loss_and_grad:
            self._refuse_non_finite(grad_norm, metrics)
        return StepResult(
            metrics=metrics,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            is_skipped=is_skipped,
            batch=facts,
            rank_times=compare(times, self.config.run.straggler_factor),
            params_norm=calc_params_l2_norm(self.model) if self.args.log_params_norm else None,
            floating_point_operations=self._count_operations(facts),
            data_s=ready - began,
            forward_backward_s=self._gradients_at - ready,
            optimizer_s=updated - self._gradients_at,
        )

    def _skip(self, facts: BatchFacts) -> StepResult:
        self._warm_up.set_rates()
        learning_rate = _learning_rate(self.optimizer)
        self.scheduler.step(increment=self.args.global_batch_size)
        self.iteration += 1
        self.args.consumed_train_samples += facts.num_problems
        return StepResult(
            metrics={}, grad_norm=0.0, learning_rate=learning_rate, is_skipped=True, batch=facts
        )

    def _rank_time(self, cutting_s: float) -> RankTime:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return RankTime(socket.gethostname(), stage, cutting_s + self._clock.seconds())

    def _run_reference(self, batches: list[MicroBatch]) -> None:
        """Calculates the reference's hidden states, if the objective has a KL over the whole vocabulary."""
        if not self.config.objective.needs_reference_distribution():
            return
        assert self.reference is not None
        self.forward.ref_hidden = {}
        with self.parameters_gathered(), self.reference.in_place():
            run_forward_only(self.forward.reference_step, batches, self.model)

    def _update(self, batches: list[MicroBatch]) -> tuple[dict[str, Any], bool, float]:
        """Runs forward, backward and optimizer; returns metrics (last pipeline stage), is_skipped and the gradient norm."""
        rows, width = batches[0].tokens.shape
        iterators = [iter(batches) for _ in self.model]
        self._clock.restart()
        with (
            self._batch_shape(width * self.args.context_parallel_size, rows, len(batches)),
            overridden(self._model_config, timers=self._clock),
        ):
            metrics, skipped, _, _, _, grad_norm, *_ = training.train_step(
                self.forward.train_step,
                _one_or_list(iterators),
                self.model,
                self.optimizer,
                _OncePerStep(self.scheduler, self.args.global_batch_size),
                self._model_config,
                get_forward_backward_func(),
                iteration=self.iteration,
            )
        self.forward.ref_hidden = {}
        # The norm is None if the optimizer found an infinite gradient (MixedPrecisionOptimizer.step).
        return metrics, bool(skipped), float(grad_norm or 0.0)

    def _count_computed(self, batches: list[MicroBatch]) -> int:
        """Returns the number of tokens that all ranks compute in a step, with padding."""
        in_replica = sum(batch.tokens.numel() for batch in batches) * self.args.context_parallel_size
        return in_replica * parallel_state.get_data_parallel_world_size()

    def _count_step(self, facts: BatchFacts) -> None:
        args = self.args
        self.iteration += 1
        args.consumed_train_samples += facts.num_problems
        if args.manual_gc and args.manual_gc_interval and self.iteration % args.manual_gc_interval == 0:
            gc.collect()

    def _refuse_non_finite(self, grad_norm: float, metrics: dict[str, float]) -> None:
        if math.isfinite(grad_norm):
            return
        raise Diverged(
            f"step {self.iteration} has no finite gradient (loss {metrics.get('loss', math.nan):g}, gradient norm "
            f"{grad_norm:g}): the run has diverged, and nothing of this step is saved. Resume from the last checkpoint, or from "
            "an earlier one (--ckpt-step), with a lower --lr (and --override-opt_param-scheduler)."
        )

    def _count_operations(self, facts: BatchFacts) -> float:
        operations = training.num_floating_point_operations(
            self.args,
            facts.num_samples,
            seqlen_squared_sum_in_batch=facts.squared_tokens,
            total_real_tokens_in_batch=facts.num_tokens,
        )
        self.floating_point_operations += operations
        return operations

    @contextlib.contextmanager
    def _batch_shape(self, width: int, rows: int, num_batches: int) -> Iterator[None]:
        """Sets this step's shape and number of micro-batches, which Megatron reads from its arguments and its calculator."""
        args = self.args
        dp = parallel_state.get_data_parallel_world_size()
        try:
            with overridden(args, seq_length=width, micro_batch_size=rows):
                # Megatron calculates global batch / (micro-batch x dp), so a micro-batch size of 1 gives num_batches.
                _set_num_microbatches(num_batches * dp, 1, dp)
                yield
        finally:
            _set_num_microbatches(args.global_batch_size, args.micro_batch_size, dp)


class _OncePerStep:
    """Advances the learning-rate schedule by one global batch, regardless of the number of micro-batches it was cut into."""

    def __init__(self, scheduler: Any, increment: int) -> None:
        self._scheduler = scheduler
        self._increment = increment

    def step(self, increment: int) -> None:
        self._scheduler.step(increment=self._increment)


def _set_num_microbatches(global_batch_size: int, micro_batch_size: int, dp: int) -> None:
    reconfigure_num_microbatches_calculator(
        rank=1,  # Megatron logs every change on rank 0
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_size=dp,
    )


def _learning_rate(optimizer: Any) -> float:
    return max((g["lr"] for g in optimizer.param_groups if not math.isnan(g["lr"])), default=0.0)


def _one_or_list(values: list[Any]) -> Any:
    """Returns a list with one value per model chunk, or the value itself if there is one chunk, as Megatron expects."""
    return values[0] if len(values) == 1 else values


def _measured_save_s(args: Any) -> float | None:
    """The longest save of the run's earlier starts, seconds; None if it has not saved."""
    before = RunStatus.read(args.save)
    return None if before is None else before.save_s
