"""The parts of a run that pretrain_rasft.py names: planner, the queue of batches, the report."""

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_rasft import metrics
from megatron_rasft.config import RasftConfig
from megatron_rasft.errors import CheckpointError
from megatron_rasft.files import write_json, written_to
from megatron_rasft.ranks import on_rank_zero
from megatron_rasft.rollout.replay import ReplayEngine
from megatron_rasft.rollout.store import RolloutStore
from megatron_rasft.training.checkpoints import architecture_of
from megatron_rasft.training.fp8_scales import has_delayed_scales
from megatron_rasft.training.heldout import Heldout
from megatron_rasft.training.outputs import (
    AppendedFile,
    metrics_file,
    reference_cache,
    rollouts_file,
    take_up_files,
)
from megatron_rasft.training.problems import Problems
from megatron_rasft.training.progress import Progress
from megatron_rasft.training.reference import LogprobCache
from megatron_rasft.training.refresh import Planner, RefreshReport
from megatron_rasft.training.rollout_servers import RolloutServers, read_keys
from megatron_rasft.training.samples import Array, BatchQueue, SampleArrays
from megatron_rasft.training.stopping import Stopped
from megatron_rasft.training.trainer import PreparedBatch, StepResult, Trainer, writers
from megatron_rasft.verify.pool import VerifierPool
from megatron_rasft.weights.folder import HfFolder
from megatron_rasft.weights.model_card import run_facts


