"""Model, optimizer and schedule under Megatron: built, asked, stepped, saved and sent.

With ``startup`` and ``checkpoints`` the adapter to megatron.training: what could change with Megatron's version is there, and
what is written as a fact about Megatron was seen in 0.19.2.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import checkpointing, training
from megatron.training.async_utils import is_empty_async_queue
from megatron.training.global_vars import (
    get_signal_handler,
    get_tensorboard_writer,
    get_wandb_writer,
)
from megatron.training.utils import calc_params_l2_norm

from megatron_rasft.config import RasftConfig
from megatron_rasft.errors import CheckpointError, RasftError
from megatron_rasft.ranks import (
    gather_to_all,
    gather_to_rank_zero,
    hand_out,
    kept_by_rank_zero,
    on_rank_zero,
)
from megatron_rasft.sync import SyncReport, WeightSync
from megatron_rasft.sync.server_protocols import Server
from megatron_rasft.training.background_saves import SaveQueue, write_in_background
from megatron_rasft.training.batches import (
    WIDTH_SLACK,
    BatchFacts,
    BatchLayout,
    BatchShard,
    MicroBatch,
    build_micro_batches,
    response_values,
    shard_batch,
)
from megatron_rasft.training.checkpoints import (
    LOAD_FAILURES,
    STATE_FILE,
    architecture_of,
    checkpoint_failure,
    chosen_folder,
    is_converted,
    load_explained,
    read_arrays,
    read_state,
    refuse_other_model,
    save_explained,
    write_state,
)
from megatron_rasft.training.forward import Forward, run_forward_only
from megatron_rasft.training.fp8_scales import has_delayed_scales, own_scales_loaded, set_delayed_scales
from megatron_rasft.training.generation import PolicySampler
from megatron_rasft.training.model import build_chunk
from megatron_rasft.training.reference import FrozenReference
from megatron_rasft.training.samples import Array, Batch, SampleArrays, views
from megatron_rasft.training.startup import quiet
from megatron_rasft.training.stopping import StopRequest
from megatron_rasft.types import Request, Response, SamplingParams, TrainingSample
from megatron_rasft.weights.exporting import export
from megatron_rasft.weights.folder import HfFolder, checkpoint_fingerprint, weights_fingerprint
from megatron_rasft.weights.gathering import ExpertGroups, gather_tensors, plan_tensors
from megatron_rasft.weights.loading import load_into
from megatron_rasft.weights.torch_dist import RELEASE

_HAS_SCALES = "has_fp8_scales"
"""Key of a run's state: whether the checkpoint has the scales of FP8's delayed recipe."""

_SCORED_BATCHES = 4
"""Global batches that are scored between two looks at whether the run is to stop."""


@dataclass(kw_only=True)
class StepResult:
    """What one training step reports, the same on every rank."""

    metrics: dict[str, float]
    """Objective metrics, each divided once over the global batch."""
    grad_norm: float
    learning_rate: float
    is_skipped: bool
    """The weights are those from before: no sample was left, or --grad-norm-skip-threshold was passed."""
    batch: BatchFacts
    data_s: float = 0.0
    """Waiting for the cut batch, and the reference's forward pass of a KL objective."""
    forward_backward_s: float = 0.0
    """Also the reduction of gradients."""
    optimizer_s: float = 0.0
    params_norm: float | None = None
    """With --log-params-norm."""
    floating_point_operations: float = 0.0
    """Of forward and backward on all ranks, as Megatron counts them; rollouts and reference left out."""

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding left out."""
        return self.batch.num_tokens


@dataclass(kw_only=True)
class PreparedBatch:
    """A global batch that has been handed out; a thread cuts this rank's micro-batches."""

    facts: BatchFacts
    micro_batches: Future[list[MicroBatch]]
    """On the host."""


