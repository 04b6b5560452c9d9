"""Knobs of ``megatron_rasft/data``: which demonstrations are read and how they become tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

TRAIN_DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(kw_only=True)
class DataConfig:
    """Demonstrations on disk."""

    train_data: list[str] = field(default_factory=list)
    """Files of demonstrations, read in this order: .jsonl, .jsonl.gz or .parquet, one row per problem."""

    data_problem_field: str = "problem"
    """Field of a row that holds the problem text."""

    data_response_field: str = "response"
    """Field of a row that holds the expert's response."""

    data_answer_field: str = "answer"
    """Field of a row that holds the gold answer the verifier compares with: text or a number."""

    data_tests_field: str = "tests"
    """Field of a row that holds the tests a program in the response must pass: a script, or a list of statements.
    Fields beside it may be entry_point (the function that is tested), test_setup_code (run before the tests) and
    test_style (asserts, check or pytest; unset, it is told from the tests). A row needs tests or an answer."""

    data_messages_field: str = "messages"
    """Field that holds a chat, [{"role", "content"}, ...], read where a row lacks a problem or a response
    field. Its last message is the assistant's response, those before it are the prompt."""

    data_id_field: str = "id"
    """Field that holds a row's id, unique in the run. Rows without one are called <file name>:<line>."""

    data_chat_template: str | None = None
    """Jinja file of the chat template. Unset: the model's own; without one, plain text and a line break."""

    data_prompt_suffix: str = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    """Appended to the problem (in a chat: to the last user message). "" appends nothing."""

    data_code_prompt_suffix: str = "\nWrite the solution in Python."
    """Appended instead of ``data_prompt_suffix`` to the problem of a row with tests; after it stands the name of
    the function that is tested, if the row gives it and the problem does not. "" appends neither."""

    data_system_prompt: str | None = None
    """System message put before each prompt that has none of its own. Unset: the chat template's default."""

    data_overlong: Literal["drop", "refuse"] = "drop"
    """What happens to a row whose prompt and response exceed the sequence length: drop counts it and trains
    without it, refuse stops the run. A row is never cut."""

    data_bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens if rows cannot be used (bad JSON, no answer, duplicate id, ...): refuse names them and
    stops the run, skip counts them by reason and trains without them. Every row left out is named in a file in --save."""

    data_cache: str | None = None
    """Folder that keeps tokenized rows, found again by the content of the data, the tokenizer and the flags: a restart
    reads them instead of tokenizing for minutes. Several runs may share it. It takes about twice the size of the data.
    Unset: data_cache in --save. "" keeps none."""

    data_seed: int = 1234
    """Seed of the order in which problems are visited, >= 0."""

    data_epochs: int = 1
    """How often each problem is trained on, >= 1."""

    def __post_init__(self) -> None:
        for path in self.train_data:
            if not path.endswith(TRAIN_DATA_SUFFIXES):
                raise ValueError(
                    f"--train-data must be {', '.join(TRAIN_DATA_SUFFIXES)} files, got {path!r}: convert it, "
                    "or rename it if only the ending is wrong."
                )
        repeated = sorted({path for path in self.train_data if self.train_data.count(path) > 1})
        if repeated:
            raise ValueError(
                f"--train-data must name each file once, got {repeated[0]!r} "
                f"{self.train_data.count(repeated[0])} times. Use --data-epochs to train on it more often."
            )
        fields = {
            "--data-problem-field": self.data_problem_field,
            "--data-response-field": self.data_response_field,
            "--data-answer-field": self.data_answer_field,
            "--data-tests-field": self.data_tests_field,
            "--data-messages-field": self.data_messages_field,
            "--data-id-field": self.data_id_field,
        }
        for flag, name in fields.items():
            if not name:
                raise ValueError(f"{flag} must not be empty: name the field as it stands in the rows.")
        if self.data_response_field in (self.data_problem_field, self.data_answer_field):
            raise ValueError(
                f"--data-response-field must differ from the problem and the answer field, got "
                f"{self.data_response_field!r} for two of them. Name the field with the worked solution."
            )
        if self.data_chat_template is not None and not Path(self.data_chat_template).is_file():
            raise ValueError(
                f"--data-chat-template must be a file, {self.data_chat_template!r} is none. Write the "
                "template to a file, or leave the flag out to use the model's own."
            )
        if self.data_overlong not in ("drop", "refuse"):
            raise ValueError(
                f"--data-overlong must be drop or refuse, got {self.data_overlong!r}. Choose one of them."
            )
        if self.data_bad_rows not in ("refuse", "skip"):
            raise ValueError(
                f"--data-bad-rows must be refuse or skip, got {self.data_bad_rows!r}. Choose one of them."
            )
        if self.data_seed < 0:
            raise ValueError(f"--data-seed must be >= 0, got {self.data_seed}. Use any other whole number.")
        if self.data_epochs < 1:
            raise ValueError(
                f"--data-epochs must be >= 1, got {self.data_epochs}. To stop earlier use Megatron's "
                "--train-iters."
            )
