"""Evaluate a model on mathematical and code benchmarks, by the published protocol unless told otherwise.

evaluate.py run --model DIR --data-folder DIR --output DIR [--benchmarks NAME[=FILE] ...] [any Megatron flag]
evaluate.py run --checkpoint DIR ...          the newest Megatron checkpoint of a run
evaluate.py run --server URL... --model DIR    running SGLang servers; DIR gives the tokenizer
evaluate.py show OUTPUT [--benchmark NAME] [--problem ID] [--verdict wrong] [--limit N]
evaluate.py table OUTPUT [OUTPUT ...] [--format markdown|csv|latex]

Killed, the same command goes on where it stopped. torchrun spreads the work over processes and GPUs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

from megatron_rasft.config.data import DataConfig
from megatron_rasft.config.parser import add_flags
from megatron_rasft.config.saved import CONFIG_FILE, SavedConfig
from megatron_rasft.data.tokenizing import end_ids, open_tokenizer, read_chat_format, tokenize_prompts
from megatron_rasft.errors import CheckpointError, DataError, FailedElsewhere, RasftError
from megatron_rasft.files import write_json
from megatron_rasft.rollout.store import read_rollouts
from megatron_rasft.servers.keys import read_key
from megatron_rasft.tools.evaluation import comparison_tables
from megatron_rasft.tools.evaluation.benchmark_grading import Grader, verify_config
from megatron_rasft.tools.evaluation.benchmark_sampling import Engine, sample_benchmark
from megatron_rasft.tools.evaluation.benchmarks import KNOWN_SETS, Benchmark, ask, chosen, read_benchmark
from megatron_rasft.tools.evaluation.config import EvaluationConfig
from megatron_rasft.tools.evaluation.server_engine import Servers
from megatron_rasft.tools.evaluation.summary import Summary, summarise
from megatron_rasft.types import SamplingParams
from megatron_rasft.verify.programs.program_grading import find_sandbox_level
from megatron_rasft.weights.folder import HfFolder, checkpoint_fingerprint, weights_fingerprint
from megatron_rasft.weights.tracker import TRACKER_FILE

WRITERS: dict[str, Callable[[comparison_tables.Results, str], str]] = {
    "markdown": comparison_tables.markdown,
    "csv": comparison_tables.comma_separated,
    "latex": comparison_tables.latex,
}
FILES = {"markdown": "results.md", "csv": "results.csv", "latex": "results.tex"}
DRAWN_BY = (
    "model checkpoint weights dtype temperature top_p max_new_tokens seed prompt_suffix system_prompt chat_template"
).split()
"""What decides about a sample: a store holds samples of one setting of these."""


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 the world failed, 2 wrong arguments."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _build_parser()
    if argv and argv[0].startswith("--") and argv[0] != "--help":
        argv = ["run", *argv]
    args, rest = parser.parse_known_args(argv)
    if rest and args.command is not run:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        args.command(args, rest)
    except (ValueError, RasftError, OSError, FailedElsewhere) as error:
        # It imports torch, which --server does without.
        from megatron_rasft.training.failures import report_failure

        return report_failure(error)
    return 0


def run(args: argparse.Namespace, megatron_flags: list[str]) -> None:
    """Sample, grade, and write tables."""
    config = EvaluationConfig.from_args(args)
    if args.server and megatron_flags:
        raise ValueError(f"{megatron_flags[0]} has no meaning with --server: the servers hold the model.")
    _check_experts(megatron_flags)
    if args.model is None and args.checkpoint is not None:
        args.model = _model_of_checkpoint(Path(args.checkpoint))
    if args.model is None:
        raise ValueError("--model DIR is missing: the model's Hugging Face folder.")
    folder = None if config.data_folder is None else Path(config.data_folder)
    benchmarks = []
    for known, path in chosen(config.benchmarks, folder):
        benchmarks.append(read_benchmark(known, path, config.unknown_data == "accept"))
    output = Path(args.output)
    iteration = None
    if args.checkpoint is not None:
        iteration = _chosen_iteration(Path(args.checkpoint), megatron_flags)
        if iteration.isdecimal():  # else Sampler says what is wrong
            megatron_flags = [*megatron_flags, "--ckpt-step", iteration]
    with _open_servers(args, config) if args.server else nullcontext() as servers:
        drawn_by = _drawn_by(args, config, servers, iteration)
        _check_protocol(output, drawn_by, benchmarks)
        if any(benchmark.kind == "code" for benchmark in benchmarks):
            level = find_sandbox_level(verify_config(config))  # fails now if the machine does not allow it
            if os.environ.get("RANK", "0") == "0":
                print(f"programs run in a sandbox of level {level}")
        with _open_engine(args, servers, megatron_flags) as engine:
            if engine is None:  # another rank speaks
                return
            _write_protocol(output, drawn_by, config, benchmarks)
            _sample_all(args, config, engine, benchmarks)
    print((output / FILES["markdown"]).read_text(encoding="utf-8"))


def _sample_all(
    args: argparse.Namespace, config: EvaluationConfig, engine: Engine, benchmarks: list[Benchmark]
) -> None:
    """Every benchmark in turn, its table written when it is done."""
    output = Path(args.output)
    tokenizer = open_tokenizer(args.model)
    prompt_config = DataConfig(
        data_prompt_suffix="",
        data_system_prompt=config.system_prompt,
        data_chat_template=config.chat_template,
    )
    stop_ids = end_ids(args.model, tokenizer) | {read_chat_format(tokenizer, prompt_config).end_id}
    params = SamplingParams(
        num_samples=config.num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        repetition_penalty=1.0,
        stop_ids=frozenset(stop_ids),
        max_batch_size=config.batch_size,
    )
    for benchmark in benchmarks:
        num_rows = len(benchmark.problems)
        if config.limit:
            benchmark.problems = benchmark.problems[: config.limit]
        put = ask(benchmark, config.prompt_suffix)
        with Grader(benchmark, config) as grade:
            rollouts = sample_benchmark(
                benchmark,
                tokenize_prompts([put(p) for p in benchmark.problems], tokenizer, prompt_config),
                engine,
                grade,
                _store(output, benchmark),
                num_samples=config.num_samples,
                seed=config.seed,
                params=params,
                decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
                on_progress=_Progress(benchmark.title),
            )
        summary = summarise(benchmark, rollouts, config.num_samples, config.ks(), num_rows)
        _write_results(output, args.label or Path(args.model).name, args.compare_with or args.model, summary)


def show(args: argparse.Namespace, _: list[str]) -> None:
    """Print stored samples, in the order they were drawn."""
    from rich.console import Console

    stores = sorted((Path(args.output) / "samples").glob("*.jsonl"))
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
                f"({rollout.verdict_reason}), {len(rollout.response_ids)} tokens, {rollout.finish_reason}",
                style=style,
                markup=False,
            )
            console.print(rollout.text + "\n", markup=False)
    if not num_shown:
        console.print("no sample matches", style="dim")


def table(args: argparse.Namespace, _: list[str]) -> None:
    """Print results of one or more evaluations side by side."""
    results: dict[str, list[Summary]] = {}
    for output in args.output:
        label, summaries = read_summaries(Path(output))
        results[label if label not in results else f"{label} ({output})"] = summaries
    print(WRITERS[args.format](results, args.compare_with or ""), end="")


def read_summaries(output: Path) -> tuple[str, list[Summary]]:
    """Label and summaries of a finished evaluation.

    Raises:
        DataError: the folder holds none.
    """
    path = output / "summary.json"
    if not path.is_file():
        raise DataError(
            f"{output} holds no results: {path.name} is not there. Run the evaluation to its end."
        )
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["label"], [Summary.from_dict(values) for values in content["benchmarks"]]


def _model_of_checkpoint(checkpoint: Path) -> str | None:
    """--hf-model of the run that wrote the checkpoints, by its config.json."""
    saved = SavedConfig.read(checkpoint)
    if saved is None:
        raise ValueError(
            f"--model DIR is missing, and {checkpoint} has no {CONFIG_FILE} that would name the model."
        )
    return saved.hf_model


def _chosen_iteration(checkpoint: Path, megatron_flags: list[str]) -> str:
    """--ckpt-step or else the newest, so that what is fingerprinted is what is loaded while a run saves on."""
    path = checkpoint / TRACKER_FILE
    if not path.is_file():
        raise CheckpointError(
            f"--checkpoint {checkpoint} holds no Megatron checkpoint: {path.name} is not there. Give the folder that was "
            "--save."
        )
    return _megatron_flag(megatron_flags, "--ckpt-step") or path.read_text().strip()


def _megatron_flag(megatron_flags: list[str], flag: str) -> str | None:
    parser = argparse.ArgumentParser(prog="evaluate.py", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    return parser.parse_known_args(megatron_flags)[0].value


def _check_experts(megatron_flags: list[str]) -> None:
    size = _megatron_flag(megatron_flags, "--expert-model-parallel-size")
    if size not in (None, "1"):
        raise ValueError(
            f"--expert-model-parallel-size must be 1 to evaluate, got {size}: replicas decode different numbers of steps. Cut "
            "the experts by --tensor-model-parallel-size, or ask servers (--server)."
        )


def _drawn_by(
    args: argparse.Namespace, config: EvaluationConfig, servers: Servers | None, iteration: str | None
) -> dict[str, Any]:
    if iteration is not None:
        folder = Path(args.checkpoint) / f"iter_{iteration:0>7}"
        weights = f"step {iteration}, {checkpoint_fingerprint(folder)}"
    elif servers is not None:
        weights = servers.weights
    else:
        weights = weights_fingerprint(Path(args.model), args.dtype)
    values = {**vars(args), **asdict(config), "weights": weights}
    return {name: values[name] for name in DRAWN_BY}


def _check_protocol(output: Path, drawn_by: dict[str, Any], benchmarks: list[Benchmark]) -> None:
    """Refuse a folder whose samples were drawn in another way or from other files, before a model is loaded."""
    path = output / "protocol.json"
    if not path.is_file():
        return
    protocol = json.loads(path.read_text(encoding="utf-8"))
    stored = protocol["drawn_by"]
    for name, value in drawn_by.items():
        if stored.get(name) != value:
            raise ValueError(
                f"--output {output} holds samples drawn with {name} {stored.get(name)!r}, not {value!r}. Give another "
                "folder, or the flags of then."
            )
    for benchmark in benchmarks:
        file, samples = protocol["files"].get(benchmark.name), _store(output, benchmark)
        if file is not None and file["sha256"] != benchmark.sha256 and samples.exists():
            raise ValueError(
                f"{samples} was drawn from {file['path']} with sha256 {file['sha256'][:12]}..., but {benchmark.path} has "
                f"{benchmark.sha256[:12]}.... Give another --output or the file of then, or delete the samples."
            )


def _store(output: Path, benchmark: Benchmark) -> Path:
    return output / "samples" / f"{benchmark.name}.jsonl"


def _write_protocol(
    output: Path, drawn_by: dict[str, Any], config: EvaluationConfig, benchmarks: list[Benchmark]
) -> None:
    """Say how the samples are drawn; the files of benchmarks that were sampled earlier stay named."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "protocol.json"
    files = json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else {}
    for b in benchmarks:
        files[b.name] = {"path": str(b.path), "sha256": b.sha256, "verified": b.is_verified}
    content = {"drawn_by": drawn_by, "config": asdict(config), "files": files}
    write_json(path, content)