class Trainer:
    """Model, optimizer and schedule of one run, and what is done with them.

    Every method is a collective of the whole world.
    """

    def __init__(self, args: Any, config: RasftConfig, folder: HfFolder) -> None:
        self.args = args
        self.config = config
        self.folder = folder
        self.forward = Forward(config.objective, folder.shape.vocab_size)
        self.max_tokens = args.seq_length
        load, args.load = args.load, None
        # Megatron's check raises in mid-backward on the ranks that see the NaN, and the others wait for them.
        self._refuses_nan, args.check_for_nan_in_loss_and_grad = args.check_for_nan_in_loss_and_grad, False
        with quiet():
            self.model, self.optimizer, self.scheduler = training.setup_model_and_optimizer(
                ModelType.encoder_or_decoder, partial(build_chunk, args)
            )
        args.load, args.check_for_nan_in_loss_and_grad = load, self._refuses_nan
        self.chunks = unwrap_model(self.model)
        self._layer_offsets = [
            get_transformer_layer_offset(c.config, vp_stage=getattr(c, "vp_stage", None)) for c in self.chunks
        ]
        self._experts = ExpertGroups(
            parallel_state.get_expert_model_parallel_group(),
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_data_parallel_rank() == 0,
        )
        self._is_first_replica = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        load_into(
            self.model,
            folder,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            layer_offsets=self._layer_offsets,
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            experts=self._experts.ranks,
        )
        self.optimizer.reload_model_params()
        self.initial_weights = folder.path
        self._load_converted_weights()
        objective = config.objective
        self.reference = FrozenReference(self.model) if objective.needs_reference() else None
        if objective.needs_reference_distribution() and self.chunks[-1].post_process:
            assert self.reference is not None
            self.forward.ref_output_weight = self.reference.output_weight(self.chunks[-1])
        self._prepare_config()
        self.sampler = PolicySampler(self.chunks, folder.shape.vocab_size)
        self.stop = StopRequest(
            lambda: get_signal_handler()._signal_received,
            args.exit_duration_in_mins,
            training._TRAIN_START_TIME,
            self.sampler.device,
        )
        self._replicas = _replicas()
        self._cutter = ThreadPoolExecutor(1, "cut", _choose_device, (self.sampler.device,))
        self.iteration = 0
        self._gradients_at = 0.0
        """When the gradients of the step were there."""
        self._floating_point_operations = 0.0
        self._lacks_scales = has_delayed_scales(args)
        """Whether FP8 tensors are still scaled by 1; a checkpoint has the scales."""
        self._checkpointing_context: dict[str, Any] = {}
        self._saving_step: int | None = None
        """Of the checkpoint that is being written in the background."""
        if args.async_save:
            write_in_background(SaveQueue.for_run(args, self.sampler.device))
        if args.manual_gc:
            gc.disable()
            gc.collect()

    def _prepare_config(self) -> None:
        """The hooks that Megatron's train() hangs on the model's config."""
        args, config = self.args, get_model_config(self.model[0])
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = self._finalize_gradients
        config.timers = None
        if args.overlap_grad_reduce:
            config.no_sync_func = _one_or_list([m.no_sync for m in self.model])
            if args.align_grad_reduce:
                config.grad_sync_func = _one_or_list([m.start_grad_sync for m in self.model])
        if args.overlap_param_gather and args.align_param_gather:
            config.param_sync_func = _one_or_list([m.start_param_sync for m in self.model])
        self.model_config = config
        for chunk in self.model:
            chunk.train()

    def _finalize_gradients(self, *args: Any, **kwargs: Any) -> None:
        finalize_model_grads(*args, **kwargs)
        torch.cuda.synchronize()
        self._gradients_at = time.monotonic()

    @property
    def layout(self) -> BatchLayout:
        """How this rank cuts a global batch."""
        args = self.args
        tp, cp = args.tensor_model_parallel_size, args.context_parallel_size
        is_on_gpu = torch.cuda.is_available() and args.distributed_backend == "nccl"
        multiple = cp * (tp if args.sequence_parallel else 1) * _rank_multiple(args, is_on_gpu)
        interleaved = args.virtual_pipeline_model_parallel_size is not None
        return BatchLayout(
            micro_batch_size=args.micro_batch_size,
            seq_length=self.max_tokens,
            is_packed=self.config.run.rasft_batch_layout == "packed",
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_size=cp,
            token_multiple=multiple,
            micro_batch_multiple=args.pipeline_model_parallel_size if interleaved else 1,
            width_slack=WIDTH_SLACK if is_on_gpu else 0.0,
        )

    # ---- batches

    def prepare(self, batch: Batch | None) -> PreparedBatch:
        """Hand a global batch out and begin to cut it; a collective of the world.

        The ranks of a replica receive its share and nothing else. Only the cutting runs on a thread, beside the step before
        this one: collectives of two threads could come in another order on another rank.

        Args:
            batch: on rank 0; not read on the others.
        """
        layout = self.layout

        def work() -> list[BatchShard]:
            assert batch is not None, "rank 0 has the batches"
            return shard_batch(batch, layout)

        shard = hand_out(work, self._replicas)
        return PreparedBatch(facts=shard.facts, micro_batches=self._cutter.submit(self._cut, shard, layout))

    def _cut(self, shard: BatchShard, layout: BatchLayout) -> list[MicroBatch]:
        batches = build_micro_batches(shard, layout)
        return [batch.pinned() for batch in batches] if self.sampler.device.type == "cuda" else batches

    def _on_device(self, prepared: PreparedBatch) -> list[MicroBatch]:
        return [batch.to(self.sampler.device) for batch in prepared.micro_batches.result()]

    def _one_ahead(self, batches: Iterable[Batch | None]) -> Iterator[PreparedBatch]:
        """Prepare every batch before the one ahead of it is used."""
        waiting = None
        for batch in batches:
            prepared = self.prepare(batch)
            if waiting is not None:
                yield waiting
            waiting = prepared
        if waiting is not None:
            yield waiting

    # ---- the Policy of a refresh

    def score(self, samples: Sequence[TrainingSample], *, with_reference: bool) -> list[memoryview]:
        """On rank 0 per sample the fp32 log-probabilities of its response, nats; [] on the others.

        Args:
            samples: on rank 0; not read on the others.

        Raises:
            Stopped: the run is to stop.
        """
        size = _SCORED_BATCHES * self.args.global_batch_size
        # Log-probabilities that samples have already are for training.
        arrays = kept_by_rank_zero(lambda: SampleArrays.of(samples, with_logprobs=False), None)
        num = on_rank_zero(lambda: len(samples))

        def part(start: int, length: int) -> Batch | None:
            if arrays is None:
                return None
            return Batch(num_problems=0, samples=arrays.slice(start, min(num, start + length)))

        if num:
            first = part(0, self.args.global_batch_size)
            self._set_scales(
                lambda: self._on_device(self.prepare(first)), is_whole=num >= self.args.global_batch_size
            )
        parts = (part(start, size) for start in range(0, num, size))
        scored: list[memoryview] = []
        with self._settled(), contextlib.ExitStack() as reference:
            if with_reference and num:
                assert self.reference is not None, "only an objective with a reference asks for it"
                reference.enter_context(self.reference.in_place())
            for prepared in self._one_ahead(parts):
                self.stop.check()
                scored += self._score(prepared)
        return scored

    def _set_scales(self, first: Callable[[], list[MicroBatch]], *, is_whole: bool = True) -> None:
        """Before the first pass of a run under FP8's delayed recipe: set the scales of the policy, from one global batch.

        The reference, which takes the policy's place for its passes, is computed with the policy's scales.

        Args:
            first: gives the batch's micro-batches; a collective of the world.
            is_whole: False for fewer samples than a global batch, as the four probes of the first sync: they have seen too
                little for the reference, so that the next pass sets the scales once more.
        """
        if not self._lacks_scales:
            return
        self._lacks_scales = not is_whole
        batches = first()
        with self._settled():
            set_delayed_scales(lambda: run_forward_only(self.forward.score_step, batches, self.model))

    def _score(self, prepared: PreparedBatch) -> list[memoryview]:
        batches = self._on_device(prepared)
        outputs = run_forward_only(self.forward.score_step, batches, self.model)
        mine: dict[int, Array] = {}
        cp_group = parallel_state.get_context_parallel_group()
        for output, batch in zip(outputs, batches[: len(outputs)], strict=True):
            mine |= response_values(output, batch, cp_group)
        speaks = (
            parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )
        # Joined, because an array of its own for each sample takes longer to pickle than its values.
        indices, lengths = np.array(list(mine), np.int64), np.array([len(v) for v in mine.values()], np.int64)
        joined = (indices, lengths, np.concatenate(list(mine.values()))) if speaks and mine else None
        merged: dict[int, memoryview] = {}
        for part, counts, values in gather_to_rank_zero(joined):
            merged |= zip(part.tolist(), views(values, counts), strict=True)
        return [merged[i] for i in range(len(merged))]

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Response]]:
        """Sample the live weights; see PolicySampler.generate."""
        replica = parallel_state.get_model_parallel_group()
        with self._settled():
            return self.sampler.generate(requests, params, lambda: self.stop.is_asked(replica))

    def weight_sync(self, connect: Callable[[str], Server]) -> WeightSync:
        """What takes this model's weights to rollout servers.

        Args:
            connect: address -> control plane of a server.
        """
        bound: dict[str, Any] = {
            "layer_offsets": self._layer_offsets,
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "experts": self._experts,
        }
        is_first = self._is_first_replica
        return WeightSync(
            self.config.sync,
            plan=partial(plan_tensors, self.model, self.folder.table, **bound),
            gather=partial(gather_tensors, self.model, self.folder.table, is_first_replica=is_first, **bound),
            connect=connect,
            model_config=self.folder.config,
            device=self.sampler.device,
            stage=parallel_state.get_pipeline_model_parallel_rank(),
            num_stages=parallel_state.get_pipeline_model_parallel_world_size(),
            takes_part=is_first or self._experts.is_first_replica,
            export=self.export,
        )

    def push_weights(self, sync: WeightSync, weight_version: int, urls: Sequence[str]) -> SyncReport:
        """Bring the servers the weights as they are now; see WeightSync.push."""
        with self._settled():
            return sync.push(weight_version, urls)

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """With overlapped parameter gathering: have all weights here, and nothing gathered behind our back.

        Before the first step, too: replicas sample at their own pace, and one without a request takes part in no gathering.
        """
        if not (self.args.use_distributed_optimizer and self.args.overlap_param_gather):
            yield
            return
        if not getattr(self.model[0], "remove_forward_pre_hook_handles", None):
            # Settled already, as in the export of a sync over the disk; or Megatron-FSDP, which gathers by hooks of its own.
            yield
            return
        # No step has changed the weights yet: every rank has all of them.
        training.disable_forward_pre_hook(self.model, param_sync=self.iteration > 0)
        try:
            yield
        finally:
            training.enable_forward_pre_hook(self.model)

    # ---- training

    def step(self, samples: Sequence[TrainingSample], num_problems: int) -> StepResult:
        """``train`` on samples that are at hand; those of rank 0 count."""
        batch = kept_by_rank_zero(
            lambda: Batch(num_problems=num_problems, samples=SampleArrays.of(samples)), None
        )
        return self.train(self.prepare(batch))

    def train(self, prepared: PreparedBatch) -> StepResult:
        """One optimizer step on a global batch; without any sample only the schedules move on.

        Raises:
            RasftError: the gradient is not finite, on every rank; --no-check-for-nan-in-loss-and-grad trains on.
        """
        args, facts = self.args, prepared.facts
        learning_rate = _learning_rate(self.optimizer)
        if not facts.num_samples:
            self.scheduler.step(increment=args.global_batch_size)
            self.iteration += 1
            args.consumed_train_samples += facts.num_problems
            return StepResult(
                metrics={}, grad_norm=0.0, learning_rate=learning_rate, is_skipped=True, batch=facts
            )
        began = time.monotonic()
        batches = self._on_device(prepared)
        self._set_scales(lambda: batches)
        if self.config.objective.needs_reference_distribution():
            assert self.reference is not None
            self.forward.ref_hidden = {}
            with self._settled(), self.reference.in_place():
                run_forward_only(self.forward.reference_step, batches, self.model)
        width = batches[0].tokens.shape[1] * args.context_parallel_size
        iterators = [iter(batches) for _ in self.model]
        ready = time.monotonic()
        with self._batch_shape(width, batches[0].tokens.shape[0], len(batches)):
            metrics, skipped, _, _, _, grad_norm, *_ = training.train_step(
                self.forward.train_step,
                iterators if len(iterators) > 1 else iterators[0],
                self.model,
                self.optimizer,
                _OncePerStep(self.scheduler, args.global_batch_size),
                self.model_config,
                get_forward_backward_func(),
                iteration=self.iteration,
            )
        self.forward.ref_hidden = {}
        self.iteration += 1
        args.consumed_train_samples += facts.num_problems
        if args.manual_gc and args.manual_gc_interval and self.iteration % args.manual_gc_interval == 0:
            gc.collect()
        updated = time.monotonic()
        values = gather_to_all({k: float(v) for k, v in metrics.items()})
        reported = max(values, key=len)  # the last pipeline stage has them
        grad_norm = float(grad_norm or 0.0)
        if self._refuses_nan and not math.isfinite(grad_norm):
            self.finish_saves()  # the weights from before this step, to go on from
            raise RasftError(
                f"step {self.iteration} has no finite gradient (loss {reported.get('loss', math.nan):g}, gradient norm "
                f"{grad_norm:g}): the run has diverged, and nothing of this step is saved. Go on from the last checkpoint, or from "
                "an earlier one (--ckpt-step), with a lower --lr (and --override-opt_param-scheduler)."
            )
        floating_point_operations = training.num_floating_point_operations(
            args,
            facts.num_samples,
            seqlen_squared_sum_in_batch=facts.squared_tokens,
            total_real_tokens_in_batch=facts.num_tokens,
        )
        self._floating_point_operations += floating_point_operations
        return StepResult(
            metrics=reported,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            is_skipped=bool(skipped),
            batch=facts,
            params_norm=calc_params_l2_norm(self.model) if args.log_params_norm else None,
            floating_point_operations=floating_point_operations,
            data_s=ready - began,
            forward_backward_s=self._gradients_at - ready,
            optimizer_s=updated - self._gradients_at,
        )

    @contextlib.contextmanager
    def _batch_shape(self, width: int, rows: int, num_batches: int) -> Iterator[None]:
        """Tell Megatron, which reads them from its arguments, this step's shape and number of micro-batches."""
        args = self.args
        kept = args.seq_length, args.micro_batch_size
        args.seq_length, args.micro_batch_size = width, rows
        dp = parallel_state.get_data_parallel_world_size()
        try:
            _set_num_microbatches(num_batches * dp, 1, dp)
            yield
        finally:
            args.seq_length, args.micro_batch_size = kept
            _set_num_microbatches(args.global_batch_size, args.micro_batch_size, dp)

    # ---- checkpoints

    def save(self, state: Callable[[], tuple[dict[str, Any], dict[str, Array]]]) -> None:
        """Write a checkpoint and this run's state; an earlier checkpoint stays until this one is complete.

        With --async-save it is complete after a later ``finish_saves``; nothing may be unfinished when this is called.

        Args:
            state: gives what JSON can hold, and arrays; called on rank 0.
        """
        args = self.args
        folder = Path(checkpointing.get_checkpoint_name(args.save, self.iteration, return_base_dir=True))

        def write() -> None:
            values, arrays = state()
            has_scales = has_delayed_scales(args) and not self._lacks_scales
            write_state(folder, {**values, _HAS_SCALES: has_scales}, arrays)

        with save_explained(f"the checkpoint of step {self.iteration}", folder):
            on_rank_zero(write)
            with self._settled(), quiet():
                checkpointing.save_checkpoint(
                    self.iteration,
                    self.model,
                    self.optimizer,
                    self.scheduler,
                    self._floating_point_operations,
                    checkpointing_context=self._checkpointing_context,
                )
        if args.async_save:
            self._saving_step = self.iteration

    def resume(self) -> tuple[dict[str, Any], dict[str, Array]] | None:
        """Load the newest checkpoint of --save, before there is one that of --load, if any.

        Returns:
            The state on every rank, and the arrays saved with it, on rank 0 only; None without a checkpoint.
        """
        args = self.args
        if args.load is None or not checkpointing.checkpoint_exists(args.load):
            return None
        load = Path(args.load)
        state: dict[str, Any] | None = on_rank_zero(lambda: read_state(args, load))
        if state is None:
            raise CheckpointError(
                f"checkpoint {chosen_folder(args, load)} has no {STATE_FILE}: it was not written by this program. Use "
                "--hf-model with an exported folder to start from those weights."
            )
        arrays: dict[str, Array] = kept_by_rank_zero(
            lambda: read_arrays(chosen_folder(args, load), state), {}
        )
        with load_explained(args, load), own_scales_loaded(args), quiet():
            iteration, self._floating_point_operations = checkpointing.load_checkpoint(
                self.model,
                self.optimizer,
                self.scheduler,
                checkpointing_context=self._checkpointing_context,
            )
        self.iteration = args.iteration = iteration
        # A run that switches to the recipe goes on from a checkpoint without scales, and its reference is scored anew.
        self._lacks_scales = has_delayed_scales(args) and not state.get(_HAS_SCALES, False)
        return state, arrays

    def initial_fingerprint(self) -> str:
        """Names the weights that this run began with, which are the reference's; for rank 0."""
        if self.initial_weights == self.folder.path:
            return weights_fingerprint(self.folder.path, "")
        return checkpoint_fingerprint(self.initial_weights)

    def _load_converted_weights(self) -> None:
        """Start from --load where that is a converted checkpoint: weights without a training state.

        The run's own checkpoints are then looked for in --save.
        """
        args = self.args
        if not on_rank_zero(lambda: args.load is not None and is_converted(args.load)):
            return
        weights = f"{args.load}/{RELEASE}"
        try:
            made_for = dist_checkpointing.load_common_state_dict(weights)["args"]
            refuse_other_model(weights, architecture_of(made_for), architecture_of(args))
            with quiet():
                checkpointing.load_checkpoint(self.model, self.optimizer, self.scheduler)
        except (AssertionError, *LOAD_FAILURES) as error:
            raise CheckpointError(
                f"the weights in {args.load} cannot be loaded: {checkpoint_failure(error).rstrip('.')}. They are damaged or "
                "do not fit this model: convert the --hf-model again."
            ) from error
        self.optimizer.reload_model_params()
        self.initial_weights = Path(weights)
        args.load = args.save

    def finish_saves(self, *, is_blocking: bool = True) -> int | None:
        """Complete the checkpoint that is being written in the background (--async-save), waiting for it or not.

        Returns:
            Its step, if it is complete now; None if it is not, or if none was being written.
        """
        if self._saving_step is None:
            return None
        # With --save-retain-interval Megatron forks a process that deletes the checkpoint before: no thread may hold a lock then.
        self._cutter.submit(int).result()
        with save_explained(f"the checkpoint of step {self._saving_step}", Path(self.args.save)), quiet():
            training.maybe_finalize_async_save(blocking=is_blocking)
        if not is_empty_async_queue():
            return None
        step, self._saving_step = self._saving_step, None
        return step

    def export(self, path: str, facts: dict[str, str] | None = None) -> None:
        """Write the model as a Hugging Face folder, in the type it was trained in: what was learnt is not rounded.

        Args:
            path: must not exist, or be an empty folder.
            facts: of the run, for the model card; None writes no card.
        """
        with self._settled():
            export(
                self.model,
                self.folder,
                path,
                layer_offsets=self._layer_offsets,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
                is_first_replica=self._is_first_replica,
                experts=self._experts,
                dtype=self.args.params_dtype,
                facts=facts,
            )


