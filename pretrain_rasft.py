"""Train a reasoning model with Rollout-Adaptive Supervised Fine-Tuning on Megatron-Core.

torchrun --nproc-per-node N pretrain_rasft.py --hf-model DIR --train-data FILE.jsonl [any Megatron flag]
"""

import sys
import traceback

if __name__ == "__main__":
    from megatron_rasft.config.command_line import answer_early

    answer_early(sys.argv[1:])

    from megatron_rasft.monitoring import early_stop
    from megatron_rasft.scratch import use_own_folder

    use_own_folder()
    early_stop.remember()

# multiprocessing runs this file once more in every process that it spawns, for example in Megatron's checkpoint writer. These
# processes need none of the imports below, which take ten seconds and 800 MB.
if __name__ != "__mp_main__":
    from megatron_rasft.errors import FailedElsewhere, RasftError, tell_launcher
    from megatron_rasft.machine import cpu_backend, gpu_kernels
    from megatron_rasft.monitoring.failures import report_failure

    try:
        gpu_kernels.check_transformer_engine()
    except RasftError as error:
        sys.exit(report_failure(error))
    cpu_backend.enable()
    cpu_backend.use_cpu_fused_adam()

    import torch.distributed as dist

    from megatron_rasft.checkpoints.background_saves import end_process
    from megatron_rasft.checkpoints.finished_runs import finished_before
    from megatron_rasft.checkpoints.resume import find_resume
    from megatron_rasft.monitoring import stalls
    from megatron_rasft.monitoring.stopping import Stopped
    from megatron_rasft.ranks import on_rank_zero
    from megatron_rasft.training import startup
    from megatron_rasft.training.assembly import build_run
    from megatron_rasft.training.outputs import check_outputs
    from megatron_rasft.training.problems import open_replay, read_problems, set_length
    from megatron_rasft.training.resume_checks import check_resume
    from megatron_rasft.training.trainer import Trainer


def main() -> None:
    """One run, top to bottom."""
    args, config, folder = startup.parse()
    resume = find_resume(args)
    if config.run.dry_run:
        from megatron_rasft.tools.dry_run import print_dry_run  # a run itself imports nothing of tools/

        return print_dry_run(args, config, resume)
    startup.start(args)
    check_outputs(args, config)
    problems, heldout = read_problems(args, config)
    replay = open_replay(config, problems)
    set_length(args, config, problems.num)
    on_rank_zero(lambda: check_resume(args, config, resume, problems))
    if finished_before(args, resume):
        return
    stalls.start_watch(args)
    trainer = Trainer(args, config, folder, resume.converted)
    with build_run(args, config, folder, problems, heldout, replay, trainer, resume) as run:
        try:
            run.begin()
            run.measure_if_due()
            while not run.is_over:
                if run.needs_refresh:
                    refresh = run.start_refresh()
                    choice = refresh.choose_problems()
                    refresh.sync_weights(choice)
                    groups = refresh.sample(choice)
                    refresh.sample_ahead(choice)  # with --rollout-lag 1; without, servers on these GPUs sleep
                    refresh.verify(groups)
                    samples = refresh.weigh(choice, groups)
                    refresh.score_reference(samples)
                    run.finish_refresh(samples)
                run.train_step()
                run.save_if_due()
                run.measure_if_due()
            run.finish()
        except Stopped:
            run.stop()


if __name__ == "__main__":
    code = 0
    try:
        main()
    except (ValueError, RasftError, FailedElsewhere, KeyboardInterrupt) as error:
        code = report_failure(error)
    except Exception:
        tell_launcher(traceback.format_exc())  # of an error that is not expected here
        raise
    finally:
        stalls.end_watch()
    if dist.is_initialized():
        dist.destroy_process_group()
    end_process(code)