def _write_results(output: Path, label: str, compared_with: str, summary: Summary) -> None:
    """Add one benchmark to summary.json and write the tables anew."""
    path = output / "summary.json"
    earlier = read_summaries(output)[1] if path.is_file() else []
    order = {name: place for place, name in enumerate(KNOWN_SETS)}
    summaries = sorted(
        [s for s in earlier if s.name != summary.name] + [summary],
        key=lambda s: (order.get(s.name, len(order)), s.name),
    )
    content = {"label": label, "benchmarks": [s.as_dict() for s in summaries]}
    write_json(path, content)
    for name, write in WRITERS.items():
        (output / FILES[name]).write_text(write({label: summaries}, compared_with), encoding="utf-8")


@contextmanager
def _open_engine(
    args: argparse.Namespace, servers: Servers | None, megatron_flags: list[str]
) -> Iterator[Engine | None]:
    """The engine, on the process that asks it; None on the others, after they have followed to the end."""
    if servers is not None:
        yield servers
        return
    from megatron_rasft.training import cpu_backend, gpu_kernels

    gpu_kernels.check_transformer_engine()
    cpu_backend.enable()
    import torch

    from megatron_rasft.tools.evaluation.trainer_engine import Sampler

    flags = ["--hf-model", str(args.model), *megatron_flags]
    if args.dtype == "bf16" or (args.dtype == "auto" and torch.cuda.is_available()):
        flags.append("--bf16")
    sampler = Sampler(flags, args.checkpoint)
    try:
        if not sampler.is_lead:
            sampler.follow()
            yield None
            return
        yield sampler
        sampler.close()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _open_servers(args: argparse.Namespace, config: EvaluationConfig) -> Servers:
    folder = HfFolder.open(args.model)
    api_key = read_key("--api-key-env", args.api_key_env)
    positions = folder.config.get("max_position_embeddings") or folder.family.default_max_position_embeddings
    return Servers(args.server, folder.config, positions, api_key, config.deadline_s)


