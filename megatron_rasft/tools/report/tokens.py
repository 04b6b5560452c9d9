"""Tokens of the examples' rollouts, with the weight of each token in the loss.

RASFT weights a token by ratio × weight × p. The rollout store has the weight A of each rollout and the probability p of each token. The
ratio of reference and policy needs the reference's log-probabilities, which ``ratios.py`` gets.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_rasft.errors import ModelFolderError, RasftError, first_line
from megatron_rasft.tools.report.archive import packed
from megatron_rasft.tools.report.records import RunRecords
from megatron_rasft.tools.report.rollouts import Example, Sample
from megatron_rasft.tools.report.texts import printable

MAX_TOKENS = 2000
"""Maximum number of tokens shown of a rollout."""
_INCOMPLETE = "�"
"""End of a decoded text whose last character has further bytes in the next token."""

Decode = Callable[[Sequence[int]], str]


class Token(NamedTuple):
    """One token, or several that share a character."""

    text: str
    p: float
    """Probability at which the (last) token was sampled."""
    weight: float
    """The product that the colour shows: the weight of the token in the loss, if all factors are known."""


@dataclass
class TokenView:
    """The tokens of a run's examples."""

    formula: str = "weight × p"
    """The product that the colours show."""
    notes: list[str] = field(default_factory=list)
    """Inputs that are missing, and what the colours show without them."""
    tokens: dict[int, list[Token]] = field(default_factory=dict)
    """id() of a sample -> its tokens."""
    largest: float = 0.0
    """Largest magnitude of a token's weight, which has the full colour."""

    def packed(self, sample: Sample) -> str | None:
        """Returns the tokens of a sample as compressed JSON in base64; None if they are unknown."""
        if id(sample) not in self.tokens:
            return None
        rows = [
            [printable(token.text), round(token.p, 4), float(f"{token.weight:.3g}")]
            for token in self.tokens[id(sample)]
        ]
        return packed(json.dumps(rows))


def read_tokens(
    records: RunRecords, examples: Sequence[Example], tokenizer: Path | None, reference: Path | None
) -> TokenView:
    """Splits the examples' rollouts into tokens and calculates the weights of the tokens.

    Args:
        records: the run's settings, which name its model folder and its objective.
        examples: the examples of the page.
        tokenizer: a folder with the model's tokenizer.json; None for the run's --hf-model.
        reference: a folder of the reference model, for ratios that the run did not store; None for stored ones only.

    Raises:
        ValueError: ``tokenizer`` or ``reference`` was given and cannot be used.
    """
    from megatron_rasft.tools.report.ratios import read_ratios

    samples = [sample for example in examples for sample in example.samples if sample.logprobs]
    folder = tokenizer or records.model_folder
    try:
        decode = open_decoder(folder)
    except RasftError as error:
        if tokenizer is not None:
            raise ValueError(f"--tokenizer {tokenizer}: {error}") from error
        return TokenView(
            notes=[f"Tokens are not coloured: {error} Name a folder with tokenizer.json with --tokenizer."]
        )
    ratios = read_ratios(records, samples, reference)
    view = TokenView(ratios.formula, ratios.notes + _notes_on_temperature(records))
    for sample in samples:
        factors = [sample.weight * ratio for ratio in ratios.of(sample)]
        view.tokens[id(sample)] = tokens = list(tokens_of(sample, factors, decode))
        view.largest = max([view.largest, *(abs(token.weight) for token in tokens)])
    return view


def _notes_on_temperature(records: RunRecords) -> list[str]:
    temperature = records.setting("rollout", "rollout_temperature")
    if temperature in (None, 1.0):
        return []
    return [f"p is the probability at the sampling temperature {temperature}. The loss uses temperature 1."]


def tokens_of(sample: Sample, factors: Sequence[float], decode: Decode) -> Iterator[Token]:
    """Yields the tokens of a rollout. Tokens that share a character are one.

    Args:
        sample: the rollout.
        factors: [tokens] what p is multiplied with.
        decode: writes token ids as text.
    """
    # The text of a token depends on the tokens before it, e.g. whether it begins with a space.
    ids = list(sample.response_ids[:MAX_TOKENS])
    start = begin = 0
    for place, (logprob, factor) in enumerate(zip(sample.logprobs, factors)):
        if place >= len(ids):
            return
        before, with_it = decode(ids[start:begin]), decode(ids[start : place + 1])
        is_last = place == len(ids) - 1
        if is_last or (len(with_it) > len(before) and not with_it.endswith(_INCOMPLETE)):
            p = math.exp(min(0.0, logprob))
            yield Token(with_it[len(before) :], p, factor * p)
            start, begin = begin, place + 1


def open_decoder(folder: Path | None) -> Decode:
    """Returns the decoder of a model folder, special tokens included.

    Raises:
        ModelFolderError: the folder is unknown, or has no tokenizer.json that can be read.
    """
    if folder is None:
        raise ModelFolderError("the run's model folder is unknown.")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelFolderError(f"{path} is not a file.")
    from tokenizers import Tokenizer  # without transformers, whose import takes seconds

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself for broken files
        raise ModelFolderError(f"{path} is not a tokenizer: {first_line(error)}.") from error

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=False))

    return decode