class Run:
    """One run: the queue of batches between planner and trainer, what is saved and what is said.

    Use it as a context manager: it owns the verifier's processes and the connections to rollout servers.
    """

    def __init__(
        self,
        args: Any,
        config: RasftConfig,
        folder: HfFolder,
        problems: Problems,
        heldout: Problems | None,
        replay: ReplayEngine | None,
        trainer: Trainer,
    ) -> None:
        self.args = args
        self.config = config
        self.trainer = trainer
        self.problems = problems
        self.total_steps = args.train_iters
        self.is_lead = torch.distributed.get_rank() == 0
        self._save = None if args.save is None else Path(args.save)
        self.verifier = VerifierPool(config.verify) if self.is_lead and config.verifies else None
        self._metrics = metrics_file(args, config)
        self._rollouts = rollouts_file(args, config)
        self._store: RolloutStore | None = None
        self._cache: LogprobCache | None = None
        self._initial_weights = ""
        on_rank_zero(self._open_files)
        tensorboard, wandb = writers()
        self.progress = Progress(
            self.total_steps,
            None if self._metrics is None else self._metrics.path,
            tensorboard,
            wandb,
            is_silent=not self.is_lead,
        )
        self.servers = self._servers(folder)
        self.planner = Planner(
            config,
            problems.demonstrations,
            batch_size=args.global_batch_size,
            total_steps=self.total_steps,
            policy=trainer,
            decode=problems.decode,
            stop_ids=problems.stop_ids(args),
            max_tokens=trainer.max_tokens,
            verifier=self.verifier,
            servers=self.servers,
            replay=replay,
            store=self._store,
            cache=self._cache,
        )
        self._heldout = (
            Heldout(config, heldout, trainer, self.planner.stop_ids, self.verifier)
            if heldout is not None
            else None
        )
        self.queue = BatchQueue()
        """Batches to be trained, with the one that is prepared."""
        self._prepared: PreparedBatch | None = None
        """The first batch of the queue, once the step before it has begun."""
        self._last_refresh: dict[str, float] = {}
        self._verdicts: Counter[str] = Counter()
        self._saved_step = 0
        """Of the checkpoint in --save that the run went on from or wrote last; step 0 needs none."""
        self._marks: dict[str, Any] = {}
        """Of the files as they were after the last step, on rank 0: what came later is made again from a checkpoint."""

    def _servers(self, folder: HfFolder) -> RolloutServers | None:
        rollout = self.config.rollout
        if rollout.rollout_engine != "sglang" or not self.config.samples_rollouts:
            return None
        return RolloutServers(
            rollout, self.trainer, folder.config, read_keys(rollout), self.progress.say, self.is_lead
        )

    def _open_files(self) -> None:
        """What rank 0 writes besides metrics."""
        self._initial_weights = self.trainer.initial_fingerprint()
        if self._rollouts is not None:
            self._store = RolloutStore(self._rollouts.path)
        if self.config.objective.needs_reference_logprobs():
            args = self.args
            precision = f"{args.params_dtype} {args.fp8} {args.fp8_recipe if args.fp8 else ''}"
            if has_delayed_scales(args):
                precision += " scaled"  # caches of earlier versions hold values made at scale 1
            self._cache = LogprobCache(
                reference_cache(args, self.config), f"{precision} {self._initial_weights}"
            )

    def __enter__(self) -> "Run":
        on_rank_zero(self._start_verifier)
        return self

    def _start_verifier(self) -> None:
        if self.verifier is not None:
            self.verifier.__enter__()

    def __exit__(self, *exc: Any) -> None:
        if self.verifier is not None:
            self.verifier.__exit__(*exc)
        if self.servers is not None:
            # they hold what a step was at, and servers on this GPU need the room
            traceback.clear_frames(exc[2])
            self.servers.close(is_clean=exc[0] is None)
        self.progress.close(int(exc[0] is not None))

    def begin(self) -> None:
        """Go on from a checkpoint if there is one, write the resolved configuration, and say what will be done."""
        resumed = self.trainer.resume()
        state = None
        if resumed is not None:
            state, arrays = resumed
            on_rank_zero(lambda: self._check_reference(state))
            self.queue = BatchQueue(state["queue"], SampleArrays(**arrays) if arrays else None)
            self._last_refresh = state["last_refresh"]
            self._verdicts = Counter(state["verdicts"])
            self.planner.load_state_dict(state["planner"])
            if self.args.load == self.args.save:
                self._saved_step = self.trainer.iteration
        on_rank_zero(lambda: self._take_up_files({} if state is None else state["files"]))
        args = self.args
        where = "GPU" if args.distributed_backend == "nccl" else "CPU"
        self.progress.say(
            f"{self.config.objective.objective} on {args.hf_model}: {self.problems.num} problems, {self.total_steps} steps of "
            f"{args.global_batch_size}, {args.world_size} {where} process(es), tp {args.tensor_model_parallel_size} pp "
            f"{args.pipeline_model_parallel_size} cp {args.context_parallel_size}, {str(args.params_dtype)[6:]}"
            + (f", going on after step {self.trainer.iteration}" if state is not None else "")
        )
        if self.problems.summary:
            self.progress.say(self.problems.summary)

    def _check_reference(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another reference than the run began with."""
        known = state.get("initial_weights", self._initial_weights)
        if self.config.objective.needs_reference() and known != self._initial_weights:
            raise CheckpointError(
                f"the run began with other weights than those of {self.trainer.initial_weights}, which would now become its "
                "reference. Give the --hf-model, and the --load of converted weights, that it began with."
            )

    @property
    def _files(self) -> dict[str, AppendedFile]:
        """What this run appends to, by the name that checkpoints know it by."""
        files = {"metrics": self._metrics, "rollouts": self._rollouts}
        return {name: file for name, file in files.items() if file is not None}

    def _take_up_files(self, marks: dict[str, Any]) -> None:
        load = None if self.args.load is None else Path(self.args.load)
        if self._save is not None:
            self._save.mkdir(parents=True, exist_ok=True)
        for line in take_up_files(self._files, marks, load, self._save):
            self.progress.say(line)
        self._mark_files()
        if self._save is not None:
            path = self._save / "config.json"
            with written_to(path, "--save"):
                write_json(path, self._resolved())

    def _record(self, report: Callable[[], None]) -> None:
        """Each rank has its own part in a report; what the first one cannot write ends all."""
        if not self.is_lead:
            report()
        on_rank_zero(report)

    def _mark_files(self) -> None:
        self._marks = {name: file.mark() for name, file in self._files.items()}

    def measure_if_due(self) -> None:
        """The held-out solve rate, before the first step, after the last, and every --heldout-interval steps."""
        step, interval = self.trainer.iteration, self.config.heldout.heldout_interval
        is_due = step == 0 or self.is_over or (interval > 0 and step % interval == 0)
        if self._heldout is None or not is_due:
            return
        began = time.monotonic()
        values = self._heldout.measure(step)
        text = (
            f"held out: {values[metrics.HELDOUT_SOLVE_RATE]:.1%} of {self._heldout.num_problems} problems solved after "
            f"step {step}, {time.monotonic() - began:.1f} s"
        )
        self._record(lambda: self.progress.refresh(step, values, text))

    @property
    def is_over(self) -> bool:
        return self.trainer.iteration >= self.total_steps

    def refresh_if_due(self) -> None:
        """Refill the queue when it has run dry."""
        if self.queue:
            return
        began = time.monotonic()
        self.queue, report = self.planner.refresh(self.trainer.iteration)
        self._last_refresh = _refresh_values(report)
        self._verdicts += report.verdicts
        line = _refresh_line(report, time.monotonic() - began)
        self._record(lambda: self.progress.refresh(self.trainer.iteration, self._last_refresh, line))

    def train_step(self) -> None:
        """One step on the next batch, and its line."""
        began = time.monotonic()
        prepared = self._prepared or self.trainer.prepare(self.queue.batch(0))
        self._prepared = self.trainer.prepare(self.queue.batch(1)) if len(self.queue) > 1 else None
        result = self.trainer.train(prepared)
        self.queue.popleft()
        values = self._step_values(result, time.monotonic() - began)
        self._record(lambda: self.progress.step(self.trainer.iteration, values))
        if result.is_skipped:
            self.progress.say(f"step {self.trainer.iteration} changed no weight: {_why_skipped(result)}")
        elif not math.isfinite(result.grad_norm):
            self.progress.say(f"step {self.trainer.iteration} trained on a gradient that is not finite")
        if self.is_lead:
            self._mark_files()

    def _step_values(self, result: StepResult, seconds: float) -> dict[str, float]:
        values = {f"objective/{name}": value for name, value in result.metrics.items()}
        values[metrics.GRAD_NORM] = result.grad_norm
        values[metrics.LEARNING_RATE] = result.learning_rate
        values[metrics.NUM_SAMPLES] = result.batch.num_samples
        values[metrics.NUM_TOKENS] = result.num_tokens
        values[metrics.QUEUE] = len(self.queue)
        values[metrics.STEP_S] = seconds
        values[metrics.DATA_S] = result.data_s
        values[metrics.FORWARD_BACKWARD_S] = result.forward_backward_s
        values[metrics.OPTIMIZER_S] = result.optimizer_s
        values[metrics.TOKENS_PER_S] = result.num_tokens / seconds
        if result.params_norm is not None:
            values[metrics.PARAMS_NORM] = result.params_norm
        if self.args.log_throughput:
            flops_per_s = result.floating_point_operations / seconds
            values[metrics.GPU_TFLOP_PER_S] = flops_per_s / self.args.world_size / 1e12
        if metrics.SOLVE_RATE in self._last_refresh:
            values[metrics.SOLVE_RATE] = self._last_refresh[metrics.SOLVE_RATE]
        for kind, name in (
            ("demonstration", metrics.DEMONSTRATION_WEIGHT),
            ("rollout", metrics.ROLLOUT_WEIGHT),
        ):
            if kind in result.batch.mean_weights:
                values[name] = result.batch.mean_weights[kind]
        return values

    def save_if_due(self) -> None:
        """Save every --save-interval steps and at the end.

        Raises:
            Stopped: on --exit-signal, after --exit-duration-in-mins, and every --exit-interval steps.
        """
        step, args = self.trainer.iteration, self.args
        self._finish_saves(is_blocking=False)
        if self.is_over or (args.save_interval and step % args.save_interval == 0):
            self._save_once()
        self.trainer.stop.check()
        if args.exit_interval and step % args.exit_interval == 0 and not self.is_over:
            raise Stopped

    def _save_once(self) -> None:
        if self._save is not None and self._saved_step != self.trainer.iteration:
            self._finish_saves()
            began = time.monotonic()
            self.trainer.save(self._state)
            self._saved_step = self.trainer.iteration
            done = "step {} is being saved" if self.args.async_save else "saved step {}"
            self.progress.say(f"{done.format(self._saved_step)}, {time.monotonic() - began:.1f} s")

    def _finish_saves(self, *, is_blocking: bool = True) -> None:
        """See Trainer.finish_saves."""
        step = self.trainer.finish_saves(is_blocking=is_blocking)
        if step is not None:
            self.progress.say(f"saved step {step} in the background")

    def stop(self) -> None:
        """Save, so that the same command goes on from the last step, and say so."""
        reason = self.trainer.stop.reason() or f"--exit-interval {self.args.exit_interval}"
        self._save_once()
        self._finish_saves()
        step = self.trainer.iteration
        if not step:
            outcome = "before the first step; the same command begins anew"
        elif self._save is None:
            outcome = f"after step {step}; --save was not given"
        else:
            outcome = f"after step {step}; saved, the same command goes on from here"
        self.progress.say(f"stopped by {reason} {outcome}")

    def _state(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """What JSON holds, and the queue's samples; rank 0 only."""
        state = {
            "planner": self.planner.state_dict(),
            "initial_weights": self._initial_weights,
            "files": self._marks,
            "queue": self.queue.sizes,
            "last_refresh": self._last_refresh,
            "verdicts": self._verdicts,
            "architecture": architecture_of(self.args),
        }
        return state, self.queue.arrays()

    def _resolved(self) -> dict[str, Any]:
        """Every flag's value."""
        return {
            "rasft": self.config.as_dict(),
            "megatron": {k: str(v) for k, v in sorted(vars(self.args).items())},
        }

    def finish(self) -> None:
        """Wait for saves, export the model, and say what became of the rollouts."""
        self._finish_saves()
        self.trainer.stop.check()
        if self.args.export_hf is not None:
            metrics_path = None if self._metrics is None else self._metrics.path
            facts = run_facts(self._resolved(), metrics_path, self.trainer.iteration)
            self.trainer.export(self.args.export_hf, facts)
            self.progress.say(f"exported to {self.args.export_hf}")
        if self._verdicts:
            counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(self._verdicts.items()))
            self.progress.say(f"rollouts: {counts}")


