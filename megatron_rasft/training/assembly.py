"""Builds a run from its parts: files, servers, refresh, held-out problems."""

from typing import Any

import torch.distributed as dist

from megatron_rasft.checkpoints.checkpointer import Checkpointer
from megatron_rasft.checkpoints.finished_runs import num_steps
from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.config import RasftConfig
from megatron_rasft.model.fp8_scales import has_delayed_scales
from megatron_rasft.ranks import kept_by_rank_zero, on_rank_zero
from megatron_rasft.rollout.replay import ReplayEngine
from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.servers.record import ServerRecords
from megatron_rasft.training.heldout import Heldout
from megatron_rasft.training.outputs import reference_cache
from megatron_rasft.training.problems import Problems
from megatron_rasft.training.record import RunRecord
from megatron_rasft.training.reference import LogprobCache, initial_fingerprint, logprobs_fingerprint
from megatron_rasft.training.refresh import Refresh, sampling_params
from megatron_rasft.training.refresh_driver import RefreshDriver
from megatron_rasft.training.remarks import remarks
from megatron_rasft.training.rollout_servers import RolloutServers, read_keys
from megatron_rasft.training.run import Run
from megatron_rasft.training.schedule import Schedule
from megatron_rasft.training.startup import writers
from megatron_rasft.training.trainer import Trainer
from megatron_rasft.verify.pool import VerifierPool
from megatron_rasft.weights.folder import ModelFolder
from megatron_rasft.wording import counted


def build_run(
    args: Any,
    config: RasftConfig,
    folder: ModelFolder,
    problems: Problems,
    heldout: Problems | None,
    replay: ReplayEngine | None,
    trainer: Trainer,
    resume: Resume,
) -> Run:
    """Builds the run that the arguments describe, ready for ``begin``. A collective of the world.

    Args:
        folder: the folder --hf-model.
        heldout: problems that are measured and never trained; None without --heldout-data.
        replay: stored rollouts, on rank 0 of a run that replays them.
        resume: where the run resumes from.
    """
    is_rank_zero = dist.get_rank() == 0
    tensorboard, wandb = writers()
    record = RunRecord(args, config, is_rank_zero=is_rank_zero, tensorboard=tensorboard, wandb=wandb)
    initial_weights: str = on_rank_zero(lambda: initial_fingerprint(folder.path, resume.converted))
    servers = None
    if config.samples_from_servers:
        known = ServerRecords(read_keys(config.rollout))
        servers = RolloutServers(config.rollout, trainer, folder.config, known, record.say, is_rank_zero)
    stop_ids = problems.stop_ids(args)
    verifier = VerifierPool(config.verify) if is_rank_zero and config.verifies else None
    sampling = sampling_params(config, stop_ids, trainer.max_tokens)
    decisions: Refresh | None = kept_by_rank_zero(
        lambda: Refresh(
            config,
            problems.demonstrations,
            batch_size=args.global_batch_size,
            total_steps=args.train_iters,
            sampling=sampling,
            decode=problems.decode,
            verifier=verifier,
            replay=replay,
            store=None if record.rollouts_path is None else RolloutStore(record.rollouts_path),
            cache=open_cache(args, config, initial_weights),
            function_digest=verifier.function.digest if verifier and verifier.function else "",
        ),
        None,
    )
    return Run(
        args,
        config,
        trainer=trainer,
        checkpoints=Checkpointer(args, trainer, resume, trainer.sampler.device),
        refresh=RefreshDriver(
            config,
            decisions,
            policy=trainer,
            servers=servers,
            sampling=sampling,
        ),
        record=record,
        heldout=None if heldout is None else Heldout(config, heldout, trainer, stop_ids, verifier),
        verifier=verifier,
        servers=servers,
        initial_weights=initial_weights,
        introduction=[
            describe_run(args, config, problems.num),
            *problems.summary.splitlines(),
            *([] if heldout is None else heldout.left_out_lines()),
            *filter(None, [schedule_of(args, config, problems.num).left_out()]),
            *remarks(config, args.given_flags, problems.num_programs),
        ],
    )


def schedule_of(args: Any, config: RasftConfig, num_problems: int) -> Schedule:
    """The steps and refreshes of a run whose length is set."""
    return Schedule.of(
        num_problems, args.global_batch_size, num_steps(args), config.run.rasft_refresh_interval
    )


def open_cache(args: Any, config: RasftConfig, initial_weights: str) -> LogprobCache | None:
    """The cache of reference log-probabilities; None if the objective needs none.

    Log-probabilities depend on the reference's weights and on the precision, so both name the cache's entries.
    """
    if not config.objective.scores_under_reference():
        return None
    fingerprint = logprobs_fingerprint(
        initial_weights, args.params_dtype, args.fp8, args.fp8_recipe, is_scaled=has_delayed_scales(args)
    )
    return LogprobCache(reference_cache(args, config), fingerprint)


def runs_on_gpu(args: Any) -> bool:
    """Returns whether a run trains on GPUs, by its parsed arguments."""
    return args.distributed_backend == "nccl"


def describe_run(args: Any, config: RasftConfig, num_problems: int) -> str:
    """The first line of a run: objective, model, length, processes, layout and precision."""
    device = "GPU" if runs_on_gpu(args) else "CPU"
    return (
        f"{config.objective.name} on {args.hf_model}: {counted(num_problems, 'problem')}, {counted(num_steps(args), 'step')} of "
        f"{args.global_batch_size}, {counted(args.world_size, device + ' process', device + ' processes')}, tp {args.tensor_model_parallel_size} pp "
        f"{args.pipeline_model_parallel_size} cp {args.context_parallel_size}, {str(args.params_dtype)[6:]}"
    )
