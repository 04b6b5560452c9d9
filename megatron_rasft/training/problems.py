"""The problems of a run, read and tokenized on one rank and counted on all."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rasft.config import DataConfig, RasftConfig, VerifyConfig
from megatron_rasft.data.reading import read_rows
from megatron_rasft.data.tokenizing import collect_demonstrations, end_ids, open_tokenizer
from megatron_rasft.errors import written_to
from megatron_rasft.training.ranks import on_rank_zero
from megatron_rasft.types import Demonstration
from megatron_rasft.verify.sandbox import Sandbox


class Problems:
    """Demonstrations and the tokenizer that made them; both on rank 0 only.

    Args:
        config: the data's flags, naming the files.
        needs_answers: whether a row without gold answer is a fault.
        flag: that named the files, for messages.
    """

    def __init__(
        self, args: Any, config: DataConfig, needs_answers: bool, flag: str = "--train-data"
    ) -> None:
        self.demonstrations: list[Demonstration] = []
        self.tokenizer: Any = None
        self.summary = ""

        def read() -> int:
            self.tokenizer = open_tokenizer(args.hf_model)
            self.demonstrations, report = collect_demonstrations(
                read_rows(config, needs_answers, flag), self.tokenizer, config, args.seq_length, needs_answers
            )
            if args.save is not None:
                path = Path(args.save, f"{flag.removeprefix('--')}-left-out.txt")
                with written_to(path, "--save"):
                    report.write_left_out(path)
            report.check(config)
            self.summary = report.describe()
            return len(self.demonstrations)

        self.num = on_rank_zero(read)

    def decode(self, ids: list[int]) -> str:
        """Text of a response, special tokens left out; rank 0 only."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stop_ids(self, args: Any) -> frozenset[int]:
        """Ids that end a response: the model's own, and what the demonstrations end with."""

        def collect() -> list[int]:
            ends = {d.response_ids[-1] for d in self.demonstrations}
            return sorted(ends | end_ids(args.hf_model, self.tokenizer))

        return frozenset(on_rank_zero(collect))


def read_problems(args: Any, config: RasftConfig) -> tuple[Problems, Problems | None]:
    """The problems to train on, and the held-out ones if there are any."""
    problems = Problems(args, config.data, config.samples_rollouts)
    heldout = None
    if config.heldout.heldout_data:
        files = replace(config.data, train_data=config.heldout.heldout_data)
        heldout = Problems(args, files, True, "--heldout-data")
    if config.verifies:
        on_rank_zero(lambda: _try_sandbox(config.verify, problems, heldout))
    return problems, heldout


def _try_sandbox(config: VerifyConfig, problems: Problems, heldout: Problems | None) -> None:
    """Refuse now, not at the first refresh, to run programs with less protection than was asked for."""
    demonstrations = problems.demonstrations + (heldout.demonstrations if heldout is not None else [])
    num_programs = sum(d.tests is not None for d in demonstrations)
    if num_programs:
        with Sandbox(config) as sandbox:
            problems.summary += (
                f"\nwith tests      {num_programs} (run in a sandbox of level {sandbox.level})"
            )


def set_length(args: Any, config: RasftConfig, num_problems: int) -> int:
    """Set --train-iters from the epochs where it was not given; the number of steps."""
    per_epoch = -(-num_problems // args.global_batch_size)
    if args.train_iters is None:
        args.train_iters = config.data.data_epochs * per_epoch
    warmup = args.lr_warmup_iters
    if warmup and warmup >= args.train_iters:
        args.lr_warmup_iters = max(0, args.train_iters - 1) // 2
    return args.train_iters