class _Progress:
    """A line every ten seconds at most, with what is left at this speed."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = self._last = time.monotonic()
        self._at_start: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._at_start is None:
            self._at_start = done
            print(f"{self._title}: {done} of {total} samples are there", flush=True)
        elif done == total or now - self._last >= 10:
            self._last = now
            per_s = (done - self._at_start) / max(now - self._began, 1e-9)
            left = f", {(total - done) / per_s:.0f} s left" if done < total and per_s else ""
            print(f"{self._title}: {done} of {total} samples, {per_s:.2f} samples/s{left}", flush=True)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="run|show|table")
    command = commands.add_parser("run", help=run.__doc__, description=run.__doc__, allow_abbrev=False)
    command.set_defaults(command=run)
    command.add_argument("--model", metavar="DIR", help="Hugging Face folder of the model.")
    command.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="Take the newest Megatron checkpoint in this --save, or that of --ckpt-step.",
    )
    command.add_argument(
        "--server", nargs="+", metavar="URL", help="Ask these SGLang servers instead of loading weights."
    )
    command.add_argument("--api-key-env", metavar="NAME", help="Environment variable with the servers' key.")
    command.add_argument("--output", metavar="DIR", required=True, help="Where samples and tables go.")
    command.add_argument("--label", help="Name of the row in the tables. Default: the model folder's name.")
    command.add_argument(
        "--compare-with",
        metavar="MODEL",
        help="Published model to put beside. Default: by the folder's name.",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="Of the embedded engine. auto: bf16 on a GPU, fp32 on a CPU.",
    )
    add_flags(command.add_argument_group("evaluation", EvaluationConfig.__doc__), EvaluationConfig)

    command = commands.add_parser("show", help=show.__doc__, description=show.__doc__)
    command.set_defaults(command=show)
    command.add_argument("output", help="--output of a run.")
    command.add_argument("--benchmark", help="Only samples of this set.")
    command.add_argument("--problem", metavar="ID", help="Only samples of this problem.")
    command.add_argument(
        "--verdict", choices=("correct", "wrong", "unverifiable", "timeout"), help="Only with this verdict."
    )
    command.add_argument("--limit", type=int, default=20, metavar="N", help="At most so many (default: 20).")

    command = commands.add_parser("table", help=table.__doc__, description=table.__doc__)
    command.set_defaults(command=table)
    command.add_argument("output", nargs="+", help="--output of runs.")
    command.add_argument("--format", choices=tuple(WRITERS), default="markdown", help="Default: markdown.")
    command.add_argument("--compare-with", metavar="MODEL", help="Published model to put beside.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
