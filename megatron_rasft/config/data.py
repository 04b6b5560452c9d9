"""Flags of ``megatron_rasft/data``: which demonstrations are read and how they become tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_rasft.files import similar_file
from megatron_rasft.flags import FlagSection, NonNegativeInt, PositiveInt, flag_name

TRAIN_DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(kw_only=True)
class DataConfig(FlagSection):
    """Demonstrations on disk."""

    train_data: list[str] = field(default_factory=list)
    """Demonstrations, read in this order: .jsonl, .jsonl.gz or .parquet files, or folders to which Hugging Face data sets were
    saved (save_to_disk). One row per problem."""

    data_problem_field: str = "problem"
    """Field of a row that holds the problem text."""

    data_response_field: str = "response"
    """Field of a row that holds the demonstration: the worked solution."""

    data_answer_field: str = "answer"
    """Field of a row that holds the gold answer, text or a number; the verifier compares answers with it."""

    data_tests_field: str = "tests"
    """Field of a row that holds the tests that a program in the response must pass: a script, or a list of statements. Optional
    fields of the same row are entry_point (the function that is tested), test_setup_code (run before the tests) and test_style
    (asserts, check or pytest; unset, the tests decide). A row needs tests or an answer, unless --verify-function grades it."""

    data_messages_field: str = "messages"
    """Field of a row that holds a chat, [{"role", "content"}, ...] or [{"from", "value"}, ...]. It is read if the row lacks a problem
    or a response field. The last message is the response of the assistant, the messages before it are the prompt. A row without
    this field may have its chat in "conversations"."""

    data_id_field: str = "id"
    """Field of a row that holds its id, unique in the run. The id of a row without this field is <file name>:<line>."""

    data_chat_template: str | None = None
    """Jinja file of the chat template. Unset: the template of the model; if it has none, plain text and a line break."""

    data_prompt_suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    """Appended to the problem (in a chat: to the last user message). "" appends nothing."""

    data_code_prompt_suffix: str = "\nWrite the solution in Python."
    """Appended instead of --data-prompt-suffix to the problem of a row with tests. The name of the tested function follows, if the
    row has it and the problem does not mention it. "" appends neither."""

    data_system_prompt: str | None = None
    """System message for prompts without a system message. Unset: the default of the chat template."""

    data_overlong: Literal["drop", "refuse"] = "drop"
    """Treatment of a row whose prompt and response exceed the sequence length. drop: count it and train without it; refuse: stop
    the run. A row is never truncated."""

    data_bad_rows: Literal["refuse", "skip"] = "refuse"
    """Treatment of rows that cannot be used (bad JSON, no answer, duplicate id, ...). refuse: name them and stop the run; skip:
    count them by reason and train without them. A file in --save names every row that was left out."""

    data_cache: str | None = None
    """Folder for the tokenized rows, so that a restart does not tokenize again. They are identified by the content of the data, the
    tokenizer and the flags; several runs may share a folder. It takes about twice the size of the data. Unset: data_cache in
    --save. "" turns the cache off."""

    data_seed: NonNegativeInt = 1234
    """Seed for the order of the problems."""

    data_epochs: PositiveInt = 1
    """Number of times that each problem is trained on. To stop earlier use Megatron's --train-iters."""

    def check(self) -> None:
        check_data_files(self, "train_data", "To train on it more often use --data-epochs.")
        for name, value in vars(self).items():
            if name.endswith("_field") and not value:
                raise self.refusal(name, "must not be empty. Give the name of the field in the rows.")
        if self.data_response_field in (self.data_problem_field, self.data_answer_field):
            raise self.refusal(
                "data_response_field",
                "is also the problem or the answer field. Give the name of the field with the worked solution. If one field holds "
                "solution and answer, separate them: tools/prepare_data.py convert --answers-from-responses.",
            )
        if self.data_chat_template is not None and not Path(self.data_chat_template).is_file():
            raise self.refusal(
                "data_chat_template",
                "is not a file. Write the template to a file, or leave the flag out to use the template of the model.",
            )


def check_data_files(section: FlagSection, name: str, advice: str) -> None:
    """Checks the endings of data files, and that no file is given twice.

    Raises:
        ValueError: a file is refused; the message about a repeated file ends with ``advice``.
    """
    paths: list[str] = getattr(section, name)
    for path in paths:
        if not path.endswith(TRAIN_DATA_SUFFIXES) and not Path(path).is_dir():
            if not Path(path).exists() and (similar := similar_file(Path(path))):
                raise ValueError(f"{flag_name(name)}: {path} does not exist. Did you mean {similar}?")
            raise ValueError(
                f"{flag_name(name)} must be {', '.join(TRAIN_DATA_SUFFIXES)} files, or folders of saved data sets, got {path!r}. "
                "Convert it, or rename it if only the ending is wrong."
            )
        if paths.count(path) > 1:
            raise ValueError(
                f"{flag_name(name)} must name each file once, got {path!r} {paths.count(path)} times. {advice}"
            )
