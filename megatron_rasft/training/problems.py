"""The problems of a run: rank 0 reads and tokenizes them, and all ranks know their number."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_rasft.config import DataConfig, RasftConfig, VerifyConfig
from megatron_rasft.data.chat_format import read_chat_format
from megatron_rasft.data.response_text import response_decoder
from megatron_rasft.data.row_cache import tokenized
from megatron_rasft.data.tokenized_rows import ByProblem, TokenizedRows
from megatron_rasft.data.tokenizer import end_ids, open_tokenizer
from megatron_rasft.files import written_to
from megatron_rasft.ranks import kept_by_rank_zero, on_rank_zero
from megatron_rasft.rollout.replay import ReplayEngine
from megatron_rasft.training.arguments import has_own_warmup
from megatron_rasft.training.outputs import data_cache
from megatron_rasft.types import Demonstration
from megatron_rasft.verify.function_trial import try_function
from megatron_rasft.verify.programs.program_grading import find_sandbox_level


class Problems:
    """Tokenized demonstrations and their tokenizer, both on rank 0 only. The constructor is a collective of the world.

    Args:
        config: names the files and sets how rows are read.
        needs_answers: whether a row without a gold answer, and without tests, is an error.
        flag: the flag of the files, for messages.
        keep_fields: whether --verify-function grades the rows; they then need no answers.
        teacher_template: the template of the teacher's prompts; None for an objective without a teacher.
    """

    def __init__(
        self,
        args: Any,
        config: DataConfig,
        needs_answers: bool,
        flag: str = "--train-data",
        keep_fields: bool = False,
        teacher_template: str | None = None,
    ) -> None:
        self.flag = flag
        self.rows: TokenizedRows | None = None
        self.tokenizer: Any = None
        self._decode: Callable[[Sequence[int]], str]
        self.summary = ""
        """Console lines about the rows that were read and those that were left out; rank 0 only."""

        def read() -> int:
            self.tokenizer = open_tokenizer(args.hf_model)
            cache = data_cache(args, config.data_cache)
            self.rows = tokenized(
                config,
                self.tokenizer,
                Path(args.hf_model),
                args.seq_length,
                needs_answers,
                flag,
                cache,
                keep_fields,
                teacher_template,
            )
            self._decode = response_decoder(self.tokenizer, read_chat_format(self.tokenizer, config))
            report = self.rows.report
            if args.save is not None:
                path = Path(args.save, f"{flag.removeprefix('--')}-left-out.txt")
                with written_to(path, "--save"):
                    report.write_left_out(path)
            report.check(config)
            self.summary = report.describe()
            return len(self.rows)

        self.num = on_rank_zero(read)

    @property
    def demonstrations(self) -> Sequence[Demonstration]:
        """The demonstrations, each built when it is read from the list; [] on ranks other than 0."""
        return [] if self.rows is None else self.rows

    def left_out_lines(self) -> list[str]:
        """Console lines about rows that are left out; [] if there are none, and on ranks other than 0."""
        if self.rows is None or not (self.rows.report.faults or self.rows.report.overlong):
            return []
        return [f"of {self.flag}:", *self.summary.splitlines()]

    @property
    def num_programs(self) -> int:
        """Number of problems whose responses are programs; 0 on ranks other than 0."""
        return 0 if self.rows is None else self.rows.num_programs

    def decode(self, ids: list[int]) -> str:
        """The text of a response, as the verifier reads it. Rank 0 only."""
        return self._decode(ids)

    def stop_ids(self, args: Any) -> frozenset[int]:
        """Token ids that end a response: the model's own, and those that demonstrations end with. A collective of the world."""

        def collect() -> list[int]:
            assert self.rows is not None, "rank 0 has the rows"
            return sorted(self.rows.end_ids | end_ids(args.hf_model, self.tokenizer))

        return frozenset(on_rank_zero(collect))


def read_problems(args: Any, config: RasftConfig) -> tuple[Problems, Problems | None]:
    """Reads the problems of --train-data, and those of --heldout-data, if given; a collective of the world."""
    by_function = config.verifies and config.verify.verify_function is not None
    teacher = config.objective.teacher()
    problems = Problems(
        args,
        config.data,
        config.grades_rollouts,
        keep_fields=by_function,
        teacher_template=None if teacher is None else teacher.template,
    )
    heldout = None
    if config.heldout.heldout_data:
        files = replace(config.data, train_data=config.heldout.heldout_data)
        heldout = Problems(args, files, True, "--heldout-data", keep_fields=by_function)
    if by_function:
        on_rank_zero(lambda: _try_function(config.verify, problems))
    elif config.verifies:
        on_rank_zero(lambda: _try_sandbox(config.verify, problems, heldout))
    return problems, heldout


def open_replay(config: RasftConfig, problems: Problems) -> ReplayEngine | None:
    """Opens the stores of --rollout-engine replay on rank 0; None on other ranks or engines. A collective."""
    if config.rollout.rollout_engine != "replay" or not config.samples_rollouts:
        return None

    def find() -> ReplayEngine:
        prompts = ByProblem(problems.demonstrations, lambda d: d.prompt_ids)
        replay = ReplayEngine(config.rollout.rollout_replay, prompts)
        problems.summary += f"\nreplayed        {replay.num_problems} (have stored rollouts)"
        return replay

    return kept_by_rank_zero(find, None)


def _try_function(config: VerifyConfig, problems: Problems) -> None:
    """Grades the first demonstration, so that a faulty --verify-function fails here, not at the first refresh."""
    first = problems.demonstrations[0]
    assert first.fields is not None, "rows are kept for --verify-function"
    trial = try_function(config, first.fields, first.response, first.source)
    problems.summary += f"\nverify function  {config.verify_function}, first demonstration: {trial}"


def _try_sandbox(config: VerifyConfig, problems: Problems, heldout: Problems | None) -> None:
    """Starts the sandbox once if there are programs to run: a machine without it fails here, not at the first refresh."""
    num_programs = problems.num_programs + (0 if heldout is None else heldout.num_programs)
    if num_programs:
        level = find_sandbox_level(config)
        problems.summary += f"\nwith tests      {num_programs} (run in a sandbox of level {level})"


def set_length(args: Any, config: RasftConfig, num_problems: int) -> None:
    """Sets --train-iters from --data-epochs if no length was given, and shortens the default warm-up to fit a short run.

    Raises:
        ValueError: --train-samples is less than one step, or the warm-up is as long as the decay.
    """
    batch = args.global_batch_size
    if args.train_samples is not None and args.train_samples < batch:
        raise ValueError(
            f"--train-samples {args.train_samples} is less than one step of --global-batch-size {batch}. Give more, or omit "
            "the flag to train on every problem once."
        )
    if args.train_iters is None and args.train_samples is None:
        args.train_iters = config.data.data_epochs * -(-num_problems // batch)
    unit = "iters" if args.train_samples is None else "samples"
    decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    warmup = getattr(args, f"lr_warmup_{unit}")
    if not warmup or warmup < decay:
        return
    if has_own_warmup(args):
        raise ValueError(
            f"--lr-warmup-{unit} {warmup} must be less than the {decay} over which the learning rate decays. Lower it, or "
            "give --lr-warmup-fraction."
        )
    setattr(args, f"lr_warmup_{unit}", max(0, decay - 1) // 2)
