"""Evaluates a model on mathematical and code benchmarks. The defaults are the published protocol.

evaluate.py run --model DIR --data-folder DIR --output DIR [--benchmarks NAME[=FILE] ...] [any Megatron flag]
evaluate.py run --checkpoint DIR ...           the newest Megatron checkpoint of a run
evaluate.py run --server URL... --model DIR    running SGLang servers; DIR gives the tokenizer
evaluate.py show OUTPUT [--benchmark NAME] [--problem ID] [--verdict wrong] [--limit N]
evaluate.py table OUTPUT [OUTPUT ...] [--format markdown|csv|latex]

After an interruption, the same command continues. torchrun distributes the work over processes and GPUs.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

if not __package__:  # lets the file run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_rasft.checkpoints.resume import Resume
from megatron_rasft.config.command_line import run_parser
from megatron_rasft.config.config_file import CONFIG_FLAG, naming_lines
from megatron_rasft.config.data import DataConfig
from megatron_rasft.config.parser import FlagParser, add_flags
from megatron_rasft.config.saved import CONFIG_FILE, SavedConfig
from megatron_rasft.data.chat_format import read_chat_format
from megatron_rasft.data.response_text import response_decoder
from megatron_rasft.data.tokenizer import end_ids, open_tokenizer
from megatron_rasft.data.tokenizing import tokenize_prompts
from megatron_rasft.errors import CheckpointError, DataError, RasftError
from megatron_rasft.monitoring import live
from megatron_rasft.rollout.store import read_rollouts
from megatron_rasft.scratch import use_own_folder
from megatron_rasft.servers.keys import read_key
from megatron_rasft.tools import cli
from megatron_rasft.tools.evaluation.benchmark_grading import (
    Grader,
    graded_by,
    try_function_on,
    verify_config,
)
from megatron_rasft.tools.evaluation.benchmark_sampling import Engine, Order, sample_benchmarks
from megatron_rasft.tools.evaluation.benchmarks import Benchmark, chosen, read_benchmark
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.tools.evaluation.output_folder import TABLE_WRITERS, OutputFolder
from megatron_rasft.tools.evaluation.own_sets import FIELDS
from megatron_rasft.tools.evaluation.questions import ask
from megatron_rasft.tools.evaluation.server_engine import Servers
from megatron_rasft.tools.evaluation.summary import Summary, summarise
from megatron_rasft.types import SamplingParams
from megatron_rasft.verify.programs.program_grading import find_sandbox_level
from megatron_rasft.weights.folder import HfFolder, checkpoint_fingerprint, weights_fingerprint
from megatron_rasft.weights.tracker import TRACKER_FILE, has_checkpoint
from megatron_rasft.wording import counted

DRAWN_BY = (
    "model checkpoint weights dtype temperature top_p max_new_tokens seed prompt_suffix code_prompt_suffix system_prompt chat_template "
    "graded_by"
).split()
"""Names of all settings that influence a sample or its verdict. All samples in a folder have the same values of these settings."""

OpenEngine = Callable[[argparse.Namespace, Servers | None, list[str]], AbstractContextManager[Engine | None]]
"""A function that opens the engine of an evaluation: (arguments, servers or None to load the weights, Megatron's flags) ->
engine."""


def main(argv: list[str] | None = None, open_engine: OpenEngine | None = None) -> int:
    """Runs the command. Returns the exit code: 0 success, 1 failure, 2 a wrong flag or input.

    Args:
        argv: the command line; None for that of the process, which then has a folder of its own for temporary files.
        open_engine: opens the engine; tests pass their own.
    """
    if argv is None:  # in a process of its own
        use_own_folder()
        argv = sys.argv[1:]
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        argv = ["run", *argv]
    return cli.run(_run_command, argv, open_engine or _open_engine)


def _run_command(argv: list[str], open_engine: OpenEngine) -> int:
    """Runs the command. If several ranks fail with the same error, one on each node prints it, as in a training run."""
    try:
        with naming_lines(argv):
            parser = build_parser()
            args, rest = parser.parse_known_args(argv)
            if rest:
                _refuse_unknown(args, rest)
            args.open_engine = open_engine
            args.command(args, rest)
    except (ValueError, RasftError, OSError) as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        # Imported here because it imports torch, which an evaluation of servers does not need
        from megatron_rasft.monitoring.failures import report_failure

        return report_failure(error)
    return 0


def _refuse_unknown(args: argparse.Namespace, rest: list[str]) -> None:
    """Refuses words that are neither flags of the command nor, for run, flags of the engine, which is not started for this."""
    if args.command is not run:
        args.parser.refuse_unknown(rest)
    engine, is_complete = run_parser()
    _, unknown = engine.parse_known_args(rest)
    if unknown and (is_complete or args.server):
        args.parser.refuse_unknown(unknown, engine.suggestible())


def run(args: argparse.Namespace, megatron_flags: list[str]) -> None:
    """Draw samples, grade them, and write tables."""
    config = EvaluationConfig.from_args(args)
    if args.server and megatron_flags:
        raise ValueError(f"{megatron_flags[0]} cannot be combined with --server: the servers hold the model.")
    _check_experts(megatron_flags)
    if args.model is None:
        args.model = _model_of_checkpoint(args.checkpoint)
    folder = None if config.data_folder is None else Path(config.data_folder)
    accepts_unknown = config.unknown_data == "accept"
    fields = DataConfig(**{name: getattr(args, name) for name in FIELDS})
    by_function = config.verify_function is not None
    benchmarks = [
        read_benchmark(known, path, accepts_unknown, fields, keep_fields=by_function)
        for known, path in chosen(config.benchmarks, folder, fields, by_function)
    ]
    resume = None
    if args.checkpoint is not None:
        resume = _choose_checkpoint(Path(args.checkpoint), megatron_flags)
        # The engine must load this checkpoint, even if the run saves another one first
        megatron_flags = [*megatron_flags, "--ckpt-step", str(resume.step)]
    output = OutputFolder(Path(args.output))
    with _open_servers(args, config) if args.server else nullcontext() as servers:
        drawn_by = _drawn_by(args, config, servers, resume)
        output.check(drawn_by, benchmarks)
        if by_function:
            for benchmark in benchmarks:
                try_function_on(benchmark, config)
        elif any(benchmark.kind == "code" for benchmark in benchmarks):
            # fails here if the machine does not allow the sandbox
            level = find_sandbox_level(verify_config(config))
            if os.environ.get("RANK", "0") == "0":
                print(f"programs run in a sandbox of level {level}")
        with args.open_engine(args, servers, megatron_flags) as engine:
            if engine is None:  # only rank 0 does the following
                return
            output.write_protocol(drawn_by, config, benchmarks)
            with live.shown(Console(highlight=False, soft_wrap=True), config.live_s):
                _sample_all(args, config, engine, benchmarks, output)
    print(output.markdown.read_text(encoding="utf-8"))


def _sample_all(
    args: argparse.Namespace,
    config: EvaluationConfig,
    engine: Engine,
    benchmarks: list[Benchmark],
    output: OutputFolder,
) -> None:
    """Evaluates the benchmarks. The tables are written after each."""
    tokenizer = open_tokenizer(args.model)
    prompt_config = DataConfig(
        data_prompt_suffix="",
        data_system_prompt=config.system_prompt,
        data_chat_template=config.chat_template,
    )
    chat_format = read_chat_format(tokenizer, prompt_config)
    stop_ids = end_ids(args.model, tokenizer) | {chat_format.end_id}
    params = SamplingParams(
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        repetition_penalty=1.0,
        stop_ids=frozenset(stop_ids),
        max_batch_size=config.batch_size,
    )
    num_rows = [len(benchmark.problems) for benchmark in benchmarks]
    orders = []
    for benchmark in benchmarks:
        if config.limit:
            benchmark.problems = benchmark.problems[: config.limit]
        write_question = ask(benchmark, config.prompt_suffix, config.code_prompt_suffix)
        questions = [write_question(problem) for problem in benchmark.problems]
        prompts = tokenize_prompts(questions, tokenizer, prompt_config)
        orders.append(
            Order(benchmark, prompts, output.samples_of(benchmark), partial(Grader, benchmark, config))
        )
    sampled = sample_benchmarks(
        orders,
        engine,
        num_samples=config.num_samples,
        seed=config.seed,
        params=params,
        decode=response_decoder(tokenizer, chat_format),
        say=partial(print, flush=True),
    )
    for benchmark, rollouts, num in zip(benchmarks, sampled, num_rows, strict=True):
        summary = summarise(benchmark, rollouts, config.num_samples, config.ks(), num)
        output.add_summary(args.label or Path(args.model).name, args.compare_with or args.model, summary)


def show(args: argparse.Namespace, _: list[str]) -> None:
    """Print stored samples, in the order in which they were drawn."""
    output = OutputFolder(Path(args.output))
    output.check_exists()
    stores = output.stores()
    if args.benchmark is not None:
        stores = [store for store in stores if store.stem == args.benchmark]
    if not stores:
        raise DataError(f"{args.output} holds no samples of {args.benchmark or 'any benchmark'}.")
    console, num_shown = Console(soft_wrap=True, highlight=False), 0
    for store in stores:
        for rollout in read_rollouts(store):
            if args.problem not in (None, rollout.problem_id) or args.verdict not in (None, rollout.verdict):
                continue
            if num_shown == args.limit:
                console.print(f"--limit {args.limit} reached", style="dim")
                return
            num_shown += 1
            style = "green" if rollout.verdict == "correct" else "red"
            console.print(
                f"{store.stem} {rollout.problem_id} sample {rollout.sample_index}: {rollout.verdict} "
                f"({rollout.verdict_reason}), {counted(len(rollout.response_ids), 'token')}, {rollout.finish_reason}",
                style=style,
                markup=False,
            )
            console.print(rollout.text + "\n", markup=False)
    if not num_shown:
        console.print("no sample matches", style="dim")


def table(args: argparse.Namespace, _: list[str]) -> None:
    """Print the results of one or more evaluations in one table."""
    results: dict[str, list[Summary]] = {}
    for output in args.output:
        label, summaries = OutputFolder(Path(output)).read_summaries()
        results[label if label not in results else f"{label} ({output})"] = summaries
    print(TABLE_WRITERS[args.format](results, args.compare_with or ""), end="")


def _model_of_checkpoint(checkpoint: str | None) -> str:
    """Returns the model folder of the run that wrote the checkpoints."""
    if checkpoint is None:
        raise ValueError("--model is missing. Give the Hugging Face folder of the model.")
    saved = SavedConfig.read(Path(checkpoint))
    if saved is None or saved.hf_model is None:
        raise ValueError(
            f"--model is missing, and {checkpoint}/{CONFIG_FILE} does not name a model. Give the Hugging Face folder of the "
            "model."
        )
    return saved.hf_model


def _choose_checkpoint(checkpoint: Path, megatron_flags: list[str]) -> Resume:
    """Chooses the checkpoint of --ckpt-step or the newest, so that the same checkpoint is fingerprinted and loaded."""
    if not has_checkpoint(checkpoint):
        raise CheckpointError(
            f"--checkpoint {checkpoint} holds no Megatron checkpoint: {TRACKER_FILE} does not exist. Give the --save folder of "
            "a run."
        )
    return Resume.at(checkpoint, _megatron_flag(megatron_flags, "--ckpt-step"))


def _megatron_flag(megatron_flags: list[str], flag: str) -> int | None:
    parser = argparse.ArgumentParser(prog="evaluate.py", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value", type=int)
    return parser.parse_known_args(megatron_flags)[0].value


def _check_experts(megatron_flags: list[str]) -> None:
    size = _megatron_flag(megatron_flags, "--expert-model-parallel-size")
    if size not in (None, 1):
        # Replicas share the experts: a replica with more steps would wait for replicas that have finished.
        raise ValueError(
            f"--expert-model-parallel-size must be 1 to evaluate, got {size}: replicas decode different numbers of steps. "
            "Divide the experts by --tensor-model-parallel-size, or use servers (--server)."
        )


def _drawn_by(
    args: argparse.Namespace, config: EvaluationConfig, servers: Servers | None, resume: Resume | None
) -> dict[str, Any]:
    """Returns the values of the settings in ``DRAWN_BY``."""
    if resume is not None:
        assert resume.checkpoint is not None, "a checkpoint was chosen"
        weights = f"step {resume.step}, {checkpoint_fingerprint(resume.checkpoint)}"
    elif servers is not None:
        weights = servers.weights
    else:
        weights = weights_fingerprint(Path(args.model), args.dtype)
    values = {**vars(args), **asdict(config), "weights": weights, "graded_by": graded_by(config)}
    return {name: values[name] for name in DRAWN_BY}


@contextmanager
def _open_engine(
    args: argparse.Namespace, servers: Servers | None, megatron_flags: list[str]
) -> Iterator[Engine | None]:
    """Yields the engine on rank 0. Yields None on the other ranks, after they have taken part in all of its sampling."""
    if servers is not None:
        yield servers
        return
    from megatron_rasft.machine import cpu_backend, gpu_kernels

    gpu_kernels.check_transformer_engine()
    # Before Megatron is imported: on a machine without a GPU, its imports call CUDA
    cpu_backend.enable()
    import torch

    from megatron_rasft.tools.evaluation.embedded_engine import EmbeddedEngine

    flags = ["--hf-model", str(args.model), *megatron_flags]
    if args.dtype == "bf16" or (args.dtype == "auto" and torch.cuda.is_available()):
        flags.append("--bf16")
    engine = EmbeddedEngine(flags, args.checkpoint)
    try:
        if not engine.is_rank_zero:
            engine.follow()
            yield None
            return
        yield engine
        engine.close()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _open_servers(args: argparse.Namespace, config: EvaluationConfig) -> Servers:
    folder = HfFolder.open(args.model)
    api_key = read_key("--api-key-env", args.api_key_env)
    positions = folder.family.longest(folder.family.text_config(folder.config))
    return Servers(args.server, folder.config, positions, api_key, config.deadline_s)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="run|show|table", parser_class=FlagParser)
    _add_run(commands)
    _add_show(commands)
    _add_table(commands)
    return parser


def _add_run(commands: Any) -> None:
    command = commands.add_parser("run", help=run.__doc__, description=run.__doc__)
    command.set_defaults(command=run, parser=command)
    command.add_argument(
        CONFIG_FLAG,
        nargs="+",
        metavar="FILE.toml",
        help="Files of flags: NAME = VALUE. Later files win, and the command line over all of them.",
    )
    command.add_argument("--model", metavar="DIR", help="Hugging Face folder of the model.")
    command.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="Folder of a run's Megatron checkpoints. Evaluates the newest checkpoint, or the step of --ckpt-step.",
    )
    command.add_argument(
        "--server",
        nargs="+",
        metavar="URL",
        help="Sample from these SGLang servers instead of loading weights.",
    )
    command.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="Name of the environment variable with the API key of the servers.",
    )
    command.add_argument("--output", metavar="DIR", required=True, help="Folder for samples and tables.")
    command.add_argument(
        "--label", help="Name of the row in the tables. Default: the name of the model folder."
    )
    command.add_argument(
        "--compare-with",
        metavar="MODEL",
        help="Model whose published results the tables add. Default: the model with the name of the folder.",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="Type of the weights, without --server. auto: bf16 on a GPU, fp32 on a CPU.",
    )
    add_flags(command.add_argument_group("evaluation", EvaluationConfig.__doc__), EvaluationConfig)
    data = command.add_argument_group("data", "Fields of the rows of your own benchmarks, as in training.")
    add_flags(data, DataConfig, only=FIELDS)


def _add_show(commands: Any) -> None:
    command = commands.add_parser("show", help=show.__doc__, description=show.__doc__)
    command.set_defaults(command=show, parser=command)
    command.add_argument("output", help="--output of an evaluation.")
    command.add_argument("--benchmark", help="Only samples of this benchmark.")
    command.add_argument("--problem", metavar="ID", help="Only samples of this problem.")
    command.add_argument(
        "--verdict", choices=("correct", "wrong", "unverifiable", "timeout"), help="Only with this verdict."
    )
    command.add_argument(
        "--limit", type=int, default=20, metavar="N", help="Show at most this many samples (default: 20)."
    )


def _add_table(commands: Any) -> None:
    command = commands.add_parser("table", help=table.__doc__, description=table.__doc__)
    command.set_defaults(command=table, parser=command)
    command.add_argument("output", nargs="+", help="--output of the evaluations.")
    command.add_argument(
        "--format",
        choices=tuple(TABLE_WRITERS),
        default="markdown",
        help="Format of the table. Default: markdown.",
    )
    command.add_argument(
        "--compare-with", metavar="MODEL", help="Model whose published results the table adds."
    )


if __name__ == "__main__":
    sys.exit(main())
