"""The rows of a data set that are not trained on, and the counts of all rows."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rasft.config.data import DataConfig
from megatron_rasft.errors import DataError
from megatron_rasft.flags import flag_name
from megatron_rasft.wording import counted

_NUM_NAMED = 10
"""Maximum number of rows of one kind that a message lists. It only counts the rest and names a complete list."""


@dataclass(kw_only=True, slots=True)
class RowFault:
    """One row that cannot be used, with the reason."""

    source: str
    """Place of the row: ``file:line``."""
    reason: str
    """Short text that is the same for all rows with this fault. The report counts rows by it."""
    detail: str = ""
    """Details that apply to this row only."""

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(kw_only=True, slots=True)
class DataReport:
    """Counts of all rows that were read, and the rows that are not trained on."""

    num_rows: int = 0
    num_demonstrations: int = 0
    num_prompt_tokens: int = 0
    num_response_tokens: int = 0
    max_tokens_found: int = 0
    """Tokens of the longest sequence, including sequences that are too long to train on."""
    num_plain_endings: int = 0
    """Rows whose response the chat template would change. Their response is tokenized unchanged, and the end token is
    appended without the template."""
    num_continued: int = 0
    """Rows whose response begins with the tag that opens its reasoning, in a prompt that ends with this tag. They are trained
    without the tag."""
    faults: list[RowFault] = field(default_factory=list)
    overlong: list[RowFault] = field(default_factory=list)
    """Rows with more tokens than --seq-length. They do not count as faults."""
    complete_list: str = "tools/prepare_data.py validate"
    """File or command that lists every row that is not trained on, for messages."""

    @property
    def num_faults_by_reason(self) -> dict[str, int]:
        """Reason -> number of rows with this fault, the most frequent first."""
        return dict(Counter(fault.reason for fault in self.faults).most_common())

    def check(self, config: DataConfig) -> None:
        """Raises DataError if ``config`` refuses rows of the report, or if no rows are left to train on."""
        if self.faults and config.data_bad_rows == "refuse":
            raise DataError(
                f"cannot use {len(self.faults)} of {counted(self.num_rows, 'row')}:\n{self._named(self.faults)}\n"
                f"Correct them, or leave them out with --data-bad-rows skip.{self.advice(config)}"
            )
        if self.overlong and config.data_overlong == "refuse":
            raise DataError(
                f"too long: {len(self.overlong)} of {counted(self.num_rows, 'row')}:\n{self._named(self.overlong)}\n"
                "Raise --seq-length, or leave them out with --data-overlong drop."
            )
        if not self.num_demonstrations:
            raise DataError(
                f"nothing to train on in {counted(self.num_rows, 'row')}: {len(self.faults)} faulty, "
                f"{len(self.overlong)} too long:\n{self._named(self.faults + self.overlong)}\n"
                "Check --data-problem-field, --data-response-field, --data-answer-field, --data-tests-field and --seq-length."
            )

    def advice(self, config: DataConfig) -> str:
        """Returns a line break and the flag for a field that no row has under its name. Empty if rows can be used."""
        names = {name: value for name, value in vars(config).items() if name.endswith("_field")}
        lacking = [name for name, value in names.items() if f'no "{value}"' in self.num_faults_by_reason]
        if self.num_demonstrations or not lacking:
            return ""
        flags = " ".join(f"{flag_name(name)} NAME" for name in lacking)
        return f"\nIf the rows have it under another name, give {flags}."

    def write_left_out(self, path: Path) -> None:
        """Writes the rows that are not trained on to ``path``, one per line. Later messages refer to this file."""
        left_out = self.faults + self.overlong
        if left_out:
            path.write_text("".join(f"{row}\n" for row in left_out), encoding="utf-8")
            self.complete_list = str(path)
        else:
            path.unlink(missing_ok=True)

    def _named(self, rows: list[RowFault], num_named: int | None = _NUM_NAMED) -> str:
        lines = [f"  {row}" for row in rows[:num_named]]
        if len(lines) < len(rows):
            lines.append(f"  ... and {len(rows) - len(lines)} more: {self.complete_list} lists all")
        return "\n".join(lines)

    def describe(self, num_named: int | None = _NUM_NAMED) -> str:
        """Returns the report as text, without a final line break.

        Args:
            num_named: maximum number of rows of one kind to list; None lists all.
        """
        lines = [f"rows            {self.num_rows}"]
        if self.num_demonstrations:
            lines.append(f"usable          {self.num_demonstrations}")
        if self.max_tokens_found:
            lines.append(f"prompt tokens   {self.num_prompt_tokens}")
            lines.append(f"response tokens {self.num_response_tokens} (trained)")
            lines.append(f"longest row     {counted(self.max_tokens_found, 'token')}")
        if self.num_plain_endings:
            lines.append(
                f"kept as they are {self.num_plain_endings} (the chat template would change their response)"
            )
        if self.num_continued:
            lines.append(
                f"continued       {self.num_continued} (the prompt already opens their reasoning, so its first tag is left out)"
            )
        lines.append(f"too long        {len(self.overlong)}")
        if self.overlong:
            lines.append(self._named(self.overlong, num_named))
        lines.append(f"faulty          {len(self.faults)}")
        lines.extend(f"  {num} x {reason}" for reason, num in self.num_faults_by_reason.items())
        if self.faults:
            lines.append(self._named(self.faults, num_named))
        return "\n".join(lines)