class _OncePerStep:
    """The learning-rate schedule counts global batches, whatever number of micro-batches one was cut into."""

    def __init__(self, scheduler: Any, increment: int) -> None:
        self._scheduler = scheduler
        self._increment = increment

    def step(self, increment: int) -> None:
        self._scheduler.step(increment=self._increment)


def writers() -> tuple[Any | None, Any | None]:
    """Megatron's TensorBoard and Weights & Biases writers; on most ranks None."""
    return get_tensorboard_writer(), get_wandb_writer()


def _rank_multiple(args: Any, is_on_gpu: bool) -> int:
    """Tokens of a micro-batch on one rank are a multiple of this, for the matrix kernels.

    The last dimension of an FP8 operand is a multiple of 16 (assert_dim_for_fp8_exec in transformer_engine/pytorch/utils.py),
    and in the gradient of a weight that dimension is the tokens. Block scales cover 128 of them, those of mxfp8 32.
    """
    if args.fp8 is not None:
        return {"blockwise": 128, "mxfp8": 32, "delayed": 16, "tensorwise": 16}.get(str(args.fp8_recipe), 128)
    if args.fp4 is not None:
        return 128
    return 8 if is_on_gpu else 1


def _choose_device(device: torch.device) -> None:
    """For a new thread, which begins on the first GPU of the node: pinning there makes a context for each process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _replicas() -> list[list[int]]:
    """The ranks of each data-parallel replica; a collective of the world."""
    found: list[list[int]] = [[] for _ in range(parallel_state.get_data_parallel_world_size())]
    for rank, replica in enumerate(gather_to_all(parallel_state.get_data_parallel_rank())):
        found[replica].append(rank)
    return found


def _set_num_microbatches(global_batch_size: int, micro_batch_size: int, dp: int) -> None:
    reconfigure_num_microbatches_calculator(
        rank=1,  # silences the log line of rank 0
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_parallel_size=dp,
    )


def _learning_rate(optimizer: Any) -> float:
    return max((g["lr"] for g in optimizer.param_groups if not math.isnan(g["lr"])), default=0.0)


def _one_or_list(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values
