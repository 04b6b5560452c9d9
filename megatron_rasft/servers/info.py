"""What a rollout server reports about itself, and the weight labels that a trainer gives it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ASLEEP = "asleep"


@dataclass(kw_only=True, frozen=True, slots=True)
class ServerInfo:
    """A server's answers to /server_info and /model_info, and the endpoints that it has."""

    url: str
    version: str
    """SGLang's version, for messages. Features are probed, never guessed from the version."""
    model_path: str
    """Path on the server's machine. After an update from disk it is the folder of that update."""
    model_config: dict[str, Any] | None
    """config.json of ``model_path``, which also shows whether the weights are FP8; None if this machine cannot read it."""
    architectures: tuple[str, ...]
    dtype: str
    """The server's --dtype; ``auto`` means the type in config.json."""
    quantization: str | None
    """The server's --quantization; also None if the model's own config decides."""
    tp_size: int
    dp_size: int
    pp_size: int
    weight_version: int | None
    """Number of optimizer steps of the weights; None if no trainer set the label."""
    weight_label: str
    """The label of the weights; ``default`` after the server's start."""
    max_total_tokens: int | None
    """Capacity of the KV cache in tokens: the limit of prompt plus response."""
    context_length: int | None
    max_running_requests: int | None
    is_deterministic: bool
    """Whether --enable-deterministic-inference was given. Other servers ignore a request's sampling_seed."""
    has_update_session: bool
    """From SGLang 0.5.21 on, weight updates must run between begin_weight_update and end_weight_update."""
    has_weights_checker: bool
    has_memory_saver: bool
    """Whether --enable-memory-saver was given, so that the trainer can make the server release and resume GPU memory."""
    random_seed: int | None
    """The server's --random-seed, drawn at random when it starts without the flag."""


def version_label(weight_version: int) -> str:
    """Returns the label of the weights after this many optimizer steps."""
    return str(weight_version)


def weight_version_of(label: str | None) -> int | None:
    """Returns the number of optimizer steps in a label; None if no trainer set the label, as with ``default``."""
    return int(label) if label is not None and label.isascii() and label.isdigit() else None


def sleep_label(released: Sequence[str]) -> str:
    """Returns the label of a server that has released this memory (``weights``, ``kv_cache``).

    A run that is killed leaves its servers asleep. The next run reads in the label which memory to resume.
    """
    return " ".join([_ASLEEP, *released]) if released else "awake"


def released_memory(label: str) -> list[str] | None:
    """Returns the memory that a server with this label has released; None if the server is awake.

    A sleeping server must not get any other request.
    """
    first, *released = label.split() or [""]
    return released if first == _ASLEEP else None