def _why_skipped(result: StepResult) -> str:
    if not result.batch.num_samples:
        return "none of its problems has anything to train on"
    return "its gradient is above --grad-norm-skip-threshold, or has no finite norm"


def _refresh_values(report: RefreshReport) -> dict[str, float]:
    total = max(1, report.num_rollouts)
    return {
        metrics.SOLVE_RATE: report.solve_rate,
        metrics.SOLVED_PROBLEMS: report.num_solved / report.num_sampled
        if report.num_sampled
        else float("nan"),
        metrics.DEMONSTRATION_WEIGHT: report.demonstration_weight,
        metrics.ROLLOUT_WEIGHT: report.rollout_weight,
        "rollout/num_rollouts": report.num_rollouts,
        "rollout/response_tokens_mean": report.mean_response_tokens,
        "verify/filtered_frac": report.num_filtered / total,
        **{f"verify/{verdict}_frac": count / total for verdict, count in report.verdicts.items()},
        "curriculum/sampled_problems": report.num_sampled,
        "curriculum/difficulty_mean_nats": report.mean_difficulty,
        "rollout/generate_s": report.generate_s,
        "verify/verify_s": report.verify_s,
        "curriculum/score_s": report.score_s,
        "training/reference_s": report.reference_s,
        **report.served,
    }


def _refresh_line(report: RefreshReport, seconds: float) -> str:
    line = f"refresh: {report.num_problems} problems"
    if report.score_s:
        line += f", score {report.score_s:.1f} s"
    if report.num_rollouts:
        line += (
            f", {report.num_rollouts} rollouts of {report.num_sampled}, {report.solve_rate:.1%} correct, "
            f"{report.num_solved} solved at least once, {report.num_filtered} filtered, "
            f"{report.mean_response_tokens:.0f} tokens each; generate {report.generate_s:.1f} s, verify {report.verify_s:.1f} s,"
        )
    return f"{line} reference {report.reference_s:.1f} s, {seconds:.1f} s in all"
