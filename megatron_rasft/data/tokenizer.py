"""Opens the tokenizer of a model folder, and checks that it gives text back unchanged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_rasft.data.chats import Message
from megatron_rasft.errors import ModelFolderError, first_line
from megatron_rasft.files import read_json_object

_SAMPLE = "Add the numbers, the sum\n\n is \\boxed{5}.\n\ndef f(x):\n    return x + 1  # (two)"
"""Text with words, punctuation, and every kind of white space that responses have."""


class Tokenizer(Protocol):
    """The methods of a transformers tokenizer that this package uses."""

    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> dict[int, Any]: ...
    @property
    def chat_template(self) -> Any: ...
    def __call__(self, text: list[str], **kwargs: Any) -> Any: ...
    def apply_chat_template(self, conversation: list[Message], **kwargs: Any) -> Any: ...
    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> Any: ...


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """Loads the tokenizer of a local model folder.

    Raises:
        ModelFolderError: transformers cannot load a tokenizer from it, or the tokenizer changes text.
    """
    from transformers import AutoTokenizer  # imported here because it takes seconds

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many different exceptions for broken files
        raise ModelFolderError(
            f"model folder {folder} has no tokenizer that transformers can load ({first_line(error)}). "
            "Copy tokenizer.json and tokenizer_config.json into it."
        ) from error
    check_round_trip(tokenizer, folder)
    return tokenizer


def check_round_trip(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Refuses a tokenizer whose decoded tokens differ from the text, as some tokenizers lose their spaces in some releases.

    A small vocabulary need not have every character of the sample. Characters that it cannot write are left out.

    Raises:
        ModelFolderError: names the folder, a text and what the tokenizer makes of it, and the release of transformers.
    """
    symbols = sorted(set(_SAMPLE) - set(" \n"))
    known = {symbol for symbol, text in zip(symbols, _round_trips(tokenizer, symbols)) if symbol in text}
    sample = "".join(symbol for symbol in _SAMPLE if symbol in known or symbol in " \n")
    # some tokenizers put a space before every text
    (ids,) = tokenize(tokenizer, [sample], add_special_tokens=False)
    if not known or getattr(tokenizer, "unk_token_id", None) in ids:
        return  # a small vocabulary of words, which has the letters but not the words of the sample
    (made,) = _round_trips(tokenizer, [sample])
    if made.strip() == sample.strip():
        return
    import transformers

    raise ModelFolderError(
        f"model folder {folder}: the tokenizer changes text: {sample[:24]!r} becomes {made[:24]!r} (transformers "
        f"{transformers.__version__}, class {type(tokenizer).__name__}). Install transformers 5.22 or later. If that is not the reason, "
        "tokenizer.json does not fit the class: copy it and tokenizer_config.json from the original model once more."
    )


def _round_trips(tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    return [
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in tokenize(tokenizer, texts, add_special_tokens=False)
    ]


def tokenize(tokenizer: Tokenizer, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
    """Returns the token ids of each text."""
    encoded = tokenizer(
        texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return [list(ids) for ids in encoded["input_ids"]]


def end_ids(folder: str | Path, tokenizer: Tokenizer) -> set[int]:
    """The token ids that end a response according to the model's generation_config.json and its tokenizer.

    Raises:
        ModelFolderError: generation_config.json cannot be read, or its eos_token_id is neither an id nor a list of ids.
    """
    path = Path(folder) / "generation_config.json"
    try:
        eos = read_json_object(path).get("eos_token_id") if path.exists() else None
    except ModelFolderError as error:
        raise ModelFolderError(f"model folder {folder}: {error}") from error
    values = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(value) is not int or value < 0 for value in values):
        raise ModelFolderError(
            f"{path}: eos_token_id must be a token id or a list of token ids, found {eos!r}. Correct or delete the key."
        )
    return {value for value in (*values, tokenizer.eos_token_id) if value is not None}
